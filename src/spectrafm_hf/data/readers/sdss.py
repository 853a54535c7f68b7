# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Optical spectra of SDSS (BOSS) and the mwmStar and mwmVisit files of SDSS-V."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from .base import AT_REST, BY_VELOCITY, SDSS_FLUX, VACUUM, OpenFile, Options, Row, SpectrumFormat, sigma
from .late import fits


#: Bits of SPPIXMASK that mask a pixel: FULLREJECT, NOSKY, NODATA, COMBINEREJ and BADFLUXFACTOR (sdss.org/dr17,
#: "bitmasks"). Others, such as BRIGHTSKY, BADSKYCHI and LOWFLAT, are set in thousands of good pixels.
BAD_PIXELS = sum(1 << bit for bit in (18, 22, 24, 25, 26))
#: Bits of ZWARNING for spectra that are not of stars (SKY, UNPLUGGED, BAD_TARGET, NODATA), and for unreliable
#: redshifts (LITTLE_COVERAGE, SMALL_DELTA_CHI2, NEGATIVE_MODEL, Z_FITLIMIT). Bright stars have MANY_OUTLIERS.
NO_STAR, NO_REDSHIFT = (0, 7, 8, 9), (1, 2, 3, 5)


def is_spec(file: OpenFile) -> bool:
    tables = [hdu for hdu in file.hdus[1:3] if isinstance(hdu, fits.BinTableHDU)]
    columns = [{name.lower() for name in hdu.columns.names} for hdu in tables] or [set()]
    # Files of Las Campanas and SDSS-V name other telescopes; results of the pipeline are in the second table.
    ours = "SDSS" in str(file.header.get("TELESCOP", "")).upper() or {"class", "z"} <= columns[-1]
    return ours and {"flux", "loglam", "ivar"} <= columns[0]


def read_spec(file: OpenFile, options: Options) -> Iterator[Row]:
    table = file.hdus[1].data
    columns = {name.lower(): np.ravel(table[name]) for name in table.names}
    about = {
        name.upper(): hdu.data[name][0]
        for hdu in file.hdus[2:3]
        if isinstance(hdu, fits.BinTableHDU) and len(hdu.data)
        for name in hdu.columns.names
    }
    # OR_MASK flags pixels that were bad in any exposure and left out of the sum. SDSS-V also has an AND_MASK.
    mask = next((columns[name] for name in ("and_mask", "andmask", "mask") if name in columns), None)
    yield {
        "object_id": file.stem,
        "snr": float(about.get("SN_MEDIAN_ALL", np.nan)),
        **classified(str(about.get("CLASS", "")), float(about.get("Z", np.nan)), about.get("ZWARNING", 0)),
        "wavelength": 10 ** columns["loglam"].astype(np.float64),
        "flux": columns["flux"],
        "flux_error": sigma(columns["ivar"]),
        "mask": mask,
        "bad_bits": BAD_PIXELS,
    }


def classified(kind: str, redshift: float, warning: Any = 0) -> Row:
    """Class and reliable redshift of an object from its pipeline, and why it is refused if it is not a star."""
    try:
        bits = int(warning)
    except (TypeError, ValueError):
        bits = 0
    row: Row = {"object_class": kind, "redshift": redshift}
    if bits > 0 and any(bits >> bit & 1 for bit in NO_STAR):
        row["refused"] = f"ZWARNING: expected a spectrum of a star, got {bits}, which means sky, no fibre or no data"
    elif bits > 0 and any(bits >> bit & 1 for bit in NO_REDSHIFT):
        row["redshift"] = np.nan
    return row


def is_mwm(file: OpenFile) -> bool:
    tables = file.hdus[1:]
    return "SDSS_ID" in file.header and bool(tables) and all(isinstance(hdu, fits.BinTableHDU) for hdu in tables)


def read_mwm(file: OpenFile, options: Options) -> Iterator[Row]:
    for i, hdu in enumerate(file.hdus):
        if i == 0 or not len(hdu.data):
            continue
        apogee = "APOGEE" in hdu.name.upper()
        columns = {name.lower(): hdu.data[name] for name in hdu.columns.names}
        for j in range(len(hdu.data)):
            if "wavelength" in columns:
                wavelength = columns["wavelength"][j]
            else:
                header = hdu.header
                wavelength = 10 ** (header["CRVAL"] + header["CDELT"] * np.arange(columns["flux"].shape[-1]))
            flags = columns["pixel_flags"][j]
            yield {
                "object_id": str(file.header["SDSS_ID"]),
                **({"visit": str(columns["mjd"][j])} if "mjd" in columns else {}),
                "survey": "sdss-v-apogee" if apogee else "sdss-v-boss",
                "snr": float(np.ravel(columns["snr"])[j]) if "snr" in columns else np.nan,
                "wavelength": wavelength,
                "flux": columns["flux"][j],
                "flux_error": sigma(columns["ivar"][j]),
                "mask": options.bad(flags) if apogee else flags,
                "bad_bits": None if apogee else BAD_PIXELS,
                "resolving_power": 22_500.0 if apogee else 2_000.0,
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
        note="the sum of the exposures, shifted by Z; masked by some bits of AND_MASK; quasars, galaxies and sky are "
        "refused",
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
        note="mwmStar and mwmVisit: a row for each instrument and telescope, or visit; pixels masked by bit",
        identify=is_mwm,
        read=read_mwm,
    ),
)
