#!/usr/bin/env python
# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Fit an emulator to a grid of synthetic spectra, measure it on stars that were held out, and save both.

    python scripts/train_emulator.py GRID --output DIR [--held-out 100] [--resolving-power 22500]

GRID is a folder made by scripts/synthesize_grid.py, or an .npz file (see spectrafm_hf.emulation.read_grid). The last
stars of the grid are held out; the emulator that is saved is the one that is measured. DIR gets the checkpoint,
accuracy.json and README.md.
"""

import argparse
import json
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
from huggingface_hub import ModelCard, ModelCardData

from spectrafm_hf.emulation import emulator_errors, fit_emulator, read_grid


TEFF_BINS: tuple[float, ...] = (0, 3500, 4000, 4500, 5000, 6000, 9000)
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

This is the error of the emulator, not of the synthesis: real spectra differ from synthetic ones by far more.
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--held-out", type=int, default=100, metavar="N")
    parser.add_argument("--resolving-power", type=float, default=0.0, metavar="R")
    parser.add_argument("--components", type=int, nargs="+", default=[8, 32, 110], metavar="N", help="in groups")
    parser.add_argument("--steps", type=int, default=250, help="of the fit of each group")
    arguments = parser.parse_args(argv)
    try:
        grid = read_grid(arguments.grid)
        if not 0 < arguments.held_out < len(grid) - 200:
            raise ValueError(f"--held-out: expected 1 to {len(grid) - 201} of {len(grid)}, got {arguments.held_out}")
    except (ValueError, OSError) as error:
        print(f"train_emulator: {error}", file=sys.stderr)
        return 2
    fitted, held_out = grid[: -arguments.held_out], grid[-arguments.held_out :]
    emulator = fit_emulator(fitted, arguments.components, arguments.resolving_power, arguments.steps)
    covered = emulator.covers(held_out.labels)
    errors = emulator_errors(emulator, held_out[covered])
    rows = accuracy_table(held_out.labels[covered], errors)
    emulator.save_pretrained(arguments.output)
    config = emulator.config
    what = "in units of the mean flux of the star" if config.fluxed else "of the continuum-normalised flux"
    accuracy = {
        "what": f"rms over pixels {what}, percent",
        "n_fitted": len(fitted),
        "n_held_out": len(held_out),
        "n_refused": int((~covered).sum()),
        "table": rows,
    }
    (arguments.output / "accuracy.json").write_text(json.dumps(accuracy, indent=1) + "\n")
    table = "\n".join(f"| {row['stars']} | {row['n']} | {row['median']:.3f} | {row['p90']:.3f} |" for row in rows)
    metadata = ModelCardData(license="apache-2.0", library_name="spectrafm_hf", tags=["astronomy", "spectroscopy"])
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
    )
    ModelCard(card).save(arguments.output / "README.md")
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
