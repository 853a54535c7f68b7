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

import yaml
from datasets import load_dataset
from transformers import HfArgumentParser, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from spectrafm_hf.training import Recipe, train


# As many as the paper's.
SYNTHETIC_STARS = 90_000


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
    if recipe.data == "gaia-xp":
        from spectrafm_hf.data import build_gaia_xp, cache_dir

        recipe.data = str(build_gaia_xp(cache_dir() / "gaia-xp"))
    elif recipe.data.startswith("synthetic-"):
        from spectrafm_hf.data import cache_dir
        from spectrafm_hf.data.synthetic import build_synthetic

        instrument = recipe.data.removeprefix("synthetic-")
        recipe.data = str(build_synthetic(cache_dir() / recipe.data, SYNTHETIC_STARS, instrument))
    data = load_dataset(recipe.data)
    train(recipe, args, data[recipe.train_split], data[recipe.validation_split])
    return 0


if __name__ == "__main__":
    sys.exit(main())
