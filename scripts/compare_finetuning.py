#!/usr/bin/env python
# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Fine-tuning on few stars beside what one would do without it: the table in scripts/recipes/finetune.tried.md.

    python scripts/compare_finetuning.py --output finetune.csv               # validation stars
    python scripts/compare_finetuning.py --output finetune.csv --split test  # once
    python scripts/compare_finetuning.py --output finetune.csv --data gaia-xp --tasks ak_targ "J - K" --stars 100

Observed Gaia XP stars: N drawn from one split, which the base has not learnt from unless it is `train`, are learnt
from as `spectrafm finetune` does, and all other stars of another split are asked. `synthetic` are made by the emulator
of the H band, learnt from and asked alike. What is in the output already is not done again.
"""

import csv
import functools
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, load_dataset
from numpy.typing import NDArray
from tqdm.auto import tqdm

from spectrafm_cli.arguments import Parser
from spectrafm_hf.checkpoints import BASE_CHECKPOINT, load_checkpoint
from spectrafm_hf.data import build_gaia_xp, cache_dir
from spectrafm_hf.inference.states import frozen_states
from spectrafm_hf.models import SpectraFMConfig
from spectrafm_hf.synthesis.synthetic import SyntheticStars
from spectrafm_hf.training.finetuning import FOLDS
from spectrafm_hf.training.heads import States, choose_head, make_folds
from spectrafm_hf.training.metrics import label_metrics
from spectrafm_hf.training.rivals import Sample, ask_rivals, pixels_of


class Task(NamedTuple):
    """A label, from which columns of the stars it is made, and which answers of the base are held back."""

    label: str
    make: Any
    held_back: tuple[str, ...] = ()


def _like_magnesium(stars: Dataset) -> NDArray[Any]:
    """A label that goes along with [alpha/M], bends with [Fe/H] and Teff, and has an error of its own of 0.05."""
    alpha, iron, teff = (np.asarray(stars[name][:], np.float64) for name in ("alpha_m", "fe_h", "teff"))
    bend = 0.04 * np.tanh(2 * (iron + 0.5)) + 0.03 * np.clip((teff - 4800) / 1000, -1, 2) ** 2
    return 1.15 * alpha + bend + 0.05 * np.random.default_rng(len(alpha)).standard_normal(len(alpha))


def _column(name: str, shift: float = 0.0) -> Any:
    return lambda stars: np.asarray(stars[name][:], np.float64) + shift


TASKS = {
    "ak_targ": Task("ak_targ", _column("ak_targ")),
    "J - K": Task("j_k", lambda stars: _column("j")(stars) - _column("k")(stars)),
    "like [Mg/Fe]": Task("like_mg", _like_magnesium),
    "[alpha/M], unknown": Task("alpha_m", _column("alpha_m"), ("alpha_m",)),
    "[alpha/M]": Task("alpha_m", _column("alpha_m")),
    "log g + 0.85": Task("logg", _column("logg", 0.85)),
    "synthetic: log g + 0.85": Task("logg", _column("logg", 0.85)),
    "synthetic: [Mg/H]": Task("mg_h", lambda stars: _column("mg_fe")(stars) + _column("fe_h")(stars)),
}
RUN = ("task", "stars", "from", "asked", "draw")


class Pool(NamedTuple):
    """Stars with what the base says of them."""

    stars: Dataset
    states: States
    flux: NDArray[Any]
    flux_error: NDArray[Any]
    rung: int
    config: SpectraFMConfig


@functools.cache
def pool(name: str, number: int, folder: Path) -> Pool:
    """The first stars of a split of Gaia XP, or synthetic stars with a seed of their own."""
    if name.startswith("synthetic"):
        source = SyntheticStars("apogee-apstar", seed=1)
        columns = source.draw(number, np.random.default_rng([11, len(name)]))
        names = [key for key in columns if key != "clean"]
        rows = [{key: columns[key][i] for key in names} | {"object_id": str(i)} for i in range(number)]
        stars = Dataset.from_list(rows)
    else:
        data = load_dataset(str(build_gaia_xp(folder)), split=name)
        stars = data.select(range(min(number, len(data))))
    model, tokenizer = load_checkpoint(BASE_CHECKPOINT)
    rung, states, used, _ = frozen_states(model, tokenizer, stars.with_format("numpy"))
    stars = stars.select(used)
    return Pool(stars, states, *pixels_of(stars.with_format("numpy")), rung, model.config)


def without(states: States, held_back: tuple[str, ...]) -> States:
    """The states without some answers."""
    kept = [i for i, name in enumerate(states.inputs) if name not in held_back]
    inputs = [states.inputs[i] for i in kept]
    return States(inputs, states.values[:, kept], states.errors[:, kept], states.coefficients, states.reliability)


def measure(
    name: str, n_stars: int, source: str, asked: str, draw: int, number: int, folder: Path
) -> list[dict[str, Any]]:
    """Figures of all models of one draw, a line each."""
    task = TASKS[name]
    first, second = pool(source, number, folder), pool(asked, number, folder)
    labels = [task.make(part.stars) for part in (first, second)]
    errors = [
        np.nan_to_num(np.asarray(part.stars[f"{task.label}_err"][:], np.float64))
        if f"{task.label}_err" in part.stars.column_names
        else np.zeros(len(part.stars))
        for part in (first, second)
    ]
    generator = np.random.default_rng([draw, n_stars])
    rows = generator.permutation(np.flatnonzero(np.isfinite(labels[0])))[:n_stars]
    others = np.flatnonzero(np.isfinite(labels[1]))
    if source == asked:
        others = np.setdiff1d(others, rows)
    states = [without(part.states, task.held_back) for part in (first, second)]
    start = time.process_time()
    folds = make_folds([str(row) for row in rows], FOLDS, draw)
    settings = first.config, first.rung, task.label
    choice = choose_head(*settings, states[0][rows], labels[0][rows], errors[0][rows], folds)
    seconds = time.process_time() - start
    answers = {"fine-tuned": choice.fitted.predict(first.config, states[1][others])}
    if task.label in states[1].inputs:
        at = states[1].inputs.index(task.label)
        answers["base, untouched"] = states[1].values[others, at], states[1].errors[others, at]
    flux = np.concatenate([first.flux[rows], second.flux[others]])
    flux_error = np.concatenate([first.flux_error[rows], second.flux_error[others]])
    parts = (states[0][rows], states[1][others])
    joined = States(
        parts[0].inputs,
        *(
            np.concatenate([getattr(part, field) for part in parts])
            for field in ("values", "errors", "coefficients", "reliability")
        ),
    )
    truth, truth_errors = (np.concatenate([a[0][rows], a[1][others]])[:, None] for a in (labels, errors))
    split = np.arange(len(rows)), np.arange(len(rows), len(rows) + len(others))
    for rival, (values, sigmas) in ask_rivals(
        Sample(flux, flux_error, joined, truth, truth_errors), [split], draw
    ).items():
        answers[rival] = values[split[1], 0], sigmas[split[1], 0]
    lines = []
    for row, (values, sigmas) in answers.items():
        found = label_metrics(values, sigmas, labels[1][others], errors[1][others])
        own = row == "fine-tuned"
        lines.append(
            dict(zip(RUN, (name, n_stars, source, asked, draw), strict=True))
            | {"model": row, "rmse": f"{found['rmse']:.5f}", "scatter": f"{found['robust_scatter']:.5f}"}
            | {"error_over_sigma": f"{found['robust_z']:.3f}", "asked_stars": found["n"]}
            | {"head": choice.fitted.head.name if own else "", "seconds": f"{seconds:.1f}" if own else ""}
        )
    return lines


def table(lines: list[dict[str, Any]]) -> str:
    """Means over the draws: RMSE, scatter and error/sigma of each model."""
    keys = list(dict.fromkeys((line["task"], line["stars"], line["from"], line["asked"]) for line in lines))
    models = list(dict.fromkeys(line["model"] for line in lines))
    rows = [["task", "stars (from)", *models], ["---"] * (2 + len(models))]
    for key in keys:
        cells = []
        for model in models:
            own = [
                line for line in lines
                if (line["task"], line["stars"], line["from"], line["asked"]) == key and line["model"] == model
            ]  # fmt: skip
            means = [
                float(np.mean([float(line[name]) for line in own])) for name in ("rmse", "scatter", "error_over_sigma")
            ]
            cells.append("{:.4f} ({:.4f}, {:.2f})".format(*means) if own else "")
        rows.append([key[0], f"{key[1]} ({key[2]})", *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="compare_finetuning.py", description="Fine-tuning beside what one would do without it.")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--stars", type=int, nargs="+", default=[30, 100, 300, 1000], metavar="N")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--source", choices=("train", "validation"), default="validation", help="of the N stars")
    parser.add_argument("--split", choices=("validation", "test"), default="validation", help="of the stars asked")
    parser.add_argument("--number", type=int, default=4000, metavar="N", help="stars of each split (default: 4000)")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="gaia-xp (default: that in the cache, built if need be)"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="CSV")
    given = parser.parse_args(argv)
    lines = list(csv.DictReader(given.output.open())) if given.output.exists() else []
    done = {tuple(line[name] for name in RUN) for line in lines}
    splits = {
        task: ("synthetic", "synthetic") if task.startswith("synthetic") else (given.source, given.split)
        for task in given.tasks
    }
    runs = [
        (task, n_stars, splits[task][0], splits[task][1], draw)
        for n_stars in given.stars
        for task in given.tasks
        for draw in range(given.draws)
    ]
    folder = given.data or cache_dir() / "gaia-xp"
    runs = [run for run in runs if tuple(map(str, run)) not in done]
    for task, n_stars, source, asked, draw in tqdm(runs, unit="run"):
        found = measure(task, n_stars, source, asked, draw, given.number, folder)
        new = [{name: str(value) for name, value in line.items()} for line in found]
        with given.output.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(new[0]), lineterminator="\n")
            if not lines:
                writer.writeheader()
            writer.writerows(new)
        lines += new
    print(table(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
