# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""LAMOST, low and medium resolution (www.lamost.org, "data production description" of each release).

Low resolution: up to DR7 one image with the rows flux, inverse variance, wavelength (in DR1 a continuum, with COEFF0
and COEFF1 in the header), AND mask, OR mask; since DR8 a table COADD with one row of vectors FLUX, IVAR, WAVELENGTH,
ANDMASK, ORMASK, NORMALIZATION.
Medium resolution: a table for each arm, COADD_B and COADD_R, and one for each exposure, B-... and R-...; with LOGLAM
and one pixel a row up to DR7, with vectors and WAVELENGTH later.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .base import BY_VELOCITY, NOT_AT_REST, VACUUM, OpenFile, Options, Row, SpectrumFormat, sigma
from .images import dispersion
from .sdss import classified


#: Bits of ANDMASK that mask a pixel: all but the fourth, a bright sky (www.lamost.org, "ANDMASK").
BAD = ~(1 << 3)


def _is_lamost(file: OpenFile) -> bool:
    return "LAMOST" in str(file.header.get("TELESCOP", "")).upper()


def is_low_resolution(file: OpenFile) -> bool:
    image = file.header.get("NAXIS") == 2 and file.header.get("NAXIS2") == 5
    return _is_lamost(file) and (image or "COADD" in file.hdu_names)


def is_medium_resolution(file: OpenFile) -> bool:
    return _is_lamost(file) and bool(_arms(file, ("COADD_", "B-", "R-")))


def _arms(file: OpenFile, starts: Sequence[str]) -> list[Any]:
    return [hdu for hdu in file.hdus if hdu.name.startswith(tuple(starts))]


def _about(file: OpenFile) -> Row:
    header = file.header
    name = header.get("OBSID") or header.get("DESIG") or file.stem
    redshift = header.get("Z", np.nan)
    kind = str(header.get("CLASS", ""))
    row = {"object_id": str(name).strip(), **classified(kind, float(redshift) if redshift != "" else np.nan)}
    # The redshift of an unclassified spectrum is meaningless.
    return row | ({"redshift": np.nan} if kind.strip().upper() == "UNKNOWN" else {})


def _columns(table: Any) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Pixels of a table, in rows or vectors, and its flags."""
    columns = {name.upper(): np.ravel(table[name]) for name in table.names}
    with np.errstate(over="ignore"):  # the tokenizer checks it
        wavelength = columns["WAVELENGTH"] if "WAVELENGTH" in columns else 10 ** columns["LOGLAM"].astype(np.float64)
    flags = next((columns[name] for name in ("ANDMASK", "PIXMASK") if name in columns), np.zeros(wavelength.shape))
    return {"wavelength": wavelength, "flux": columns["FLUX"], "flux_error": sigma(columns["IVAR"])}, flags


def read_low_resolution(file: OpenFile, options: Options) -> Iterator[Row]:
    if "COADD" in file.hdu_names:
        pixels, flags = _columns(file.hdus["COADD"].data)
    else:
        flux, ivar, wavelength, flags = np.asarray(file.hdus[0].data[:4], np.float64)
        if "COEFF0" in file.header and (found := dispersion(file.header, flux.size)) is not None:
            wavelength = found[0]
        pixels = {"wavelength": wavelength, "flux": flux, "flux_error": sigma(ivar)}
    yield {**_about(file), "snr": file.header.get("SNRG", np.nan), **pixels, "mask": flags, "bad_bits": BAD}


def read_medium_resolution(file: OpenFile, options: Options) -> Iterator[Row]:
    about = _about(file)
    exposures: dict[str, list[Any]] = defaultdict(list)
    for hdu in _arms(file, ("B-", "R-") if options.visits else ("COADD_",)):
        exposures[hdu.name.partition("-" if options.visits else "_")[2] if options.visits else ""].append(hdu)
    if not exposures:
        raise ValueError(f"{file.path}: expected combined arms, got {file.hdu_names}; its exposures are read as visits")
    for exposure, arms in exposures.items():
        parts = [_columns(arm.data) for arm in arms]
        pixels = {name: np.concatenate([part[name] for part, _ in parts]) for name in parts[0][0]}
        pixels["mask"] = np.concatenate([flags for _, flags in parts])
        order = np.argsort(pixels["wavelength"], kind="stable")
        yield {
            **about,
            **({"visit": exposure} if exposure else {}),
            "snr": float(np.mean([arm.header.get("SNR", np.nan) for arm in arms])),
            **{name: values[order] for name, values in pixels.items()},
        }


FORMATS = (
    SpectrumFormat(
        name="lamost-lrs",
        survey="lamost-lrs",
        wavelength_medium=VACUUM,
        rest_frame=BY_VELOCITY,
        flux_unit="relative",
        resolving_power="1,800",
        normalisation="none",
        note="heliocentric, shifted by Z; masked by ANDMASK (bad in all exposures) except a bright sky; quasars and "
        "galaxies are refused",
        identify=is_low_resolution,
        read=read_low_resolution,
    ),
    SpectrumFormat(
        name="lamost-mrs",
        survey="lamost-mrs",
        wavelength_medium=VACUUM,
        rest_frame=NOT_AT_REST,
        flux_unit="counts",
        resolving_power="7,500",
        normalisation="none",
        note="both arms of the combined spectrum, or of each exposure as visits; velocities are in the catalogue",
        identify=is_medium_resolution,
        read=read_medium_resolution,
    ),
)
