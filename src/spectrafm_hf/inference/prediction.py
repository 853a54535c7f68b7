# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Predict labels of many stars in batches, with flags.

No function here holds more than one batch, so the number of stars does not matter.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from transformers.feature_extraction_utils import BatchFeature

from ..data.schema import PIXEL_COLUMNS, valid_pixels
from ..models import SpectraFMForPrediction, SpectraFMTokenizer
from ..models.basis_spectrafm import SpectrumBasis
from ..models.flags_spectrafm import QUALITY, star_flags
from ..models.gate_spectrafm import NOT_AT_REST
from ..models.rungs_spectrafm import Rung
from .training_range import TrainingRange


logger = logging.getLogger(__name__)
#: Separates the flags of a star.
FLAG_SEPARATOR = ";"
NO_PIXEL = "no valid pixel"
NO_ANSWER = "no answer from this spectrum"

# -------------------------------------------------------------------------------------------------- the training range


Item = TypeVar("Item")
Result = TypeVar("Result")


# ---------------------------------------------------------------------------------------------------------- prediction


@dataclass
class Flagged:
    """Number of stars by flag; `str` is one line, empty without flags."""

    stars: int = 0
    flagged: int = 0
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, flags: Iterable[str], reasons: Iterable[str] = ()) -> None:
        """Count the flags and the reasons of a batch of `predict_batches`."""
        for flag, reason in itertools.zip_longest(flags, reasons, fillvalue=""):
            self.stars += 1
            self.flagged += bool(flag or reason)
            # Reasons why a star cannot be predicted are sentences: only their first words are counted.
            names = flag.split(FLAG_SEPARATOR) if flag else [reason.partition(":")[0]] if reason else []
            for name in names:
                self.counts[name] = self.counts.get(name, 0) + 1

    def __add__(self, other: Flagged) -> Flagged:
        counts = Counter(self.counts) + Counter(other.counts)
        return Flagged(self.stars + other.stars, self.flagged + other.flagged, dict(counts))

    def __str__(self) -> str:
        most = ", ".join(f"{flag} ({count:,})" for flag, count in Counter(self.counts).most_common(8))
        return f"{self.flagged:,} of {self.stars:,} stars flagged: {most}" if self.flagged else ""


def rung_of_pixels(basis: SpectrumBasis, wavelength: ArrayLike, resolving_power: float | None = None) -> Rung | None:
    """
    The rung for pixels at these wavelengths, in any order; a resolving power of NaN is unknown. Wavelengths that are
    not positive numbers are ignored.
    """
    grid = np.unique(np.asarray(wavelength, np.float64))
    grid = grid[np.isfinite(grid) & (grid > 0)]
    power = None if resolving_power is None or not np.isfinite(resolving_power) else float(resolving_power)
    return basis.rung_for(grid, power) if len(grid) else None


def answered_labels(
    model: SpectraFMForPrediction, tokenizer: SpectraFMTokenizer, row: Mapping[str, Any] | None = None
) -> list[str]:
    """
    Labels that a checkpoint predicts by default: all of its labels for a `row` in the range of its star model,
    otherwise those of the network.
    """
    names = list(tokenizer.requests or tokenizer.label_names)
    config = model.config
    if row is None or tokenizer.basis is None or not config.network_labels:
        return names
    wavelength = np.asarray(row["wavelength"], np.float64)[valid_pixels(row)]
    rung = rung_of_pixels(tokenizer.basis, wavelength, row.get("resolving_power"))
    first = None if rung is None else rung.first_interval
    learnt = {each["label"] for each in config.corrections if config.rung_intervals[each["rung"]][0] == first}
    if first is not None and config.star_intervals[0] <= first < config.star_intervals[1]:
        learnt |= {*config.star_labels, *(config.star_combinations or {})}
    return [name for name in names if name in learnt or name in config.network_labels]


#: Tokens per batch of the model: fewer do not use the full speed of a CPU, many more do not fit into its caches
#: (`scripts/benchmarks/benchmark.py --curves`). It is fixed, because the batch size changes the last digit of a result.
TOKENS_AT_ONCE = 2048
NO_MEMORY = "too large for the memory"
# Where tokens are evidence: number of pixels that cost as much as a token, and the least cost of a star. This gives 256
# stars of APOGEE (the few whose fit needs more iterations share them) and 512 of Gaia XP: enough for full speed, and
# few enough for an even share among threads.
PIXELS_OF_EVIDENCE, LEAST_OF_EVIDENCE = 1024, 4


def tokens_of(row: Mapping[str, Any], tokenizer: SpectraFMTokenizer) -> int:
    """Cost of a spectrum in tokens, for the batch size."""
    pixels = int(np.size(row["flux"]))
    return pixels if tokenizer.basis is None else max(LEAST_OF_EVIDENCE, -(-pixels // PIXELS_OF_EVIDENCE))


def batches_of(
    rows: Iterable[dict[str, Any]], tokenizer: SpectraFMTokenizer, size: int | None = None
) -> Iterator[list[dict[str, Any]]]:
    """
    Rows in lists for [`predict_batches`]; the last may be shorter.

    Parameters
    ----------
    rows : iterable of rows
    tokenizer : SpectraFMTokenizer
    size : int, optional
        Stars in a list. Default: as many as fit into `TOKENS_AT_ONCE`, at least one.
    """
    batch: list[dict[str, Any]] = []
    tokens = 0
    for row in rows:
        batch.append(row)
        tokens += 0 if size else tokens_of(row, tokenizer)
        if len(batch) == size or tokens >= TOKENS_AT_ONCE:
            yield batch
            batch, tokens = [], 0
    if batch:
        yield batch


def predict_batches(
    model: SpectraFMForPrediction,
    tokenizer: SpectraFMTokenizer,
    batches: Iterable[Sequence[Mapping[str, Any]]],
    requests: Sequence[str] | None = None,
    training_range: TrainingRange | None = None,
) -> Iterator[dict[str, NDArray[Any]]]:
    """Predict the labels of stars, batch after batch.

    Parameters
    ----------
    model : SpectraFMForPrediction
        It is put into eval mode.
    tokenizer : SpectraFMTokenizer
        Its settings of units do not matter: the rows are in Angstrom, in vacuum, with one-sigma errors.
    batches : iterable of sequences of rows
        Rows in the schema of this project, such as `batches_of(read_spectra(files), tokenizer)`; labels are not read.
    requests : sequence of str, optional
        Labels to predict. Default: those of the tokenizer.
    training_range : TrainingRange, optional
        Flags stars outside this range.

    Yields
    ------
    dict of arrays of shape (stars,), one a batch
        `object_id` (str), and the name of the `file` if the rows have one; for each request `<label>` and `<label>_err`
        (float32, physical units, one sigma); `flags` (str, empty if there are none; `not_at_rest` if the row has
        `rest_frame` = False; and flags of the row, such as `frame_unstated`); `reason` (str). A star that cannot be
        predicted has labels of NaN and a reason; other reasons are empty.
        Spectra of different lengths are batched separately, to avoid padding. If a batch does not fit into memory, the
        batch size is halved from then on, and a warning is logged.

    Raises
    ------
    ValueError
        For an unknown label.
    """
    predictor = _BatchPredictor(model, tokenizer, requests, training_range)
    # Random tokens are drawn in the order of the stars.
    one_by_one = model.device.type != "cpu" or (tokenizer.max_length is not None and tokenizer.sampling == "random")
    yield from _side_by_side(predictor, batches, 1 if one_by_one else torch.get_num_threads())


def _side_by_side(work: Callable[[Item], Result], items: Iterable[Item], n_threads: int) -> Iterator[Result]:
    """
    Map `work` over items, in order, in several Python threads with one torch thread each. On two cores this is 20 %
    faster than the threads of torch, because tokenisation runs in parallel too and no thread waits for another.
    """
    items = iter(items)
    first = list(itertools.islice(items, 2))
    items = itertools.chain(first, items)
    if n_threads == 1 or len(first) < 2:
        yield from map(work, items)
        return
    threads_of_torch = torch.get_num_threads()
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > n_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
            # Torch keeps this number for each Python thread; new threads start with the one set last.
            torch.set_num_threads(threads_of_torch)


class _BatchPredictor:
    """Predictions of a batch, as [`predict_batches`] yields them; for several threads."""

    def __init__(
        self,
        model: SpectraFMForPrediction,
        tokenizer: SpectraFMTokenizer,
        requests: Sequence[str] | None,
        training_range: TrainingRange | None,
    ) -> None:
        self.names = list(requests if requests is not None else tokenizer.requests or tokenizer.label_names)
        tokenizer.label_ids(self.names)
        self.model, self.tokenizer = model.eval(), schema_tokenizer(tokenizer)
        # Models on evidence have their own flags, which do not depend on the grid.
        self.training_range = training_range if tokenizer.basis is None else None
        self.most = 0  # stars that fit into memory; 0: not yet known

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, NDArray[Any]]:
        names = self.names
        demand_scalars(self.model, names, rows)
        values = np.full((len(rows), len(names)), np.nan, np.float32)
        errors = values.copy()
        reasons = [""] * len(rows)
        for i, row in enumerate(rows):
            reasons[i] = row.get("refused") or ""
        usable = [i for i, reason in enumerate(reasons) if not reason]
        causes = [""] * len(usable)
        found: list[list[str]] = [[] for _ in rows]
        tokens = tokenize_rows(self.tokenizer, [rows[i] for i in usable], names, causes) if usable else ()
        for inputs, members in tokens:
            self._answer(inputs, np.array(usable)[members], (values, errors), reasons, found)
        for i, cause in zip(usable, causes, strict=True):
            reasons[i] = reasons[i] or cause
        unknown = ~np.isfinite(values + errors)
        values[unknown] = errors[unknown] = np.nan
        for i in np.flatnonzero(unknown.any(axis=1)).tolist():
            without = ", ".join(name for name, is_unknown in zip(names, unknown[i], strict=True) if is_unknown)
            some = self.model.config.network_labels
            reasons[i] = reasons[i] or (f"{NO_ANSWER}: {without}" if some else "prediction not finite")
            if not some:
                values[i] = errors[i] = np.nan
        joined = [""] * len(rows)
        for i, row in enumerate(rows):
            if not reasons[i] or reasons[i].startswith(NO_ANSWER):
                flags = [NOT_AT_REST] if row.get("rest_frame") is False else []
                flags += [*(row.get("flags") or []), *found[i]]
                if self.training_range is not None:
                    flags += self.training_range.flags(row, dict(zip(names, values[i].tolist(), strict=True)))
                joined[i] = FLAG_SEPARATOR.join(dict.fromkeys(flags))
        batch: dict[str, NDArray[Any]] = {"object_id": np.array([str(row["object_id"]) for row in rows], dtype=object)}
        if rows and "file" in rows[0]:
            batch["file"] = np.array([Path(row["file"]).name for row in rows], dtype=object)
        for j, name in enumerate(names):
            batch |= {name: values[:, j], f"{name}_err": errors[:, j]}
        return {**batch, "flags": np.array(joined, dtype=object), "reason": np.array(reasons, dtype=object)}

    def _answer(
        self,
        inputs: BatchFeature,
        members: NDArray[np.intp],
        answers: tuple[NDArray[Any], NDArray[Any]],
        reasons: list[str],
        flags: list[list[str]],
    ) -> None:
        """
        Fill in values, errors and flags of some stars, in batches that fit into memory.
        """
        quality = {name: inputs.pop(name) for name in QUALITY if name in inputs}
        start = 0
        while start < len(members):
            some = members[start : start + (self.most or len(members))]
            part = {name: value[start : start + len(some)].to(self.model.device) for name, value in inputs.items()}
            try:
                with torch.inference_mode():
                    output = self.model(**part)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(some) > 1:
                    self.most = len(some) // 2
                    logger.warning(f"out of memory with {len(some)} stars in a batch: {self.most} from now on")
                    continue
                reasons[some[0]] = NO_MEMORY
            else:
                for column, found in zip(answers, (output.predictions, output.prediction_errors), strict=True):
                    column[some] = found.float().cpu().numpy()
                if quality:
                    own = {name: value[start : start + len(some)] for name, value in quality.items()}
                    of_stars = star_flags(self.model, part, output, own, self.names)
                    for i, names in zip(some, of_stars, strict=True):
                        flags[i] = names
            start += len(some)


def demand_scalars(model: SpectraFMForPrediction, names: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Raise ValueError for rows without a scalar that a label needs."""
    if not (needed := model.config.scalars_of(names)):
        return
    for row in rows:
        if missing := [name for name in needed if name not in row]:
            labels = [name for name in names if set(model.config.scalars_of([name])) & set(missing)]
            where = f" in {Path(row['file']).name}" if "file" in row else ""
            raise ValueError(
                f"{missing[0]}: expected a column of this name{where} (NaN where unknown), as {', '.join(labels)} is "
                "predicted from it, got none; --scalar-table TABLE adds it by identifier"
            )


def is_out_of_memory(error: Exception) -> bool:
    from accelerate.utils.memory import should_reduce_batch_size  # slow to import, rarely needed

    # The last is from oneDNN, on a CPU.
    return isinstance(error, MemoryError) or should_reduce_batch_size(error) or "could not create a" in str(error)


def schema_tokenizer(tokenizer: SpectraFMTokenizer) -> SpectraFMTokenizer:
    """A copy of a tokenizer that takes rows of the schema, whatever its settings of units."""
    tokenizer = copy.copy(tokenizer)
    tokenizer.wavelength_unit, tokenizer.wavelength_medium, tokenizer.error_type = "Angstrom", "vacuum", "sigma"
    return tokenizer


def tokenize_rows(
    tokenizer: SpectraFMTokenizer, rows: Sequence[Mapping[str, Any]], names: list[str], reasons: list[str]
) -> Iterator[tuple[BatchFeature, NDArray[np.intp]]]:
    """
    Inputs of the model, and the rows that they belong to.

    Parameters
    ----------
    tokenizer : SpectraFMTokenizer
        From `schema_tokenizer`.
    rows : sequence of rows
    names : list of str
        Labels to predict.
    reasons : list of str
        One for each row; set for rows that cannot be used, which are then left out.

    Yields
    ------
    inputs, members
        One pair if all rows have the same length; otherwise one for each group of similar length.
    """
    for part in _parts(tokenizer, rows):
        yield from _tokenize(tokenizer, rows, part, names, reasons)


def _parts(tokenizer: SpectraFMTokenizer, rows: Sequence[Mapping[str, Any]]) -> Iterator[NDArray[np.intp]]:
    """
    Groups of rows of similar length, so that with padding a group has no more than `TOKENS_AT_ONCE`, or than all rows
    would have if they were as short as its shortest.
    """
    n_tokens = [tokens_of(row, tokenizer) for row in rows]
    if max(n_tokens) * len(rows) <= max(TOKENS_AT_ONCE, min(n_tokens) * len(rows)):  # as most batches are
        yield np.argsort(n_tokens, kind="stable")
        return
    part: list[int] = []
    for i in sorted(range(len(rows)), key=n_tokens.__getitem__):
        if part and n_tokens[i] * (len(part) + 1) > max(TOKENS_AT_ONCE, n_tokens[part[0]] * len(rows)):
            yield np.array(part)
            part = []
        part.append(i)
    yield np.array(part)


def _tokenize(
    tokenizer: SpectraFMTokenizer,
    rows: Sequence[Mapping[str, Any]],
    part: NDArray[np.intp],
    names: list[str],
    reasons: list[str],
) -> Iterator[tuple[BatchFeature, NDArray[np.intp]]]:
    """Inputs of some rows; bad spectra are found by bisection and left out."""
    try:
        columns = {name: [rows[i][name] for i in part] for name in PIXEL_COLUMNS}
        for name in tokenizer.scalar_names or ():
            columns |= {each: [rows[i].get(each, np.nan) for i in part] for each in (name, f"{name}_err")}
        if len(part) == 1:
            row = rows[part[0]]
            if len({np.shape(row[name]) for name in PIXEL_COLUMNS}) == 1 and not valid_pixels(row).any():
                raise ValueError(NO_PIXEL)
        if tokenizer.basis is None:
            inputs = tokenizer(columns, requests=names)
        else:
            powers, normalised = ([rows[i].get(name) for i in part] for name in ("resolving_power", "normalised"))
            inputs = tokenizer(
                columns, requests=names, resolving_power=powers, normalised=normalised, return_quality=True
            )
    except (ValueError, MemoryError) as error:
        # One bad star makes the batch fail: find it and leave it out.
        if len(part) == 1:
            cause = NO_MEMORY if isinstance(error, MemoryError) else str(error).removesuffix(" in spectrum 0")
            reasons[part[0]] = " ".join(cause.split())
        else:
            for half in np.array_split(part, 2):
                yield from _tokenize(tokenizer, rows, half, names, reasons)
    else:
        yield inputs, part


# -------------------------------------------------------------------------------------------------------------- tables
