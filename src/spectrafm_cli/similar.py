# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""`spectrafm similar`: stars with similar spectra."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import (
    DEFAULT_MODEL,
    add_model,
    add_overwrite,
    demand_new_output,
    positive,
    reading,
)
from .embed import embeddings
from .loading import labels_of, load, say_device
from .report import PRINTED_STARS, heading, print_table, report


if TYPE_CHECKING:
    from spectrafm_hf.data.readers import Failure


def add(verbs: Any) -> None:
    similar = verbs.add_parser("similar", parents=[reading()], help="find the most similar spectra of a data set")
    similar.add_argument(
        "--to", type=Path, required=True, metavar="PATH", help="data set folder, or output of `spectrafm embed`"
    )
    similar.add_argument("-n", type=positive, default=5, metavar="N", help="number of neighbours (default: 5)")
    add_model(similar)
    similar.add_argument("--output", type=Path, metavar="FILE", help=".csv table of all neighbours")
    similar.add_argument("--batch-size", type=positive, default=128, metavar="N", help="batch size (default: 128)")
    add_overwrite(similar)
    similar.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    import csv

    from spectrafm_hf.files import complete_file
    from spectrafm_hf.inference.similar import Embeddings, label_distance, neighbours, read_embeddings

    demand_new_output(arguments)
    if arguments.output and not arguments.output.parent.is_dir():
        raise ValueError(f"output: expected a folder that exists, got {arguments.output.parent}")
    failures: list[Failure] = []
    model, tokenizer = load(arguments.model or DEFAULT_MODEL, arguments.revision, arguments.device)
    names, units = labels_of(model, tokenizer)
    others = read_embeddings(arguments.to, model) if arguments.to.is_file() else None
    if others is None:
        others = Embeddings.join(list(embeddings(arguments, [arguments.to], model, tokenizer, failures)))
    queries = Embeddings.join(list(embeddings(arguments, arguments.input, model, tokenizer, failures)))
    index, similarity = neighbours(queries, others, arguments.n)

    known = [name for name in names if name in others.labels]
    lines = [
        [queries.object_id[star], str(rank), others.object_id[i], f"{cosine:.5f}"]
        + [f"{others.labels[name][i]:g}" for name in known]
        for star in range(len(index))
        for rank, (i, cosine) in enumerate(zip(index[star], similarity[star], strict=True), start=1)
        if i >= 0
    ]
    header = ["object_id", "rank", "neighbour", "similarity"]
    print_table([*header, *(heading(name, units) for name in known)], lines[:PRINTED_STARS])
    if arguments.output:
        with complete_file(arguments.output) as temporary, temporary.open("w", newline="", encoding="utf-8") as table:
            csv.writer(table, lineterminator="\n").writerows([[*header, *known], *lines])
        print(f"written: {arguments.output}")
    elif len(lines) > PRINTED_STARS:
        print(f"... {len(lines) - PRINTED_STARS:,} more, --output FILE keeps them")
    distances = label_distance(queries, others, index, names)
    if distances:
        near, random = distances
        print(
            f"distance in {', '.join(known)}, each in units of its scatter: neighbours {near:.3f}, random stars "
            f"{random:.3f}, ratio {near / random:.2f}"
        )
    say_device(model)
    return report(failures, arguments.output)
