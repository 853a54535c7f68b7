#!/usr/bin/env python
# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
Train the published architecture from scratch, and compare it with a checkpoint on stars held out from both.

    python scripts/paper/compare_original.py scripts/recipes/original-synthetic.yaml \
        scripts/recipes/original-synthetic.csv

The recipe is trained as by `train.py`, from weights drawn as the published program draws them, and its curves.csv gets
a column `cpu_seconds`. Spectra are read as by that program: shuffled pixels in windows of `max_length`, whose
predictions are averaged. The figures are 1.4826 MAD on validation stars of 3,500-6,500 K of the one source. A finished
training is not repeated, an interrupted one is resumed.
"""

import csv
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerCallback

from spectrafm_cli.arguments import Parser
from spectrafm_hf.checkpoints import load_checkpoint
from spectrafm_hf.data.schema import PIXEL_COLUMNS
from spectrafm_hf.files import complete_file
from spectrafm_hf.inference.prediction import predict_batches
from spectrafm_hf.models.configuration_spectrafm import PADDING_ID
from spectrafm_hf.statistics import robust_scatter
from spectrafm_hf.training.recipe import last_checkpoint, load_stars, read_recipe
from spectrafm_hf.training.trainer import train


@torch.no_grad()
def initialise(model: nn.Module) -> None:
    """
    Draw the weights as the published program does. With the small normal ones of transformers a flux would be
    next to nothing beside the encoding of its wavelength.
    """
    for name, parameter in model.named_parameters():
        if "value_embedding.weight" in name:
            nn.init.uniform_(parameter)
            parameter[PADDING_ID] = 0.0
        elif name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            # One matrix for the three there, of three times the rows.
            nn.init.uniform_(parameter, -1.0, 1.0).mul_((6.0 / (4 * parameter.shape[1])) ** 0.5)
        elif name.endswith("o_proj.weight"):
            nn.init.kaiming_uniform_(parameter, a=5**0.5)
        elif name.endswith(("extra_key", "extra_value")):
            nn.init.xavier_normal_(parameter)
        elif parameter.ndim == 2 and "value_embedding" not in name:
            nn.init.kaiming_uniform_(parameter)


class Start(TrainerCallback):
    """Initialise as in the published program, and record CPU seconds."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            initialise(model)
        spent = [entry["cpu_seconds"] for entry in state.log_history if "cpu_seconds" in entry]
        self.zero = time.process_time() - (spent[-1] if spent else 0.0)

    def on_log(self, args, state, control, **kwargs):
        state.log_history[-1]["cpu_seconds"] = round(time.process_time() - self.zero, 1)


def windows(columns: Mapping[str, NDArray[Any]], size: int, seed: int = 0) -> Iterator[list[dict[str, Any]]]:
    """
    For each star its windows, as rows: all pixels once, in random order, `size` to a window. The last one is filled
    with pixels of the first.
    """
    generator = np.random.default_rng(seed)
    for star in zip(*(columns[name] for name in PIXEL_COLUMNS), strict=True):
        order = generator.permutation(len(star[0]))
        filled = np.resize(order, -(-len(order) // size) * size)
        yield [
            {"object_id": "", **{name: values[window] for name, values in zip(PIXEL_COLUMNS, star, strict=True)}}
            for window in filled.reshape(-1, size)
        ]


def answers(name: str | Path, columns: Mapping[str, NDArray[Any]], labels: list[str], size: int) -> NDArray[Any]:
    """Predictions of a checkpoint for each window, (stars, windows, labels)."""
    model, tokenizer = load_checkpoint(str(name))
    stars = tqdm(windows(columns, size), total=len(columns["flux"]), delay=2)
    found = predict_batches(model, tokenizer, stars, labels)
    return np.array([np.stack([star[label] for label in labels], axis=-1) for star in found])


def compare(recipe_file: Path, model: str, n_stars: int, options: list[str]) -> list[dict[str, Any]]:
    """Rows of the table."""
    recipe, args = read_recipe(recipe_file, options)
    train_stars, validation = load_stars(recipe, args.seed)
    ((source, columns),) = validation.items()
    stars = {name: column[:n_stars] for name, column in columns.items()}
    folder = Path(args.output_dir or "runs")
    if not (folder / "final").is_dir():
        args.resume_from_checkpoint = last_checkpoint(folder)
        train(recipe, args, train_stars, {source: stars}, callbacks=[Start()])
    curves = list(csv.DictReader((folder / "curves.csv").read_text().splitlines()))
    trained = {
        "steps": curves[-1]["step"],
        "stars_seen": int(curves[-1]["step"]) * args.per_device_train_batch_size,
        "cpu_seconds": [line["cpu_seconds"] for line in curves if line["loss"]][-1],
    }
    truth = np.stack([stars[name] for name in recipe.labels], axis=-1)
    judged = (stars["teff"] > 3500) & (stars["teff"] < 6500)

    def row(what: str, values: NDArray[Any], **facts: Any) -> dict[str, Any]:
        scatter = [robust_scatter(column) for column in (values - truth)[judged].T]
        found = dict(zip(recipe.labels, (round(value, 4) for value in scatter), strict=True))
        return {"model": what, "stars": int(judged.sum()), **{name: facts.get(name, "") for name in trained}, **found}

    read = answers(folder / "final", stars, recipe.labels, recipe.tokenizer["max_length"])
    median = np.broadcast_to(np.median(truth, axis=0), truth.shape)
    return [
        row(f"published architecture, mean of {read.shape[1]} windows", read.mean(axis=1), **trained),
        row("published architecture, one window", read[:, 0], **trained),
        row(model, answers(model, stars, recipe.labels, stars["flux"].shape[1])[:, 0]),
        row("the median star", median),
    ]


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="compare_original.py", description=(__doc__ or "").strip().partition("\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("output", type=Path, help="table to write")
    parser.add_argument("--model", default="spectrafm-base", metavar="NAME_OR_PATH", help="to compare with")
    parser.add_argument("--stars", type=int, default=300, metavar="N", help="to compare on (default: 300)")
    arguments, options = parser.parse_known_args(argv)
    rows = compare(arguments.recipe, arguments.model, arguments.stars, options)
    with complete_file(arguments.output) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(arguments.output.read_text(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
