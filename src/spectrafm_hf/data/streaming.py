# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""A training set of many Parquet files that is read as it is needed, on one process or many, with the same batches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets.distributed import split_dataset_by_node
from numpy.typing import NDArray


#: Lanes that a stream is read in, at most.
LANES = 8
#: Stars of a lane that are read, and shuffled, together.
CHUNK = 512


class StreamedStars(torch.utils.data.Dataset):
    """
    Stars of a streamed data set that are asked for by the numbers of their draws, which grow.

    The shards are dealt out to lanes, in another order in each epoch, and a batch, of all processes together, takes an
    equal part from each lane, one part after the other. A process opens the lanes that its part of the batch comes
    from: where the number of processes divides that of the lanes, a shard is read by one process; where it does not, by
    several, which pass over what is not theirs. Which star a draw is follows from its number, the seed and the size of
    the batch of all processes together, so that neither their number nor an interruption changes anything: a resumed
    run passes over what it has seen of the epoch. More than one worker of a `DataLoader` only makes each of them read
    what the others use.

    Stars are shuffled within `CHUNK` of a lane. (The buffer of `datasets` goes star by star, which takes longer than
    training a small model on them.) A lane that is at its end before the epoch is begins again; what the epoch leaves
    over of a longer lane waits for the next.

    Parameters
    ----------
    data : datasets.IterableDataset
        In the project's schema.
    n_stars : int
        Stars of an epoch.
    seed : int
    batch_size : int
        Of all processes together. An epoch ends with a whole batch.

    Raises
    ------
    ValueError
        If there are fewer stars than a batch has.
    """

    def __init__(self, data: datasets.IterableDataset, n_stars: int, seed: int, batch_size: int = 1):
        self.data, self.n_stars, self.seed = data, n_stars, seed
        self.set_batch_size(batch_size)

    def set_batch_size(self, batch_size: int) -> None:
        """Of all processes together, which is not known before they are."""
        if not 0 < batch_size <= self.n_stars:
            raise ValueError(f"batch size: expected at most the {self.n_stars} stars of an epoch, got {batch_size}")
        self.batch_size = batch_size
        self.lanes = math.gcd(LANES, batch_size)
        while self.lanes > self.data.num_shards:
            self.lanes //= 2
        self._readers: dict[int, _Reader] = {}

    def __len__(self) -> int:
        return self.n_stars // self.batch_size * self.batch_size

    def __getitems__(self, draws: list[int]) -> dict[str, NDArray[Any]]:
        """Columns of these stars; `draw` holds their numbers."""
        stars = [self._star(draw) for draw in draws]
        columns = {name: _stacked([star[name] for star in stars]) for name in stars[0]}
        return {**columns, "draw": np.array(draws)}

    def _star(self, draw: int) -> dict[str, Any]:
        epoch, number = divmod(draw, len(self))
        batch, place = divmod(number, self.batch_size)
        part = self.batch_size // self.lanes
        lane, place = divmod(place, part)
        place += batch * part
        reader = self._readers.get(lane)
        if reader is None or reader.epoch != epoch or place < reader.first:
            self._readers[lane] = reader = _Reader(epoch, self._chunks(lane, epoch))
        return reader.star(place)

    def _chunks(self, lane: int, epoch: int) -> Iterator[dict[str, NDArray[Any]]]:
        """Columns of the stars of a lane, without end."""
        n_shards = self.data.num_shards
        shards = np.random.default_rng([self.seed, epoch]).permutation(n_shards)[lane :: self.lanes].tolist()
        for times in itertools.count():
            found = 0
            for shard in shards:
                stars = split_dataset_by_node(self.data, shard, n_shards, "shards").with_format("numpy")
                for number, columns in enumerate(stars.iter(CHUNK)):
                    found += len(columns["flux"])
                    generator = np.random.default_rng([self.seed, epoch, times, shard, number])
                    order = generator.permutation(len(columns["flux"]))
                    yield {name: column[order] for name, column in columns.items()}
            if not found:
                raise ValueError("data: expected stars in its shards, got empty ones")

    def first(self, n: int) -> dict[str, NDArray[Any]]:
        """Columns of so many stars, as they stand in the data set."""
        return next(iter(self.data.with_format("numpy").iter(n)))


class _Reader:
    """Stars of a lane in an epoch, by their place in it, which grows."""

    def __init__(self, epoch: int, chunks: Iterator[dict[str, NDArray[Any]]]):
        self.epoch, self.chunks = epoch, chunks
        self.first, self.chunk = 0, next(chunks)

    def star(self, place: int) -> dict[str, Any]:
        while place >= self.first + len(self.chunk["flux"]):
            self.first += len(self.chunk["flux"])
            self.chunk = next(self.chunks)
        return {name: column[place - self.first] for name, column in self.chunk.items()}


def _stacked(column: list[Any]) -> NDArray[Any]:
    """An array of (stars, pixels), or of arrays where their lengths differ."""
    if len({np.shape(value) for value in column}) == 1:
        return np.stack(column)
    together = np.empty(len(column), dtype=object)
    together[:] = column
    return together


def load_streamed(name: str, train_split: str, validation_split: str, n_stars: int, seed: int) -> tuple[Any, Any]:
    """
    Training stars of a data set of Parquet files, streamed, and its validation stars, which are on disk.

    Parameters
    ----------
    name : str
        As `datasets.load_dataset` takes it.
    n_stars : int
        Of an epoch; 0 for as many as there are.

    Raises
    ------
    ValueError
        If there are no such files.
    """
    builder = datasets.load_dataset_builder(name)
    files = builder.config.data_files or {}
    if missing := {train_split, validation_split} - set(files):
        raise ValueError(f"{name}: expected Parquet files of {sorted(missing)}, got some of {sorted(files)}")
    train = builder.as_streaming_dataset(split=train_split)
    # Of the one split; whole data sets would go through the cache on disk.
    validation = datasets.load_dataset(
        "parquet", data_files={validation_split: list(files[validation_split])}, split=validation_split
    )
    return StreamedStars(train, n_stars or sum(map(count_rows, files[train_split])), seed), validation


def count_rows(file: str) -> int:
    """
    Rows of a Parquet file, here or on the hub.

    Raises
    ------
    ValueError
        If it is none, or cut off.
    """
    try:
        with fsspec.open(file, "rb") as opened:
            return int(pq.read_metadata(opened).num_rows)
    except pa.ArrowInvalid as error:
        raise ValueError(f"data: expected Parquet files, got {file} ({' '.join(str(error).split())})") from error
