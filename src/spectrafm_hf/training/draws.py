# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Which stars a run draws, and in what order."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch


class Draws(torch.utils.data.Sampler[int]):
    """
    The stars of a run in the order of training, numbered through all epochs, each of which begins with a multiple of
    the size of the batch of all processes together.

    Which star a draw is, the data set knows (see [`Columns`], [`Mixture`] and [`StreamedStars`]), and what is random in
    a batch follows from the numbers of its draws (see [`SpectraFMCollator`]), so that it does not matter which process
    or worker makes the batch, or whether the run was interrupted before.
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
    Stars, as a data set or as columns, that answer a list of draws with columns: no Python object for each.

    With a `seed`, each epoch of `epoch_length` draws has an order of its own.
    """

    def __init__(self, data: Any, epoch_length: int = 0, seed: int | None = None):
        self.data = data if isinstance(data, Mapping) else data.with_format("numpy")
        self.epoch_length, self.seed = epoch_length or len(self), seed
        self._epoch, self._order = -1, torch.empty(0)

    def __len__(self) -> int:
        return len(next(iter(self.data.values()))) if isinstance(self.data, Mapping) else len(self.data)

    def __getitems__(self, draws: list[int]) -> dict[str, np.ndarray]:
        """Columns of the stars that these draws of one epoch are; `draw` holds their numbers."""
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
