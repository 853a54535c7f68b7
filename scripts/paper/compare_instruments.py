# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Compare the predicted labels of one star through two instruments with their errors.

    spectrafm data miles --out miles
    python scripts/paper/compare_instruments.py --miles miles --output instruments.md

Observed: stars in both MILES and STELIB (which is in the same package as MILES); with `--files`, two halves of an
X-shooter spectrum; and stars of MILES with additional extinction. Synthetic: the same stars through Gaia XP, LAMOST,
SDSS, DESI, GALAH, Gaia RVS and APOGEE (`resources/instruments`). Synthetic optical spectra get the residuals of
observed training stars of MILES, for which the model was trained: the mean, and a variable part that is the same for
all instruments. Without `--miles` they are purely synthetic.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from evaluate_observed import answers
from numpy.typing import NDArray
from observed_samples import LABELS, TEFF, miles, shared_stars
from report_files import add_output, print_and_write

from spectrafm_hf import load_checkpoint
from spectrafm_hf.data.readers import find_files, read_spectra
from spectrafm_hf.statistics import MAD_TO_SIGMA, robust_scatter
from spectrafm_hf.synthesis.instruments import Instrument, extinction_curve
from spectrafm_hf.synthesis.labels import draw_optical_labels
from spectrafm_hf.synthesis.survey_observed import LikeObserved
from spectrafm_hf.synthesis.survey_spectra import SURVEYS, factor_like
from spectrafm_hf.synthesis.synthetic import load_emulator


Array = NDArray[Any]
SNR = 100.0
EXCESSES, R_V = (0.3, 1.0), 3.1  # E(B-V) of additional extinction of stars of MILES


def rows_of(instrument: Instrument, seen: Mapping[str, Array], **others: Any) -> list[dict[str, Any]]:
    """Rows of spectra with the noise of `SNR`."""
    return [
        {
            "object_id": str(i),
            "wavelength": instrument.wavelength,
            "flux": flux.astype(np.float32),
            "flux_error": error.astype(np.float32),
            "mask": instrument.mask,
            **others,
        }
        for i, (flux, error) in enumerate(zip(seen["flux"], seen["flux_error"], strict=True))
    ]


def with_noise(clean: Array, generator: np.random.Generator) -> dict[str, Array]:
    error = np.abs(clean) / SNR
    return {"flux": clean + error * generator.standard_normal(error.shape), "flux_error": error}


def drawn_labels(n: int, generator: np.random.Generator) -> dict[str, Array]:
    """Labels, (n,) each, within the grids of the emulators of all instruments."""
    emulators = [load_emulator(name).eval() for name in ("emulator-optical", "emulator-hband")]

    def covered(stars: Mapping[str, Array]) -> NDArray[np.bool_]:
        inside = (stars["teff"] > TEFF[0]) & (stars["teff"] < TEFF[1])
        for emulator in emulators:
            inside &= emulator.covers(np.stack([stars[name] for name in emulator.config.label_names], axis=1))
        return inside

    return draw_optical_labels(n, generator, covered)


def optical_stars(
    labels: dict[str, Array], like: LikeObserved | None, seed: int
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Rows of the same stars through each of the surveys of the optical."""
    emulator, generator = load_emulator("emulator-optical").eval(), np.random.default_rng(seed)
    wavelength, lines = emulator.synthesize(normalized=True, **labels)
    factor: Array | float = 1.0
    if like is not None:
        factor = factor_like(like, np.asarray(wavelength), np.asarray(lines), labels, generator)
    for name, power in SURVEYS.items():
        instrument = Instrument.load(name)
        flux = np.asarray(emulator.synthesize(normalized=instrument.normalisation == "continuum", **labels)[1])
        seen = instrument.apply(np.asarray(wavelength), flux * factor, generator)
        yield name, rows_of(instrument, with_noise(seen["clean"], generator), resolving_power=power)


def other_stars(name: str, labels: dict[str, Array], seed: int) -> list[dict[str, Any]]:
    """Rows of the same stars, purely synthetic, through an instrument outside the optical."""
    instrument = Instrument.load(name)
    emulator, generator = load_emulator(instrument.emulator).eval(), np.random.default_rng(seed)
    own = {label: labels[label] for label in emulator.config.label_names}
    normalised = instrument.normalisation == "continuum"
    wavelength, flux = emulator.synthesize(normalized=normalised, **own)
    instrument = dataclasses.replace(instrument, tilt=None)
    power = emulator.config.resolving_power or None
    seen = instrument.apply(np.asarray(wavelength), np.asarray(flux), generator, power, np.zeros(len(flux)))
    others = {"normalised": True} if normalised else {}
    return rows_of(instrument, with_noise(seen["clean"], generator), **others)


def reddened(rows: Sequence[dict[str, Any]], colour_excess: float) -> list[dict[str, Any]]:
    """Rows with additional extinction of this E(B-V) in magnitudes, R(V) = 3.1."""
    found = []
    for row in rows:
        curve = extinction_curve(np.asarray(row["wavelength"], float))
        factor = 10.0 ** (-0.4 * R_V * colour_excess * (curve - curve.mean()))
        found.append(row | {name: np.asarray(row[name]) * factor for name in ("flux", "flux_error")})
    return found


def halves(path: Path) -> list[list[dict[str, Any]]]:
    """The same spectrum twice, with the blue or the red half of it masked."""
    (row,) = read_spectra([path])
    if isinstance(row, Exception) or "wavelength" not in row:
        raise ValueError(f"{path}: expected one spectrum, got {row}")
    wavelength = np.asarray(row["wavelength"])
    red = wavelength > np.sqrt(wavelength[0] * wavelength[-1])
    return [[row | {"mask": np.asarray(row["mask"]) | part}] for part in (red, ~red)]


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


def flags_of(name: str, blue: tuple[Array, Array, Array], red: tuple[Array, Array, Array]) -> str:
    """T_eff and flags of two halves."""
    parts = [
        f"{half} half {found[0, 0]:.0f} K, {flags[0]}" for half, (found, _, flags) in (("blue", blue), ("red", red))
    ]
    return f"Flags of {name}: {'; '.join(parts)}."


def observed_lines(model: Any, tokenizer: Any, folder: Path) -> Iterator[str]:
    """Lines of stars of MILES and of STELIB."""
    for name, splits in {"all": ("train", "validation", "test"), "not in training": ("validation", "test")}.items():
        samples, labels = shared_stars(folder, splits)
        one, other = (answers(model, tokenizer, rows)[:2] for rows in samples)
        yield from comparison(f"MILES - STELIB, observed, {name}", one, other)
        yield from comparison(f"STELIB - published, observed, {name}", other, (labels, np.zeros_like(labels)))
    rows, _ = miles(folder, "validation")
    plain = answers(model, tokenizer, rows)[:2]
    for excess in EXCESSES:
        seen = answers(model, tokenizer, reddened(rows, excess))[:2]
        yield from comparison(f"MILES validation, E(B-V) = {excess:g} - 0", seen, plain)


def synthetic_lines(model: Any, tokenizer: Any, like: LikeObserved | None, n: int) -> Iterator[str]:
    """Lines of synthetic stars: each instrument against the truth, and each pair."""
    labels = drawn_labels(n, np.random.default_rng(0))
    rows = dict(optical_stars(labels, like, seed=1))
    rows |= {name: other_stars(name, labels, seed=2) for name in ("gaia-xp", "apogee")}
    seen = {name: answers(model, tokenizer, own)[:2] for name, own in rows.items()}
    true = np.stack([labels[name] for name in LABELS], axis=1)
    for name, found in seen.items():
        yield from comparison(f"{name} - true, synthetic", found, (true, np.zeros_like(true)))
    for one, other in itertools.combinations(seen, 2):
        yield from comparison(f"{one} - {other}, synthetic", seen[one], seen[other])


def report(arguments: argparse.Namespace) -> str:
    model, tokenizer = load_checkpoint(arguments.model)
    lines = [
        f"Predictions of {arguments.model} for one star through two instruments, {TEFF[0]:g}-{TEFF[1]:g} K: scatter "
        "(1.4826 MAD) and median of the differences; robust z: 1.4826 median of |difference| / combined error.",
        "",
        "| instruments | n | label | scatter | median | robust z |",
        "|---|---|---|---|---|---|",
    ]
    like = None
    if arguments.miles:
        lines += observed_lines(model, tokenizer, arguments.miles)
        if tokenizer.basis is None:
            raise ValueError(f"model: expected one on evidence, got {arguments.model}")
        like = LikeObserved(tokenizer.basis, arguments.miles)
    notes = [""] if arguments.files else []
    for path in sorted(find_files([arguments.files])) if arguments.files else ():
        if "xshooter" in (name := Path(path).name):
            blue, red = (answers(model, tokenizer, rows) for rows in halves(Path(path)))
            lines += comparison(f"blue - red half, {name}", blue[:2], red[:2])
            notes.append(flags_of(name, blue, red))
    lines += synthetic_lines(model, tokenizer, like, arguments.stars)
    return "\n".join([*lines, *notes, ""])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="compare_instruments.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="spectrafm-base", help="a bundled checkpoint, or a folder")
    parser.add_argument("--miles", type=Path, metavar="DIR", help="made by `spectrafm data miles`")
    parser.add_argument("--files", type=Path, metavar="DIR", help="observed spectra, including one of X-shooter")
    parser.add_argument("--stars", type=int, default=100, help="synthetic ones")
    add_output(parser)
    arguments = parser.parse_args(argv)
    return print_and_write(report(arguments), arguments.output)


if __name__ == "__main__":
    sys.exit(main())
