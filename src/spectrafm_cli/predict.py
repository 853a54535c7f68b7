# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""`spectrafm predict`: the labels of stars."""

from __future__ import annotations

import argparse
import contextlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import (
    DEFAULT_MODEL,
    DELAY,
    add_model,
    add_overwrite,
    demand_new_output,
    positive,
    reading,
    reading_options,
)
from .loading import count, labels_of, load_with_range, say_device, scalar_options
from .report import cause, nothing_done, report
from .summary import PLOTTED_STARS, Summary
from .survey import predict_survey


if TYPE_CHECKING:
    from spectrafm_hf.data.readers import Failure, Row


#: Of so many files the first spectrum is looked at, to see which labels a mixed folder tells.
MODEL_FILES = 200


def add(verbs: Any) -> None:
    predict = verbs.add_parser(
        "predict",
        parents=[reading(demanded=False)],
        help="predict stellar labels from spectra",
        description="Predict stellar labels from spectra. INPUT: files (see `spectrafm formats`), folders of files, or "
        "data set folders. Unusable spectra are listed at the end and in failed.csv next to the output; the exit "
        "code is then 1.",
    )
    add_model(predict)
    predict.add_argument(
        "--output",
        type=Path,
        metavar="FILE_OR_DIR",
        help="table with one row per spectrum: .csv, .parquet or .fits; for surveys a folder with one Parquet file "
        "per input file, resumed by the same command. Several processes (`accelerate launch`) share the files; the "
        "input may be hf://datasets/OWNER/NAME",
    )
    predict.add_argument(
        "--gaia-ids",
        nargs="+",
        default=[],
        metavar="ID_OR_TABLE",
        help="Gaia DR3 source ids, or tables of them (FILE or FILE:COLUMN), whose XP spectra are downloaded "
        "and cached (needs the extra `gaia`)",
    )
    predict.add_argument(
        "--scalar-table",
        type=Path,
        metavar="TABLE",
        help="scalars that a fine-tuned checkpoint needs, by identifier or file name, where the spectra lack them",
    )
    predict.add_argument(
        "--plot", type=Path, metavar="DIR", help=f"plot the first {PLOTTED_STARS} spectra and an overview"
    )
    predict.add_argument("--batch-size", type=positive, metavar="N", help="batch size (default: by number of pixels)")
    predict.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="distribute a survey over a Ray cluster: ADDRESS, RAY_ADDRESS or a local one (needs the extra `ray`)",
    )
    add_overwrite(predict)
    predict.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from tqdm.auto import tqdm

    from spectrafm_hf.data.readers import MEASURE, Failure, find_files, read_spectra
    from spectrafm_hf.inference.prediction import answered_labels, batches_of, predict_batches
    from spectrafm_hf.inference.tables import PredictionWriter
    from spectrafm_hf.inference.velocities import (
        VELOCITY,
        VELOCITY_UNIT,
        at_measured_velocities,
        settled,
        velocity_columns,
    )

    demand_new_output(arguments)
    failures = _fetch_gaia(arguments)
    if arguments.output and (arguments.output.is_dir() or not arguments.output.suffix):
        return predict_survey(arguments, failures)
    if arguments.ray is not None:
        raise ValueError(f"--ray: expected a folder as the output, got {arguments.output}")
    files = find_files(arguments.input, arguments.split, failures)
    model, tokenizer, training_range = load_with_range(
        arguments.model or DEFAULT_MODEL, arguments.revision, arguments.device
    )
    every, known = labels_of(model, tokenizer)
    answered = set(every if tokenizer.basis is None else ())
    first_rows = _first_rows(files, arguments)
    while answered != set(every) and (row := next(first_rows, None)):
        answered |= set(answered_labels(model, tokenizer, row))
    answered = answered or set(every)  # where no file could be read
    names = [label for label in every if label in answered]
    units = {label: known[label] for label in names}
    scalars = scalar_options(arguments.scalar_table, tokenizer)
    rows = read_spectra(files, failures=failures, keep_refused=True, **reading_options(arguments), **scalars)
    columns = list(names)
    if measures := arguments.radial_velocity == MEASURE:
        rows = at_measured_velocities(rows, model, tokenizer)
        columns, units = [VELOCITY, *names], {**units, VELOCITY: VELOCITY_UNIT}
    else:
        rows = settled(rows, model, tokenizer)
    summary = Summary(columns, units)
    with contextlib.ExitStack() as stack:
        writer = None
        if arguments.output:
            # Data sets have an object_id for each star; spectra of one star may be in several files.
            tell = len(files) > 1 and any(path.suffix.lower() != ".parquet" for path in files)
            writer = stack.enter_context(PredictionWriter(arguments.output, columns, units, files=tell))
        progress = stack.enter_context(tqdm(total=count(files), desc="predicting", unit=" stars", delay=DELAY))

        def requested(row: Row) -> tuple[str, ...]:
            """The labels predicted for a spectrum."""
            wanted = answered_labels(model, tokenizer, None if row["refused"] else row)
            return tuple(label for label in names if label in wanted)

        for own, group in itertools.groupby(rows, requested):
            batches, same = itertools.tee(batches_of(group, tokenizer, arguments.batch_size))
            for batch, prediction in zip(
                same, predict_batches(model, tokenizer, batches, own, training_range), strict=True
            ):
                _fill_in(prediction, names)
                if measures:
                    prediction |= velocity_columns(batch)
                failed = summary.add(batch, prediction)
                failures += [Failure(batch[i]["file"], cause(prediction, i)) for i in failed]
                if writer:
                    writer.write(prediction)
                progress.update(len(batch))
        if not summary.n_good:
            raise ValueError(nothing_done(failures, len(files), arguments.output))

    summary.print(arguments.output)
    if arguments.model is None:
        print(f"model: {DEFAULT_MODEL} (--model NAME takes another)")
    say_device(model)
    if training_range is None:
        print(f"{model.name_or_path} has no training range: values outside of it are not flagged")
    if arguments.plot:
        summary.draw(arguments.plot, model, tokenizer)
    return report(failures, arguments.output)


def _first_rows(files: Sequence[Path], arguments: argparse.Namespace) -> Iterator[Row]:
    """The first readable spectra of some files."""
    from spectrafm_hf.data.readers import read_spectra

    for file in files[:MODEL_FILES]:
        row = next(iter(read_spectra([file], failures=[], keep_refused=True, **reading_options(arguments))), None)
        if row is not None and not row["refused"]:
            yield row


def _fill_in(prediction: dict[str, Any], names: Sequence[str]) -> None:
    """Columns of labels that are not predicted for some spectra."""
    import numpy as np

    count = len(prediction["object_id"])
    for column in (column for name in names for column in (name, f"{name}_err")):
        prediction.setdefault(column, np.full(count, np.nan, np.float32))


def _fetch_gaia(arguments: argparse.Namespace) -> list[Failure]:
    """Add spectra of Gaia source ids to the input; returns ids without spectra."""
    from tqdm.auto import tqdm

    failures: list[Failure] = []
    if not arguments.gaia_ids:
        if not arguments.input:
            raise ValueError("INPUT: expected files, folders or --gaia-ids, got none")
        return failures
    from spectrafm_hf.data.gaia_archive import GaiaArchive, read_source_ids
    from spectrafm_hf.inference.survey import process_number

    if (n_processes := process_number()[1]) > 1:
        raise ValueError(f"--gaia-ids: expected one process, which fetches them, got {n_processes}")
    identifiers = read_source_ids(arguments.gaia_ids)
    with tqdm(total=len(identifiers), desc="fetching", unit=" stars", delay=DELAY) as progress:
        arguments.input += GaiaArchive().files(identifiers, failures, progress.update)
    if not arguments.input:
        raise ValueError(nothing_done(failures, 0, arguments.output))
    return failures
