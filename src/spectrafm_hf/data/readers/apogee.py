# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""APOGEE, DR10 to DR17 and SDSS-V: apStar, apVisit and aspcapStar files.

specutils reads fluxes, errors and wavelengths; it drops the pixel mask (or takes any set bit for a bad pixel), the
gaps between the detectors, the visits of an apStar and all apVisits that do not name their survey.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from astropy.io import fits

from .base import AT_REST, BY_VELOCITY, SDSS_FLUX, VACUUM, OpenFile, Options, Row, SpectrumFormat


#: Errors from here on are those of pixels without data (1e10 in DR13).
NO_DATA = 1e9
#: A lower peak of the cross-correlation is noise: 0.03 in a visit of DR13 whose header says 602 km/s, while its apStar
#: says 14 km/s; usual are 0.3 to 1.
MIN_CORRELATION = 0.1


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


def _specutils(file: OpenFile, format: str, **options: object) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Wavelength, flux and error of one spectrum."""
    from specutils import Spectrum

    spectrum = Spectrum.read(file.hdus, format=format, **options)
    return spectrum.spectral_axis.to_value("Angstrom"), spectrum.flux.value, spectrum.uncertainty.array


def _about(header: fits.Header) -> Row:
    scalars = {"j": "J", "h": "H", "k": "K", "ak_targ": "AKTARG"}
    known = {name: float(header[card]) for name, card in scalars.items() if header.get(card, -9999) > -99}
    return {"snr": header.get("SNR", np.nan), **known}


def read_ap_star(file: OpenFile, options: Options) -> Iterator[Row]:
    header, flags = file.header, np.atleast_2d(file.hdus[3].data)
    object_id = header.get("OBJID", file.stem)
    # Row 0 is the combination of the visits weighted by pixel, row 1 with one weight a visit, then come the visits;
    # a single visit stands in row 0.
    visits = range(2, 2 + header["NVISITS"]) if header["NVISITS"] > 1 else [0]
    for i in visits if options.visits else [0]:
        # Its loader for SDSS-V takes a row, and reads those before it as well.
        wavelength, flux, flux_error = _specutils(file, "SDSS-V apStar", idx=i)
        row = {"object_id": object_id, **_about(header), "radial_velocity": header.get("VHELIO", np.nan)}
        if options.visits:
            n = max(i - 1, 1)
            row |= {"visit": str(n), "snr": header.get(f"SNRVIS{n}") or row["snr"]}
            row["radial_velocity"] = header.get(f"VHELIO{n}", np.nan)
        # Gaps between the detectors hold zeros (DR13) or NaN (DR17).
        mask = options.bad(flags[i]) | (flux == 0) | (flux_error >= NO_DATA)
        yield {**row, "wavelength": wavelength, "flux": flux, "flux_error": flux_error, "mask": mask}


def read_ap_visit(file: OpenFile, options: Options) -> Iterator[Row]:
    wavelength, flux, flux_error = _specutils(file, "APOGEE apVisit")
    mask = options.bad(file.hdus[3].data.ravel()) | (flux == 0) | (flux_error >= NO_DATA)
    pixels = {"wavelength": wavelength, "flux": flux, "flux_error": flux_error, "mask": mask}
    # Red to blue in the file.
    order = np.argsort(wavelength)
    found = file.header.get("CCPEAK", 1.0) > MIN_CORRELATION
    yield {
        "object_id": file.header.get("OBJID", file.stem),
        **_about(file.header),
        "radial_velocity": file.header.get("VRAD", np.nan) if found else np.nan,
        **{name: values[order] for name, values in pixels.items()},
    }


def read_aspcap_star(file: OpenFile, options: Options) -> Iterator[Row]:
    wavelength, flux, flux_error = _specutils(file, "APOGEE aspcapStar")
    header = file.header
    yield {
        "object_id": header.get("OBJ", header.get("OBJID", file.stem)),
        **_about(header),
        "radial_velocity": header.get("VHELIO", np.nan),
        "wavelength": wavelength,
        "flux": flux,
        "flux_error": flux_error,
        # Beside the detectors the file holds zeros.
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
