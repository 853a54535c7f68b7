#!/usr/bin/env python
# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
Plot the loss and the validation figures of one or several consecutive runs.

    python scripts/generate/plot_curves.py OUTPUT.png CURVES.csv [CURVES.csv ...]

CURVES.csv is written by a training: `curves.csv` in the folder of a run, or `scripts/recipes/*.curves.csv`.
"""

import csv
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter

from spectrafm_hf.show.style import save_figure


SCATTER = "_robust_scatter"


def read_curves(paths: list[Path]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Steps and values of each column; a run begins where the one before it ended."""
    points: dict[str, list[tuple[float, float]]] = {}
    first = 0.0
    for path in paths:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            for name, value in row.items():
                if value and name != "step":
                    points.setdefault(name, []).append((first + float(row["step"]), float(value)))
        first += float(rows[-1]["step"])
    return {name: tuple(np.array(values).T) for name, values in points.items()}  # type: ignore[misc]


def plot(path: Path, curves: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """The loss at the top; below, the scatter of each validation figure over its final value."""
    figure = Figure(figsize=(9, 7), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for name, (steps, values) in curves.items():
        if name == "loss":
            above.plot(steps, values, lw=0.7, label="training")
        elif name.endswith("_loss") and name != "train_loss" and not (name == "eval_loss" and len(steps) < 2):
            above.plot(steps, values, "o-", ms=3, label=name.removesuffix("_loss").replace("eval", "validation", 1))
        elif name.endswith(SCATTER):
            label = name.removeprefix("eval_").removesuffix(SCATTER)
            below.plot(steps, values / values[-1], "o-", ms=3, label=f"{label}, {values[-1]:.3g} at the end")
    above.set(ylabel="loss")
    below.set(xlabel="step", ylabel="1.4826 MAD / that at the end", yscale="log")
    for axis_ticks in (below.yaxis.set_major_formatter, below.yaxis.set_minor_formatter):
        axis_ticks(FormatStrFormatter("%g"))  # 1.2, not 1.2 x 10^0
    for axes in (above, below):
        axes.legend(fontsize=7, ncols=2)
    save_figure(figure, path, dpi=110)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) < 2 or argv[0] in ("-h", "--help"):
        print((__doc__ or "").strip(), file=sys.stderr)
        return 0 if argv[:1] in (["-h"], ["--help"]) else 2
    try:
        plot(Path(argv[0]), read_curves([Path(name) for name in argv[1:]]))
    except (OSError, ValueError, KeyError) as error:
        print(f"plot_curves.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
