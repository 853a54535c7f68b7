# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""JWST, whose files do not state everything; and all formats of specutils, only on request."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from .base import AS_STATED, NOT_AT_REST, VACUUM, OpenFile, Options, Row, SpectrumFormat
from .tables import read_fits_table


def read_with_specutils(file: OpenFile, options: Options) -> Iterator[Row]:
    from specutils import SpectrumList

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about header cards that are not used
            spectra = list(SpectrumList.read(file.path))
    except Exception as error:  # loaders raise all kinds of errors
        reason = " ".join(str(error).split())[:100]
        raise ValueError(f"{file.path}: expected a spectrum that specutils recognises, got {reason}") from error
    rows = [row for spectrum in spectra for row in _rows(spectrum)]
    for i, row in enumerate(rows):
        yield {"object_id": file.stem if len(rows) == 1 else f"{file.stem}:{i}", **row}


def _rows(spectrum: Any) -> Iterator[Row]:
    """Rows without an identifier; a two-dimensional flux has several spectra."""
    columns = {"flux": np.asarray(spectrum.flux.value, np.float64)}
    from astropy.nddata import StdDevUncertainty, UnknownUncertainty

    if spectrum.uncertainty is not None and not isinstance(spectrum.uncertainty, UnknownUncertainty):
        with np.errstate(divide="ignore", invalid="ignore"):  # an inverse variance of 0 is an infinite error
            columns["flux_error"] = np.asarray(spectrum.uncertainty.represent_as(StdDevUncertainty).array, np.float64)
    if spectrum.mask is not None:
        columns["mask"] = np.asarray(spectrum.mask, bool)
    stated: Row = {"wavelength": spectrum.spectral_axis.value, "wavelength_unit": spectrum.spectral_axis.unit}
    stated["flux_unit"] = spectrum.flux.unit
    # FITS name of an air wavelength, which specutils ignores.
    if str(spectrum.meta.get("header", {}).get("CTYPE1", "")).startswith("AWAV"):
        stated["medium"] = "air"
    for star in np.ndindex(columns["flux"].shape[:-1]):
        yield {**stated, **{name: column[star] for name, column in columns.items()}}


FORMATS = (
    SpectrumFormat(
        name="jwst",
        survey="jwst",
        wavelength_medium=VACUUM,
        rest_frame=NOT_AT_REST,
        flux_unit="Jy",
        resolving_power="30 to 3,600",
        normalisation="none",
        note="extracted spectra (x1d, c1d), barycentric; a row for each slit or integration; masked by DO_NOT_USE",
        identify=lambda file: (
            str(file.header.get("TELESCOP")) == "JWST" and bool({"EXTRACT1D", "COMBINE1D"} & set(file.hdu_names))
        ),
        read=read_fits_table,
    ),
    SpectrumFormat(
        name="specutils",
        survey="",
        wavelength_medium=AS_STATED,
        rest_frame=AS_STATED,
        flux_unit=AS_STATED,
        resolving_power=AS_STATED,
        normalisation=AS_STATED,
        note="all formats of specutils, only with --format, because trying all of its loaders takes seconds",
        identify=lambda file: False,
        read=read_with_specutils,
    ),
)
