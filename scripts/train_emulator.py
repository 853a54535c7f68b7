#!/usr/bin/env python
# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Fit an emulator to a grid of synthetic spectra, evaluate it on held-out stars, and save both.

    python scripts/train_emulator.py GRID --output DIR [--held-out 100] [--resolving-power 22500]
    python scripts/train_emulator.py GRID --output DIR --intervals [--hold-out-every 10] [--learning-curve 100 200]
                                     [--derivatives 3]

GRID is a folder made by scripts/synthesize_grid.py, complete or not, or an .npz file (see
spectrafm_hf.synthesis.emulation.read_grid). The last stars of the grid are held out, or every n-th; the evaluated
emulator is saved. --intervals is for long spectra at high resolution (see
spectrafm_hf.synthesis.emulation.fit_interval_emulator) and measures at R = 2,000 and 20,000, by Teff and range.
--derivatives compares those of held-out stars with the synthesis, which it runs. DIR gets the checkpoint, accuracy.json
and README.md.

The optical emulator:

    python scripts/train_emulator.py GRID --output emulator-optical --intervals --hold-out-every 12 \\
        --components 2 8 30 60 60 --learning-curve 600 1000 --derivatives 2
"""

import argparse
import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import ModelCard, ModelCardData

from spectrafm_hf import SpectrumEmulator
from spectrafm_hf.synthesis import Synthesizer
from spectrafm_hf.synthesis.emulation import (
    Grid,
    emulator_errors,
    fit_emulator,
    fit_interval_emulator,
    read_grid,
    resolution_errors,
)
from spectrafm_hf.synthesis.sampling import SAMPLINGS


TEFF_BINS: tuple[float, ...] = (0, 3500, 4000, 4500, 5000, 6000, 9000)
# Angstrom, vacuum.
RANGES: tuple[tuple[float, float], ...] = (
    (3301, 4000),
    (4000, 5000),
    (5000, 6000),
    (6000, 7000),
    (7000, 8500),
    (8500, 10300),
)
RESOLVING_POWERS = (2000.0, 20000.0)
STEPS = {"teff": 50.0, "logg": 0.1, "li_fe": 0.2}  # of finite differences to both sides; 0.1 of other labels
FE_H_BINS: tuple[float, ...] = (-9, -1, -0.5, 0, 9)


def accuracy_table(labels: np.ndarray, errors: np.ndarray) -> list[dict]:
    """Median and 90th percentile of the errors (percent), by Teff, by [Fe/H], and for all stars."""
    rows = []

    def add(name, chosen):
        if chosen.any():
            median, p90 = (round(100 * float(np.percentile(errors[chosen], q)), 4) for q in (50, 90))
            rows.append({"stars": name, "n": int(chosen.sum()), "median": median, "p90": p90})

    teff, fe_h = labels[:, 0], labels[:, 2]
    add("all", np.isfinite(teff))
    add("Teff > 4000 K", teff > 4000)
    add("Teff <= 4000 K", teff <= 4000)
    for name, column, bins in (("Teff {}-{} K", teff, TEFF_BINS), ("[Fe/H] {} to {}", fe_h, FE_H_BINS)):
        for low, high in pairwise(bins):
            add(name.format(low, high), (column > low) & (column <= high))
    return rows


CARD = """---
{metadata}
---

# {name}

Labels in, synthetic spectrum out: `SpectrumEmulator.from_pretrained(bundled("{name}")).synthesize(teff=4800, logg=2.5,
fe_h=-0.2, mg_fe=0.1)`. Fitted to {n_fitted} spectra of a grid synthesised with Turbospectrum and MARCS atmospheres.

- wavelength: {first:.1f}-{last:.1f} Angstrom (vacuum), {pixels:,} pixels, {resolution}
- flux: {flux}
- labels and their range in the grid: {labels}
- it refuses labels outside that range, and stars far from every star of the grid in Teff, log g and [Fe/H]

## Accuracy

Rms over pixels of emulated against synthesised flux, {what}, for {n_held_out} stars of the grid that were held out
(`scripts/train_emulator.py`); percent.

| stars | n | median | 90th percentile |
|---|---|---|---|
{table}
{sections}
This is the error of the emulator, not of the synthesis: real spectra differ from synthetic ones by much more.
"""


def resolution_table(emulator: SpectrumEmulator, held_out: Grid) -> list[dict]:
    """Median rms (percent of the continuum) by resolving power, wavelength range and Teff."""
    teff, rows = held_out.labels[:, 0], []
    for power in RESOLVING_POWERS:
        errors = resolution_errors(emulator, held_out, power, RANGES)
        for i, (low, high) in enumerate((*RANGES, (RANGES[0][0], RANGES[-1][1]))):
            row = {"resolving_power": power, "range": [low, high]}
            for cool, hot in (*pairwise(TEFF_BINS), (4500, 9000)):
                chosen = (teff > cool) & (teff <= hot)
                if chosen.any():
                    row[f"Teff {cool}-{hot} K"] = round(100 * float(np.median(errors[chosen, i])), 3)
            rows.append(row)
    return rows


def markdown(rows: list[dict]) -> str:
    """A table of rows that share their keys."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join(lines + ["| " + " | ".join(str(value) for value in row.values()) + " |" for row in rows])


def derivative_table(emulator: SpectrumEmulator, held_out: Grid, n: int) -> list[dict]:
    """
    Derivatives of the flux of `n` held-out stars against finite differences of the synthesis at R = 20,000.

    `ratio` is the slope of a regression of the emulator's on the synthesis's, `correlation` theirs over pixels, `rms`
    that of the difference over that of the synthesis's. All are medians over the stars.
    """
    synthesizer = Synthesizer(3300.0, 10302.0, 4e-6, relative=True, spherical_below=-1.0)
    names = list(emulator.config.label_names)
    warm = np.flatnonzero(held_out.labels[:, 0] > 4500)
    stars = warm[np.linspace(0, len(warm) - 1, n).round().astype(int)]
    rows = []
    for name in names:
        figures = []
        for star in stars:
            spectra = []
            for sign in (1, -1):
                moved = held_out.labels[star].copy()
                moved[names.index(name)] += sign * STEPS.get(name, 0.1)
                truth = SAMPLINGS["r20000"](
                    synthesizer.synthesize(dict(zip(names, map(float, moved), strict=True)))
                ).flux
                table = torch.from_numpy(moved[None])
                with torch.no_grad():
                    spectra.append((sign * emulator(table)[0][0].double().numpy(), sign * truth))
            emulated, truth = (sum(pair) for pair in zip(*spectra, strict=True))
            figures.append(
                (
                    (emulated @ truth) / (truth @ truth),
                    np.corrcoef(emulated, truth)[0, 1],
                    np.linalg.norm(emulated - truth) / np.linalg.norm(truth),
                )
            )
        ratio, correlation, rms = (round(float(value), 3) for value in np.median(figures, axis=0))
        rows.append({"label": name, "ratio": ratio, "correlation": correlation, "rms": rms})
    return rows


def split(grid: Grid, arguments: argparse.Namespace) -> tuple[Grid, Grid]:
    """The stars to fit and those held out; `ValueError` naming the option."""
    if every := arguments.hold_out_every:
        if not 2 <= every <= len(grid):
            raise ValueError(f"--hold-out-every: expected 2 to {len(grid)}, got {every}")
        held_out = np.arange(len(grid)) % every == every // 2
        return grid[~held_out], grid[held_out]
    if not 0 < arguments.held_out < len(grid) - 200:
        raise ValueError(f"--held-out: expected 1 to {len(grid) - 201} of {len(grid)}, got {arguments.held_out}")
    return grid[: -arguments.held_out], grid[-arguments.held_out :]


def fit(fitted: Grid, held_out: Grid, arguments: argparse.Namespace) -> tuple[SpectrumEmulator, list[dict]]:
    """The emulator, and the errors of emulators fitted to fewer stars."""
    settings = (arguments.components, arguments.resolving_power, arguments.steps)
    if not arguments.intervals:
        return fit_emulator(fitted, *settings), []
    rows = []
    warm = held_out[held_out.labels[:, 0] > 4500]

    def emulate(stars):
        emulator = fit_interval_emulator(stars, *settings, directions=arguments.directions)
        if arguments.learning_curve:
            covered = warm[emulator.covers(warm.labels)]
            errors = [resolution_errors(emulator, covered, power, []) for power in RESOLVING_POWERS]
            figures = [round(100 * float(np.median(error)), 3) for error in errors]
            names = [f"R = {power:,.0f}" for power in RESOLVING_POWERS]
            rows.append({"stars": len(stars), **dict(zip(names, figures, strict=True))})
        return emulator

    for number in arguments.learning_curve:
        emulate(fitted[:number])
    return emulate(fitted), rows


DERIVATIVES = """
## Derivatives

Of the flux of held-out stars above 4,500 K by each label, against finite differences of the synthesis, over all pixels
without a line spread function; medians over the stars. `ratio`: slope of a regression of the emulator's on the
synthesis's; `correlation` of the two; `rms` of the difference in units of that of the synthesis's.

"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--held-out", type=int, default=100, metavar="N", help="the last N stars (default: 100)")
    parser.add_argument("--hold-out-every", type=int, metavar="N", help="every N-th star instead")
    parser.add_argument("--resolving-power", type=float, default=0.0, metavar="R")
    parser.add_argument("--components", type=int, nargs="+", default=[8, 32, 110], metavar="N", help="in groups")
    parser.add_argument("--steps", type=int, default=250, help="steps of the fit of a group (default: 250)")
    parser.add_argument("--intervals", action="store_true", help="use a basis for each interval")
    parser.add_argument("--directions", type=int, default=48, help="of an interval (default: 48)")
    parser.add_argument(
        "--learning-curve", type=int, nargs="*", default=[], metavar="N", help="also fit to these numbers of stars"
    )
    parser.add_argument(
        "--derivatives", type=int, default=0, metavar="STARS", help="compare derivatives of this number of stars"
    )
    arguments = parser.parse_args(argv)
    try:
        grid = read_grid(arguments.grid)
        fitted, held_out = split(grid, arguments)
        emulator, curve = fit(fitted, held_out, arguments)
    except (ValueError, OSError) as error:
        print(f"train_emulator: {error}", file=sys.stderr)
        return 2
    covered = emulator.covers(held_out.labels)
    errors = emulator_errors(emulator, held_out[covered])
    rows = accuracy_table(held_out.labels[covered], errors)
    emulator.save_pretrained(arguments.output)
    config = emulator.config
    what = "in units of the mean flux of the star" if config.fluxed else "of the continuum-normalised flux"
    accuracy: dict[str, Any] = {
        "what": f"rms over pixels {what}, percent",
        "n_fitted": len(fitted),
        "n_held_out": len(held_out),
        "n_refused": int((~covered).sum()),
        "table": rows,
    }
    sections = ""
    if arguments.intervals:
        accuracy["by_resolution"] = resolution_table(emulator, held_out[covered])
        sections += "\n## By resolving power and range\n\nMedian rms of the continuum-normalised flux, percent.\n\n"
        sections += markdown(accuracy["by_resolution"]) + "\n"
    if curve:
        accuracy["learning_curve"] = curve
        sections += "\n## By the number of stars\n\nAs above, whole range, Teff > 4,500 K.\n\n" + markdown(curve) + "\n"
    if arguments.derivatives:
        accuracy["derivatives"] = derivative_table(emulator, held_out[covered], arguments.derivatives)
        sections += DERIVATIVES + markdown(accuracy["derivatives"]) + "\n"
    (arguments.output / "accuracy.json").write_text(json.dumps(accuracy, indent=1) + "\n")
    table = "\n".join(f"| {row['stars']} | {row['n']} | {row['median']:.3f} | {row['p90']:.3f} |" for row in rows)
    tags = ["astronomy", "spectroscopy", "synthetic-spectra"]
    metadata = ModelCardData(license="apache-2.0", library_name="transformers", pipeline_tag="other", tags=tags)
    ranges = zip(config.label_names, config.label_minimum, config.label_maximum, config.label_units, strict=True)
    card = CARD.format(
        metadata=metadata.to_yaml(),
        name=arguments.output.name,
        n_fitted=len(fitted),
        first=grid.wavelength[0],
        last=grid.wavelength[-1],
        pixels=len(grid.wavelength),
        resolution=f"R = {config.resolving_power:,.0f}" if config.resolving_power else "means over each pixel",
        flux=f"in {config.flux_unit} at the surface of the star, or continuum-normalised"
        if config.fluxed
        else "continuum-normalised",
        labels=", ".join(f"{name} {low:.4g} to {high:.4g} {unit}".strip() for name, low, high, unit in ranges),
        what=what,
        n_held_out=int(covered.sum()),
        table=table,
        sections=sections,
    )
    ModelCard(card).save(arguments.output / "README.md")
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
