# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""A survey on a Ray cluster: Ray Data distributes the shards, each is predicted and written as on one machine.

Ray pickles what it sends between processes; here these are only names of shards, checkpoint and folder, which all
machines have to see. Spectra and weights are read by the process that needs them.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoints import bundled_names, load_checkpoint
from ..data.readers import Failure
from .survey import Outcome, Shard, ShardPredictor
from .training_range import TrainingRange


try:
    import ray
    import ray.data
except ImportError as error:
    raise ImportError('Ray is not installed: pip install ".[ray]" in a clone of the repository') from error


class ShardActor:
    """Predictor of shards in a Ray process; it loads the checkpoint once. See [`predict_on_ray`]."""

    def __init__(
        self,
        model: str,
        revision: str,
        output: str,
        batch_size: int | None,
        reading: Mapping[str, Any],
        requests: list[str] | None,
    ) -> None:
        loaded, tokenizer = load_checkpoint(model, revision)
        tokenizer.requests = requests or tokenizer.requests
        if torch.cuda.is_available():
            loaded.cuda()  # type: ignore[call-arg]  # transformers wraps it without its types
        training_range = TrainingRange.load(str(loaded.name_or_path), revision)
        self.predictor = ShardPredictor(loaded, tokenizer, output, training_range, batch_size, reading)

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row of Ray Data: a shard as JSON, to which its `Outcome` is added."""
        fields = json.loads(row["shard"])
        outcome = self.predictor.outcome(Shard(**{**fields, "files": tuple(fields["files"])}))
        failures = json.dumps([(str(failure.file), failure.cause) for failure in outcome.failures])
        return {**row, "written": outcome.written, "stars": outcome.stars, "failures": failures}


def predict_on_ray(
    shards: Sequence[Shard],
    model: str,
    output: str | os.PathLike[str],
    *,
    revision: str = "main",
    batch_size: int | None = None,
    reading: Mapping[str, Any] | None = None,
    address: str | None = None,
    requests: Sequence[str] | None = None,
    progress: Callable[[int], Any] = lambda stars: None,
) -> Iterator[Outcome]:
    """
    Predict shards with Ray Data, in parallel on all CPUs of the cluster, or GPUs if there are any.

    Ray restarts a shard whose process or machine fails.

    Parameters
    ----------
    shards : sequence of Shard
        Unfinished shards of `list_shards`, with files that all machines see.
    model : str
        A bundled checkpoint, a folder that all machines see, or a name on the hub.
    output : path
        Folder that all machines see.
    revision : str
        Of the checkpoint.
    batch_size : int, optional
        As in `ShardPredictor`.
    reading : mapping
        Arguments of `read_spectra`.
    address : str, optional
        Address of the cluster, as in `ray.init`. Default: RAY_ADDRESS, a cluster on this machine, or a new one on this
        machine.
    requests : sequence of str, optional
        Labels; default: those of the checkpoint.
    progress : callable
        Called with the number of stars of each batch.

    Yields
    ------
    Outcome
        In the order in which they finish.

    Raises
    ------
    ConnectionError
        If no cluster runs at the address.
    """
    if not shards:
        return
    # Ray processes start in other folders, so paths have to be absolute.
    shards = [
        shard if shard.repository else replace(shard, files=tuple(map(os.path.abspath, shard.files)))
        for shard in shards
    ]
    arguments = {
        "model": os.path.abspath(model) if model not in bundled_names() and os.path.isdir(model) else model,
        "revision": revision,
        "output": os.path.abspath(output),
        "batch_size": batch_size,
        "reading": dict(reading or {}),
        "requests": None if requests is None else list(requests),
    }
    started = not ray.is_initialized()
    if started:
        # No usage reports unless the user wants them.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(address, logging_level=logging.WARNING)
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        names = [{"shard": json.dumps(asdict(shard))} for shard in shards]
        outcomes = ray.data.from_items(names, override_num_blocks=len(names)).map(
            ShardActor,  # type: ignore[arg-type]  # Ray takes classes, too
            fn_constructor_kwargs=arguments,
            # One shard at a time; the next one goes to the first idle process.
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=len(names), max_tasks_in_flight_per_actor=1),
            num_gpus=1 if ray.cluster_resources().get("GPU") else None,
        )
        by_name = {row["shard"]: shard for row, shard in zip(names, shards, strict=True)}
        for row in outcomes.iter_rows():
            failures = [Failure(Path(file), cause) for file, cause in json.loads(row["failures"])]
            progress(int(row["stars"]))
            yield Outcome(by_name[row["shard"]], bool(row["written"]), int(row["stars"]), failures)
    finally:
        if started:
            ray.shutdown()
