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
        help="fine-tune a checkpoint on your spectra and labels",
        description="Fine-tune a checkpoint on your spectra and a table of labels: new labels, or labels that are "
        "wrong for your stars. Spectra and labels are joined; unused ones are listed. Models are weighted by "
        "cross-validation. Predictions of all other labels stay the same. DIR gets the checkpoint, its card, a report "
        "that compares it with standard methods, and a plot.",
    )
    finetune.add_argument("--labels", type=Path, required=True, metavar="TABLE", help=".csv, .ecsv, .fits or .parquet")
    finetune.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="output folder, also the name of the checkpoint"
    )
    finetune.add_argument(
        "--model",
        metavar="NAME_OR_PATH",
        default=DEFAULT_MODEL,
        help=f"checkpoint to fine-tune (default: {DEFAULT_MODEL})",
    )
    finetune.add_argument(
        "--label",
        nargs="+",
        metavar="NAME",
        help="label columns (default: columns with a unit, age[Gyr], or an error, age_err, and known label "
        "names; otherwise all numbers except coordinates, magnitudes and similar)",
    )
    finetune.add_argument(
        "--units", nargs="+", default=[], metavar="LABEL=UNIT", help="units of labels (default: from the table)"
    )
    finetune.add_argument(
        "--scalars",
        nargs="+",
        default=[],
        metavar="NAME",
        help="columns of the spectra or of TABLE that may be inputs too (bp_rp, parallax), with errors in NAME_err; "
        "kept if they help, and then needed by predict",
    )
    finetune.add_argument(
        "--id-column", metavar="NAME", help="identifier column: object_id or file name (default: best match)"
    )
    finetune.add_argument("--seed", type=int, default=0, help="default: 0")
    finetune.add_argument("--overwrite", action="store_true", help="overwrite another fine-tuning in DIR")
    finetune.add_argument("--strict", action="store_true", help="exit code 1 if a spectrum was dropped")
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
    for named in arguments.units:
        name, equals, unit = named.partition("=")
        if not equals:
            raise ValueError(f"--units: expected LABEL=UNIT, such as age=Gyr, got {named}")
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
        scalars=arguments.scalars,
        id_column=arguments.id_column,
        seed=arguments.seed,
        failures=failures,
        command=shlex.join(["spectrafm", *arguments.command_line]),
        overwrite=arguments.overwrite,
        say=lambda line: print(line, flush=True),
        draw=plot_given,
        **reading_options(arguments),
    )
    print(f"\n{tuned.summary()}")
    print(f"\nwritten: {arguments.out} (details: README.md; spectrafm predict FILES --model {arguments.out})")
    return 1 if arguments.strict and tuned.dropped else 0
