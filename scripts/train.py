#!/usr/bin/env python
# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
Train SpectraFM from a recipe.

    python scripts/train.py scripts/recipes/gaia-xp-small.yaml [--output_dir DIR] [--resume_from_checkpoint DIR] ...

The YAML file holds the fields of `spectrafm_hf.training.Recipe` and of `transformers.TrainingArguments`; options on
the command line override those of the file.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from datasets import load_dataset
from transformers import HfArgumentParser, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from spectrafm_hf.data.mixture import HostedStars, Mixture
from spectrafm_hf.data.synthetic import SyntheticStars
from spectrafm_hf.training import Recipe, train


# As many as the paper's.
SYNTHETIC_STARS = 90_000
VALIDATION_STARS = 2000


def hosted(name: str) -> str:
    """What `datasets` can load; the data sets known by name are built if they are not there."""
    from spectrafm_hf.data import build_gaia_xp, cache_dir

    if name == "gaia-xp":
        return str(build_gaia_xp(cache_dir() / "gaia-xp"))
    if name.startswith("synthetic-"):
        from spectrafm_hf.data.synthetic import build_synthetic

        return str(build_synthetic(cache_dir() / name, SYNTHETIC_STARS, name.removeprefix("synthetic-")))
    return name


def mixture(recipe: Recipe, seed: int) -> tuple[Mixture, dict[str, Any]]:
    """Training stars, and validation stars by source."""
    sources: list[Any] = []
    validation: dict[str, Any] = {}
    for name in recipe.sources:
        if name.startswith("synthetic-"):
            sources.append(SyntheticStars(name.removeprefix("synthetic-")))
            validation[name] = sources[-1].draw(VALIDATION_STARS, np.random.default_rng([seed, 2]))
        else:
            data = load_dataset(hosted(name))
            sources.append(HostedStars(data[recipe.train_split]))
            validation[name] = data[recipe.validation_split]
    return Mixture(sources, list(recipe.sources.values()), recipe.stars_per_epoch, seed), validation


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help") or not argv[0].endswith((".yaml", ".yml")):
        print(__doc__.strip(), file=sys.stderr)
        return 0 if argv[:1] in (["-h"], ["--help"]) else 2
    settings = yaml.safe_load(Path(argv[0]).read_text())
    parser = HfArgumentParser([Recipe, TrainingArguments])  # type: ignore[list-item]
    options, _ = parser.parse_known_args(argv[1:])
    given = {name for name in vars(options) if any(arg.split("=")[0].lstrip("-") == name for arg in argv[1:])}
    recipe, args = parser.parse_dict({**settings, **{name: getattr(options, name) for name in given}})

    if args.resume_from_checkpoint in ("last", "True", "true"):
        args.resume_from_checkpoint = get_last_checkpoint(args.output_dir)
    if recipe.sources:
        train_set, validation_set = mixture(recipe, args.seed)
    else:
        data = load_dataset(hosted(recipe.data))
        train_set, validation_set = data[recipe.train_split], data[recipe.validation_split]
    train(recipe, args, train_set, validation_set)
    return 0


if __name__ == "__main__":
    sys.exit(main())
