# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""`spectrafm predict` into a folder: surveys."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import TYPE_CHECKING

from .arguments import DEFAULT_MODEL, DELAY, reading_options
from .loading import first_row, load, say_device, scalar_options
from .report import FAILED, nothing_done, report


if TYPE_CHECKING:
    from spectrafm_hf.data.readers import Failure
    from spectrafm_hf.inference.survey import Outcome


def predict_survey(arguments: argparse.Namespace, failures: list[Failure]) -> int:
    """Write one file for each shard of this process."""
    from tqdm.auto import tqdm

    from spectrafm_hf.inference.prediction import Flagged, answered_labels
    from spectrafm_hf.inference.survey import ShardPredictor, is_on_the_hub, list_shards, process_number
    from spectrafm_hf.inference.training_range import TrainingRange

    if arguments.plot:
        raise ValueError("--plot: expected a table as the output to draw from, not a folder")
    if arguments.model is None and any(map(is_on_the_hub, arguments.input)):
        raise ValueError("--model: expected one for spectra on the hub, got none")
    rank, world_size = process_number()
    if arguments.ray is not None and world_size > 1:
        raise ValueError(f"--ray: expected one process, which Ray makes more of, got {world_size}")
    shards = list_shards(arguments.input, arguments.split, failures)
    row = None if any(map(is_on_the_hub, arguments.input)) else first_row(arguments)
    name = arguments.model or DEFAULT_MODEL
    model, tokenizer = load(name, arguments.revision, arguments.device)
    tokenizer.requests = answered_labels(model, tokenizer, row)  # all files get the same columns
    training_range = TrainingRange.load(str(model.name_or_path), arguments.revision)
    reading = {**reading_options(arguments), **scalar_options(arguments.scalar_table, tokenizer)}
    predictor = ShardPredictor(model, tokenizer, arguments.output, training_range, arguments.batch_size, reading)
    own = shards[rank::world_size]
    left = []
    for shard in own:
        if (known := predictor.failures(shard)) is None:
            left.append(shard)
        else:
            failures += known
    done = before = len(own) - len(left)
    with tqdm(desc="predicting", unit=" stars", delay=DELAY, disable=None if rank == 0 else True) as progress:
        outcomes: Iterable[Outcome]
        if arguments.ray is None:
            outcomes = (predictor.outcome(shard, progress.update) for shard in left)
        else:
            from spectrafm_hf.inference.survey_ray import predict_on_ray

            outcomes = predict_on_ray(
                left,
                name,
                arguments.output,
                revision=arguments.revision,
                batch_size=arguments.batch_size,
                reading=reading,
                address=arguments.ray or None,
                requests=tokenizer.requests,
                progress=progress.update,
            )
        for number, outcome in enumerate(outcomes, start=1):
            progress.set_postfix_str(f"{number} of {len(left)} shards")
            failures += outcome.failures
            done += outcome.written
    process = f"process {rank} of {world_size}: " if world_size > 1 else ""
    print(f"{process}{done:,} of {len(own):,} shards in {arguments.output}, {before:,} of them from before")
    if arguments.ray is None:
        say_device(model)
    inside = arguments.output / FAILED
    if flagged := str(sum(map(predictor.flagged, filter(predictor.is_done, own)), Flagged())):
        print(flagged)
    if own and not done:
        raise ValueError(nothing_done(failures, len(own), inside))
    # The underscore keeps it from being taken for a part of the table.
    return report(failures, inside, f"_failed-{rank}.csv" if rank else f"_{FAILED}")
