#!/usr/bin/env python
# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
The Cramer-Rao bound of stellar labels for any instrument, and comparison of a checkpoint with it.

    python scripts/paper/cramer_rao.py --instrument apogee --snr 50 100 200
    python scripts/paper/cramer_rao.py --instrument my.yaml --range 15860 16430         # only these pixels
    python scripts/paper/cramer_rao.py --instrument apogee --model spectrafm-base --stars 1000 --output bound.json

No unbiased estimate has a smaller scatter; see `spectrafm_hf.synthesis.bounds` for the unknown parameters. The stars
are synthetic and held out: no training draws them, whatever its seed. Use another `--seed` for final figures than
during development. With `--model`, the checkpoint predicts the same stars with noise, and the table has

- `bound`: median over the stars of the bound of one star;
- `scatter`: 1.4826 MAD of predicted - true; `bias`: the median of predicted - true;
- `ratio`: scatter / bound;
- `strict`: scatter / the scatter that these stars would have if each were at its bound. That is less than the median
  where bounds differ from star to star ([N/Fe]: a fifth), so that a perfect model has a `ratio` below 1;
- `error/sigma`: 1.4826 median of |predicted - true| / error, 1 where errors are right.

A model that has learnt the distribution of labels can be better than the bound if the spectrum has little information.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from spectrafm_cli.arguments import Parser
from spectrafm_hf.checkpoints import load_checkpoint
from spectrafm_hf.data import LABEL_UNITS
from spectrafm_hf.files import write_json
from spectrafm_hf.hub.cards import checksums
from spectrafm_hf.inference.prediction import batches_of, predict_batches
from spectrafm_hf.statistics import MAD_TO_SIGMA, robust_scatter
from spectrafm_hf.synthesis.bounds import (
    CHUNK,
    OTHER_PRIOR,
    PRIORS,
    Observed,
    cramer_rao,
    expected_scatter,
    held_out_labels,
    label_bound,
    label_weights,
    observe,
    pixel_errors,
)
from spectrafm_hf.synthesis.instruments import Instrument
from spectrafm_hf.synthesis.synthetic import load_emulator


Array = NDArray[Any]
Pair = tuple[float, float]

DEFAULT_RANGES: dict[str, Pair] = {"teff": (4000.0, 6000.0), "fe_h": (-1.0, 1.0)}


def inside(wavelength: Array, ranges: Sequence[Pair]) -> Array:
    """Which pixels lie in one of the ranges, shape (pixels,)."""
    return np.any([(wavelength >= low) & (wavelength <= high) for low, high in ranges], axis=0)


def bounds(observed: Observed, errors: Array, used: Array, labels: Sequence[str]) -> dict[str, Array]:
    """Bound of each label, shape (stars,), from the pixels that are used."""
    assert observed.jacobian is not None
    ivar = np.where(used, 1 / errors.astype(np.float64) ** 2, 0.0)
    covariance = cramer_rao(observed.jacobian, ivar, observed.prior)
    return {name: label_bound(covariance, observed.names, name) for name in labels}


class Checkpoint:
    """A model, and the figures of its predictions."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.model, self.tokenizer = load_checkpoint(name)
        self.about = {"name": name, **checksums(self.model, self.tokenizer)}
        if torch.cuda.is_available():
            self.model.cuda()  # type: ignore[call-arg]  # transformers wraps it without its types

    def predict(
        self, wavelength: Array, flux: Array, errors: Array, mask: Array, labels: Sequence[str]
    ) -> dict[str, Array]:
        """Columns of `predict_batches` for spectra on one grid."""

        def rows() -> Iterator[dict[str, Any]]:
            for i in tqdm(range(len(flux)), desc=f"predicting with {self.name}", unit="star", delay=2):
                pixels = {"wavelength": wavelength, "flux": flux[i], "flux_error": errors[i], "mask": mask}
                yield {"object_id": str(i), **pixels}

        batches = batches_of(rows(), self.tokenizer)
        answers = list(predict_batches(self.model, self.tokenizer, batches, list(labels)))
        return {name: np.concatenate([answer[name] for answer in answers]) for name in answers[0]}


def accuracy(values: Array, errors: Array, truth: Array, bound: Array) -> dict[str, float | int]:
    """Figures of one label over the stars that got an answer."""
    answered = np.isfinite(values)
    residual = (values - truth)[answered]
    scatter, at_bound = robust_scatter(residual), expected_scatter(bound[answered])
    return {
        "answered": int(answered.sum()),
        "scatter": scatter,
        "bias": float(np.median(residual)) if residual.size else float("nan"),
        "error_over_sigma": float(MAD_TO_SIGMA * np.median(np.abs(residual) / errors[answered]))
        if residual.size
        else float("nan"),
        "ratio": scatter / float(np.median(bound)),
        "strict_ratio": scatter / at_bound,
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures of the command, as they are written."""
    instrument = Instrument.load(arguments.instrument)
    emulator = load_emulator(arguments.emulator or instrument.emulator)
    ranges = DEFAULT_RANGES | arguments.label_range
    table = held_out_labels(emulator, arguments.stars, arguments.seed, ranges)
    generator = np.random.default_rng([arguments.seed, 1])
    wavelength = instrument.wavelength
    seen = inside(wavelength, arguments.range) if arguments.range else np.ones(len(wavelength), bool)
    mask = instrument.mask | (inside(wavelength, arguments.mask) if arguments.mask else False)
    if not (seen & ~mask).any():
        raise ValueError(f"range, mask: expected some that leave pixels of {instrument.name}, got none left")

    emulated = list(emulator.config.label_names)
    labels = [*emulated[:3], "alpha_m", *emulated[3:]]
    checkpoint = Checkpoint(arguments.model) if arguments.model else None
    if checkpoint:
        known = list(checkpoint.model.config.label_names)
        labels = [name for name in labels if name in known]
        if not labels:
            raise ValueError(f"model: expected labels out of {emulated}, got {known}")
    truth = {name: table @ label_weights(emulated, name) for name in labels}

    # A few stars at a time: the derivatives of all would not fit the memory.
    parts: list[Observed] = []
    found: dict[float, list[dict[str, Array]]] = {snr: [] for snr in arguments.snr}
    for start in tqdm(range(0, len(table), CHUNK), desc="bounds", unit=f"{CHUNK} stars", delay=2):
        part = observe(instrument, emulator, table[start : start + CHUNK], generator, priors=arguments.prior)
        for snr in arguments.snr:
            errors = pixel_errors(instrument, part.flux, snr, white=arguments.white)
            found[snr].append(bounds(part, errors, seen & ~mask, labels))
        parts.append(replace(part, jacobian=None))
    flux = np.concatenate([part.flux for part in parts])
    report: dict[str, Any] = {
        "instrument": instrument.name,
        "emulator": Path(arguments.emulator or instrument.emulator).name,
        "pixels": {"all": len(wavelength), "used": int((seen & ~mask).sum())},
        "range": [list(pair) for pair in arguments.range],
        "mask": [list(pair) for pair in arguments.mask],
        "noise": "white" if arguments.white else "as the instrument has it",
        "independent_noise": not instrument.noise.correlation,
        "stars": len(table),
        "seed": arguments.seed,
        "label_ranges": {name: list(pair) for name, pair in ranges.items()},
        "prior": dict(zip(parts[0].names, parts[0].prior.tolist(), strict=True)),
        "units": {name: LABEL_UNITS.get(name, "") for name in labels},
        "model": checkpoint.about if checkpoint else None,
        "results": {},
    }
    for snr in arguments.snr:
        bound = {name: np.concatenate([part[name] for part in found[snr]]) for name in labels}
        results: dict[str, dict[str, Any]] = {
            name: {"bound": float(np.median(sigma)), "scatter_at_bound": expected_scatter(sigma)}
            for name, sigma in bound.items()
        }
        if checkpoint:
            errors = pixel_errors(instrument, flux, snr, white=arguments.white)
            noisy = flux + errors * np.random.default_rng([arguments.seed, 2]).standard_normal(flux.shape, np.float32)
            level = np.median(noisy, axis=1, keepdims=True) if instrument.normalisation == "median" else np.float32(1)
            noisy, errors = (noisy / level)[:, seen], (errors / level)[:, seen]
            answers = checkpoint.predict(wavelength[seen], noisy, errors, mask[seen], labels)
            for name in labels:
                results[name] |= accuracy(answers[name], answers[f"{name}_err"], truth[name], bound[name])
        report["results"][f"{snr:g}"] = results
    return report


# ---------------------------------------------------------------------------------------------------------------- table


def number(name: str, value: float, sign: str = "") -> str:
    """Format with suitable decimals: one for temperatures."""
    return f"{value:{sign}.{1 if name == 'teff' else 4}f}"


def as_text(report: Mapping[str, Any]) -> str:
    """What is printed: how it was made, then a table for each S/N, or one of bounds only."""
    pixels, prior = report["pixels"], report["prior"]
    weak = ", ".join(f"{name} {prior[name]:g}" for name in prior if prior[name] != OTHER_PRIOR)
    lines = [
        f"{report['instrument']}, {pixels['used']:,} of {pixels['all']:,} pixels; "
        f"{report['stars']:,} held-out stars of {report['emulator']} (seed {report['seed']}); noise: {report['noise']}",
        "stars: " + ", ".join(f"{low:g} <= {name} <= {high:g}" for name, (low, high) in report["label_ranges"].items()),
        f"free: {', '.join(prior)}",
        f"one sigma of the priors: {weak}; all others {OTHER_PRIOR:g}",
    ]
    if not report["independent_noise"]:
        lines.append("The noise of this instrument is correlated; here it is independent, of the same errors.")
    names = {name: f"{name} [{unit.split(' (')[0]}]" for name, unit in report["units"].items()}
    width = max(map(len, names.values()))
    results = report["results"]
    if report["model"] is None:
        lines += ["", "bound of one star (median)", " " * width + "".join(f"{f'S/N {snr}':>12}" for snr in results)]
        for name, title in names.items():
            found = "".join(f"{number(name, figures[name]['bound']):>12}" for figures in results.values())
            lines.append(f"{title:<{width}}{found}")
        return "\n".join(lines)
    for snr, figures in results.items():
        head = "".join(f"{title:>12}" for title in ("bound", "scatter", "ratio", "strict", "bias", "error/sigma", "n"))
        lines += ["", f"{report['model']['name']}, S/N {snr}", " " * width + head]
        for name, title in names.items():
            row = figures[name]
            cells = [
                number(name, row["bound"]),
                number(name, row["scatter"]),
                f"{row['ratio']:.2f}",
                f"{row['strict_ratio']:.2f}",
                number(name, row["bias"], "+"),
                f"{row['error_over_sigma']:.2f}",
                f"{row['answered']:,}",
            ]
            lines.append(f"{title:<{width}}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------------------- command


class _ByLabel(argparse.Action):
    """`LABEL NUMBER ...`, once for each label: a dictionary of a number, or of a tuple of them."""

    def __call__(self, parser, namespace, values, option_string=None):
        name, *texts = values
        try:
            numbers = tuple(float(text) for text in texts)
        except ValueError:
            parser.error(f"{option_string}: expected a label and numbers, got {' '.join(values)!r}")
        kept = {**getattr(namespace, self.dest), name: numbers[0] if len(numbers) == 1 else numbers}
        setattr(namespace, self.dest, kept)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 0, or 2 for bad input (one line on stderr)."""
    parser = Parser(prog="cramer_rao.py", description="The Cramer-Rao bound of stellar labels for any instrument.")
    parser.add_argument("--instrument", default="apogee", metavar="NAME_OR_YAML")
    parser.add_argument("--emulator", metavar="NAME_OR_FOLDER", help="default: the one that the instrument names")
    parser.add_argument("--snr", type=float, nargs="+", default=[50.0, 100.0, 200.0], metavar="S/N", help="per pixel")
    parser.add_argument("--white", action="store_true", help="the same error in all pixels of a star")
    parser.add_argument(
        "--range",
        type=float,
        nargs=2,
        action="append",
        default=[],
        metavar=("LOW", "HIGH"),
        help="Angstrom in vacuum: the spectrum has no other pixels (may be repeated)",
    )
    parser.add_argument(
        "--mask",
        type=float,
        nargs=2,
        action="append",
        default=[],
        metavar=("LOW", "HIGH"),
        help="Angstrom in vacuum: these pixels are masked (may be repeated)",
    )
    parser.add_argument("--stars", type=int, default=500, metavar="N")
    parser.add_argument("--seed", type=int, default=0, help="of the held-out stars and their noise (default 0)")
    default_ranges = ", ".join(f"{name} {low:g} {high:g}" for name, (low, high) in DEFAULT_RANGES.items())
    parser.add_argument(
        "--label-range",
        nargs=3,
        action=_ByLabel,
        default={},
        metavar=("LABEL", "LOW", "HIGH"),
        help=f"stars within it only (may be repeated; default {default_ranges})",
    )
    default_priors = ", ".join(f"{name} {sigma:g}" for name, sigma in PRIORS.items())
    parser.add_argument(
        "--prior",
        nargs=2,
        action=_ByLabel,
        default={},
        metavar=("LABEL", "SIGMA"),
        help=f"one sigma of its prior (may be repeated; default {default_priors}, others {OTHER_PRIOR:g})",
    )
    parser.add_argument("--model", metavar="NAME_OR_FOLDER", help="a checkpoint that predicts the same stars")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON with all figures and how they were made")
    arguments = parser.parse_args(argv)
    command_line = list(sys.argv[1:] if argv is None else argv)
    try:
        for field in ("range", "mask"):
            for low, high in getattr(arguments, field):
                if not low < high:
                    raise ValueError(f"{field}: expected the lower wavelength first, got {low:g} {high:g}")
        if arguments.output and not arguments.output.absolute().parent.is_dir():
            raise ValueError(f"output: expected a folder that exists, got {arguments.output.parent}")
        report = {"command": shlex.join(["python", "scripts/paper/cramer_rao.py", *command_line]), **measure(arguments)}
        print(as_text(report))
        if arguments.output:
            write_json(arguments.output, report)
            print(f"\nwritten: {arguments.output}")
    except (ValueError, OSError) as error:
        print(f"cramer_rao.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
