# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""GALAH: one file for each of the four cameras of HERMES, in air, like the arc lines of IRAF.

To DR3 (docs.datacentral.org.au/galah/dr3/galah-dr3-spectra) the extensions are the spectrum, its relative error, both
before sky subtraction, and the normalised spectrum, which is at rest and has its own grid. In reduction 6.0 (DR4) they
have names and share one grid, and the velocity is in the header (RVCOM, RV).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from .base import AIR, BY_VELOCITY, OpenFile, Options, Row, SpectrumFormat
from .images import dispersion


_NAME = re.compile(r"^\d{16}$")


def is_reduction_6(file: OpenFile) -> bool:
    return {"NORMALIZED", "RELATIVE_ERROR"} <= {name.upper() for name in file.hdu_names}


def is_galah(file: OpenFile) -> bool:
    return is_reduction_6(file) or "GALAH" in str(file.header.get("ORIGIN", ""))


def read_galah(file: OpenFile, options: Options) -> Iterator[Row]:
    hdus = file.hdus
    row: Row = {"object_id": file.stem[:15] if _NAME.match(file.stem[:16]) else file.stem}
    if is_reduction_6(file):
        flux, relative = (hdus[name] for name in ("NORMALIZED", "RELATIVE_ERROR"))
        row |= {"radial_velocity": _velocity(file), "frame": "observed", "normalised": True}
    elif len(hdus) > 4:
        # The error is on the grid of the spectrum that is not at rest, pixel by pixel.
        flux, relative = hdus[4], hdus[1]
        row |= {"frame": "rest", "normalised": True}
    else:
        flux, relative = hdus[0], hdus[1]
        row |= {"frame": "observed", "normalised": False}
    values = np.asarray(flux.data, np.float64)
    found = dispersion(flux.header if "CRVAL1" in flux.header else file.header, values.size)
    if found is None:
        raise ValueError(f"wavelength: expected CRVAL1 and CDELT1 in {file.path}, got none")
    error = np.asarray(relative.data, np.float64)
    if error.size != values.size:  # camera 4 of some reductions
        error = np.interp(np.linspace(0, 1, values.size), np.linspace(0, 1, error.size), error)
    yield {**row, "wavelength": found[0], "flux": values, "flux_error": error * np.abs(values)}


def _velocity(file: OpenFile) -> float:
    """Heliocentric velocity (km/s), of all cameras together if there is one."""
    for name, good in (("RVCOM", "RVCOM_OK"), ("RV", "RV_OK")):
        velocity = file.header.get(name)
        if isinstance(velocity, int | float) and file.header.get(good, 1) in (1, True):
            return float(velocity)
    return np.nan


FORMATS = (
    SpectrumFormat(
        name="galah",
        survey="galah",
        wavelength_medium=AIR,
        rest_frame=BY_VELOCITY,
        flux_unit="1",
        resolving_power="28,000",
        normalisation="the continuum of the pipeline (counts where there is none)",
        note="one camera a file; at rest up to DR3, shifted by RVCOM since DR4; counts are as observed",
        identify=is_galah,
        read=read_galah,
    ),
)
