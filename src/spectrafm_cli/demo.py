# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""`spectrafm demo`: 64 real stars that come with the package."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import DEFAULT_MODEL, MODEL_HELP, add_device, add_revision
from .loading import labels_of, load, say_device
from .report import PRINTED_STARS, heading, measured, print_table


def add(verbs: Any) -> None:
    demo = verbs.add_parser("demo", help="predict labels of 64 bundled stars and plot them")
    demo.add_argument("--output", type=Path, default=Path(), metavar="DIR", help="output folder for spectrafm-demo.png")
    demo.add_argument("--model", default=DEFAULT_MODEL, metavar="NAME_OR_PATH", help=MODEL_HELP)
    add_device(demo)
    add_revision(demo)
    demo.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    import numpy as np

    from spectrafm_hf.data.readers import read_spectra
    from spectrafm_hf.data.schema import digits
    from spectrafm_hf.files import DEMO_STARS
    from spectrafm_hf.inference.prediction import answered_labels, predict_batches
    from spectrafm_hf.show.labels import plot_comparison
    from spectrafm_hf.training.metrics import label_metrics

    model, tokenizer = load(arguments.model, arguments.revision, arguments.device)
    rows = list(read_spectra([DEMO_STARS]))
    names = answered_labels(model, tokenizer, rows[0])
    known = labels_of(model, tokenizer)[1]
    units = {name: known[name] for name in names}
    unknown = [name for name in names if not any(name in row for row in rows)]
    if unknown:
        raise ValueError(f"model: expected one that predicts labels of the demo stars, got one that predicts {unknown}")
    (prediction,) = predict_batches(model, tokenizer, [rows], names)
    catalogue = {
        name: np.array([row.get(name, np.nan) for row in rows], np.float32)
        for label in names
        for name in (label, f"{label}_err")
    }

    print(f"{len(rows)} stars that {arguments.model} was not trained on: Gaia DR3 XP spectra, APOGEE DR17 labels")
    header = ["object_id", *(text for name in names for text in (heading(name, units), "APOGEE"))]
    lines = [
        [
            prediction["object_id"][i],
            *(
                text
                for name in names
                for text in (
                    measured(prediction, i, name, units),
                    f"{catalogue[name][i]:.{digits(units[name])}f}",
                )
            ),
        ]
        for i in range(PRINTED_STARS)
    ]
    print_table(header, lines)
    print(f"... {len(rows) - len(lines)} more in the picture")
    print()
    print(f"predicted - APOGEE, all {len(rows)} stars:")
    summary = []
    for name in names:
        figures = label_metrics(prediction[name], prediction[f"{name}_err"], catalogue[name], catalogue[f"{name}_err"])
        number = digits(units[name]) + (units[name] != "K")
        scatter, bias = f"{figures['robust_scatter']:.{number}f}", f"{figures['bias']:+.{number}f}"
        summary.append([heading(name, units), scatter, bias, f"{figures['robust_z']:.2f}"])
    print_table(["label", "scatter (1.4826 MAD)", "bias (median)", "scatter / sigma"], summary)
    print("(half of them were picked to cover [Fe/H] evenly; the model card has the figures of a whole split)")

    arguments.output.mkdir(parents=True, exist_ok=True)
    picture = arguments.output / "spectrafm-demo.png"
    # The star in the middle of the temperatures stands for all.
    example = rows[int(np.argsort(catalogue["teff"])[len(rows) // 2])] if "teff" in catalogue else rows[0]
    tokens = []
    if tokenizer.basis is not None:
        inputs = tokenizer(example, return_tensors="np")
        edges = tokenizer.basis.interval_edges[inputs["interval_ids"][0][inputs["attention_mask"][0]]]
        tokens = [(float(low), float(high)) for low, high in edges]
    plot_comparison(picture, prediction, catalogue, units, example, tokens)
    say_device(model)
    print(f"written: {picture}")
