# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Labels of many stars from a trained model: batch after batch, with flags, into a table on disk.

No function here holds more than one batch, so the number of stars does not matter.
"""

from __future__ import annotations

import copy
import itertools
import json
import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import torch
from accelerate.utils.memory import should_reduce_batch_size
from astropy import units
from astropy.io import fits
from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HTTPError, LocalEntryNotFoundError
from numpy.typing import NDArray
from transformers.feature_extraction_utils import BatchFeature

from ..data.schema import PIXEL_COLUMNS, valid_pixels
from ..files import ask_twice, complete_file, temporary_name
from ..models import SpectraFMForPrediction, SpectraFMTokenizer
from ..models.flags_spectrafm import AIR, AIR_TOLERANCE, MOVED, MOVED_SIGMA, QUALITY, star_flags
from ..models.gate_spectrafm import FRAME_UNSTATED, MEDIUM_UNSTATED, to_rest
from ..models.velocity_spectrafm import VelocityMeter


logger = logging.getLogger(__name__)
#: Between the flags of a star.
FLAG_SEPARATOR = ";"
NO_PIXEL = "no valid pixel"
NO_ANSWER = "no answer from this spectrum"
#: Of a spectrum that its reader could not shift to the rest frame, as no velocity is known.
NOT_AT_REST = "not_at_rest"

# -------------------------------------------------------------------------------------------------- the training range

RANGE_FILE = "training_range.json"
#: A spectrum that covers less of the wavelength range of the training spectra is flagged.
MIN_COVERAGE = 0.95
#: A relative difference from a limit that is rounding (float32 wavelengths, spectra not shifted to the rest frame).
TOLERANCE = 2e-3

Pair = tuple[float, float]
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class TrainingRange:
    """What the training spectra covered; beyond it a prediction is an extrapolation.

    It lies beside the weights in `training_range.json`, for example::

        {"labels": {"teff": [3100.0, 7900.0], "logg": [-0.4, 5.1]},
         "wavelength": [3360.0, 10200.0], "wavelength_step": [20.0, 20.0]}

    or, for a model of several instruments, with a pair for each, such as `[[3360.0, 10200.0], [15152.0, 16960.0]]`.

    Attributes
    ----------
    labels : dict of str to (low, high)
        Least and greatest value of each label among the training stars, in the units of the checkpoint.
    wavelength : (low, high), or one such pair for each instrument
        First and last wavelength of the training spectra, Angstrom, vacuum, rest frame.
    wavelength_step : (low, high), or one such pair for each instrument
        Least and greatest spacing of the pixels of a training spectrum, Angstrom.
    """

    labels: dict[str, Pair] = field(default_factory=dict)
    wavelength: Pair | Sequence[Pair] | None = None
    wavelength_step: Pair | Sequence[Pair] | None = None

    def __post_init__(self) -> None:
        limits = [(f"labels[{name!r}]", pair) for name, pair in self.labels.items()]
        for name in ("wavelength", "wavelength_step"):
            limits += [(name, pair) for pair in _pairs(getattr(self, name))]
        for name, pair in limits:
            if not (len(pair) == 2 and np.all(np.isfinite(pair)) and pair[0] <= pair[1]):
                raise ValueError(f"{name}: expected two numbers, the least first, got {pair}")
        if len({len(_pairs(limits)) for limits in (self.wavelength, self.wavelength_step)} - {0}) > 1:
            raise ValueError(
                "wavelength_step: expected one pair for each of wavelength, got "
                f"{self.wavelength_step} for {self.wavelength}"
            )

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `training_range.json` into the folder of a checkpoint."""
        path = Path(folder, RANGE_FILE)
        with complete_file(path) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, name_or_path: str | os.PathLike[str], revision: str = "main") -> TrainingRange | None:
        """The range of a checkpoint (a folder, or a name on the hub at a revision), None if it has none.

        Raises
        ------
        ValueError
            If the file is there but is not what it should be.
        OSError
            If neither the hub nor its cache says whether there is one: without it, no star would be flagged.
        """
        path = Path(name_or_path, RANGE_FILE)
        if os.path.isdir(name_or_path):
            if not path.is_file():
                return None
        else:
            found = _on_the_hub(str(name_or_path), revision)
            if found is None:
                return None
            path = Path(found)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            labels = {name: tuple(pair) for name, pair in content.pop("labels").items()}
            return cls(labels, **{name: _as_tuples(limits) for name, limits in content.items()})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            cause = " ".join(str(error).split())
            raise ValueError(f"{path}: expected labels, wavelength and wavelength_step, got {cause}") from error

    def flags(self, row: Mapping[str, Any], values: Mapping[str, float]) -> list[str]:
        """What of a star lies outside.

        Parameters
        ----------
        row : mapping
            The spectrum, in the schema of this project.
        values : mapping of str to float
            Predicted labels.

        Returns
        -------
        list of str
            `"teff>6500"` or `"teff<3500"` for a label; `"wavelength"` for a spectrum that has pixels outside the range
            or covers less than 95 percent of it; `"wavelength_step"` for one that is sampled differently. Of several
            instruments, that counts which the spectrum shares most wavelengths with.
        """
        found = []
        for name, (low, high) in self.labels.items():
            if name in values and values[name] < low:
                found.append(f"{name}<{low:g}")
            elif name in values and values[name] > high:
                found.append(f"{name}>{high:g}")
        wavelength = np.asarray(row["wavelength"], np.float64)[valid_pixels(row)]
        if not wavelength.size:
            return found
        if np.any(wavelength[1:] < wavelength[:-1]):  # sorting takes longer than to see that there is no need
            wavelength = np.sort(wavelength)
        first, last = wavelength[[0, -1]]
        ranges, steps = _pairs(self.wavelength), _pairs(self.wavelength_step)
        shared = [min(last, high) - max(first, low) for low, high in ranges]
        instrument = int(np.argmax(shared)) if shared else 0
        if ranges:
            low, high = ranges[instrument]
            outside = first < low * (1 - TOLERANCE) or last > high * (1 + TOLERANCE)
            if outside or shared[instrument] < MIN_COVERAGE * (high - low):
                found.append("wavelength")
        if wavelength.size > 1 and steps:
            low, high = steps[instrument]
            spacing = np.diff(wavelength)
            # The median lies outside where half of them do: to count takes less time than to find it.
            if 2 * max(np.sum(spacing < low * 0.99), np.sum(spacing > high * 1.01)) > spacing.size:
                found.append("wavelength_step")
        return found


def _on_the_hub(name: str, revision: str) -> str | None:
    """Where the file of a repository is, which is fetched if the cache of the hub has it not; None if there is none."""
    try:
        return ask_twice(lambda: hf_hub_download(name, RANGE_FILE, revision=revision))
    except (OSError, HTTPError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        # That there is none is remembered as well.
        if try_to_load_from_cache(name, RANGE_FILE, revision=revision) is _CACHED_NO_EXIST:
            return None
        cause = " ".join(str(error.__cause__ or error).split())[:200]
        raise OSError(
            f"{name}: expected the hub, or its cache, to say whether there is a {RANGE_FILE}, got {cause}"
        ) from error


def _pairs(limits: Pair | Sequence[Pair] | None) -> list[Pair]:
    """One pair, or one for each instrument."""
    if limits is None:
        return []
    return [cast(Pair, limits)] if np.ndim(limits) == 1 else list(cast(Sequence[Pair], limits))


def _as_tuples(values: Any) -> Any:
    return tuple(map(_as_tuples, values)) if isinstance(values, list) else values


# ---------------------------------------------------------------------------------------------------------- prediction


@dataclass
class Flagged:
    """How many stars have which flags: `str` says it in a line, empty if none has any."""

    stars: int = 0
    flagged: int = 0
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, flags: Iterable[str], reasons: Iterable[str] = ()) -> None:
        """Count the flags of a batch, joined as `predict_batches` yields them, and the reasons beside them."""
        for flag, reason in itertools.zip_longest(flags, reasons, fillvalue=""):
            joined = flag or reason
            self.stars += 1
            self.flagged += bool(joined)
            for flag in joined.split(FLAG_SEPARATOR) if joined else ():
                # Reasons why a star cannot be predicted quote numbers: only their first words are counted.
                name = flag.partition(":")[0]
                self.counts[name] = self.counts.get(name, 0) + 1

    def __add__(self, other: Flagged) -> Flagged:
        counts = Counter(self.counts) + Counter(other.counts)
        return Flagged(self.stars + other.stars, self.flagged + other.flagged, dict(counts))

    def __str__(self) -> str:
        most = ", ".join(f"{flag} ({count:,})" for flag, count in Counter(self.counts).most_common(8))
        return f"{self.flagged:,} of {self.stars:,} stars flagged: {most}" if self.flagged else ""


def answered_labels(
    model: SpectraFMForPrediction, tokenizer: SpectraFMTokenizer, row: Mapping[str, Any] | None = None
) -> list[str]:
    """
    What a checkpoint is asked for by itself: for a model that refines some spectra with a star model, all of its labels
    where `row` is one of these, and what the network answers otherwise.
    """
    names = list(tokenizer.requests or tokenizer.label_names)
    config = model.config
    if row is None or tokenizer.basis is None or not config.network_labels:
        return names
    wavelength = np.sort(np.asarray(row["wavelength"], np.float64)[valid_pixels(row)])
    power = row.get("resolving_power")
    power = None if power is None or not np.isfinite(power) else float(power)
    rung = tokenizer.basis.rung_for(wavelength, power) if len(wavelength) else None
    first = None if rung is None else rung.first_interval
    learnt = {each["label"] for each in config.corrections if config.rung_intervals[each["rung"]][0] == first}
    if first is not None and config.star_intervals[0] <= first < config.star_intervals[1]:
        learnt |= {*config.star_labels, *(config.star_combinations or {})}
    return [name for name in names if name in learnt or name in config.network_labels]


#: The columns of a velocity that was measured.
VELOCITY, VELOCITY_UNIT = "radial_velocity", "km/s"


def at_measured_velocities(
    rows: Iterable[dict[str, Any]], model: SpectraFMForPrediction, tokenizer: SpectraFMTokenizer
) -> Iterator[dict[str, Any]]:
    """
    Rows, those at rest whose `rest_frame` was not True, by the velocity that their lines tell.

    Yields
    ------
    dict
        With `radial_velocity` and `radial_velocity_err` (km/s) where it was measured; with the reason in `refused`
        where it is not significant.

    Raises
    ------
    ValueError
        For a model that is not on evidence.
    """
    if tokenizer.basis is None:
        raise ValueError("radial_velocity: expected a model on evidence to measure it with, such as spectrafm-base")
    meter = VelocityMeter(tokenizer.basis, model)
    for row in rows:
        if row.get("refused") or row.get("rest_frame") is True:
            yield {**row, VELOCITY: np.nan}  # what a survey says of it was not measured here
            continue
        found = meter(row["wavelength"], row["flux"], row["flux_error"], row["mask"], row.get("resolving_power"))
        if found.cause:
            yield {**row, "refused": found.cause, VELOCITY: np.nan}
            continue
        yield {
            **row,
            "wavelength": to_rest(np.asarray(row["wavelength"], np.float64), found.value),
            "rest_frame": True,
            "flags": [flag for flag in row.get("flags", ()) if flag != FRAME_UNSTATED],
            VELOCITY: found.value,
            f"{VELOCITY}_err": found.error,
        }


def settled(
    rows: Iterable[dict[str, Any]], model: SpectraFMForPrediction, tokenizer: SpectraFMTokenizer
) -> Iterator[dict[str, Any]]:
    """
    Rows; those of which nobody says whether they are at rest, or in air or vacuum, by what their lines tell.

    Without a statement they would be taken as at rest and in vacuum. Wavelengths in air are 83 km/s off by that, which
    costs thousands of kelvin. So the velocity is measured: where it is significant, it is taken out, with the flag
    `medium` or `velocity` where there was one; where it is not, all stays as it is, with the flags that say what is
    unstated.

    Yields
    ------
    dict
    """
    meter = None if tokenizer.basis is None else VelocityMeter(tokenizer.basis, model)
    for row in rows:
        flags = list(row.get("flags") or ())
        unstated = {FRAME_UNSTATED, MEDIUM_UNSTATED} & set(flags)
        if meter is None or row.get("refused") or not (unstated or row.get("rest_frame") is False):
            yield row
            continue
        found = meter(row["wavelength"], row["flux"], row["flux_error"], row["mask"], row.get("resolving_power"))
        if found.cause:
            yield row
            continue
        flags = [flag for flag in flags if flag not in unstated]
        if abs(found.value) > max(MOVED, MOVED_SIGMA * found.error):
            in_air = MEDIUM_UNSTATED in unstated and abs(found.value - AIR) <= AIR_TOLERANCE
            flags.append("medium" if in_air else "velocity")
        wavelength = to_rest(np.asarray(row["wavelength"], np.float64), found.value)
        yield {**row, "wavelength": wavelength, "rest_frame": True, "flags": flags}


def velocity_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, NDArray[np.float32]]:
    """What [`at_measured_velocities`] has found, for a table."""
    names = (VELOCITY, f"{VELOCITY}_err")
    return {name: np.array([row.get(name, np.nan) for row in rows], np.float32) for name in names}


#: Tokens that the model gets at once: with fewer a CPU does not come to its full speed, with many more what passes from
#: layer to layer leaves its caches (`scripts/benchmark.py --curves`). A number found by a trial would be another one in
#: each run, and with it the last digit of an answer.
TOKENS_AT_ONCE = 2048
NO_MEMORY = "too large for the memory"
# Where tokens are evidence: pixels that cost as much as a token does, and what a star costs at least. So 139 stars of
# APOGEE go together, and 512 of Gaia XP: enough for full speed, and few enough for the threads to share them evenly.
PIXELS_OF_EVIDENCE, LEAST_OF_EVIDENCE = 512, 4


def tokens_of(row: Mapping[str, Any], tokenizer: SpectraFMTokenizer) -> int:
    """What a spectrum costs, in tokens, for the size of a batch."""
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
        Stars in a list. Default: as many as have `TOKENS_AT_ONCE`, at least one.
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
        That of the model. Its settings on units do not matter: the rows are in Angstrom, in vacuum, with sigmas.
    batches : iterable of sequences of rows
        Rows in the schema of this project, such as `batches_of(read_spectra(files), tokenizer)`; labels are not read.
    requests : sequence of str, optional
        Labels to predict. Default: what the tokenizer asks for by itself.
    training_range : TrainingRange, optional
        Flags what lies outside.

    Yields
    ------
    dict of arrays of shape (stars,), one a batch
        `object_id` (str), and where the rows have one the name of the `file`; for each request `<label>` and
        `<label>_err` (float32, physical units, one sigma); `flags` (str, empty if all is well; `not_at_rest` where the
        row has a `rest_frame` of False, and those of the row itself, such as `frame_unstated`); `reason` (str). A star
        that cannot be predicted has labels of NaN, and only that has a reason.
        Spectra of different lengths are handled apart, as the shorter ones would be padded. Where the memory does not
        suffice for a batch, the model gets half of it at a time from then on, and a warning is logged.

    Raises
    ------
    ValueError
        For an unknown label.
    """
    predictor = _BatchPredictor(model, tokenizer, requests, training_range)
    # Tokens that are drawn at random are drawn in the order of the stars.
    one_by_one = model.device.type != "cpu" or (tokenizer.max_length is not None and tokenizer.sampling == "random")
    yield from _side_by_side(predictor, batches, 1 if one_by_one else torch.get_num_threads())


def _side_by_side(work: Callable[[Item], Result], items: Iterable[Item], n_threads: int) -> Iterator[Result]:
    """
    `work` on each item, in order, in as many Python threads with one thread of torch each: by a fifth faster on two
    cores than what shares each product of matrices among them, as no thread waits for another, and as what is done in
    one thread, such as making tokens, is done on all cores.
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
            # Each thread has a number of its own, and new ones the last that was set.
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
        # Evidence has flags of its own, in which the grid of a spectrum plays no part.
        self.training_range = training_range if tokenizer.basis is None else None
        self.most = 0  # stars that there is memory for at once; 0 until it is found to end

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, NDArray[Any]]:
        names = self.names
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
        Fill in values, errors and flags of some stars, of which the model gets no more at a time than go through.
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
                    logger.warning(f"out of memory with {len(some)} stars at once: {self.most} from now on")
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


def is_out_of_memory(error: Exception) -> bool:
    # The last is what oneDNN, which does some of the work on a CPU, says of it.
    return isinstance(error, MemoryError) or should_reduce_batch_size(error) or "could not create a" in str(error)


def schema_tokenizer(tokenizer: SpectraFMTokenizer) -> SpectraFMTokenizer:
    """One that takes rows of this project's schema, whatever units it is set to."""
    tokenizer = copy.copy(tokenizer)
    tokenizer.wavelength_unit, tokenizer.wavelength_medium, tokenizer.error_type = "Angstrom", "vacuum", "sigma"
    return tokenizer


def tokenize_rows(
    tokenizer: SpectraFMTokenizer, rows: Sequence[Mapping[str, Any]], names: list[str], reasons: list[str]
) -> Iterator[tuple[BatchFeature, NDArray[np.intp]]]:
    """
    Inputs of the model, and of which rows they are.

    Parameters
    ----------
    tokenizer : SpectraFMTokenizer
        As `schema_tokenizer` makes it.
    rows : sequence of rows
    names : list of str
        Labels to ask for.
    reasons : list of str
        One for each row. Gets why a row cannot be used, which is then in no inputs.

    Yields
    ------
    inputs, members
        Of all rows together if they are of one length; of those of similar length otherwise.
    """
    for part in _parts(tokenizer, rows):
        yield from _tokenize(tokenizer, rows, part, names, reasons)


def _parts(tokenizer: SpectraFMTokenizer, rows: Sequence[Mapping[str, Any]]) -> Iterator[NDArray[np.intp]]:
    """
    Which rows to handle together: so few, of similar length, that with padding they make no more than `TOKENS_AT_ONCE`,
    or than all rows would if they were as short as the shortest of these.
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
    """Inputs of all of a part, or by halves without those that get a reason."""
    try:
        columns = {name: [rows[i][name] for i in part] for name in PIXEL_COLUMNS}
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
        # One bad star refuses the batch: find it, and go on without it.
        if len(part) == 1:
            cause = NO_MEMORY if isinstance(error, MemoryError) else str(error).removesuffix(" in spectrum 0")
            reasons[part[0]] = " ".join(cause.split())
        else:
            for half in np.array_split(part, 2):
                yield from _tokenize(tokenizer, rows, half, names, reasons)
    else:
        yield inputs, part


# -------------------------------------------------------------------------------------------------------------- tables

TABLE_SUFFIXES = (".csv", ".parquet", ".fits")
#: A Parquet file of many small groups of rows is slow to open. These are 4 MB of labels.
ROW_GROUP = 2**16


class PredictionWriter:
    """Write predictions batch after batch: `with PredictionWriter(path, names, units) as writer: writer.write(batch)`.

    The file appears under its name when all is written; after an error nothing is left of it.

    Parameters
    ----------
    path : path
        Ends in .csv, .parquet or .fits. A file of this name is replaced.
    label_names : sequence of str
    label_units : mapping of str to str
        For the columns of a FITS file.
    metadata : mapping of bytes to bytes
        For the schema of a Parquet file.
    files : bool
        Whether to tell of which file each spectrum is, as object_ids of many may be the same.
    overwrite : bool
        False refuses a `path` that is there.

    Raises
    ------
    ValueError
        For another ending, or a folder that does not exist.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        label_names: Sequence[str],
        label_units: Mapping[str, str],
        metadata: Mapping[bytes, bytes] | None = None,
        *,
        files: bool = False,
        overwrite: bool = True,
    ) -> None:
        self.path = Path(path)
        self.units = dict(label_units)
        self.suffix = self.path.suffix.lower()
        if self.suffix not in TABLE_SUFFIXES:
            raise ValueError(f"output: expected a name that ends in {', '.join(TABLE_SUFFIXES)}, got {self.path}")
        if not self.path.parent.is_dir():
            raise ValueError(f"output: expected a folder that exists, got {self.path.parent}")
        if self.path.is_dir():
            raise ValueError(f"output: expected the name of a file, got the folder {self.path}")
        if self.path.exists() and not overwrite:
            raise ValueError(f"output: expected a new file, got {self.path}, which exists; --overwrite replaces it")
        numbers = [pa.field(column, pa.float32()) for name in label_names for column in (name, f"{name}_err")]
        before, after = ["object_id", *["file"] * files], ["flags", "reason"]
        texts = {name: pa.field(name, pa.string()) for name in (*before, *after)}
        columns = [*(texts[name] for name in before), *numbers, *(texts[name] for name in after)]
        self.schema = pa.schema(columns, dict(metadata or {}))
        self._temporary = temporary_name(self.path)
        self._widths = dict.fromkeys(texts, 1)
        self._waiting: list[pa.Table] = []

    def __enter__(self) -> Self:
        # FITS states the number of rows and the widths of texts ahead of them: Parquet keeps the rows until then.
        if self.suffix == ".csv":
            options = pa_csv.WriteOptions(quoting_style="needed")
            self._writer = pa_csv.CSVWriter(str(self._temporary), self.schema, write_options=options)
        else:
            self._writer = pq.ParquetWriter(str(self._temporary), self.schema)
        return self

    def write(self, batch: Mapping[str, NDArray[Any]]) -> None:
        """Append one batch of `predict_batches`."""
        # Text has no NaN that all programs read: what is unknown stays empty.
        columns = [
            pa.array(batch[column.name], column.type, from_pandas=self.suffix == ".csv") for column in self.schema
        ]
        for name, width in self._widths.items():
            self._widths[name] = max(width, *(len(_ascii(text)) for text in batch[name]))
        self._waiting.append(pa.Table.from_arrays(columns, schema=self.schema))
        if self.suffix == ".csv" or sum(map(len, self._waiting)) >= ROW_GROUP:
            self._flush()

    def note(self, metadata: Mapping[bytes, bytes]) -> None:
        """Add to the metadata of a Parquet file what was not known when it was begun."""
        self._writer.add_key_value_metadata(metadata)

    def _flush(self) -> None:
        if self._waiting:
            self._writer.write_table(pa.concat_tables(self._waiting))
            self._waiting.clear()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._flush()
            self._writer.close()
            if kind is None:
                if self.suffix == ".fits":
                    self._parquet_to_fits()
                self._temporary.replace(self.path)
        finally:
            self._temporary.unlink(missing_ok=True)

    def _parquet_to_fits(self) -> None:
        columns = [
            fits.Column(name, f"{self._widths[name]}A")
            if name in self._widths
            else fits.Column(name, "E", unit=_fits_unit(self.units.get(name.removesuffix("_err"), "")))
            for name in self.schema.names
        ]
        header = fits.BinTableHDU.from_columns(columns).header
        kinds = [(name, f"S{self._widths[name]}" if name in self._widths else ">f4") for name in self.schema.names]
        temporary = self._temporary.with_name(f"{self._temporary.name}.fits")
        try:
            with pq.ParquetFile(self._temporary) as table:
                header["NAXIS2"] = table.metadata.num_rows
                with fits.StreamingHDU(temporary, header) as stream:
                    for batch in table.iter_batches():
                        records = np.empty(len(batch), dtype=kinds)
                        for name in self.schema.names:
                            column = batch.column(name)
                            records[name] = list(map(_ascii, column.to_pylist())) if name in self._widths else column
                        stream.write(records.view(np.uint8))
            temporary.replace(self._temporary)
        finally:
            temporary.unlink(missing_ok=True)


def _ascii(text: str) -> bytes:
    """FITS knows ASCII only."""
    return text.encode("ascii", "backslashreplace")


def _fits_unit(unit: str) -> str | None:
    """A unit of the FITS standard, which "dex" is not: readers would complain about it."""
    try:
        return units.Unit(unit, format="fits").to_string("fits") or None
    except ValueError:
        return None
