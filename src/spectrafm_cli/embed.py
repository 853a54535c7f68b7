# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""`spectrafm embed`: a vector for each spectrum."""

from __future__ import annotations

import argparse
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
from .loading import count, load, say_device
from .report import nothing_done, report


if TYPE_CHECKING:
    from spectrafm_hf.data.readers import Failure
    from spectrafm_hf.inference.similar import Embeddings
    from spectrafm_hf.models import SpectraFMForPrediction, SpectraFMTokenizer


def add(verbs: Any) -> None:
    embed = verbs.add_parser("embed", parents=[reading()], help="write an embedding vector for each spectrum")
    add_model(embed)
    embed.add_argument("--output", type=Path, required=True, metavar="FILE", help="a .parquet file")
    embed.add_argument("--batch-size", type=positive, default=128, metavar="N", help="batch size (default: 128)")
    add_overwrite(embed)
    embed.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from spectrafm_hf.inference.similar import EmbeddingWriter

    demand_new_output(arguments)
    failures: list[Failure] = []
    model, tokenizer = load(arguments.model or DEFAULT_MODEL, arguments.revision, arguments.device)
    n_stars = 0
    with EmbeddingWriter(arguments.output, model) as writer:
        for part in embeddings(arguments, arguments.input, model, tokenizer, failures):
            writer.write(part)
            n_stars += len(part.object_id)
            width, wavelengths = part.vectors.shape[1], part.range
    print(f"written: {arguments.output}, {n_stars:,} vectors of {width} numbers, of spectra of {wavelengths}")
    say_device(model)
    return report(failures, arguments.output)


def embeddings(
    arguments: argparse.Namespace,
    paths: Sequence[Path],
    model: SpectraFMForPrediction,
    tokenizer: SpectraFMTokenizer,
    failures: list[Failure],
) -> Iterator[Embeddings]:
    """Of all spectra that can be used, batch after batch; at least one."""
    from tqdm.auto import tqdm

    from spectrafm_hf.data.readers import Failure, batched, find_files, read_spectra
    from spectrafm_hf.inference.similar import Embedder
    from spectrafm_hf.inference.velocities import settled

    files = find_files(paths, arguments.split if paths is arguments.input else None, failures)
    embedder = Embedder(model, tokenizer)
    rows = settled(read_spectra(files, failures=failures, **reading_options(arguments)), model, tokenizer)
    n_stars = 0
    with tqdm(total=count(files), desc="embedding", unit=" stars", delay=DELAY) as progress:
        for batch in batched(rows, arguments.batch_size):
            part, bad = embedder(batch)
            failures += [Failure(batch[i]["file"], f"{batch[i]['object_id']}: {why}") for i, why in bad.items()]
            n_stars += len(part.object_id)
            progress.update(len(batch))
            if part.object_id:
                yield part
    if not n_stars:
        raise ValueError(nothing_done(failures, len(files), arguments.output))
