# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Optical spectra of SDSS (BOSS) and the mwmStar and mwmVisit files of SDSS-V, through specutils.

specutils drops the redshift of an optical spectrum, and takes any set bit of the mask for a bad pixel, which for
APOGEE spectra costs a third of some stars.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from astropy.io import fits

from ...models.tokenization_spectrafm import SPEED_OF_LIGHT
from .base import AT_REST, BY_VELOCITY, SDSS_FLUX, VACUUM, OpenFile, Options, Row, SpectrumFormat, sigma


def velocity(redshift: float) -> float:
    """km/s of a redshift, by the relativistic Doppler formula; NaN for the numbers that stand for an unknown one."""
    ratio = (1 + redshift) ** 2
    return SPEED_OF_LIGHT * (ratio - 1) / (ratio + 1) if redshift > -1 else np.nan


def is_spec(file: OpenFile) -> bool:
    tables = [hdu for hdu in file.hdus[1:2] if isinstance(hdu, fits.BinTableHDU)]
    columns = {name.lower() for hdu in tables for name in hdu.columns.names}
    return "SDSS" in str(file.header.get("TELESCOP", "")).upper() and {"flux", "loglam", "ivar"} <= columns


def read_spec(file: OpenFile, options: Options) -> Iterator[Row]:
    from specutils import Spectrum

    if str(file.header.get("VERS2D", "")).startswith("v6"):
        spectrum = Spectrum.read(file.hdus, format="SDSS-V spec", hdu=1)
    else:
        spectrum = Spectrum.read(file.hdus, format="SDSS-III/IV spec")
    about = {name.upper(): hdu.data[name][0] for hdu in file.hdus[2:3] for name in hdu.columns.names if len(hdu.data)}
    yield {
        "object_id": file.stem,
        "snr": float(about.get("SN_MEDIAN_ALL", np.nan)),
        "radial_velocity": velocity(float(about.get("Z", np.nan))),
        "wavelength": spectrum.spectral_axis.to_value("Angstrom"),
        "flux": spectrum.flux.value,
        "flux_error": sigma(spectrum.uncertainty.array),
        "mask": spectrum.mask,
    }


def is_mwm(file: OpenFile) -> bool:
    tables = file.hdus[1:]
    return "SDSS_ID" in file.header and bool(tables) and all(isinstance(hdu, fits.BinTableHDU) for hdu in tables)


def read_mwm(file: OpenFile, options: Options) -> Iterator[Row]:
    from specutils import Spectrum

    for i, hdu in enumerate(file.hdus):
        if i == 0 or not len(hdu.data):
            continue
        spectrum = Spectrum.read(file.hdus, format="SDSS-V mwm", hdu=i)
        apogee = "APOGEE" in hdu.name.upper()
        flags = np.atleast_2d(hdu.data["pixel_flags"])
        flux, ivar = (np.atleast_2d(values) for values in (spectrum.flux.value, spectrum.uncertainty.array))
        is_visit = "mjd" in [name.lower() for name in hdu.columns.names]
        for j in range(len(flux)):
            yield {
                "object_id": str(file.header["SDSS_ID"]),
                **({"visit": str(hdu.data["mjd"][j])} if is_visit else {}),
                "survey": "sdss-v-apogee" if apogee else "sdss-v-boss",
                "snr": float(np.ravel(hdu.data["snr"])[j]),
                "wavelength": spectrum.spectral_axis.to_value("Angstrom"),
                "flux": flux[j],
                "flux_error": sigma(ivar[j]),
                "mask": options.bad(flags[j]) if apogee else flags[j] != 0,
            }


FORMATS = (
    SpectrumFormat(
        name="sdss-spec",
        survey="sdss",
        wavelength_medium=VACUUM,
        rest_frame=BY_VELOCITY,
        flux_unit=SDSS_FLUX,
        resolving_power="1,500 to 2,500",
        normalisation="none",
        note="the sum of the exposures, shifted by Z; masked where AND_MASK is set",
        identify=is_spec,
        read=read_spec,
    ),
    SpectrumFormat(
        name="sdss-mwm",
        survey="sdss-v",
        wavelength_medium=VACUUM,
        rest_frame=AT_REST,
        flux_unit=SDSS_FLUX,
        resolving_power="22,500 (APOGEE), 2,000 (BOSS)",
        normalisation="none",
        note="mwmStar and mwmVisit: a row for each instrument and telescope, or visit; APOGEE pixels masked by bit",
        identify=is_mwm,
        read=read_mwm,
    ),
)
