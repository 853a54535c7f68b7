#!/usr/bin/env python
# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
Train SpectraFM from a recipe, with the Trainer of transformers.

    python scripts/train.py scripts/recipes/gaia-xp-ak.yaml [--output_dir DIR] [--resume_from_checkpoint last] ...

The YAML file holds the fields of `spectrafm_hf.training.recipe.Recipe` and of `transformers.TrainingArguments`; options
on the command line override those of the file. On several processes or machines:

    accelerate launch --config_file scripts/accelerate/ddp.yaml scripts/train.py RECIPE ...
"""

import sys

from spectrafm_hf.training.recipe import load_stars, read_recipe
from spectrafm_hf.training.trainer import train


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help") or not argv[0].endswith((".yaml", ".yml")):
        print(__doc__.strip(), file=sys.stderr)
        return 0 if argv[:1] in (["-h"], ["--help"]) else 2
    try:
        recipe, args = read_recipe(argv[0], argv[1:])
        train(recipe, args, *load_stars(recipe, args.seed))
    except (OSError, ValueError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
