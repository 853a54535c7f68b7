# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
r"""Compare predicted labels of observed stars, on the grids of their instruments, with published ones.

    spectrafm data miles --out miles
    python scripts/paper/evaluate_observed.py --miles miles --lamost lamost_dr1_labelled.npz --files FOLDER \
        --synthetic 3000 --output observed.md

The stars of LAMOST come from a file of arrays: `wavelength` (pixels,), `flux` and `flux_error` (stars, pixels), and
`labels` (stars, 3). Baselines: ridge regression on the pixels of the same stars, in ten folds, and with `--synthetic`
two networks trained on this number of synthetic stars (`synthetic_rivals.py`). Other samples: stars of MILES with
telluric lines, continuum waves, noise, and a resolving power 20 % below the stated one; stars of STELIB; and files in
FOLDER of stars with published labels (`observed_samples.py`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from observed_samples import LABELS, LAMOST_POWER, MILES_POWER, TEFF, lamost, miles, published_files, shared_stars
from report_files import add_output, print_and_write
from synthetic_rivals import answers_of_rivals

from spectrafm_hf import load_checkpoint
from spectrafm_hf.inference.prediction import batches_of, predict_batches
from spectrafm_hf.models.rungs_spectrafm import degraded
from spectrafm_hf.statistics import MAD_TO_SIGMA, robust_scatter
from spectrafm_hf.synthesis.survey_observed import LikeObserved
from spectrafm_hf.training.baseline import Spectra
from spectrafm_hf.training.baselines import RidgeBaseline


Array = NDArray[Any]
FOLDS = 10
#: Degradation: resolving power, amplitude of continuum waves, and telluric bands (first and last wavelength in
#: Angstrom, mean depth).
POWER_SEEN, WAVES = 1_440.0, 0.015
AIR = (
    (6_278.0, 6_325.0, 0.04),
    (6_868.0, 6_960.0, 0.25),
    (7_160.0, 7_350.0, 0.1),
)
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


def spoilt(rows: Sequence[dict[str, Any]], seed: int = 1) -> list[dict[str, Any]]:
    """Stars of MILES as seen by an instrument like LAMOST with an overstated resolving power."""
    generator = np.random.default_rng(seed)
    found = []
    for row in rows:
        usable = ~np.asarray(row["mask"]) & np.isfinite(row["flux"])
        old, power = np.asarray(row["wavelength"], float)[usable], POWER_SEEN
        weight = np.ones((1, len(old)))
        wavelength, (flux,), (counts,) = degraded(
            old, row["flux"][None, usable].astype(float), weight, MILES_POWER, power
        )
        x = np.log(wavelength / 5_500.0)
        for low, high, depth in AIR:
            within = (wavelength > low) & (wavelength < high)
            lines = generator.gamma(1.0, size=within.sum())
            flux[within] *= np.exp(-depth * generator.uniform(0.0, 2.0) * lines)
        period = np.exp(generator.uniform(np.log(0.05), np.log(0.4)))
        flux *= 1.0 + WAVES * np.sin(2.0 * np.pi * x / period + generator.uniform(0.0, 2.0 * np.pi))
        flux *= np.exp(generator.normal(0.0, 0.7) * x + generator.normal(0.0, 0.7) * x**2)
        error = np.sqrt(np.median(flux) * np.maximum(flux, 0.02)) / np.exp(
            generator.uniform(np.log(20.0), np.log(150.0))
        )
        flux += error * generator.standard_normal(flux.shape)
        found.append(
            {
                "object_id": row["object_id"],
                "wavelength": wavelength,
                "flux": flux.astype(np.float32),
                "flux_error": error.astype(np.float32),
                "mask": counts == 0,
                "resolving_power": LAMOST_POWER,
            }
        )
    return found


def answers(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]]) -> tuple[Array, Array, Array]:
    """Labels and errors (stars, 3), and flags (stars,)."""
    batches = list(predict_batches(model, tokenizer, batches_of(rows, tokenizer), LABELS))
    joined = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    flags = np.where(joined["reason"] != "", joined["reason"], joined["flags"])
    return (
        np.stack([joined[name] for name in LABELS], axis=1),
        np.stack([joined[f"{name}_err"] for name in LABELS], axis=1),
        flags,
    )


def ridge_in_folds(rows: Sequence[dict[str, Any]], labels: Array, seed: int = 0) -> Array:
    """Predictions of ridge regression on the other folds (stars, 3); the penalty is chosen within those."""
    flux = np.stack([np.where(row["mask"], np.nan, row["flux"]) for row in rows])
    level = np.nanmedian(flux, axis=1, keepdims=True)
    flux = np.nan_to_num(flux / level, nan=1.0)
    error = np.full(flux.shape, 0.01)
    fold = np.random.default_rng(seed).permutation(len(rows)) % FOLDS
    found = np.full(labels.shape, np.nan)

    def fitted(stars: Array, alpha: float) -> RidgeBaseline:
        chosen = labels[stars]
        train = Spectra(flux[stars], error[stars], chosen, np.zeros_like(chosen), np.zeros((len(chosen), 0)))
        return RidgeBaseline(alpha, transform="raw").fit(train)

    for number in range(FOLDS):
        train, test = fold != number, fold == number
        inner = train & (fold == (number + 1) % FOLDS)
        misses = [
            np.median(
                np.abs(fitted(train & ~inner, alpha).raw_predict(flux[inner], error[inner])[0] - labels[inner])
                / labels.std(axis=0)
            )
            for alpha in PENALTIES
        ]
        found[test] = fitted(train, PENALTIES[int(np.argmin(misses))]).raw_predict(flux[test], error[test])[0]
    return found


def table(name: str, found: Array, errors: Array | None, labels: Array) -> Iterator[str]:
    """One line for each label: scatter, bias, correlation, error/sigma."""
    inside = (labels[:, 0] > TEFF[0]) & (labels[:, 0] < TEFF[1])
    for i, label in enumerate(LABELS):
        known = inside & np.isfinite(found[:, i])
        miss = found[known, i] - labels[known, i]
        scatter, bias = robust_scatter(miss), np.median(miss)
        together = np.corrcoef(found[known, i], labels[known, i])[0, 1]
        ratio = "" if errors is None else f"{MAD_TO_SIGMA * np.median(np.abs(miss) / errors[known, i]):.2f}"
        digits = 0 if label == "teff" else 3
        figures = f"{scatter:.{digits}f} | {bias:+.{digits}f} | {together:.2f} | {ratio}"
        yield f"| {name} | {known.sum()} | {label} | {figures} |"


def report(arguments: argparse.Namespace) -> str:
    model, tokenizer = load_checkpoint(arguments.model)
    lines = [
        f"Stars of {TEFF[0]:g}-{TEFF[1]:g} K by their published labels; scatter: 1.4826 MAD; bias: median; r: "
        "correlation; error/sigma: 1.4826 median of |error| / sigma, with published labels as exact.",
        "",
        "| stars | n | label | scatter | bias | r | error/sigma |",
        "|---|---|---|---|---|---|---|",
    ]
    notes = []
    samples = {}
    if arguments.miles:
        rows, labels = miles(arguments.miles, arguments.split)
        samples[f"MILES {arguments.split}"] = rows, labels
        samples[f"MILES {arguments.split}, spoilt"] = spoilt(rows), labels
        splits = ("validation", "test") if arguments.split == "test" else (arguments.split,)
        (_, rows), labels = shared_stars(arguments.miles, splits)
        samples[f"STELIB, of MILES {' and '.join(splits)}"] = rows, labels
    if arguments.lamost:
        samples["LAMOST"] = lamost(arguments.lamost)
    basis = tokenizer.basis
    if basis is None:
        raise ValueError(f"model: expected one on evidence, got {arguments.model}")
    like = LikeObserved(basis, arguments.miles) if arguments.miles and arguments.synthetic else None
    for name, (rows, labels) in samples.items():
        found, errors, flags = answers(model, tokenizer, rows)
        lines += table(f"{name}, {arguments.model}", found, errors, labels)
        if name in (f"MILES {arguments.split}", "LAMOST"):
            ridge = ridge_in_folds(rows, labels)
            lines += table(f"{name}, ridge on its pixels, {FOLDS}-fold", ridge, None, labels)
            others = answers_of_rivals(basis, like, rows, arguments.synthetic) if like else {}
            for rival, answer in others.items():
                lines += table(f"{name}, {rival}", answer, None, labels)
        names, counts = np.unique([flag for joined in flags for flag in joined.split(";") if flag], return_counts=True)
        flag_counts = ", ".join(f"{flag} {count}" for flag, count in zip(names, counts, strict=True)) or "none"
        notes.append(f"Flags of {name}, of all {len(rows)} stars: {flag_counts}.")
    lines += ["", *notes, ""]
    if arguments.files:
        lines += stars_of_files(model, tokenizer, arguments.files)
    return "\n".join(lines)


def stars_of_files(model: Any, tokenizer: Any, folders: Sequence[Path]) -> Iterator[str]:
    """A table of single stars: published and predicted labels."""
    yield "| file | star | published (Teff, log g, [Fe/H]) | predicted | flags | source |"
    yield "|---|---|---|---|---|---|"
    for known, row in zip(*published_files(folders), strict=True):
        found, errors, flags = answers(model, tokenizer, [row])
        predicted = "; ".join(
            f"{value:.{digits}f} ± {error:.{digits}f}"
            for value, error, digits in zip(found[0], errors[0], (0, 2, 2), strict=True)
        )
        stated = "{:.0f}; {:.2f}; {:.2f}".format(*known.labels)
        yield f"| {known.file} | {known.star} | {stated} | {predicted} | {flags[0]} | {known.source} |"
    yield ""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="evaluate_observed.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="spectrafm-base", help="a bundled checkpoint, or a folder")
    parser.add_argument("--miles", type=Path, metavar="DIR", help="made by `spectrafm data miles`")
    parser.add_argument("--split", default="test", choices=("train", "validation", "test"), help="of MILES")
    parser.add_argument("--lamost", type=Path, metavar="FILE", help="arrays of labelled stars of LAMOST")
    parser.add_argument("--files", type=Path, nargs="+", metavar="DIR", help="files of stars with known labels")
    parser.add_argument("--synthetic", type=int, default=0, metavar="N", help="training stars of other networks")
    add_output(parser)
    arguments = parser.parse_args(argv)
    if not (arguments.miles or arguments.lamost):
        parser.error("--miles, --lamost: expected at least one of them")
    return print_and_write(report(arguments), arguments.output)


if __name__ == "__main__":
    sys.exit(main())
