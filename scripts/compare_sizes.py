#!/usr/bin/env python
# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
Train models of several sizes for the same time of the processor, and write what each has learned into one table.

    python scripts/compare_sizes.py RECIPE OUTPUT.csv --cpu-seconds 600 patch_size=86 patch_size=172 ...
    python scripts/compare_sizes.py RECIPE OUTPUT.csv patch_size=172,hidden_size=128,layers=4

Each variant changes settings of `SpectraFMConfig` in the recipe; `layers` is the number of encoder layers, all like the
first. How many steps fit into the time is measured on the first ones, so that the learning rate comes to its end. All
that a step needs counts: drawing stars, tokens, the model, the optimizer. Variants that are in the table already are
left out. The figures are 1.4826 MAD on validation stars of 3,500-6,500 K.
"""

import copy
import csv
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainerCallback

from spectrafm_cli import Parser
from spectrafm_hf.files import complete_file
from spectrafm_hf.training import Recipe, load_stars, read_recipe, train


#: Steps that are timed, after as many that are not.
TIMED = 8


class Clock(TrainerCallback):
    """Seconds of the processor at each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.seconds.append(time.process_time())

    @property
    def of_a_step(self) -> float:
        return (self.seconds[-1] - self.seconds[TIMED]) / (len(self.seconds) - 1 - TIMED)


def with_settings(recipe: Recipe, variant: str) -> Recipe:
    """The recipe with the settings of a variant such as `patch_size=172,layers=4`."""
    recipe = copy.deepcopy(recipe)
    for setting in variant.split(","):
        name, _, text = setting.partition("=")
        value = yaml.safe_load(text)
        if name == "layers":
            for field in ("encoder_attention_heads", "encoder_ffn_dim"):
                recipe.model[field] = [recipe.model[field][0]] * value
        else:
            recipe.model[name] = value
    return recipe


def compare(recipe: Recipe, args: Any, variant: str, cpu_seconds: float) -> dict[str, Any]:
    """The row of a variant."""
    changed, stars = with_settings(recipe, variant), load_stars(recipe, args.seed)
    args = copy.deepcopy(args)
    args.save_strategy = args.eval_strategy = args.logging_strategy = "no"
    args.report_to, args.load_best_model_at_end = [], False
    with tempfile.TemporaryDirectory() as folder:
        args.output_dir, args.max_steps = folder, 2 * TIMED + 1
        clock = Clock()
        train(changed, args, *stars, callbacks=[clock])
        args.max_steps = max(int(cpu_seconds / clock.of_a_step), 1)
        trainer = train(changed, args, *stars)
    found = trainer.evaluate()
    speed = trainer.throughput.report()
    row = {
        "variant": variant,
        "parameters": sum(parameter.numel() for parameter in trainer.task.model.parameters()),
        "cpu_seconds": cpu_seconds,
        "steps": args.max_steps,
        "stars": args.max_steps * args.per_device_train_batch_size,
        "tokens_per_star": round(speed["tokens_per_s"] / speed["stars_per_s"], 1),
        "share_of_peak": round(speed["share_of_peak"], 3),
        "loss": round(found["eval_loss"], 4),
    }
    scatter = {name: value for name, value in found.items() if name.endswith("_robust_scatter")}
    return row | {name[len("eval_") : -len("_robust_scatter")]: round(value, 4) for name, value in scatter.items()}


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="compare_sizes.py", description=(__doc__ or "").strip().partition("\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("output", type=Path, help="table to write, or to go on with")
    parser.add_argument("variants", nargs="+", metavar="NAME=VALUE[,NAME=VALUE ...]")
    parser.add_argument("--cpu-seconds", type=float, default=600.0, metavar="S", help="for each (default: 600)")
    arguments = parser.parse_args(argv)
    recipe, args = read_recipe(arguments.recipe)
    rows = list(csv.DictReader(arguments.output.read_text().splitlines())) if arguments.output.exists() else []
    for variant in arguments.variants:
        if not any(row["variant"] == variant for row in rows):
            rows.append(compare(recipe, args, variant, arguments.cpu_seconds))
            with complete_file(arguments.output) as temporary, temporary.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
    print(arguments.output.read_text(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
