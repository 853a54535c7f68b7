# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""APOGEE, DR10 to DR17 and SDSS-V: apStar, apVisit and aspcapStar files.

Not read by specutils, because it drops the pixel mask (or takes any set bit for a bad pixel), the gaps between the
detectors, the visits of an apStar, apVisits that do not name their survey, and stars with a single visit (flat arrays).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .base import AT_REST, BY_VELOCITY, SDSS_FLUX, VACUUM, OpenFile, Options, Row, SpectrumFormat
from .late import fits


#: Larger errors mark pixels without data (1e10 in DR13).
NO_DATA = 1e9
#: A visit velocity is noise if the peak of the cross-correlation is lower (usual: 0.3 to 1), the velocity larger,
#: or the template hotter than this. In DR13 this finds 32 of 36 wrong velocities, such as 602 km/s for a star with 14.
MIN_CORRELATION, MAX_VISIT_VELOCITY, HOT_TEMPLATE = 0.15, 400.0, 6000.0


def _flux_in_rows(file: OpenFile, pixels: int) -> bool:
    hdus = file.hdus
    return (
        len(hdus) > 4
        and str(hdus[1].header.get("BUNIT", "")).startswith("Flux")
        and hdus[1].header.get("NAXIS1") == pixels
        and hdus[3].header.get("NAXIS1") == pixels
    )


def is_ap_star(file: OpenFile) -> bool:
    return _flux_in_rows(file, file.header.get("NWAVE", 8575)) and "NVISITS" in file.header


def is_ap_visit(file: OpenFile) -> bool:
    return _flux_in_rows(file, 4096) and str(file.hdus[4].header.get("BUNIT", "")).startswith("Wave")


def is_aspcap_star(file: OpenFile) -> bool:
    return len(file.hdus) == 5 and "ASPCAPFLAG" in file.hdus[4].header.values()


def _wavelength(header: fits.Header, pixels: int) -> np.ndarray:
    return 10 ** (header["CRVAL1"] + header["CDELT1"] * np.arange(pixels))


def _trusted(velocity: float, correlation: float, template: float) -> float:
    """The velocity of a visit, NaN if it is noise."""
    good = correlation >= MIN_CORRELATION and abs(velocity) <= MAX_VISIT_VELOCITY and template < HOT_TEMPLATE
    return velocity if good else np.nan


def _about(header: fits.Header) -> Row:
    scalars = {"j": "J", "h": "H", "k": "K", "ak_targ": "AKTARG"}
    known = {name: float(header[card]) for name, card in scalars.items() if header.get(card, -9999) > -99}
    return {"snr": header.get("SNR", np.nan), **known}


def read_ap_star(file: OpenFile, options: Options) -> Iterator[Row]:
    header = file.header
    # A single visit may come without the dimension of visits.
    flux, flux_error, flags = (np.atleast_2d(file.hdus[i].data) for i in (1, 2, 3))
    object_id = header.get("OBJID", file.stem)
    # Row 0 combines the visits with weights for each pixel, row 1 with one weight for each visit; then come the visits.
    # A single visit is in row 0.
    visits = range(2, 2 + header["NVISITS"]) if header["NVISITS"] > 1 else [0]
    for i in visits if options.visits else [0]:
        row = {"object_id": object_id, **_about(header), "radial_velocity": header.get("VHELIO", np.nan)}
        if options.visits:
            n = max(i - 1, 1)
            row |= {"visit": str(n), "snr": header.get(f"SNRVIS{n}") or row["snr"]}
            row["radial_velocity"] = header.get(f"VHELIO{n}", np.nan)
        # Gaps between the detectors hold zeros (DR13) or NaN (DR17).
        yield {
            **row,
            "wavelength": _wavelength(
                file.hdus[1].header if "CRVAL1" in file.hdus[1].header else header, flux.shape[1]
            ),
            "flux": flux[i],
            "flux_error": flux_error[i],
            "mask": options.bad(flags[i]) | (flux[i] == 0) | (flux_error[i] >= NO_DATA),
        }


def read_ap_visit(file: OpenFile, options: Options) -> Iterator[Row]:
    header = file.header
    flux, flux_error, flags, wavelength = (np.ravel(file.hdus[i].data) for i in (1, 2, 3, 4))
    mask = options.bad(flags) | (flux == 0) | (flux_error >= NO_DATA)
    pixels = {"wavelength": wavelength, "flux": flux, "flux_error": flux_error, "mask": mask}
    # Red to blue in the file.
    order = np.argsort(wavelength)
    yield {
        "object_id": header.get("OBJID", file.stem),
        **_about(header),
        "radial_velocity": _trusted(header.get("VRAD", np.nan), header.get("CCPEAK", 1.0), header.get("RVTEFF", 0.0)),
        **{name: values[order] for name, values in pixels.items()},
    }


def read_aspcap_star(file: OpenFile, options: Options) -> Iterator[Row]:
    flux, flux_error = (np.ravel(file.hdus[i].data) for i in (1, 2))
    header = file.header
    yield {
        "object_id": header.get("OBJ", header.get("OBJID", file.stem)),
        **_about(header),
        "radial_velocity": header.get("VHELIO", np.nan),
        "wavelength": _wavelength(file.hdus[1].header, flux.size),
        "flux": flux,
        "flux_error": flux_error,
        # The file has zeros outside the detectors.
        "mask": (flux == 0) | (flux_error >= NO_DATA),
    }


FORMATS = (
    SpectrumFormat(
        name="apogee-apstar",
        survey="apogee",
        wavelength_medium=VACUUM,
        rest_frame=AT_REST,
        flux_unit=SDSS_FLUX,
        resolving_power="22,500",
        normalisation="none",
        note="the combined spectrum, or its visits on request; pixels masked by bit",
        identify=is_ap_star,
        read=read_ap_star,
    ),
    SpectrumFormat(
        name="apogee-apvisit",
        survey="apogee",
        wavelength_medium=VACUUM,
        rest_frame=BY_VELOCITY,
        flux_unit=SDSS_FLUX,
        resolving_power="22,500",
        normalisation="none",
        note="as observed from Earth, shifted by VRAD; pixels masked by bit",
        identify=is_ap_visit,
        read=read_ap_visit,
    ),
    SpectrumFormat(
        name="apogee-aspcapstar",
        survey="apogee",
        wavelength_medium=VACUUM,
        rest_frame=AT_REST,
        flux_unit="1",
        resolving_power="22,500",
        normalisation="the continuum of ASPCAP",
        note="has no pixel mask: bad pixels have large errors",
        identify=is_aspcap_star,
        read=read_aspcap_star,
    ),
)
