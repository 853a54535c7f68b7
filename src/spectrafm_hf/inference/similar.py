# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Similar stars: an embedding of each spectrum, and its nearest neighbours in a data set.

The embedding is the mean state of the members before their heads. It was chosen with
`scripts/paper/compare_embeddings.py`, by the mean label distance of a star to its five neighbours ([`label_distance`])
relative to random stars; for `spectrafm-base`, for complete / nearly half masked spectra:

============================  ==========================  ==========================================
embedding                     Gaia XP (3,981 validation)  APOGEE (1,200 synthetic, with abundances)
============================  ==========================  ==========================================
state of the members          0.31 / 0.39                 0.47 / 0.48
amplitudes of the components  0.54 / 0.63                 0.52 / 0.52
predictions of the network    0.34 / 0.39                 0.60 / 0.60
30 principal components       0.62 / 0.87                 0.55 / 0.58
============================  ==========================  ==========================================

Embeddings of different rungs, such as Gaia XP and the H band, cannot be compared.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from ..checkpoints import demand_evidence
from ..data.schema import label_names_of
from ..files import temporary_name
from ..models import SpectraFMForPrediction, SpectraFMTokenizer
from ..statistics import robust_scatter
from .prediction import schema_tokenizer, tokenize_rows


#: Queries per batch.
CHUNK = 256
#: Metadata keys of a file of embeddings: checksum of the weights, and range of the spectra.
MODEL_KEY, RANGE_KEY = b"spectrafm_model", b"spectrafm_range"
#: Inputs of the model that the embedding depends on.
EMBEDDED = ("coefficients", "reliability", "interval_ids", "attention_mask")


def fingerprint(model: SpectraFMForPrediction) -> str:
    """Checksum of the weights: embeddings of different models cannot be compared."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of some stars.

    Attributes
    ----------
    object_id : list of str
    vectors : array of shape (stars, width), float32
    labels : dict of str to array of shape (stars,)
        Labels of the rows, NaN where unknown.
    range : str
        Wavelengths of the rung of the spectra: only embeddings of one rung can be compared.
    """

    object_id: list[str]
    vectors: NDArray[np.float32]
    labels: dict[str, NDArray[np.float32]]
    range: str

    @classmethod
    def join(cls, parts: Sequence[Embeddings]) -> Embeddings:
        """Concatenate embeddings of one range; labels are NaN in parts without them."""
        for part in parts[1:]:
            demand_same_range(part, parts[0])
        names = dict.fromkeys(name for part in parts for name in part.labels)
        unknown = [np.full(len(part.object_id), np.nan, np.float32) for part in parts]
        return cls(
            [identifier for part in parts for identifier in part.object_id],
            np.concatenate([part.vectors for part in parts]),
            {
                name: np.concatenate([part.labels.get(name, none) for part, none in zip(parts, unknown, strict=True)])
                for name in names
            },
            parts[0].range,
        )


def demand_same_range(part: Embeddings, other: Embeddings) -> None:
    """Raise ValueError for embeddings that cannot be compared."""
    if part.range != other.range:
        raise ValueError(f"embeddings: expected spectra with the same wavelengths, got {part.range} and {other.range}")


class Embedder:
    """Embed spectra in batches; the first one determines the rung.

    Parameters
    ----------
    model : SpectraFMForPrediction
        It is put into eval mode.
    tokenizer : SpectraFMTokenizer
        That of the model, with a basis.

    Raises
    ------
    ValueError
        For a model whose tokens are fluxes.
    """

    def __init__(self, model: SpectraFMForPrediction, tokenizer: SpectraFMTokenizer) -> None:
        demand_evidence(tokenizer, "embed")
        self.model, self.tokenizer = model.eval(), schema_tokenizer(tokenizer)
        self.width = model.config.hidden_size
        self.rung: int | None = None

    @property
    def range(self) -> str:
        """Wavelengths of the rung."""
        assert self.tokenizer.basis is not None
        if self.rung is None:
            return ""
        low, high = self.tokenizer.basis.rungs[self.rung].range
        return f"{low:,.0f}-{high:,.0f} Å"

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> tuple[Embeddings, dict[int, str]]:
        """Embed rows of the schema; also returns why rows could not be used."""
        reasons = [row.get("refused") or "" for row in rows]
        usable = [i for i, reason in enumerate(reasons) if not reason]
        causes = [""] * len(usable)
        vectors = np.empty((len(rows), self.width), np.float32)
        some = self.tokenizer.label_names[:1]
        parts = list(tokenize_rows(self.tokenizer, [rows[i] for i in usable], some, causes)) if usable else []
        for inputs, part in sorted(parts, key=lambda part: int(part[1].min())):  # the first star comes first
            tokens = {name: inputs[name] for name in EMBEDDED}
            with torch.inference_mode():
                output = self.model.model(**{name: value.to(self.model.device) for name, value in tokens.items()})
            members = np.array(usable)[part]
            seen = output.rung_seen.cpu().numpy()
            if self.rung is None and seen.any():
                self.rung = int(seen[seen.any(axis=1)][0].argmax())
            own = seen[:, self.rung or 0]
            vectors[members] = output.last_hidden_state[:, self.rung or 0].mean(dim=1).float().cpu().numpy()
            for i in members[~own].tolist():
                reasons[i] = f"expected a spectrum of {self.range} as the first one, got another"
        for i, cause in zip(usable, causes, strict=True):
            reasons[i] = reasons[i] or cause
        is_good = np.array([not reason for reason in reasons], bool)
        vectors, good = vectors[is_good], [rows[i] for i in np.flatnonzero(is_good).tolist()]
        names = dict.fromkeys(name for row in good for name in label_names_of(row))
        labels = {name: np.array([row.get(name, np.nan) for row in good], np.float32) for name in names}
        bad = {i: reason for i, reason in enumerate(reasons) if reason}
        return Embeddings([str(row["object_id"]) for row in good], vectors, labels, self.range), bad


# --------------------------------------------------------------------------------------------------------------- files


class EmbeddingWriter:
    """Write embeddings batch after batch: `with EmbeddingWriter(path, model) as writer: writer.write(embeddings)`.

    A Parquet file of `object_id`, `embedding` and the labels of the first batch; all of one range. It is written
    atomically.

    Raises
    ------
    ValueError
        For another ending than .parquet, or a folder that does not exist.
    """

    def __init__(self, path: str | os.PathLike[str], model: SpectraFMForPrediction) -> None:
        self.path = Path(path)
        if self.path.suffix != ".parquet" or not self.path.parent.is_dir() or self.path.is_dir():
            raise ValueError(f"output: expected the name of a .parquet file in a folder that exists, got {self.path}")
        self._metadata = {MODEL_KEY: fingerprint(model).encode()}
        self._temporary = temporary_name(self.path)
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> Self:
        return self

    def write(self, embeddings: Embeddings) -> None:
        n_stars, width = embeddings.vectors.shape
        if self._writer is None:
            fields = [pa.field("object_id", pa.string()), pa.field("embedding", pa.list_(pa.float32(), width))]
            fields += [pa.field(name, pa.float32()) for name in embeddings.labels]
            self._schema = pa.schema(fields, metadata=self._metadata | {RANGE_KEY: embeddings.range.encode()})
            self._writer = pq.ParquetWriter(str(self._temporary), self._schema)
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.vectors.ravel()), width)
        unknown = np.full(n_stars, np.nan, np.float32)
        labels = [pa.array(embeddings.labels.get(name, unknown)) for name in self._schema.names[2:]]
        self._writer.write_table(
            pa.Table.from_arrays([pa.array(embeddings.object_id), vectors, *labels], schema=self._schema)
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if self._writer is not None:
                self._writer.close()
                if kind is None:
                    self._temporary.replace(self.path)
        finally:
            self._temporary.unlink(missing_ok=True)


def read_embeddings(path: str | os.PathLike[str], model: SpectraFMForPrediction) -> Embeddings | None:
    """Read a file of `EmbeddingWriter`; None for other files.

    Raises
    ------
    ValueError
        If they are of another model.
    """
    with contextlib.suppress(pa.ArrowInvalid, OSError):
        metadata = pq.read_schema(path).metadata or {}
        if MODEL_KEY not in metadata:
            return None
        if metadata[MODEL_KEY] != fingerprint(model).encode() or RANGE_KEY not in metadata:
            raise ValueError(f"{path}: expected embeddings of this model, got those of another model")
        table = pq.read_table(path)
        vectors = table["embedding"].combine_chunks()
        labels = {name: table[name].to_numpy() for name in table.column_names[2:]}
        rows = vectors.flatten().to_numpy().reshape(len(vectors), -1)
        return Embeddings(table["object_id"].to_pylist(), rows, labels, metadata[RANGE_KEY].decode())
    return None


# ---------------------------------------------------------------------------------------------------------- neighbours


def neighbours(queries: Embeddings, others: Embeddings, n: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Find the most similar stars, the most similar first, excluding the star itself (the same `object_id`).

    Returns
    -------
    index : array of int, shape (queries, n)
        Rows of `others`; -1 where there are fewer.
    similarity : array of shape (queries, n)
        Cosine of the angle between the vectors; NaN there.

    Raises
    ------
    ValueError
        If they are of spectra of other wavelengths.
    """
    demand_same_range(others, queries)
    lengths = (np.linalg.norm(part.vectors, axis=1, keepdims=True) for part in (queries, others))
    a, b = (part.vectors / length for part, length in zip((queries, others), lengths, strict=True))
    names = np.array(others.object_id)
    index = np.full((len(a), n), -1)
    similarity = np.full((len(a), n), np.nan, np.float32)
    kept = min(n, len(b))
    for start in range(0, len(a), CHUNK):
        chunk = slice(start, start + CHUNK)
        cosine = a[chunk] @ b.T
        cosine[np.array(queries.object_id[chunk])[:, None] == names] = -np.inf
        best = np.argpartition(-cosine, kept - 1, axis=1)[:, :kept]
        values = np.take_along_axis(cosine, best, axis=1)
        order = np.argsort(-values, axis=1, kind="stable")
        best, values = (np.take_along_axis(part, order, axis=1) for part in (best, values))
        real = np.isfinite(values)
        index[chunk, :kept] = np.where(real, best, -1)
        similarity[chunk, :kept] = np.where(real, values, np.nan)
    return index, similarity


def label_distance(
    queries: Embeddings, others: Embeddings, index: NDArray[np.int64], names: Sequence[str], seed: int = 0
) -> tuple[float, float] | None:
    """Mean distance in labels of neighbours, and of random stars.

    Parameters
    ----------
    queries, others : Embeddings
    index : array of int, shape (queries, n)
        From [`neighbours`].
    names : sequence of str
        Labels to use, if both have them.
    seed : int
        Seed of the random stars, of which there are as many as neighbours.

    Returns
    -------
    (neighbours, random) or None
        Means of the Euclidean distance in units of the robust scatter of each label among `others`; None if no pair of
        stars has known labels.
    """
    names = [name for name in names if name in queries.labels and name in others.labels]
    if not names:
        return None
    theirs, ours = (np.stack([part.labels[name] for name in names], axis=1) for part in (others, queries))
    scale = np.array([robust_scatter(column[np.isfinite(column)]) for column in theirs.T])
    known = np.isfinite(scale) & (scale > 0)
    if not known.any():
        return None

    def mean(rows: NDArray[np.int64]) -> float:
        distance = np.linalg.norm((theirs[rows] - ours[:, None])[..., known] / scale[known], axis=-1)
        counts = (rows >= 0) & np.isfinite(distance)
        return float(distance[counts].mean()) if counts.any() else float("nan")

    random = np.random.default_rng(seed).integers(len(theirs), size=index.shape)
    found = mean(index), mean(random)
    return found if np.isfinite(found).all() else None
