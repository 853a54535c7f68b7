# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Calibrate the errors of a base model in the optical: writes a checkpoint with the same weights and other errors.

    spectrafm data miles --out miles
    python scripts/calibrate_survey.py spectrafm-base --miles miles --output runs/calibrated

The result is factors of the errors as a function of T_eff and of the missing information (`rung_error_curves`). They
are fitted to validation stars of MILES (unchanged, cut to the ranges of surveys, and as seen by other instruments) and
to synthetic stars through random surveys and instruments, with residuals of observed stars added. First the factors are
cross-checked, by a fit to one half of the stars and a table of error/sigma for the other half.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pretrain import TEMPERATURES, UNKNOWN_KNOTS, error_curves, interpolation

from spectrafm_hf import load_checkpoint
from spectrafm_hf.checkpoints import save_checkpoint
from spectrafm_hf.files import complete_file
from spectrafm_hf.inference.prediction import batches_of
from spectrafm_hf.inference.training_range import TrainingRange
from spectrafm_hf.statistics import MAD_TO_SIGMA
from spectrafm_hf.synthesis.bases import survey_grid
from spectrafm_hf.synthesis.survey_observed import LABEL_ERRORS, LABELS, LikeObserved, observed_stars
from spectrafm_hf.synthesis.survey_spectra import DrawnSpectra, observed_spectra, synthetic_spectra


Array = NDArray[Any]
OBSERVED_DRAWS, SYNTHETIC_STARS, SYNTHETIC_DRAWS = 20, 1_000, 60
#: Total weight of each group of spectra: observed, of surveys, and of random instruments.
STARS = 300.0
#: Fraction of the likely variance of a published label that is not attributed to the model. Errors of published labels
#: are poorly known.
LABEL_SHARE = 0.5
UNKNOWN_BINS = (-6.0, -1.5, -1.0, -0.6, -0.4, -0.2, -0.1, -0.04, 0.0)
TEFF_BINS = (3_000.0, 4_000.0, 4_500.0, 5_000.0, 5_500.0, 6_000.0, 7_000.0, 8_000.0)
LEAST_IN_BIN = 30


def answers_of(model: Any, tokenizer: Any, number: int, drawn: DrawnSpectra) -> dict[str, Array]:
    """Columns (spectra, labels) of the predictions of the network, for a rung."""
    names = list(model.config.network_labels)
    parts = []
    for batch in batches_of(drawn.rows, tokenizer):
        with torch.no_grad():
            outputs = model(**tokenizer(batch, requests=names))
        found = outputs.predictions, outputs.prediction_errors, outputs.unknown[:, number]
        parts.append([part.double().numpy() for part in found])
    value, sigma, unknown = (np.concatenate(part) for part in zip(*parts, strict=True))
    n, error = len(value), dict(zip(LABELS, np.array(LABEL_ERRORS) * np.sqrt(LABEL_SHARE), strict=True))
    truth = np.stack([drawn.labels.get(name, np.full(n, np.nan)) for name in names], axis=1)
    observed = drawn.kind == "observed"
    return {
        "residual": value - truth,
        "sigma": sigma,
        "label_error": np.tile([error.get(name, 0.0) * observed for name in names], (n, 1)),
        "teff": value[:, names.index("teff")],
        "unknown": unknown,
        "star": drawn.stars + (0 if observed else 1_000_000),
        "group": np.full(n, 0 if observed else 2 if drawn.name == "drawn" else 1),
        "name": np.full(n, f"{drawn.kind}, {drawn.name}"),
    }


def sample(model: Any, tokenizer: Any, number: int, folder: Path, seed: int) -> dict[str, Array]:
    """Columns of all spectra with predictions within the training range."""
    generator, grid = np.random.default_rng(seed), survey_grid()
    like = LikeObserved(tokenizer.basis, folder)
    parts = [
        answers_of(model, tokenizer, number, drawn)
        for source in (
            observed_spectra(observed_stars(folder, "validation"), OBSERVED_DRAWS, generator),
            synthetic_spectra(grid, like, SYNTHETIC_STARS, SYNTHETIC_DRAWS, generator),
        )
        for drawn in source
    ]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    low, high = model.config.label_ranges[number]["teff"]
    seen = np.isfinite(columns["sigma"]).all(axis=1) & np.isfinite(columns["unknown"])  # others are of another rung
    kept = seen & (columns["teff"] > low) & (columns["teff"] < high)
    return {name: values[kept] for name, values in columns.items()}


def counts_of(columns: dict[str, Array]) -> Array:
    """(spectra,): weights. All stars of a group have the same weight, whatever their number of spectra."""
    keys = np.stack([columns["star"], columns["group"]])
    _, which, number = np.unique(keys, axis=1, return_inverse=True, return_counts=True)
    counts = 1.0 / number[which.ravel()]
    for group in range(3):
        own = columns["group"] == group
        counts[own] *= STARS / max(counts[own].sum(), 1.0)
    return counts


def fitted(columns: dict[str, Array], knots: Sequence[Sequence[float]]) -> list[list[list[float]]]:
    """Curves of each label, of which the first has the factor as well."""
    design = [interpolation(columns[name], own) for name, own in zip(("teff", "unknown"), knots, strict=True)]
    counts, found = counts_of(columns), []
    for residual, sigma, error in zip(*(columns[name].T for name in ("residual", "sigma", "label_error")), strict=True):
        factor, (first, second) = error_curves(residual, sigma, error, design, counts)
        found.append([np.round(np.array(first) + np.log(factor), 4).tolist(), second])
    return found


def factors(columns: dict[str, Array], knots: Sequence[Sequence[float]], curves: list[list[list[float]]]) -> Array:
    """(spectra, labels)."""
    design = [interpolation(columns[name], own) for name, own in zip(("teff", "unknown"), knots, strict=True)]
    return np.exp([sum(part @ np.array(c) for part, c in zip(design, of, strict=True)) for of in curves]).T


def cross_checked(columns: dict[str, Array], knots: Sequence[Sequence[float]]) -> Array:
    """Factors (spectra, labels) of each half of the stars, from the other."""
    found = np.ones_like(columns["sigma"])
    half = np.random.default_rng(0).permutation(2_000_000)[columns["star"]] % 2 == 0
    for train in (half, ~half):
        curves = fitted({name: values[train] for name, values in columns.items()}, knots)
        rest = {name: values[~train] for name, values in columns.items()}
        found[~train] = factors(rest, knots, curves)
    return found


def table(columns: dict[str, Array], factor: Array, names: Sequence[str]) -> Iterator[str]:
    """Lines of error/sigma with and without factors, and of the median sigma."""
    yield "| spectra | n | error/sigma before | error/sigma | labels taken for exact | sigma before | sigma |"
    yield "|---|---|---|---|---|---|---|"
    residual, sigma, error = (columns[name] for name in ("residual", "sigma", "label_error"))

    def joined(values: Array, digits: Sequence[int]) -> str:
        return " / ".join("" if np.isnan(x) else f"{x:.{n}f}" for x, n in zip(values, digits, strict=True))

    def line(name: str, own: Array) -> str:
        def ratio(size: Array, about: Array | float) -> str:
            with np.errstate(invalid="ignore"):
                z = np.abs(residual / np.hypot(size, about))[own]
            found = [MAD_TO_SIGMA * np.median(x[np.isfinite(x)]) if np.isfinite(x).any() else np.nan for x in z.T]
            return joined(np.array(found), [2] * len(names))

        digits = [0 if label == "teff" else 3 for label in names]
        sizes = [joined(np.median(size[own], axis=0), digits) for size in (sigma, sigma * factor)]
        ratios = ratio(sigma, error), ratio(sigma * factor, error), ratio(sigma * factor, 0.0)
        return f"| {name} | {own.sum()} | {' | '.join((*ratios, *sizes))} |"

    observed = columns["group"] == 0
    for name in dict.fromkeys(columns["name"]):
        yield line(name, columns["name"] == name)
    for kind, chosen in (("observed", observed), ("synthetic", ~observed)):
        for column, bins in (("teff", TEFF_BINS), ("unknown", UNKNOWN_BINS)):
            for low, high in zip(bins[:-1], bins[1:], strict=True):
                own = chosen & (columns[column] >= low) & (columns[column] < high)
                if own.sum() >= LEAST_IN_BIN:
                    yield line(f"{kind}, {column} {low:g} to {high:g}", own)


def calibrate(model: Any, tokenizer: Any, folder: Path, seed: int = 0) -> list[str]:
    """Set `rung_error_knots` and `rung_error_curves` of the optical; lines of a table of the cross-check."""
    config, names = model.config, list(model.config.network_labels)
    number = [rung.guesses_power for rung in tokenizer.basis.rungs].index(True)
    rungs = len(config.rung_intervals)
    all_knots = list(config.rung_error_knots or [[] for _ in range(rungs)])
    all_curves = list(config.rung_error_curves or [{} for _ in range(rungs)])
    all_knots[number], all_curves[number] = [], {}
    config.rung_error_knots, config.rung_error_curves = all_knots, all_curves
    columns = sample(model.eval(), tokenizer, number, folder, seed)
    knots = [TEMPERATURES, np.percentile(columns["unknown"], UNKNOWN_KNOTS).round(4).tolist()]
    lines = list(table(columns, cross_checked(columns, knots), names))
    all_knots[number], all_curves[number] = knots, dict(zip(names, fitted(columns, knots), strict=True))
    config.rung_error_knots, config.rung_error_curves = all_knots, all_curves
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="calibrate_survey.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="a bundled checkpoint, or a folder")
    parser.add_argument("--miles", type=Path, required=True, metavar="DIR", help="made by `spectrafm data miles`")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the checkpoint to write")
    parser.add_argument("--table", type=Path, metavar="FILE.md", help="also write the table of the cross-check here")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    model, tokenizer = load_checkpoint(arguments.model)
    if tokenizer.basis is None or not any(rung.guesses_power for rung in tokenizer.basis.rungs):
        raise ValueError(f"model: expected one with a rung of the optical, got {arguments.model}")
    ranges = TrainingRange.load(str(model.name_or_path))
    text = "\n".join([*calibrate(model, tokenizer, arguments.miles, arguments.seed), ""])
    print(text)
    save_checkpoint(model, tokenizer, arguments.output)
    if ranges is not None:
        ranges.save(arguments.output)
    if arguments.table:
        with complete_file(arguments.table) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
