# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Tables of spectra in FITS, ECSV or VOTable files, whatever their columns are called."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .base import AS_STATED, CHUNK_ROWS, JWST_DO_NOT_USE, OpenFile, Options, Row, SpectrumFormat, column_of
from .columns import (
    by_meaning,
    find_columns,
    from_logarithm,
    groups,
    heading,
    length_unit,
    logarithm,
    medium_beside,
    medium_of,
    plain,
    unit_of,
    velocity_factor,
)
from .headers import about
from .late import fits, units
from .orders import as_one_or_each


if TYPE_CHECKING:
    from astropy.table import Table


PIXELS = ("wavelength", "log_wavelength", "flux", "flux_error", "ivar", "variance", "snr", "mask", "good")
#: An unnamed third column holds errors if it is smaller than this times the flux; else it may be a continuum.
LARGEST_ERROR = 0.5
#: Columns with the number of an order; a table with one of them has no identifiers of stars.
_ORDERS = {"order", "orders", "sporder", "echelleorder", "orderno"}
#: Columns that may have one value for each star or for each pixel.
OF_STARS = ("snr", "mask", "good")
#: A table without identifiers and with more rows than this holds stars, not orders.
MOST_ORDERS = 512


_NOT_IN_A_MEDIUM = {
    **dict.fromkeys(("frequency", "freq"), "Hz"),
    **dict.fromkeys(("wavenumber", "wavenumbers"), "cm-1"),
    **dict.fromkeys(("energy", "photonenergy"), "eV"),
}
#: Default units of columns that state none (waveobs is the column of iSpec).
_OWN_UNIT = {"waveobs": "nm", **_NOT_IN_A_MEDIUM}


def spectrum_of(
    columns: Mapping[str, Any], names: Mapping[str, str], unit_names: Mapping[str, Any], options: Options
) -> Row:
    """
    One spectrum, with the statements of its columns.

    Parameters
    ----------
    columns : mapping of role to array of shape (pixels,)
    names : mapping of role to heading
    unit_names : mapping of role to unit or text
        Takes precedence over units in the headings.
    options : Options
    """

    def unit(role: str) -> Any:
        return unit_names.get(role) or heading(names[role]).unit

    if np.ndim(columns["flux"]) == 1:  # drop columns with one number for each star
        columns = {role: part for role, part in columns.items() if role not in OF_STARS or np.ndim(part)}
    row: Row = {"flux": columns["flux"], "flux_unit": unit_of(unit("flux"))}
    where = "wavelength" if "wavelength" in columns else "log_wavelength"
    row["medium"] = medium_of(names[where])
    log = logarithm(unit(where))
    written = unit(where) if log is None else log[1]
    row["wavelength_unit"] = length_unit(written, "wavelength") or options.wavelength_unit
    if log is None and where == "wavelength":
        row["wavelength"] = columns[where]
        if row["wavelength_unit"] is None and (own := _OWN_UNIT.get(plain(names[where]))):
            row["wavelength_unit"] = units.Unit(own)
        if plain(names[where]) in _NOT_IN_A_MEDIUM:
            row["medium"] = "vacuum"
    else:
        natural = math.e if plain(names[where]).startswith("ln") else None
        row["wavelength"] = from_logarithm(columns[where], natural if log is None else log[0])
    for role, kind in (("flux_error", "sigma"), ("ivar", "ivar"), ("variance", "variance")):
        if role in columns:
            row |= {"flux_error": columns[role], "error_kind": kind, "error_unit": unit_of(unit(role))}
    if "snr" in columns and np.shape(columns["snr"]) == np.shape(columns["flux"]):
        row["flux_error"] = _of_snr(columns["flux"], columns["snr"])
    if "mask" in columns:
        row["mask"] = _flags(columns["mask"])
        if plain(names["mask"]) == "andmask":
            from .sdss import BAD_PIXELS

            row["bad_bits"] = BAD_PIXELS
        elif refused := _good_or_bad(row, names["mask"]):
            row["refused"] = refused
    elif "good" in columns:
        row["mask"] = _flags(columns["good"]) == 0
    name = plain(names["flux"])
    if "norm" in name:
        row["normalised"] = True
    if name in ("fnu", "fluxnu") and row["flux_unit"] is None:
        row["flux_unit"] = units.Jy
    # Rows of a table have one length: shorter spectra are padded with NaN or zeros.
    wavelength = np.asarray(row["wavelength"])
    if wavelength.dtype.kind == "f" and wavelength.ndim == 1:
        real = np.isfinite(wavelength)
        if (zeros := wavelength == 0).any() and not zeros.all():
            real &= ~zeros
        there = [key for key in ("wavelength", "flux", "flux_error", "mask") if row.get(key) is not None]
        if not real.all() and all(np.shape(row[key]) == real.shape for key in there):
            row |= {key: np.asarray(row[key])[real] for key in there}
    return row


def _good_or_bad(row: Row, name: str) -> str:
    """Why a mask of zeros and ones seems to be inverted: it masks all pixels with data and none without."""
    mask, flux = np.asarray(row["mask"]), np.asarray(row["flux"])
    if mask.shape != flux.shape or flux.dtype.kind not in "fiu" or not np.isin(mask, (0, 1)).all() or not mask.any():
        return ""
    measured = np.isfinite(flux) & (flux != 0)
    if (error := row.get("flux_error")) is not None and np.shape(error) == flux.shape:
        with np.errstate(invalid="ignore"):
            measured &= np.isfinite(np.asarray(error, np.float64)) & (np.asarray(error) > 0)
    bad = mask.astype(bool)
    if (measured & ~bad).any() or not (measured & bad).any():
        return ""
    return (
        f"mask: expected 0 or False for good pixels, got a column {name} that leaves none of {int(measured.sum())} "
        f"measured ones; if it marks good pixels, name it with columns={{'good': {name!r}}}, else leave it out with "
        "columns={'mask': 'none'}"
    )


def are_no_errors(flux: Any, third: Any) -> bool:
    """Whether the unnamed column after wavelength and flux is too large for errors of the flux."""
    flux, third = np.abs(np.asarray(flux, np.float64)), np.abs(np.asarray(third, np.float64))
    real = np.isfinite(flux) & np.isfinite(third) & (flux > 0)
    return bool(real.any() and np.median(third[real] / flux[real]) > LARGEST_ERROR)


def _of_snr(flux: Any, snr: Any) -> np.ndarray:
    """One-sigma errors from signal-to-noise ratios; infinite where the ratio is not positive or unknown."""
    flux, snr = np.asarray(flux, np.float64), np.asarray(snr, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((snr > 0) & (flux != 0), np.abs(flux / snr), np.inf)


def _flags(values: Any) -> np.ndarray:
    array = np.asarray(values)
    if array.dtype.kind in "SU":
        return np.isin(np.char.lower(array.astype(str)), ("true", "t", "1", "yes"))
    return array


def by_star(columns: Mapping[str, Any], default: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Consecutive lines of the same star."""
    if "object_id" not in columns:
        yield default, dict(columns)
        return
    ids = np.array([str(name) for name in columns["object_id"]])
    for part in np.split(np.arange(len(ids)), np.flatnonzero(ids[1:] != ids[:-1]) + 1):
        name = ids[part[0]]
        yield name, {role: values[part] for role, values in columns.items()}


def moving(columns: Mapping[str, Any], names: Mapping[str, str], unit_names: Mapping[str, Any]) -> Row:
    """The velocity, in km/s, or the redshift of a star whose lines all state it."""
    row: Row = {}
    for role in ("radial_velocity", "redshift"):
        if role in columns:
            values = np.ravel(np.asarray(columns[role], np.float64))
            if values.size and np.all((values == values[0]) | np.isnan(values)):
                row[role] = float(values[0])
    if "radial_velocity" in row:
        own = "radial_velocity"
        row[own] *= velocity_factor(unit_names.get(own) or heading(names[own]).unit)
    return row


# ------------------------------------------------------------------------------------------------- ECSV and VOTable


def is_ecsv(file: OpenFile) -> bool:
    return file.kind == "text" and file.head.startswith(b"# %ECSV")


def read_ecsv(file: OpenFile, options: Options) -> Iterator[Row]:
    if _is_sampling(file):
        raise ValueError(f"{file.path}: expected spectra, got only their sampling (a file of gaiaxpy)")
    from astropy.table import Table

    yield from rows_of_table(file, Table.read(file.text().read(), format="ascii.ecsv"), options)


def read_votable(file: OpenFile, options: Options) -> Iterator[Row]:
    from astropy.io import votable

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about details of the standard
        tables = list(votable.parse(str(file.path)).iter_tables())
    for parsed in tables:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            table = parsed.to_table(use_names_over_ids=True)
        # Units unknown to astropy are lost, so their text is read again.
        written = {each.name: each._unit if hasattr(each, "_unit") else each.unit for each in parsed.fields}
        roles = find_columns(file.path, table.colnames, options.columns, demanded=False)
        wanted = options
        if not ("flux" in roles and {"wavelength", "log_wavelength"} & roles.keys()):
            meant = by_meaning((each.name, str(each.ucd or ""), str(each.utype or "")) for each in parsed.fields)
            wanted = replace(options, columns={**meant, **options.columns})
        yield from rows_of_table(file, table, wanted, {name: str(unit) for name, unit in written.items() if unit})


def _is_sampling(file: OpenFile) -> bool:
    return file.stem.endswith("_sampling") and b"\npos" in file.head


def rows_of_table(
    file: OpenFile, table: Table, options: Options, written: Mapping[str, str] | None = None
) -> Iterator[Row]:
    """Spectra of an astropy table: vectors, or one pixel a row. Only the name of the file is used."""
    roles = find_columns(file.path, table.colnames, options.columns, demanded=False)
    if "flux" not in roles and len(table.colnames) == 2 and options.columns == {}:
        first, second = table.colnames
        if getattr(table[first].unit, "physical_type", None) == "length":
            roles = {"wavelength": first, "flux": second}
    if not {"flux"} <= roles.keys() or not {"wavelength", "log_wavelength"} & roles.keys():
        roles = find_columns(file.path, table.colnames, options.columns)
    stated = {role: (written or {}).get(name) or table[name].unit for role, name in roles.items()}
    medium = medium_beside(roles.get("wavelength", ""), table.colnames)
    columns = {role: _filled(table[name]) for role, name in roles.items()}
    object_id = str(table.meta.get("object_id", file.stem))
    if np.ndim(columns["flux"]) == 1 and columns["flux"].dtype != object:
        for name, part in by_star({role: values for role, values in columns.items()}, object_id):
            row = {**spectrum_of(pixels_of(part), roles, stated, options), **moving(part, roles, stated)}
            yield {"object_id": name, **row, "medium": row["medium"] or medium}
        return
    for i in range(len(table)):
        part = {role: values[i] for role, values in columns.items()}
        name = str(part["object_id"]) if "object_id" in part else f"{object_id}:{i}"
        row = {**spectrum_of(pixels_of(part), roles, stated, options), **moving(part, roles, stated)}
        yield {"object_id": name, **row, "medium": row["medium"] or medium}


def pixels_of(columns: Mapping[str, Any]) -> dict[str, Any]:
    return {role: values for role, values in columns.items() if role in PIXELS}


def _filled(column: Any) -> np.ndarray:
    array = getattr(column, "value", column)
    if np.ma.isMaskedArray(array) and np.ma.getmaskarray(array).any() and array.dtype.kind in "fiu":
        return np.ma.filled(array.astype(np.float64), np.nan)
    return np.ma.filled(array, True) if np.ma.isMaskedArray(array) and array.dtype == bool else np.asarray(array)


# --------------------------------------------------------------------------------------------------------------- FITS


_TABLES = (fits.BinTableHDU, fits.TableHDU)


def spectrum_tables(file: OpenFile, wanted: Mapping[str, str]) -> list[fits.BinTableHDU]:
    """The tables of a FITS file that hold a wavelength and a flux."""
    found, beside = [], []
    for hdu in file.hdus:
        if isinstance(hdu, _TABLES):
            roles = find_columns(file.path, hdu.columns.names, wanted if wanted else None, demanded=False)
            if "flux" in roles and {"wavelength", "log_wavelength"} & roles.keys():
                found.append(hdu)
            elif not wanted and groups(file.path, hdu.columns.names):
                beside.append(hdu)
    if not found:
        return beside
    # DEEP2 and DEIMOS: each arm, extracted in several ways.
    for way in ("HORNE", "BXSPF"):
        if len(arms := [hdu for hdu in found if hdu.name.upper() in (f"{way}-B", f"{way}-R")]) == 2:
            return arms
    # The first says which: others hold exposures, models or lines.
    return [hdu for hdu in found if hdu.columns.names == found[0].columns.names]


def _is_table(file: OpenFile) -> bool:
    if file.kind != "fits":
        return False
    try:
        return bool(spectrum_tables(file, {}))
    except ValueError:  # ambiguous; reading raises a better message
        return True


def no_spectrum(file: OpenFile) -> ValueError:
    names = [name for hdu in file.hdus if isinstance(hdu, _TABLES) for name in hdu.columns.names]
    found = f"the columns {', '.join(names[:8])}{' and others' * (len(names) > 8)}" if names else "no table"
    return ValueError(
        f"{file.path}: expected a table with columns wavelength and flux, or an image of a spectrum, got {found}; name "
        "the columns with columns={'wavelength': 'NAME', 'flux': 'NAME'}"
    )


def read_fits_table(file: OpenFile, options: Options) -> Iterator[Row]:
    tables = spectrum_tables(file, options.columns)
    if not tables:
        raise no_spectrum(file)
    rows = (row for hdu in tables for roles in _columns(file, hdu, options) for row in _rows(file, hdu, roles, options))
    if sum(hdu.header["NAXIS2"] for hdu in tables) > MOST_ORDERS and any(map(_has_vectors, tables)):
        for row in rows:  # a survey, star by star
            row.pop("named")
            yield row
        return
    few = list(rows)
    named = any([row.pop("named") for row in few])
    yield from few if named else as_one_or_each(few, file.stem)


def _has_vectors(hdu: fits.BinTableHDU) -> bool:
    return any(isinstance(column.dtype, np.dtype) and column.dtype.shape != () for column in hdu.columns) or any(
        str(column.format)[:1] in "PQ" for column in hdu.columns
    )


def _columns(file: OpenFile, hdu: fits.BinTableHDU, options: Options) -> list[dict[str, str]]:
    """Columns by role of each of several spectra in a table."""
    roles = find_columns(file.path, hdu.columns.names, options.columns, demanded=False)
    if not options.columns and not ("flux" in roles and {"wavelength", "log_wavelength"} & roles.keys()):
        several = [*groups(file.path, hdu.columns.names).values()]
    else:
        several = [find_columns(file.path, hdu.columns.names, options.columns)]
    if "PYP_SPEC" in file.header or "PYP_SPEC" in hdu.header:
        # PypeIt masks with True for good pixels.
        several = [{"good" if role == "mask" else role: name for role, name in each.items()} for each in several]
    return several


def _rows(file: OpenFile, hdu: fits.BinTableHDU, roles: dict[str, str], options: Options) -> Iterator[Row]:
    units_of = {role: hdu.columns[name].unit for role, name in roles.items()}
    stated = about(
        [file.header, hdu.header], hdu.columns.names.index(roles.get("wavelength") or roles["log_wavelength"])
    )
    beside = medium_beside(roles.get("wavelength", ""), hdu.columns.names)
    n_rows = hdu.header["NAXIS2"]
    if not n_rows:
        return
    one_pixel_a_row = np.ndim(hdu.data[:1][roles["flux"]][0]) == 0
    step = n_rows if one_pixel_a_row else CHUNK_ROWS
    step_name = next((name for name in hdu.columns.names if plain(name) in ("deltaw", "deltalambda")), None)
    lengths = "NELEM" if "NELEM" in hdu.columns.names else None
    orders = any(plain(name) in _ORDERS for name in hdu.columns.names)
    classes = next((name for name in hdu.columns.names if plain(name) in ("class", "spectype")), None)
    for start in range(0, n_rows, step):
        # Slice rows first: a whole column would be converted and cached.
        chunk = hdu.data[start : start + step]
        columns = {role: column_of(hdu, chunk, name) for role, name in roles.items()}
        for i in range(1 if one_pixel_a_row else len(chunk)):
            # A copy: the file can then be closed.
            part = {role: np.array(values if one_pixel_a_row else values[i]) for role, values in columns.items()}
            pixels = pixels_of(part)
            if step_name is not None and "wavelength" in pixels and np.ndim(pixels["wavelength"]) == 0:
                # IUE: the first wavelength and the step.
                count = np.arange(np.size(pixels["flux"]))
                pixels["wavelength"] = pixels["wavelength"] + float(chunk[step_name][i]) * count
            if lengths is not None and not one_pixel_a_row:
                length = int(chunk[lengths][i])
                pixels = {role: values[:length] if np.ndim(values) else values for role, values in pixels.items()}
            row = {**stated, **spectrum_of(pixels, roles, units_of, options), **moving(part, roles, units_of)}
            row["medium"] = row["medium"] or beside or stated.get("medium")
            row.setdefault("bad_bits", _serious(hdu, file, roles))
            if classes is not None and not one_pixel_a_row:
                row["object_class"] = str(chunk[classes][i])
            named = "object_id" in roles and not one_pixel_a_row and not orders
            if one_pixel_a_row and hdu.name.startswith("SPAT"):  # a slit of PypeIt; orders have other names
                object_id, named = f"{file.stem}:{hdu.name}", True
            elif one_pixel_a_row:
                object_id = file.stem
            else:
                object_id = str(part["object_id"]).strip() if named else f"{file.stem}:{start + i}"
            yield {"object_id": object_id, "named": named, **row}


def _serious(hdu: fits.BinTableHDU, file: OpenFile, roles: Mapping[str, str]) -> int | None:
    """Bits of a data quality column that mask a pixel: from the header (HST) or the manual (JWST)."""
    if "mask" not in roles:
        return None
    if str(file.header.get("TELESCOP", "")).strip() == "JWST":
        return JWST_DO_NOT_USE
    return hdu.header.get("SDQFLAGS", file.header.get("SDQFLAGS"))


STATED_BY_FILES = {
    "survey": "",
    "wavelength_medium": AS_STATED,
    "rest_frame": AS_STATED,
    "flux_unit": AS_STATED,
    "resolving_power": AS_STATED,
    "normalisation": AS_STATED,
}

ECSV = SpectrumFormat(
    name="ecsv",
    **STATED_BY_FILES,
    note="columns of wavelength and flux, with units",
    identify=is_ecsv,
    read=read_ecsv,
)
FORMATS = (
    SpectrumFormat(
        name="fits-table",
        **STATED_BY_FILES,
        note="columns of wavelength and flux, and optionally error, mask, object_id: vectors, or one pixel a row",
        identify=_is_table,
        read=read_fits_table,
    ),
    ECSV,
    SpectrumFormat(
        name="votable",
        **STATED_BY_FILES,
        note="columns of wavelength and flux, with units",
        identify=lambda file: file.kind == "votable",
        read=read_votable,
    ),
)
