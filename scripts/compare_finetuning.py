#!/usr/bin/env python
# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""What to train with how many stars: the measurement behind the choice of `spectrafm finetune`.

    python scripts/compare_finetuning.py --output finetune.csv                       # labels, from synthetic stars
    python scripts/compare_finetuning.py --case new-label --output finetune.csv      # extinction, from an XP model

Observed Gaia XP stars: N of the training split, judged on stars of the validation split. `labels` goes on from
`spectrafm-base-synthetic`, which has seen no observed star, to the four labels of APOGEE; `new-label` from
`spectrafm-gaia-xp-small` to `ak_targ`, the extinction, which it does not know. Score: geometric mean over the labels of
the robust scatter of predicted - true over that of the labels. What is in the output already is not done again.
"""

import csv
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
from datasets import load_dataset
from tqdm.auto import tqdm
from transformers import TrainingArguments

from spectrafm_cli import Parser
from spectrafm_hf.data import build_gaia_xp, cache_dir
from spectrafm_hf.finetuning import FROZEN, training_settings
from spectrafm_hf.metrics import robust_scatter
from spectrafm_hf.training import Recipe, train


CASES: dict[str, dict[str, Any]] = {
    "labels": {
        "checkpoint": "spectrafm-base-synthetic",
        "labels": ["teff", "logg", "fe_h", "alpha_m"],
        "units": ["K", "dex", "dex", "dex"],
    },
    "new-label": {"checkpoint": "spectrafm-gaia-xp-small", "labels": ["ak_targ"], "units": ["mag"]},
}


def measure(case: str, n_stars: int, what: str, seed: int, judged: int, steps: int | None) -> dict[str, Any]:
    """Train once; the figures of a line of the output."""
    data = load_dataset(str(build_gaia_xp(cache_dir() / "gaia-xp")))
    chosen = np.random.default_rng([seed, n_stars]).permutation(len(data["train"]))[:n_stars]
    settings, arguments = training_settings(len(chosen), what, steps=steps, seed=seed)
    labels = CASES[case]["labels"]
    recipe = Recipe(**CASES[case], **settings, tokenizer={"requests": labels})
    arguments |= {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "disable_tqdm": True}
    validation = data["validation"].select(range(min(judged, len(data["validation"]))))
    if case == "new-label":  # what the catalogue gives without an error
        unknown = dict.fromkeys(("ak_targ_err",), [float("nan")])
        validation = validation.add_column("ak_targ_err", unknown["ak_targ_err"] * len(validation))
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        trained = data["train"].select(chosen)
        if case == "new-label":
            trained = trained.add_column("ak_targ_err", [float("nan")] * len(trained))
        trainer = train(recipe, TrainingArguments(output_dir=folder, **arguments), trained, validation)
        answers: Any = trainer.predict(trainer.eval_dataset)  # type: ignore[arg-type]
    config = cast(Any, trainer.model).config
    columns = [list(config.label_names).index(name) for name in labels]
    center, scale = (np.array(values)[columns] for values in (config.label_centers, config.label_scales))
    values, truth = answers.predictions[0] * scale + center, answers.label_ids[0]
    known = np.isfinite(truth)
    scatter = [robust_scatter((values - truth)[known[:, i], i]) for i in range(len(labels))]
    spread = [robust_scatter(truth[known[:, i], i]) for i in range(len(labels))]
    return {
        "case": case,
        "stars": n_stars,
        "train": what,
        "seed": seed,
        "steps": arguments["max_steps"],
        "score": f"{np.exp(np.mean(np.log(np.divide(scatter, spread)))):.4f}",
        "scatter": " ".join(f"{value:.4g}" for value in scatter),
        "processor_seconds": f"{time.process_time() - start:.0f}",
    }


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="compare_finetuning.py", description="What to train with how many stars.")
    parser.add_argument("--case", choices=CASES, default="labels")
    parser.add_argument("--stars", type=int, nargs="+", default=[50, 300, 2000, 20_000], metavar="N")
    parser.add_argument("--train", nargs="+", choices=FROZEN, default=list(FROZEN))
    parser.add_argument("--seeds", type=int, default=2, metavar="N", help="how many (default: 2)")
    parser.add_argument("--judged", type=int, default=2000, metavar="N", help="validation stars (default: 2000)")
    parser.add_argument("--steps", type=int, metavar="N", help="default: as `spectrafm finetune` chooses")
    parser.add_argument("--output", type=Path, required=True, metavar="CSV")
    given = parser.parse_args(argv)
    lines = list(csv.DictReader(given.output.open())) if given.output.exists() else []
    done = {(line["case"], line["stars"], line["train"], line["seed"]) for line in lines}
    runs = [(n, what, seed) for n in given.stars for seed in range(given.seeds) for what in given.train]
    for n_stars, what, seed in tqdm(runs, unit="run"):
        if (given.case, str(n_stars), what, str(seed)) in done:
            continue
        line = measure(given.case, n_stars, what, seed, given.judged, given.steps)
        new = not given.output.exists()
        with given.output.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(line), lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
