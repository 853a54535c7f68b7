# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""`spectrafm finetune`: labels of your own."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import DEFAULT_MODEL, reading, reading_options


if TYPE_CHECKING:
    from spectrafm_hf.data.readers import Failure


def add(verbs: Any) -> None:
    finetune = verbs.add_parser(
        "finetune",
        parents=[reading("--spectra")],
        help="teach a checkpoint labels of yours, from spectra and a table",
        description="Teach a checkpoint labels of yours from spectra and a table: labels that are new to it, or that "
        "it gets wrong for your stars. Spectra and labels are joined; what cannot be used is told. Cross-validation "
        "chooses how the labels follow from what the checkpoint says of the spectra; the answers for all other labels "
        "stay as they are. DIR gets the checkpoint with its card, its figures beside those of what one would do "
        "without it, and a picture.",
    )
    finetune.add_argument("--labels", type=Path, required=True, metavar="TABLE", help=".csv, .ecsv, .fits or .parquet")
    finetune.add_argument("--out", type=Path, required=True, metavar="DIR", help="its name is that of the checkpoint")
    finetune.add_argument(
        "--model", metavar="NAME_OR_PATH", default=DEFAULT_MODEL, help=f"to go on from (default: {DEFAULT_MODEL})"
    )
    finetune.add_argument(
        "--label",
        nargs="+",
        metavar="NAME",
        help="columns to learn (default: those with a unit, age[Gyr], or an error, age_err, and those known by name; "
        "without such, all numbers but coordinates, magnitudes and the like; without any, these)",
    )
    finetune.add_argument(
        "--units", nargs="+", default=[], metavar="LABEL=UNIT", help="of labels (default: as the table says)"
    )
    finetune.add_argument(
        "--id-column", metavar="NAME", help="with the object_id or the file of each spectrum (default: what fits best)"
    )
    finetune.add_argument("--seed", type=int, default=0, help="default: 0")
    finetune.add_argument("--overwrite", action="store_true", help="begin again where DIR holds another fine-tuning")
    finetune.add_argument("--strict", action="store_true", help="exit code 1 where a spectrum was dropped")
    finetune.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    import shlex

    import datasets
    from transformers.utils import logging

    from spectrafm_hf.data.readers import find_files
    from spectrafm_hf.show.labels import plot_given
    from spectrafm_hf.training.finetuning import finetune

    # Of writing a checkpoint, and of reading what was just written: a moment each, ten times.
    datasets.disable_progress_bars()
    logging.disable_progress_bar()

    units = {}
    for given in arguments.units:
        name, equals, unit = given.partition("=")
        if not equals:
            raise ValueError(f"--units: expected LABEL=UNIT, such as age=Gyr, got {given}")
        units[name] = unit
    failures: list[Failure] = []
    files = find_files(arguments.input, arguments.split, failures)
    tuned = finetune(
        files,
        arguments.labels,
        arguments.out,
        model=arguments.model,
        names=arguments.label,
        units=units,
        id_column=arguments.id_column,
        seed=arguments.seed,
        failures=failures,
        command=shlex.join(["spectrafm", *arguments.given]),
        overwrite=arguments.overwrite,
        say=lambda line: print(line, flush=True),
        draw=plot_given,
        **reading_options(arguments),
    )
    print(f"\n{tuned.summary()}")
    print(f"\nwritten: {arguments.out} (README.md tells all; spectrafm predict FILES --model {arguments.out})")
    return 1 if arguments.strict and tuned.dropped else 0
