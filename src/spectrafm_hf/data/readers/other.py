# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Everything else that specutils recognises; and JWST, of which more is known than what it says."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from astropy import units
from astropy.io import fits

from .base import AIR, AS_GIVEN, NOT_AT_REST, VACUUM, OpenFile, Options, Row, SpectrumFormat


def read_any(file: OpenFile, options: Options, format: str | None = None) -> Iterator[Row]:
    from specutils import SpectrumList

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about header cards that play no part here
            spectra = list(SpectrumList.read(file.path, format=format))
    except Exception as error:  # whatever one of the many loaders stumbles over
        reason = " ".join(str(error).split())[:100]
        columns = [name for hdu in file.hdus if isinstance(hdu, fits.BinTableHDU) for name in hdu.columns.names]
        found = f"the columns {', '.join(columns[:8])}{' and others' * (len(columns) > 8)}" if columns else "no table"
        raise ValueError(
            f"{file.path}: expected a table with columns wavelength and flux, or a spectrum that specutils recognises, "
            f"got {found} ({reason})"
        ) from error
    rows = [row for spectrum in spectra for row in _rows(file, spectrum)]
    for i, row in enumerate(rows):
        yield {"object_id": file.stem if len(rows) == 1 else f"{file.stem}:{i}", **row}


def read_jwst(file: OpenFile, options: Options) -> Iterator[Row]:
    # Where a file holds one spectrum, the registry of specutils finds two loaders, and takes none.
    yield from read_any(file, options, "JWST x1d multi" if "EXTRACT1D" in file.hdu_names else "JWST c1d multi")


def _rows(file: OpenFile, spectrum: Any) -> Iterator[Row]:
    """Rows without an identifier; a two-dimensional flux holds several."""
    from astropy.nddata import StdDevUncertainty, UnknownUncertainty

    try:
        wavelength = spectrum.spectral_axis.to_value("Angstrom", units.spectral())
    except units.UnitConversionError as error:
        raise ValueError(
            f"wavelength: expected a length, frequency or energy in {file.path}, got {spectrum.spectral_axis.unit}"
        ) from error
    columns = {"flux": np.asarray(spectrum.flux.value, np.float64)}
    if spectrum.uncertainty is not None and not isinstance(spectrum.uncertainty, UnknownUncertainty):
        with np.errstate(divide="ignore", invalid="ignore"):  # an inverse variance of 0 is an infinite error
            columns["flux_error"] = np.asarray(spectrum.uncertainty.represent_as(StdDevUncertainty).array, np.float64)
    if spectrum.mask is not None:
        columns["mask"] = np.asarray(spectrum.mask, bool)
    # FITS writes "air wavelength" so; specutils passes it by.
    in_air = str(spectrum.meta.get("header", {}).get("CTYPE1", "")).startswith("AWAV")
    for star in np.ndindex(columns["flux"].shape[:-1]):
        row: Row = {"wavelength": wavelength, **{name: column[star] for name, column in columns.items()}}
        yield row | {"wavelength_medium": AIR} if in_air else row


FORMATS = (
    SpectrumFormat(
        name="jwst",
        survey="jwst",
        wavelength_medium=VACUUM,
        rest_frame=NOT_AT_REST,
        flux_unit="Jy",
        resolving_power="30 to 3,600",
        normalisation="none",
        note="extracted spectra (x1d, c1d), barycentric; a row for each order, slit or integration",
        identify=lambda file: (
            str(file.header.get("TELESCOP")) == "JWST" and bool({"EXTRACT1D", "COMBINE1D"} & set(file.hdu_names))
        ),
        read=read_jwst,
    ),
    SpectrumFormat(
        name="specutils",
        survey="",
        wavelength_medium=AS_GIVEN,
        rest_frame=AS_GIVEN,
        flux_unit="as given",
        resolving_power="as given",
        normalisation="as given",
        note="whatever else specutils recognises (its registry asks each of its loaders, a tenth of a second a file)",
        identify=lambda file: file.kind == "fits",
        read=read_any,
    ),
)
