# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Several sources of spectra, hosted or drawn as they are needed, as one data set to train on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray


Columns = dict[str, NDArray[Any]]


class Source(Protocol):
    """Anything that stars can be drawn from: [`HostedStars`], or `SyntheticStars`."""

    def draw(self, n: int, generator: np.random.Generator) -> Columns:
        """Columns of `n` stars that share their pixels."""
        ...


class HostedStars:
    """Stars of a data set, drawn at random; with `datasets`' format "numpy", which answers indices with columns."""

    def __init__(self, data: Any):
        self.data = data.with_format("numpy")

    def draw(self, n: int, generator: np.random.Generator) -> Columns:
        return self.data[np.sort(generator.integers(len(self.data), size=n))]


class Mixture(torch.utils.data.Dataset):
    """
    Stars of several sources, each batch from one of them, so that the stars of a batch share their pixels.

    A batch follows from `seed` and the first of its indices alone, whatever the process or worker that makes it: a
    sampler that resumes or shares indices between processes does so for these stars as well. Indices may go on beyond
    `length`, epoch after epoch; the stars are always new. Two processes that share a batch draw their parts of it from
    a source each: other stars than one process would draw, and as many from each source in the end.

    Parameters
    ----------
    sources : sequence of Source
    shares : sequence of float
        How often a batch comes from each, in any unit.
    length : int
        Number of stars until an epoch ends.
    seed : int
    """

    def __init__(self, sources: Sequence[Source], shares: Sequence[float], length: int, seed: int):
        if len(shares) != len(sources) or min(shares) < 0 or not 0 < sum(shares) < np.inf:
            raise ValueError(f"shares: expected a positive number for each of {len(sources)} sources, got {shares}")
        self.sources = list(sources)
        self.shares = np.array(shares, dtype=float) / sum(shares)
        self.length = length
        self.seed = seed

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, indices: list[int]) -> Columns:
        """Columns of `len(indices)` stars; `draw` holds the indices."""
        generator = np.random.default_rng([self.seed, indices[0]])
        source = self.sources[generator.choice(len(self.sources), p=self.shares)]
        return {**source.draw(len(indices), generator), "draw": np.array(indices)}
