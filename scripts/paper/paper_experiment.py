#!/usr/bin/env python
# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""The experiment of Koblischke & Bovy 2024 on observed stars: [Fe/H] learnt from 100 metal-rich ones, evaluated on all.

    python scripts/paper/paper_experiment.py --output runs/paper --shared ../shared/data

In each draw, 100 stars whose [Fe/H] is above a limit are seen in a range of wavelengths, and all others are evaluated
in the same range. `spectrafm-base` has seen other Gaia XP stars of all kinds with labels, synthetic spectra of the
optical and of the H band, and how synthetic spectra of MILES differ from observed ones, but no observed star in the H
band. All methods are those of the report of `spectrafm finetune`, on the same pixels; "closed form" is what it makes.
What has been computed stays in the output folder.
"""

import csv
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from benchmark_transfer import OWN, Array, Stars, apogee_dr12, gaia_xp, learn, miles, pool, write
from datasets import Dataset
from tqdm.auto import tqdm

from spectrafm_cli.arguments import Parser
from spectrafm_hf.training.metrics import label_metrics


N_STARS = 100
RUN = ("task", "draw")
FIGURES = {"rmse": "RMSE", "bias": "bias", "robust_scatter": "1.4826 MAD", "robust_z": "error/sigma"}


@dataclass(frozen=True)
class Task:
    """Stars, the range that they are seen in (Angstrom), above which [Fe/H] the 100 are, and below which is poor."""

    sample: Callable[[Path | None], Stars]
    window: tuple[float, float]
    iron_rich: float
    iron_poor: float

    def stars(self, shared: Path | None) -> Stars:
        """The stars in the range alone."""
        stars = self.sample(shared)
        kept: dict[str, list[Array]] = {name: [] for name in ("wavelength", "flux", "flux_error", "mask")}
        for row in stars.rows.with_format("numpy"):
            inside = (row["wavelength"] > self.window[0]) & (row["wavelength"] < self.window[1])
            for name, column in kept.items():
                column.append(row[name][inside])
        power = (
            {"resolving_power": stars.rows["resolving_power"][:]} if "resolving_power" in stars.rows.features else {}
        )
        rows = Dataset.from_dict({**kept, **power, "object_id": stars.rows["object_id"][:]})
        return Stars(rows, stars.parts, stars.labels)


TASKS = {
    "xp-red": Task(gaia_xp, (6_400.0, 10_200.0), -1.0, -1.0),
    "xp-narrow": Task(gaia_xp, (8_400.0, 8_900.0), -1.0, -1.0),
    "miles": Task(miles, (4_840.0, 5_460.0), -0.5, -0.5),
    # Three of the 336 have [Fe/H] < -1, 36 have [Fe/H] < -0.3.
    "apogee-dr12": Task(apogee_dr12, (15_168.0, 15_190.0), -0.1, -0.3),
}


def measure(name: str, draw: int, folder: Path, shared: Path | None) -> list[dict[str, Any]]:
    """Figures of all methods for all evaluated stars and for the metal-poor ones, a line each."""
    task = TASKS[name]
    stars = pool(f"paper-{name}", functools.partial(task.stars, shared), folder)
    iron = stars.labels["fe_h"]
    error = np.nan_to_num(stars.labels.get("fe_h_err", np.zeros_like(iron)))
    learnt = np.concatenate([stars.parts["learnt"], stars.parts["validation"]])
    rich = learnt[iron[learnt] > task.iron_rich]
    rows = np.random.default_rng([draw, 77]).choice(rich, N_STARS, replace=False)
    # Few stars are evaluated outside the training range, too.
    tested = stars.parts["test"] if len(stars.parts["test"]) > 1_000 else np.arange(len(iron))
    tested = np.setdiff1d(tested[np.isfinite(iron[tested])], rows)
    found = learn(stars, "fe_h", iron, error, rows, tested, draw)
    lines = []
    for model, (values, errors) in found.answers.items():
        for group, some in (("all", np.ones(len(tested), bool)), ("iron-poor", iron[tested] < task.iron_poor)):
            figures = label_metrics(values[some], errors[some], iron[tested][some], error[tested][some])
            own = {key: f"{figures[key]:.4f}" for key in FIGURES}
            lines.append({"model": model, "stars": group, "n": str(figures["n"]), **own})
    return lines


def table(lines: Sequence[Mapping[str, str]]) -> str:
    """Means over the draws and their spread, a table for each task."""
    parts = []
    for task in dict.fromkeys(line["task"] for line in lines):
        groups = ("all", f"[Fe/H] < {TASKS[task].iron_poor:g}")
        rows = [[task, *(f"{group}: {title}" for group in groups for title in FIGURES.values())]]
        rows.append(["---"] * len(rows[0]))
        for model in dict.fromkeys(line["model"] for line in lines if line["task"] == task):
            row = ["closed form on frozen states" if model == OWN else model]
            for group in ("all", "iron-poor"):
                own = [line for line in lines if (line["task"], line["model"], line["stars"]) == (task, model, group)]
                for key in FIGURES:
                    values = [float(line[key]) for line in own]
                    row.append(f"{np.mean(values):.3f} ± {np.std(values):.3f}")
            rows.append(row)
        parts.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="paper_experiment.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--shared", type=Path, metavar="DIR", help="with the file of APOGEE DR12")
    parser.add_argument("--draws", type=int, default=10, metavar="N", help="of the 100 stars (default: 10)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, metavar="TASK", help="default: all that can be had")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "paper.csv"
    lines: list[dict[str, Any]] = list(csv.DictReader(path.open())) if path.exists() else []
    done = {tuple(line[name] for name in RUN) for line in lines}
    runs = [(task, draw) for task in args.tasks or TASKS for draw in range(args.draws)]
    for task, draw in tqdm(runs, unit="run"):
        if (task, str(draw)) in done:
            continue
        try:
            found = measure(task, draw, args.output / "samples", args.shared)
        except ValueError as error:
            if args.tasks or not str(error).startswith("shared:"):
                raise
            tqdm.write(f"left out: {task}: {error}")
            continue
        lines += [{"task": task, "draw": str(draw), **line} for line in found]
        write(path, lines)
    if lines:
        print(table(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
