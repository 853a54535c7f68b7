#!/usr/bin/env python
# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Kinds of stars for the missing pixels of Gaia XP: a mixture of Gaussians of the coefficients of training stars.

    python scripts/generate/fit_kinds.py spectrafm-base --gaia-xp DIR

Writes the mixture into the basis of the checkpoint, a bundled name or a folder. Labels do not depend on it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset
from numpy.typing import NDArray
from safetensors.numpy import save_file
from sklearn.mixture import GaussianMixture

from spectrafm_hf import load_checkpoint
from spectrafm_hf.checkpoints import bundled
from spectrafm_hf.data.schema import PIXEL_COLUMNS
from spectrafm_hf.files import complete_file
from spectrafm_hf.inference.prediction import schema_tokenizer
from spectrafm_hf.models.rungs_spectrafm import Rung


RUNG, AT_ONCE = 0, 1000


def amplitudes(model, tokenizer, stars) -> NDArray[np.float64]:
    """Of whole spectra, (stars, components)."""
    completion = model.model.rungs[RUNG].completion
    found = []
    for start in range(0, len(stars), AT_ONCE):
        pixels = stars[start : start + AT_ONCE]
        rows = [{name: pixels[name][i] for name in PIXEL_COLUMNS} for i in range(len(pixels["flux"]))]
        for grid in schema_tokenizer(tokenizer)(rows, return_grids=True)["grids"]:
            evidence = grid.evidence
            parts = evidence.coefficients, evidence.reliability, np.asarray(evidence.intervals)
            with torch.no_grad():
                found.append(completion.amplitudes(*map(torch.from_numpy, parts))[0].double().numpy())
    return np.concatenate(found)


def with_kinds(rung: Rung, completion, values: NDArray[np.float64], n_kinds: int, floor: float, seed: int) -> Rung:
    """The rung with a mixture that describes amplitudes (stars, components); `floor` is a variance of each."""
    spread = completion.spread.double().numpy()
    mixture = GaussianMixture(n_kinds, reg_covar=floor, tol=1e-3, max_iter=100, random_state=seed)
    mixture.fit(values / spread)
    lower = np.linalg.cholesky(mixture.covariances_)
    directions = completion.components.double().numpy() / completion.metric.double().numpy()[..., None]
    return replace(
        rung,
        kind_shares=mixture.weights_,
        kind_center=completion.center.double().numpy(),
        kind_directions=directions * spread,
        kind_means=mixture.means_,
        kind_factors=lower[:, *np.tril_indices(len(spread))],
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fit_kinds.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint", metavar="NAME_OR_PATH")
    parser.add_argument("--gaia-xp", type=Path, required=True, metavar="DIR", help="of `spectrafm data gaia-xp`")
    parser.add_argument("--kinds", type=int, default=20)
    parser.add_argument("--floor", type=float, default=2e-3, help="variance that is added, over that of all stars")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    folder = Path(arguments.checkpoint)
    folder = folder if folder.is_dir() else Path(bundled(arguments.checkpoint))
    model, tokenizer = load_checkpoint(folder)
    stars = load_dataset(str(arguments.gaia_xp), split="train").with_format("numpy")
    values = amplitudes(model, tokenizer, stars)
    basis = tokenizer.basis
    if basis is None:
        parser.error(f"NAME_OR_PATH: expected a checkpoint with a basis, got {folder}")
    completion = model.model.rungs[RUNG].completion
    basis.rungs[RUNG] = with_kinds(
        basis.rungs[RUNG], completion, values, arguments.kinds, arguments.floor, arguments.seed
    )
    with complete_file(folder / "basis.safetensors") as temporary:
        save_file(basis.arrays(), temporary)
    print(f"{len(values):,} training stars, {arguments.kinds} kinds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
