#!/usr/bin/env python
# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
Compare embeddings of spectra by the labels of nearest neighbours, for complete spectra and for spectra with holes.

    python scripts/paper/compare_embeddings.py gaia-xp --split validation --labels teff logg fe_h alpha_m
    python scripts/paper/compare_embeddings.py synthetic-apogee --labels teff logg fe_h mg_fe c_fe n_fe

For each embedding the table has the label distance of the five nearest stars of the data set relative to that of random
stars (`label_distance`), and the scatter (1.4826 MAD) of the differences in each label. `holes` is the same for queries
with a fifth of the range and 30 percent of the other pixels masked. The embeddings:

- `states`: the mean of the states of the members, which `spectrafm embed` writes;
- `amplitudes`: amplitudes of the components of stars, in units of their spread;
- `labels`: predictions of the network, in units of the scale of each label;
- `pixels`: 30 principal components of the flux over its median, of these stars; masked pixels are at the median star.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from spectrafm_cli.arguments import Parser
from spectrafm_hf.checkpoints import BASE_CHECKPOINT, demand_evidence, load_checkpoint
from spectrafm_hf.data.readers import batched, find_files, read_spectra
from spectrafm_hf.data.schema import valid_pixels
from spectrafm_hf.inference.prediction import schema_tokenizer, tokenize_rows
from spectrafm_hf.inference.similar import EMBEDDED, Embeddings, label_distance, neighbours
from spectrafm_hf.statistics import robust_scatter


Array = NDArray[Any]
Rows = Sequence[dict[str, Any]]
BATCH, NEIGHBOURS, COMPONENTS = 128, 5, 30


def with_holes(rows: Rows, seed: int) -> list[dict[str, Any]]:
    """A fifth of the pixels in a row, and 30 percent of all, masked."""
    random = np.random.default_rng(seed)
    found = []
    for row in rows:
        n_pixels = len(row["mask"])
        mask = np.asarray(row["mask"]) | (random.random(n_pixels) < 0.3)
        first = random.integers(n_pixels * 4 // 5)
        mask[first : first + n_pixels // 5] = True
        found.append({**row, "mask": mask})
    return found


def vectors_of(name: str, rows: Rows) -> dict[str, Array]:
    """Vectors of the model, (stars, width) each."""
    model, tokenizer = load_checkpoint(name)
    demand_evidence(tokenizer, "embed")
    tokenizer, config = schema_tokenizer(tokenizer), model.config
    names = list(config.network_labels or config.label_names)
    chosen = [list(config.label_names).index(label) for label in names]
    center, scale = (np.array(table)[chosen] for table in (config.label_centers, config.label_scales))
    parts: dict[str, list[Array]] = {}
    for batch in batched(rows, BATCH):
        ((inputs, members),) = tokenize_rows(tokenizer, batch, names, [""] * len(batch))
        order = np.argsort(members)
        tokens = {key: inputs[key][order] for key in EMBEDDED}
        with torch.no_grad():
            values = model(**tokens, request_ids=inputs["request_ids"]).predictions.numpy()
            output = model.model(**tokens)
            rung = int(output.rung_seen[0].int().argmax())
            completion: Any = model.model.rungs[rung].completion
            own = output.last_hidden_state[:, rung].mean(dim=1).numpy()
            evidence = (tokens[key] for key in ("coefficients", "reliability"))
            amplitudes, _ = completion.amplitudes(*evidence, tokens["interval_ids"][0])
        found = {"states": own, "amplitudes": amplitudes / completion.spread, "labels": (values - center) / scale}
        for key, part in found.items():
            parts.setdefault(key, []).append(np.asarray(part, np.float32))
    return {key: np.concatenate(part) for key, part in parts.items()}


def fluxes(rows: Rows) -> Array:
    """Flux over its median, (stars, pixels), NaN where masked."""
    flux = np.stack([np.where(valid_pixels(row), row["flux"], np.nan) for row in rows])
    return flux / np.nanmedian(flux, axis=1, keepdims=True)


def main() -> int:
    parser = Parser(description="Compare embeddings of spectra by the labels of nearest neighbours.")
    parser.add_argument("input", type=Path, nargs="+", metavar="INPUT", help="a data set with labels, on one grid")
    parser.add_argument("--split")
    parser.add_argument("--labels", nargs="+", required=True, metavar="LABEL")
    parser.add_argument("--model", default=BASE_CHECKPOINT, metavar="NAME_OR_PATH")
    parser.add_argument("--stars", type=int, default=4000, metavar="N", help="at most (default: 4000)")
    parser.add_argument("--seed", type=int, default=0, help="of the holes (default: 0)")
    arguments = parser.parse_args()
    try:
        run(arguments)
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    return 0


def run(arguments: argparse.Namespace) -> None:
    names = arguments.labels
    rows = list(islice(read_spectra(find_files(arguments.input, arguments.split)), arguments.stars))
    labels = {name: np.array([row.get(name, np.nan) for row in rows], np.float32) for name in names}
    holed = with_holes(rows, arguments.seed)
    vectors, others = vectors_of(arguments.model, rows), vectors_of(arguments.model, holed)
    whole, parts = fluxes(rows), fluxes(holed)
    typical = np.nanmedian(whole, axis=0)
    whole, parts = (np.where(np.isnan(flux), typical, flux) for flux in (whole, parts))
    mean = whole.mean(axis=0)
    components = np.linalg.svd(whole - mean, full_matrices=False)[2][:COMPONENTS]
    vectors["pixels"], others["pixels"] = ((flux - mean) @ components.T for flux in (whole, parts))
    identifiers = [str(i) for i in range(len(rows))]
    print(
        f"{arguments.model}, {len(rows):,} stars, {NEIGHBOURS} neighbours; distance, and scatter of {', '.join(names)}"
    )
    for name, width in ((name, part.shape[1]) for name, part in vectors.items()):
        stars = Embeddings(identifiers, vectors[name].astype(np.float32), labels, "")
        for what, part in (("whole", vectors[name]), ("holes", others[name])):
            queries = Embeddings(identifiers, part.astype(np.float32), labels, "")
            index, _ = neighbours(queries, stars, NEIGHBOURS)
            distance = label_distance(queries, stars, index, names)
            assert distance is not None
            off = [labels[label][:, None] - labels[label][index] for label in names]
            scatters = " ".join(f"{robust_scatter(one[np.isfinite(one)]):.4g}" for one in off)
            print(f"{name:10} {width:5} {what}: {distance[0] / distance[1]:.3f}, {scatters}")


if __name__ == "__main__":
    sys.exit(main())
