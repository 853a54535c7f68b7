# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Rows of data sets, tables of other libraries and objects of specutils -> columns of wavelength, flux, error, mask."""

import importlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .gate_spectrafm import air_to_vacuum, in_angstrom, sigma_of, to_rest


# --------------------------------------------------------------------------------------------------------- one of them


class GatedRow(dict):
    """A row after the gate: Angstrom, vacuum, one-sigma errors, whatever the settings of the tokenizer."""


def is_table(value) -> bool:
    """A path, a table of pandas, astropy, Arrow, polars or datasets, or a row of one."""
    if isinstance(value, str | os.PathLike):
        return True
    own = hasattr(value, "colnames") or hasattr(value, "iloc") or hasattr(value, "with_format")
    own |= hasattr(value, "__arrow_c_stream__") and hasattr(value, "columns")  # polars and others that speak Arrow
    return own or (hasattr(value, "schema") and hasattr(value, "column"))


def rows_of_table(value, keep_refused: bool = False, scalars: Sequence[str] = ()) -> tuple[list[GatedRow], bool]:
    """
    Rows in the project's schema, with some scalars if the object has them, and whether it is one spectrum. Uses the
    installed package, which knows files and names of columns. A checkpoint loaded without the package takes arrays,
    mappings and spectra of specutils.
    """
    try:
        objects = importlib.import_module("spectrafm_hf.data.objects")
    except ImportError as error:
        raise ValueError(
            f"wavelength: expected arrays or a mapping where the package spectrafm_hf is not installed, got a "
            f"{type(value).__name__}; pip install spectrafm_hf"
        ) from error
    rows, one = objects.rows_of(value, keep_refused=keep_refused, scalars=scalars)
    return list(map(GatedRow, rows)), one


def is_spectrum(value) -> bool:
    """Whether this is a `specutils.Spectrum` or similar."""
    return hasattr(value, "spectral_axis") and hasattr(value, "flux")


def read_spectrum(spectrum, medium: str = "vacuum", shift: bool = True) -> tuple:
    """
    `specutils.Spectrum` of one or more stars -> wavelength, flux, error (one sigma, NaN where unknown), mask.

    Parameters
    ----------
    spectrum : specutils.Spectrum
        Its velocity or redshift moves it to the rest frame; a WCS of type AWAV means air.
    medium : {"vacuum", "air"}
        Medium of the returned wavelengths, where the WCS states air.
    shift : bool
        False if another velocity is used instead.
    """
    from astropy import units

    flux, mask, uncertainty = spectrum.flux, spectrum.mask, spectrum.uncertainty
    mask = np.zeros(flux.shape, bool) if mask is None else np.asarray(mask)
    if uncertainty is None:
        sigma = np.full(flux.shape, np.nan)
    else:
        kinds = {"std": ("sigma", 1.0), "var": ("variance", 0.5), "ivar": ("ivar", -0.5)}
        if uncertainty.uncertainty_type not in kinds:
            raise ValueError(
                f"flux_error: expected an uncertainty of type std, var or ivar, got {uncertainty.uncertainty_type}"
            )
        kind, power = kinds[uncertainty.uncertainty_type]
        # The uncertainty of a collection of spectra has no unit.
        unit = uncertainty.unit if uncertainty.unit is not None else flux.unit ** (1 / power)
        sigma = sigma_of(np.asarray(uncertainty.array), kind) * unit**power
    axis = getattr(spectrum, "spectral_axis_index", None)
    if axis is not None:
        flux, sigma, mask = (np.moveaxis(array, axis, -1) for array in (flux, sigma, mask))
    wavelength = in_angstrom(spectrum.spectral_axis.value, spectrum.spectral_axis.unit)
    header = spectrum.meta.get("header", {}) if isinstance(getattr(spectrum, "meta", None), dict) else {}
    names = [str(header.get("CTYPE1", ""))] if hasattr(header, "get") else []
    names += list(getattr(getattr(getattr(spectrum, "wcs", None), "wcs", None), "ctype", ()))
    if medium == "vacuum" and any(name.startswith("AWAV") for name in names):
        wavelength = air_to_vacuum(wavelength)
    velocity = getattr(spectrum, "radial_velocity", None)
    if shift and velocity is not None:
        wavelength = to_rest(wavelength, float(np.ravel(velocity.to_value("km/s"))[0]))
    return wavelength * units.AA, flux, sigma, mask


# ---------------------------------------------------------------------------------------------------- one or several


def first_of(values):
    return values[0] if isinstance(values, Sequence) and len(values) else None


def are_tables(value) -> bool:
    return is_table(value) or (isinstance(value, list) and bool(value) and all(map(is_table, value)))


def rows_of_tables(value, scalars: Sequence[str] = ()) -> list[GatedRow]:
    """The needed columns of all rows."""
    tables = value if isinstance(value, list) else [value]
    found = [row for each in tables for row in rows_of_table(each, scalars=scalars)[0]]
    names = set.intersection(*(set(row) for row in found))
    return [GatedRow((name, row[name]) for name in row if name in names) for row in found]


def are_rows(value) -> bool:
    return isinstance(value, Mapping) or isinstance(first_of(value), Mapping)


def are_spectra(value) -> bool:
    return is_spectrum(value) or is_spectrum(first_of(value))


def as_columns(rows) -> Mapping[str, Any]:
    """One row, a list of rows, or columns -> columns."""
    if isinstance(rows, Mapping):
        return rows
    names = rows[0].keys()
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping) or row.keys() != names:
            got = list(row) if isinstance(row, Mapping) else type(row).__name__
            raise ValueError(f"wavelength: expected rows with the columns {list(names)}, got {got} in row {number}")
    return {name: [row[name] for row in rows] for name in names}


def pixel_columns(rows: Mapping[str, Any]) -> tuple:
    for name in ("wavelength", "flux"):
        if name not in rows:
            raise ValueError(f"{name}: expected a column of this name in the rows, got {list(rows)}")
    return rows["wavelength"], rows["flux"], rows.get("flux_error"), rows.get("mask")


def read_spectra(spectra, medium: str, shift: bool) -> tuple:
    """`specutils.Spectrum`, one (of any number of stars) or a list -> wavelength, flux, error (sigma), mask."""
    if is_spectrum(spectra):
        return read_spectrum(spectra, medium, shift)
    return tuple(map(list, zip(*(read_spectrum(spectrum, medium, shift) for spectrum in spectra), strict=True)))
