# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Order of the training stars."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch


class Draws(torch.utils.data.Sampler[int]):
    """
    Numbers of the draws of a run in the order of training, increasing through all epochs. The first draw of an epoch is
    a multiple of the batch size of all processes together.

    The data set maps draws to stars (see [`Columns`], [`Mixture`] and [`StreamedStars`]). The random numbers of a batch
    depend only on its draws (see [`SpectraFMCollator`]). So a batch is the same in any process or worker, and in a
    resumed run.
    """

    def __init__(self, n_stars: int, batch_size: int = 1):
        self.n_stars, self.epoch = n_stars, 0
        self.epoch_length = -(-n_stars // batch_size) * batch_size

    def set_epoch(self, epoch: int):
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n_stars

    def __iter__(self) -> Iterator[int]:
        first = self.epoch * self.epoch_length
        return iter(range(first, first + self.n_stars))


class Columns(torch.utils.data.Dataset):
    """
    Stars of a data set, or of a mapping of columns, returned as columns for a list of draws: faster than row by row.

    With a `seed`, the stars are shuffled in each epoch of `epoch_length` draws.
    """

    def __init__(self, data: Any, epoch_length: int = 0, seed: int | None = None):
        self.data = data if isinstance(data, Mapping) else data.with_format("numpy")
        self.epoch_length, self.seed = epoch_length or len(self), seed
        self._epoch, self._order = -1, torch.empty(0)

    def __len__(self) -> int:
        return len(next(iter(self.data.values()))) if isinstance(self.data, Mapping) else len(self.data)

    def __getitems__(self, draws: list[int]) -> dict[str, np.ndarray]:
        """Columns of the stars of these draws of one epoch, and the column `draw` with their numbers."""
        epoch = draws[0] // self.epoch_length
        indices = [draw - epoch * self.epoch_length for draw in draws]
        if self.seed is not None:
            if epoch != self._epoch:
                generator = torch.Generator().manual_seed(self.seed + epoch)
                self._epoch, self._order = epoch, torch.randperm(len(self), generator=generator)
            indices = self._order[indices].tolist()
        if isinstance(self.data, Mapping):
            columns = {name: column[indices] for name, column in self.data.items()}
        else:
            columns = self.data[indices]
        return {**columns, "draw": np.array(draws)}
