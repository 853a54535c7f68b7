# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
Convert the supported forms of spectra, scalars and requests to arrays, for the tokenizer.

Errors name the field that was read.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .gate_spectrafm import (
    MAX_WAVELENGTH,
    MIN_WAVELENGTH,
    SPEED_OF_LIGHT,
    air_to_vacuum,
    overlaps,
    per_wavelength,
    to_rest,
)
from .objects_spectrafm import (
    GatedRow,
    are_rows,
    are_spectra,
    are_tables,
    as_columns,
    first_of,
    pixel_columns,
    read_spectra,
    rows_of_tables,
)


# Larger numbers are treated as infinite: the model computes in float32.
HUGE = 1e30


# ------------------------------------------------------------------------------------------------------------- settings


def distinct_names(field: str, names) -> list[str]:
    """Settings: different names, as JSON can hold them."""
    listed = np.iterable(names) and not isinstance(names, str)
    if not (listed and all(isinstance(name, str) for name in names) and len(set(names)) == len(names)):
        raise ValueError(f"{field}: expected a list of different names, got {names!r}")
    return [str(name) for name in names]


def plain_numbers(field: str, values):
    """Settings: a finite number or a list of such, as JSON can hold them."""
    if values is None:
        return None
    array = numbers(field, values)
    if not np.all(np.isfinite(array)):
        raise ValueError(f"{field}: expected finite numbers, got {array[~np.isfinite(array)][0]}")
    return array.tolist()


def number_table(field: str, values):
    """Settings: a finite number or an array, which stays an array because long lists are slow."""
    found = plain_numbers(field, values)
    return np.array(found) if isinstance(found, list) else found


def whole_number(field: str, value, lowest: int) -> int:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < lowest:
        raise ValueError(f"{field}: expected a whole number of at least {lowest}, got {value!r}")
    return int(value)


def random_generator(generator) -> np.random.Generator:
    if isinstance(generator, np.random.Generator):
        return generator
    if not isinstance(generator, int | np.integer) or generator < 0:
        raise ValueError(f"generator: expected a numpy.random.Generator or a seed, got {generator!r}")
    return np.random.default_rng(generator)


# ------------------------------------------------------------------------------------------------ labels and requests


def label_columns(field: str, names, rows: Mapping[str, Any]):
    """A list of names -> these columns; values are not changed."""
    if names is None or isinstance(names, Mapping):
        return names
    names = distinct_names(field, names)
    if missing := [name for name in names if name not in rows]:
        raise ValueError(f"{field}: expected names out of the columns {list(rows)}, got {missing}")
    return {name: rows[name] for name in names}


def as_mapping(field: str, values) -> Mapping[str, Any]:
    if values is not None and not isinstance(values, Mapping):
        raise ValueError(f"{field}: expected a mapping of names to numbers, got {type(values).__name__}")
    return values or {}


def request_rows(requests, n_stars: int) -> list[list]:
    """One list of requests for all stars, or one for each."""
    if isinstance(requests, str | Mapping) or not np.iterable(requests):
        raise ValueError(f"requests: expected a list of names or wavelengths, got {requests!r}")
    rows = list(requests)
    if not any(is_sequence(row) for row in rows):
        rows = [rows]
    elif not all(is_sequence(row) for row in rows):
        raise ValueError("requests: expected names and wavelengths, or a list of them for each star, got both")
    elif len(rows) != n_stars:
        raise ValueError(f"requests: expected one list for each of {n_stars} stars, got {len(rows)}")
    for star, row in enumerate(rows):
        if len(row) == 0:
            raise ValueError(f"requests: expected at least one, got none for star {star}")
    return [list(row) for row in rows]


class Columns(NamedTuple):
    """The arguments of a call of the tokenizer, as columns of all stars."""

    pixels: tuple[Any, Any, Any, Any]  # wavelength, flux, flux_error, mask
    units: tuple[str, float, str]  # kind of errors, Angstrom per unit of wavelength, medium
    scalars: Any
    labels: Any
    label_errors: Any
    resolving_power: Any
    normalised: Any


def columns_of_call(call: Columns, shift: bool, scalar_names: Sequence[str] = ()) -> Columns:
    """
    Tables, rows and spectra of other libraries become columns; names of columns become their values. The scalars of
    `scalar_names`, and their errors, are taken from rows that have them.

    `shift` moves spectra of specutils to the rest frame by their own velocity.
    """
    (wavelength, flux, flux_error, mask), (error_type, unit, medium), scalars, labels, label_errors, *others = call
    resolving_power, normalised = others
    if flux is None and are_tables(wavelength):
        wavelength = rows_of_tables(wavelength, scalar_names)
    if isinstance(wavelength, GatedRow) or isinstance(first_of(wavelength), GatedRow):
        error_type, unit, medium = "sigma", 1.0, "vacuum"
    if are_rows(wavelength) or are_spectra(wavelength):
        for field, value in (("flux", flux), ("flux_error", flux_error), ("mask", mask)):
            if value is not None:
                raise ValueError(f"{field}: expected None with rows or spectra, got {type(value).__name__}")
    if are_rows(wavelength):
        rows = as_columns(wavelength)
        wavelength, flux, flux_error, mask = pixel_columns(rows)
        resolving_power = rows.get("resolving_power") if resolving_power is None else resolving_power
        normalised = rows.get("normalised") if normalised is None else normalised
        if labels is not None and not isinstance(labels, Mapping) and label_errors is None:
            names = distinct_names("labels", labels)
            label_errors = {name: rows[f"{name}_err"] for name in names if f"{name}_err" in rows}
        if scalar_names and not isinstance(scalars, Mapping):
            wanted = scalar_names if scalars is None else distinct_names("scalars", scalars)
            errors = [f"{name}_err" for name in wanted if f"{name}_err" in rows]
            scalars = [*(name for name in wanted if scalars is not None or name in rows), *errors]
        scalars, labels = label_columns("scalars", scalars, rows), label_columns("labels", labels, rows)
    elif are_spectra(wavelength):
        wavelength, flux, flux_error, mask = read_spectra(wavelength, call.units[2], shift)
        error_type = "sigma"
    scalars, labels = as_mapping("scalars", scalars), as_mapping("labels", labels)
    label_errors = as_mapping("label_errors", label_errors)
    if alone := label_errors.keys() - labels.keys():
        raise ValueError(f"label_errors: expected names out of the labels {list(labels)}, got {sorted(alone)}")
    pixels, units = (wavelength, flux, flux_error, mask), (error_type, unit, medium)
    return Columns(pixels, units, scalars, labels, label_errors, resolving_power, normalised)


def no_pixels(scalars: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Stars without a spectrum, as many as there are scalars."""
    if not scalars:
        raise ValueError("wavelength: expected a spectrum, rows or scalars, got None")
    n_stars = max(numbers(f"scalars[{name!r}]", values).size for name, values in scalars.items())
    columns = [per_star(f"scalars[{name!r}]", values, n_stars) for name, values in scalars.items()]
    known = np.any(np.abs(columns) < HUGE, axis=0)
    if not (known.all() and n_stars):
        raise ValueError(f"scalars: expected a known value for each star without a spectrum, got {dict(scalars)}")
    empty = np.zeros((n_stars, 0))
    return {name: empty.copy() for name in ("wavelength", "flux", "flux_error")} | {"valid": empty > 0}


# --------------------------------------------------------------------------------------------------------------- arrays


def is_sequence(value) -> bool:
    """Something with elements: a list, a tuple, an array or tensor of at least one dimension."""
    return isinstance(value, list | tuple) or getattr(value, "ndim", 0) > 0


def unit_of(values):
    """Unit of a quantity, or of the first one of a list; "" where there is none."""
    unit = getattr(first_of(values) if isinstance(values, list | tuple) else values, "unit", None)
    return "" if unit is None else unit


def numbers(field: str, values, unit: Any = "", factor: float = 1.0) -> np.ndarray:
    """
    Numbers of any kind in `unit` (plain ones times `factor`) -> float64, NaN where masked; bool for a mask. Flux in
    single precision is not converted, which saves half the time. The result may be the input: do not write to it.
    """
    if isinstance(values, Sequence) and not isinstance(values, str | bytes):
        values = list(values)
    if isinstance(values, list) and unit_of(values):
        return np.array([numbers(field, value, unit, factor) for value in values])
    hidden = values.mask if isinstance(values, np.ndarray) and hasattr(values, "mask") else False
    if unit_of(values):
        try:
            if not hasattr(values, "to_value"):
                values = values.quantity  # the column of a table
            values = values.to_value(unit)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{field}: expected {unit or 'numbers without a unit'}, got {values.unit}") from error
        factor = 1.0
    if hasattr(values, "detach"):
        values = values.detach().cpu()
    try:
        array = np.asarray(values)
        if isinstance(values, list) and array.dtype == object:
            # Missing numbers in data sets are None.
            array = np.asarray([np.nan if value is None else value for value in values])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{field}: expected an array of numbers, got {type(values).__name__} ({error})") from error
    kinds = "biu" if field == "mask" else "fiu"
    if array.dtype.kind not in kinds:
        expected = "True and False" if field == "mask" else "real numbers"
        found = " ".join(np.array2string(array, threshold=4).split())
        raise ValueError(f"{field}: expected {expected}, got {array.dtype} {found[:200]}")
    if field == "mask":
        return array.astype(bool) | hidden
    with np.errstate(over="ignore"):
        single = field in ("flux", "flux_error") and array.dtype.kind == "f" and array.dtype.itemsize == 4
        array = array.astype(np.float32 if single else np.float64, copy=False)
        array = array if factor == 1.0 else array * factor
    return np.where(hidden, np.nan, array) if np.any(hidden) else array


def number(field: str, value, unit: Any = "", factor: float = 1.0) -> float:
    array = numbers(field, value, unit, factor)
    if array.ndim:
        raise ValueError(f"{field}: expected a number, got shape {array.shape}")
    return float(array)


def per_star(field: str, values, n_stars: int, unit: Any = "") -> np.ndarray:
    """One number for each star, (stars,); None is NaN."""
    array = numbers(field, np.nan if values is None else values, unit)
    if array.ndim > 1 or array.size not in (1, n_stars):
        raise ValueError(f"{field}: expected one number or one for each of {n_stars} stars, got shape {array.shape}")
    return np.broadcast_to(array, n_stars)


def optional_per_star(field: str, values, n_stars: int) -> np.ndarray:
    """One number or truth for each star, (stars,), float64; None is NaN."""
    if isinstance(values, list | tuple):
        values = [np.nan if value is None else value for value in values]
    if isinstance(values, bool | np.bool_ | list | tuple | np.ndarray):
        values = np.asarray(values)
        values = values.astype(float) if values.dtype == bool else values
    return per_star(field, values, n_stars)


def padded(field: str, values, unit: Any = "", factor: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """One spectrum or many, of equal or different length -> (stars, pixels), padded, and the lengths (stars,)."""
    # Many spectra come as a list, a column of a data set, or an array of arrays.
    holds_objects = is_sequence(values) and getattr(values, "dtype", None) == np.dtype(object)
    if (isinstance(values, Sequence) or holds_objects) and any(is_sequence(row) for row in values):
        first = values[0]
        if (
            type(first) is np.ndarray
            and first.dtype != object
            and first.ndim == 1
            and all(type(row) is np.ndarray and row.shape == first.shape and row.dtype == first.dtype for row in values)
        ):
            return padded(field, np.stack(values), unit, factor)  # faster than one by one
        rows = [numbers(field, row, unit, factor) for row in values]
        shapes = {row.shape for row in rows}
        if any(len(shape) != 1 for shape in shapes):
            raise ValueError(f"{field}: expected a list of one-dimensional spectra, got shapes {sorted(shapes)}")
        lengths = np.array([row.size for row in rows])
        if len(shapes) == 1:
            array = np.stack(rows)
        else:
            array = np.zeros((len(rows), lengths.max()), dtype=rows[0].dtype)
            for row, target in zip(rows, array, strict=True):
                target[: row.size] = row
    else:
        array = numbers(field, values, unit, factor)
        if array.ndim not in (1, 2):
            raise ValueError(f"{field}: expected one or two dimensions, (stars, pixels), got shape {array.shape}")
        array = np.atleast_2d(array)
        lengths = np.full(len(array), array.shape[1])
    if array.size == 0 or lengths.min() == 0:
        raise ValueError(f"{field}: expected at least one pixel in each spectrum, got shape {array.shape}")
    return array, lengths


def extent(numbers: np.ndarray) -> str:
    low, high = numbers.min(), numbers.max()
    return f"{low}" if low == high else f"{low} to {high}"


def one_row_if_equal(array: np.ndarray) -> np.ndarray:
    """(stars, n) -> (1, n) where all rows are the same."""
    return array[:1] if len(array) > 1 and np.all(array == array[0]) else array


def first_if_equal(rows: list) -> Any:
    """The first of plain arrays that are all the same, which is faster than to stack them; otherwise all."""
    first = rows[0]
    plain = type(first) is np.ndarray and first.ndim == 1 and first.dtype.kind in "fiu"
    if not plain or any(type(row) is not np.ndarray or row.dtype != first.dtype for row in rows):
        return rows
    content = first.tobytes()
    return first if all(row is first or row.tobytes() == content for row in rows) else rows


def read_errors(error: np.ndarray, valid: np.ndarray, error_type: str) -> tuple[np.ndarray, np.ndarray]:
    """
    Sigma or inverse variance -> sigma (0 = unknown), and `valid` without pixels that have bad errors; it is arbitrary
    at invalid pixels.
    """
    if not np.min(error) >= 0 and np.any(valid & (error < 0)):
        raise ValueError(f"flux_error: expected positive numbers, got {np.where(valid, error, 0.0).min():g}")
    if error_type == "ivar":
        with np.errstate(divide="ignore", invalid="ignore"):
            error = 1.0 / np.sqrt(error)
    known = valid & (error > 0) & (error < HUGE)
    if np.all(some := known.any(axis=1, keepdims=True)):
        return error, known
    none_known = valid & ~some
    if np.any(wrong := np.any(none_known & ~np.isnan(error), axis=1)):
        raise ValueError(
            f"flux_error: expected positive numbers, got only zeros or infinities in spectrum {np.argmax(wrong)}"
        )
    return np.where(known, error, 0.0), known | none_known


def check_range(field: str, wavelength: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Which wavelengths (Angstrom) are within the limits; raises if a valid one is not."""
    in_range = (wavelength >= MIN_WAVELENGTH) & (wavelength <= MAX_WAVELENGTH)
    wrong = np.asarray(counts & ~in_range)
    if wrong.any():
        value = np.broadcast_to(wavelength, wrong.shape)[wrong][0]
        raise ValueError(
            f"{field}: expected {MIN_WAVELENGTH:g} to {MAX_WAVELENGTH:g} Angstrom, got {value:g}"
            + (" (are these nanometres or microns? set wavelength_unit)" if value < MIN_WAVELENGTH else "")
        )
    return in_range


def read_pixels(columns: tuple, units: tuple[str, float, str], radial_velocity: Any = None) -> dict[str, np.ndarray]:
    """
    Spectra in any form -> padded arrays of shape (stars, pixels), sorted by wavelength.

    Parameters
    ----------
    columns : tuple
        wavelength, flux, flux_error, mask.
    units : tuple
        Kind of errors ("sigma" or "ivar"), Angstrom per unit of wavelength, and medium ("vacuum" or "air").
    radial_velocity : float, quantity or array of shape (stars,), optional
        km/s.

    Returns
    -------
    dict
        `flux`, `flux_error` (0 = unknown) and `valid`; where not valid, flux and error are 0. `wavelength` has one row
        if all stars share it. Padding has an infinite wavelength.
    """
    (wavelength, flux, flux_error, mask), (error_type, unit, medium) = columns, units
    for field, value in (("wavelength", wavelength), ("flux", flux)):
        if value is None:
            raise ValueError(
                f"{field}: expected an array for a spectrum, got None; a spectrum is "
                "(wavelength, flux), a row or table with both, or a path"
            )
    flux_unit = unit_of(flux)
    flux, lengths = padded("flux", flux, flux_unit)

    def like_flux(field, values, unit="", factor=1.0):
        """The same shape as flux, or one row for all."""
        array, own_lengths = padded(field, values, unit, factor)
        if len(array) not in (1, len(flux)) or np.any(own_lengths != lengths):
            expected, actual = (f"{len(n)} spectra of {extent(n)} pixels" for n in (lengths, own_lengths))
            raise ValueError(f"{field}: expected the lengths of flux, {expected}, got {actual}")
        return array

    if len(flux) > 1 and isinstance(wavelength, list) and len(wavelength) == len(flux):
        wavelength = first_if_equal(wavelength)
    wavelength = like_flux("wavelength", wavelength, "Angstrom", unit)
    wavelength = one_row_if_equal(wavelength)
    present = np.arange(flux.shape[1]) < one_row_if_equal(lengths[:, None])
    valid = present & (np.abs(flux) < HUGE)
    if mask is not None:
        valid &= ~like_flux("mask", mask)
    error = np.zeros_like(flux)
    if flux_error is not None:
        error_unit = flux_unit if error_type == "sigma" or not flux_unit else flux_unit**-2
        error, valid = read_errors(like_flux("flux_error", flux_error, error_unit), valid, error_type)
    if not np.all(good := valid.any(axis=1)):
        raise ValueError(
            f"flux: expected at least one valid pixel in each spectrum, got none in spectrum {np.argmin(good)}"
        )

    if (factor := per_wavelength(flux_unit, wavelength)) is not None:
        with np.errstate(over="ignore", invalid="ignore"):
            flux, error = flux * factor, error * factor
        valid &= np.abs(flux) < HUGE
    if medium == "air":
        wavelength = air_to_vacuum(wavelength)
    in_range = check_range("wavelength", wavelength, valid)
    if radial_velocity is not None:
        beta = per_star("radial_velocity", radial_velocity, len(flux), "km/s")[:, None] / SPEED_OF_LIGHT
        if np.any(wrong := ~(np.abs(beta) < 1)):
            value = beta[wrong][0] * SPEED_OF_LIGHT
            raise ValueError(f"radial_velocity: expected km/s below the speed of light, got {value:g}")
        wavelength = to_rest(wavelength, one_row_if_equal(beta * SPEED_OF_LIGHT))
    counted = present if len(present) >= len(wavelength) else np.broadcast_to(present, wavelength.shape)
    left_out = np.stack([overlaps(row) for row in np.where(counted[: len(wavelength)], wavelength, np.nan)])
    if left_out.any():
        present, valid = present & ~left_out, valid & ~left_out
    whole = valid.all()
    pixels = {
        "wavelength": np.where(present & in_range, wavelength, np.inf),
        "flux": flux if whole else np.where(valid, flux, 0.0),
        "flux_error": error if whole else np.where(valid, error, 0.0),
        "valid": valid,
    }
    sort_pixels(pixels)
    return pixels


def sort_pixels(pixels: dict[str, np.ndarray]):
    """Sort by wavelength, in place, padding last; of several pixels at one wavelength at most one may be valid."""
    wavelength = pixels["wavelength"]
    if np.all((wavelength[:, 1:] > wavelength[:, :-1]) | (wavelength[:, 1:] == np.inf)):
        return
    pixels["wavelength"] = np.broadcast_to(wavelength, pixels["valid"].shape)
    order = np.lexsort((~pixels["valid"], pixels["wavelength"]))
    for name, values in pixels.items():
        pixels[name] = np.take_along_axis(values, order, axis=1)
    wavelength = pixels["wavelength"]
    again = (wavelength[:, 1:] == wavelength[:, :-1]) & np.isfinite(wavelength[:, 1:])
    if np.any(twice := again & pixels["valid"][:, 1:]):
        value = wavelength[:, 1:][twice][0]
        raise ValueError(f"wavelength: expected different wavelengths in a spectrum, got {value:g} Angstrom twice")
    if again.any():
        wavelength[:, 1:][again] = np.inf
        sort_pixels(pixels)
