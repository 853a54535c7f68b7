#!/usr/bin/env python
# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""What to train with how many stars, and how fast: the measurement behind the choice of `spectrafm finetune`.

    python scripts/compare_finetuning.py --output finetune.csv                       # labels, from synthetic stars
    python scripts/compare_finetuning.py --case new-label --output finetune.csv      # extinction, from an XP model

Observed Gaia XP stars: N of the training split and, to choose the best step by, as many more of it as `spectrafm
finetune` would hold back; judged on stars of the validation split. `labels` goes on from `spectrafm-base-synthetic`,
which has seen no observed star, to the four labels of APOGEE; `new-label` from `spectrafm-gaia-xp-small` to `ak_targ`,
the extinction, which it does not know. Score: geometric mean over the labels of the robust scatter of predicted - true
over that of the labels. `start` is the checkpoint as it was. What is in the output already is not done again.
"""

import csv
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
from datasets import Dataset, load_dataset
from tqdm.auto import tqdm
from transformers import TrainingArguments

from spectrafm_cli import Parser
from spectrafm_hf.data import build_gaia_xp, cache_dir
from spectrafm_hf.finetuning import FROZEN, training_settings
from spectrafm_hf.metrics import robust_scatter
from spectrafm_hf.training import Recipe, SpectraFMTrainer, set_up, train


CASES: dict[str, dict[str, Any]] = {
    "labels": {
        "checkpoint": "spectrafm-base-synthetic",
        "labels": ["teff", "logg", "fe_h", "alpha_m"],
        "units": ["K", "dex", "dex", "dex"],
    },
    "new-label": {"checkpoint": "spectrafm-gaia-xp-small", "labels": ["ak_targ"], "units": ["mag"]},
}
#: Of a run, what tells it from others.
RUN = ("case", "stars", "train", "learning_rate", "seed")


def measure(judged: int, case: str, n_stars: int, what: str, learning_rate: float, seed: int) -> dict[str, Any]:
    """Train once; the figures of a line of the output."""
    labels = CASES[case]["labels"]
    data = load_dataset(str(build_gaia_xp(cache_dir() / "gaia-xp")))
    held_back = n_stars // 3 if n_stars < 600 else n_stars // 8
    chosen = np.random.default_rng([seed, n_stars]).permutation(len(data["train"]))
    parts = {
        "train": data["train"].select(chosen[:n_stars]),
        "held back": data["train"].select(chosen[n_stars : n_stars + held_back]),
        "judged": data["validation"].select(range(min(judged, len(data["validation"])))),
    }
    if case == "new-label":  # what the catalogue gives without an error
        parts = {name: part.add_column("ak_targ_err", [float("nan")] * len(part)) for name, part in parts.items()}
    settings, arguments = training_settings(n_stars, "all" if what == "start" else what, seed=seed)
    recipe = Recipe(**CASES[case], **settings, tokenizer={"requests": labels})
    arguments |= {"disable_tqdm": True, "learning_rate": learning_rate}
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(output_dir=folder, **arguments)
        if what == "start":
            args.remove_unused_columns, args.label_names = False, ["labels", "label_errors"]
            trainer = SpectraFMTrainer(recipe, set_up(recipe, args, parts["train"], parts["held back"]), args)
        else:
            trainer = train(recipe, args, parts["train"], parts["held back"])
        scatter, spread = _scatter(trainer, parts["judged"], labels)
    return {
        "case": case,
        "stars": n_stars,
        "train": what,
        "learning_rate": learning_rate,
        "seed": seed,
        "steps": arguments["max_steps"],
        "best_step": trainer.state.best_global_step,
        "score": f"{np.exp(np.mean(np.log(np.divide(scatter, spread)))):.4f}",
        "scatter": " ".join(f"{value:.4g}" for value in scatter),
        "processor_seconds": f"{time.process_time() - start:.0f}",
    }


def _scatter(trainer: SpectraFMTrainer, stars: Dataset, labels: list[str]) -> tuple[list[float], list[float]]:
    """Of predicted - true and of true, for each label."""
    answers: Any = trainer.predict(type(cast(Any, trainer.task.validation_stars))(stars))
    config = trainer.task.model.config
    columns = [list(config.label_names).index(name) for name in labels]
    center, scale = (np.array(values)[columns] for values in (config.label_centers, config.label_scales))
    values, truth = answers.predictions[0] * scale + center, answers.label_ids[0]
    known = np.isfinite(truth)
    return (
        [robust_scatter((values - truth)[known[:, i], i]) for i in range(len(labels))],
        [robust_scatter(truth[known[:, i], i]) for i in range(len(labels))],
    )


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="compare_finetuning.py", description="What to train with how many stars.")
    parser.add_argument("--case", choices=CASES, default="labels")
    parser.add_argument("--stars", type=int, nargs="+", default=[50, 300, 1000, 5000], metavar="N")
    parser.add_argument("--train", nargs="+", choices=["start", *FROZEN], default=["start", *FROZEN])
    parser.add_argument("--learning-rates", nargs="+", type=float, default=[1e-4, 3e-4, 1e-3], metavar="RATE")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], metavar="SEED")
    parser.add_argument("--judged", type=int, default=2000, metavar="N", help="validation stars (default: 2000)")
    parser.add_argument("--output", type=Path, required=True, metavar="CSV")
    given = parser.parse_args(argv)
    lines = list(csv.DictReader(given.output.open())) if given.output.exists() else []
    done = {tuple(line[name] for name in RUN) for line in lines}
    runs = [
        (given.case, n_stars, what, rate, seed)
        for n_stars in given.stars
        for seed in given.seeds
        for what in given.train
        for rate in (given.learning_rates if what != "start" else [0.0])
        if not (what == "start" and given.case == "new-label")
    ]
    for run in tqdm([run for run in runs if tuple(map(str, run)) not in done], unit="run"):
        line = measure(given.judged, *run)
        new = not given.output.exists()
        with given.output.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(line), lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
