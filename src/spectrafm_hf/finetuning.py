# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint of one's own, from one's own spectra and a table of labels, in one call: `spectrafm finetune`.

Spectra are joined with labels and split by star; a checkpoint is trained further on them, its errors are calibrated on
validation stars, and test stars tell how good it is beside classical models of the same stars.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import json
import math
import platform
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, load_dataset
from numpy.typing import NDArray
from pyarrow import csv as arrow_csv
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainingArguments

from .baselines import Baseline, MLPBaseline, RidgeBaseline, Spectra
from .cards import checksums, read_evaluations, sha256, write_model_card
from .checkpoints import demand_pixels, load_checkpoint, suitable_checkpoint
from .data.from_files import build_from_files
from .data.labels import (
    FILE_COLUMNS,
    ID_COLUMNS,
    LabelIndex,
    known_numbers,
    label_columns,
    number_columns,
    read_labels,
    stated_units,
)
from .data.readers import SUFFIXES, Failure, read_spectra
from .data.schema import LABEL_UNITS
from .files import complete_file
from .metrics import format_table, robust_scatter, table_metrics
from .models import SpectraFMTokenizer
from .plots import plot_curves, plot_given
from .prediction import TrainingRange, batches_of, predict_batches
from .training import Recipe, last_checkpoint, train


# ---------------------------------------------------------------------------------------------------- what is trained

#: What is kept as it is, by what is trained. `frozen` is the last stage of the paper. In all of them the vectors of the
#: labels and the readout are trained.
FROZEN: dict[str, list[str]] = {
    "all": [],
    "frozen": ["decoder", "encoder.layers.1"],
    "lora": [],
    "head": ["embeddings.patch_embedding", "embeddings.wavelength_encoding", "encoder", "decoder"],
}
TRAINED = {
    "all": "everything",
    "frozen": "everything but the decoder and the second layer of the encoder",
    "lora": "adapters (LoRA) and the readout",
    "head": "the readout",
}
LORA = {"r": 8, "lora_alpha": 16, "modules_to_save": ["value_embedding", "readout"]}
#: What is trained unless somebody says otherwise, at any number of stars: measured from 50 to 1,000, with two or three
#: draws of the stars, freezing more was nowhere better by more than chance (scripts/recipes/finetune.tried.md).
DEFAULT = "all"
LEARNING_RATES = {"all": 3e-4, "frozen": 3e-4, "lora": 1e-3, "head": 1e-3}
#: An instrument that is new to the checkpoint takes more to learn, and the same place says how that was measured.
NEW_INSTRUMENT_RATE, NEW_INSTRUMENT_STEPS = 1e-3, 3


def training_settings(
    n_stars: int,
    what: str,
    *,
    new_instrument: bool = False,
    steps: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    Arguments of [`Recipe`] and of `transformers.TrainingArguments`.

    Parameters
    ----------
    n_stars, what
        Training stars, and what is trained: a name of `FROZEN`.
    new_instrument : bool
        Whether the checkpoint has never seen spectra of the kind.
    steps, batch_size : int, optional
        Default: 200 steps for up to 100 stars, more with the square root of their number, 5,000 at most, three times as
        many for a new instrument; batches of a sixteenth of the stars, between 16 and 128.
    seed : int
        Of order, noise and dropout.
    """
    if what not in FROZEN:
        raise ValueError(f"train: expected one of {', '.join(FROZEN)}, got {what!r}")
    steps = steps or int(np.clip(20 * math.sqrt(n_stars), 200, 5000)) * (NEW_INSTRUMENT_STEPS if new_instrument else 1)
    often = max(1, steps // 10)
    recipe: dict[str, Any] = {
        "freeze": FROZEN[what],
        "lora": LORA if what == "lora" else {},
        "noise": 1.0,
        # Steps of Muon would be too large for the few that are taken here.
        "muon_learning_rate": 0.0,
        "ema_decay": min(0.98, 1 - 10 / steps),
    }
    arguments: dict[str, Any] = {
        "max_steps": steps,
        "per_device_train_batch_size": batch_size or int(np.clip(n_stars // 16, 16, 128)),
        "per_device_eval_batch_size": 256,
        "learning_rate": NEW_INSTRUMENT_RATE if new_instrument else LEARNING_RATES[what],
        "adam_beta2": 0.98,
        "weight_decay": 0.01,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        # Where nothing beats the start on validation stars, the start stays. The loss would take the step before errors
        # become too small, which calibration mends, and the answers go on getting better.
        "eval_on_start": True,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_residual",
        "greater_is_better": False,
        "eval_strategy": "steps",
        "eval_steps": often,
        "save_steps": often,
        "save_total_limit": 2,
        "logging_steps": max(1, often // 2),
        "report_to": "none",
        # Without an accelerator the loader warns of it.
        "dataloader_pin_memory": torch.cuda.is_available(),
        "seed": seed,
    }
    return recipe, arguments


class Progress(TrainerCallback):
    """A bar with figures of validation, or a line for each evaluation where there is no terminal; an end to training.

    Parameters
    ----------
    say : callable
        Gets the lines.
    minutes : float, optional
        Stop after so long: an evaluation ends the run, and its best step counts as ever.
    """

    def __init__(self, say: Callable[[str], None], minutes: float | None = None):
        self.say, self.minutes = say, minutes

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.monotonic()
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step", disable=None)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()
        if self.minutes is not None and time.monotonic() - self.start > 60 * self.minutes:
            self.say(f"{self.minutes:g} minutes are over: training ends after {state.global_step:,} steps")
            control.should_training_stop = control.should_evaluate = control.should_save = True

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.bar.set_postfix(loss=f"{metrics['eval_loss']:.4f}", residual=f"{metrics['eval_residual']:.4f}")
        if self.bar.disable:
            self.say(
                f"step {state.global_step:,} of {state.max_steps:,}: validation loss {metrics['eval_loss']:.4f}, "
                f"residuals {metrics['eval_residual']:.4f} of the scatter of the labels"
            )

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


# -------------------------------------------------------------------------------------------------------------- labels

MIN_STARS = 20
UNREADABLE = "cannot be read"  # the cause of a dropped spectrum that is a fault, not a star without labels


@dataclass(frozen=True)
class Labels:
    """A table of labels, ready to be joined.

    Attributes
    ----------
    table : pyarrow.Table
        All its columns; names in lower case, without units.
    values : dict of array, shape (rows,)
        `<label>` and `<label>_err`, NaN where unknown.
    units : dict of str to str
        Of the labels to learn; "" where nobody says.
    notes : list of str
        What the user should know, a line each.
    """

    table: pa.Table
    values: dict[str, NDArray[np.float64]]
    units: dict[str, str]
    notes: list[str]


def read_label_table(
    path: Path,
    names: Sequence[str] | None = None,
    units: Mapping[str, str] | None = None,
    known: Mapping[str, str] | None = None,
) -> Labels:
    """Read a table of labels with their units.

    Parameters
    ----------
    path : path
        As `read_labels` takes it. A heading `age[Gyr]` or `age [Gyr]` is a label and its unit.
    names : sequence of str, optional
        Labels to learn. Default: columns of numbers with an `_err` beside them or a unit in their heading, and those
        with names that this project knows. Without such, all numbers but coordinates, magnitudes and the like; without
        any, these too.
    units, known : mapping of label to unit, optional
        Instead of what the table says, and those of the checkpoint, which cannot be others.

    Raises
    ------
    ValueError
        For a label that is not there, not of numbers, without a value, or in another unit than the checkpoint's.
    """
    known, asked = known or {}, {name.lower(): unit for name, unit in (units or {}).items()}
    table = read_labels(path)
    found = stated_units(table)
    numbers = number_columns(table)
    notes = []
    if names is None:
        names = label_columns(table, {*known, *asked}) or numbers
        if left := [name for name in numbers if name not in names]:
            notes.append(f"columns of numbers that are not learnt (--label names those that are): {', '.join(left)}")
        # A column with a word among its numbers is text: it may have been meant.
        texts = [
            field.name
            for field in table.schema
            if field.name in {*LABEL_UNITS, *known}
            and not pa.types.is_floating(field.type)
            and field.name not in numbers
        ]
        if texts:
            notes.append(f"columns that hold words, which are not learnt: {', '.join(texts)}")
    names = list(dict.fromkeys(name.lower() for name in names))
    if not names or set(names) - set(numbers):
        raise ValueError(
            f"labels: expected columns of numbers in {path.name} ({', '.join(numbers) or 'there are none'}), got "
            f"{', '.join(name for name in names if name not in numbers) or 'none'}"
        )
    if wrong := sorted(set(asked) - set(names)):
        raise ValueError(f"units: expected units of labels to learn ({', '.join(names)}), got {', '.join(wrong)}")
    values = {}
    for name in [column for label in names for column in (label, f"{label}_err")]:
        values[name] = known_numbers(table, name) if name in table.column_names else np.full(len(table), np.nan)
        n_unknown = int(np.isnan(values[name]).sum())
        if n_unknown == len(table) and not name.endswith("_err"):
            raise ValueError(f"{name}: expected values in this column of {path.name}, got none in {n_unknown:,} rows")
        if n_unknown and name in table.column_names:
            notes.append(f"{name}: unknown (empty, no number, or one for nothing) in {n_unknown:,} rows of the table")
    final = {}
    for name in names:
        unit = asked.get(name, found.get(name))
        if unit and known.get(name) and unit.lower() != known[name].lower():
            raise ValueError(f"{name}: expected {known[name]}, the unit of the checkpoint, got {unit}")
        final[name] = unit or known.get(name) or LABEL_UNITS.get(name, "").split(" ")[0]
    return Labels(table, values, final, notes)


# ------------------------------------------------------------------------------------------------------------ the stars


def join_columns(table: pa.Table, id_column: str | None = None) -> list[str]:
    """The columns by which labels may be joined with spectra: `id_column`, else those with usual names."""
    usual = (*ID_COLUMNS, *FILE_COLUMNS)
    columns = [id_column.lower()] if id_column else [name for name in usual if name in table.column_names]
    if not columns or columns[0] not in table.column_names:
        expected = repr(id_column) if id_column else f"one of {', '.join(usual)}"
        raise ValueError(
            f"id_column: expected {expected} among the columns of the labels, got {', '.join(table.column_names)}"
        )
    # Decimals would round identifiers.
    whole = [column for column in columns if not pa.types.is_floating(table.schema.field(column).type)]
    if not whole:
        raise ValueError(f"{columns[0]}: expected identifiers as text or whole numbers, got decimals")
    return whole


def join(
    labels: Labels, object_ids: Sequence[str], files: Sequence[str], id_column: str | None = None
) -> tuple[NDArray[np.int64], list[str], str]:
    """
    Which row of the labels belongs to a spectrum: by identifier or, where that fits more, by name of the file.

    By default the column is the one out of `ID_COLUMNS` and `FILE_COLUMNS` that fits most spectra.

    Returns
    -------
    rows : array of int, shape (spectra,)
        -1 for none, -2 where several rows of the table contradict each other.
    stars : list of str
        The star of each spectrum: its identifier; where it is joined by its file, that of the table if it has one.
    how : str
        In words, with the number of rows that were not needed.
    """
    keys = {"object_id": list(object_ids), "file": [_stem(file) for file in files]}
    fits = []
    for column in join_columns(labels.table, id_column):
        texts = [None if key is None else str(key) for key in labels.table[column].to_pylist()]
        for by in keys:
            own = pa.array([key and _stem(key) for key in texts] if by == "file" else texts, pa.string())
            index = LabelIndex(pa.table({"id": own}), "id")
            fits.append((index.find(keys[by]), column, by, own, len(index.unmatched_labels)))
    rows, column, by, own, n_left = max(fits, key=lambda fit: int((fit[0] >= 0).sum()))
    if not (rows >= 0).any():
        raise ValueError(
            f"labels: expected identifiers of the spectra ({', '.join(keys[by][:3])}, ...) in the column {column}, "
            f"got none of them ({', '.join(map(str, labels.table[column].to_pylist()[:3]))}, ...)"
        )
    # Of several rows of one identifier, the first counts if the others say the same, else none.
    values = np.stack([labels.values[name] for name in labels.units], axis=1)
    firsts = LabelIndex(pa.table({"id": own}), "id").find("" if key is None else key for key in own.to_pylist())
    differs = ~((values == values[firsts]) | (np.isnan(values) & np.isnan(values[firsts]))).all(axis=1)
    rows = np.where(np.isin(rows, firsts[differs & (firsts >= 0)]), -2, rows)
    stars = list(object_ids)
    star = next((name for name in ID_COLUMNS if name in labels.table.column_names), None)
    if by == "file" and star not in (None, column):
        told = labels.table[star].to_pylist()
        stars = [
            star if row < 0 or told[row] is None else str(told[row]).strip()
            for star, row in zip(stars, rows.tolist(), strict=True)
        ]
    return rows, stars, f"{by} = column {column}" + (f"; rows without a spectrum: {n_left:,}" if n_left else "")


def _stem(file: str) -> str:
    """Name of a file without folder and suffix."""
    plain = Path(file.strip()).name.removesuffix(".gz")
    return next((plain[: -len(suffix)] for suffix in SUFFIXES if plain.lower().endswith(suffix)), plain)


def split_stars(object_ids: Sequence[str]) -> NDArray[np.str_]:
    """
    train, validation or test for each spectrum; all spectra of a star are in one of them.

    Stars are ordered by the SHA-256 of their identifiers. The first tenth is test and the next is validation; of fewer
    than 1,000 stars a fifth each, as a tenth would be too few to judge by. The same stars are always split alike.
    """
    stars = sorted(set(object_ids), key=lambda star: hashlib.sha256(star.encode()).digest())
    share = 0.2 if len(stars) < 1000 else 0.1
    n_held_out = max(1, round(share * len(stars)))
    splits = ["test"] * n_held_out + ["validation"] * n_held_out + ["train"] * len(stars)
    split_of = dict(zip(stars, splits, strict=False))
    return np.array([split_of[star] for star in object_ids])


def _read(
    files: Sequence[Path], work: Path, failures: Sequence[Failure], fingerprint: str, command: str, **reading: Any
) -> tuple[Dataset, list[dict[str, str]]]:
    """All spectra as a data set on disk, read once, and what could not be used: file, identifier and cause."""
    told = work / "unreadable.json"
    found = json.loads(told.read_text(encoding="utf-8")) if told.is_file() else {}
    if found.get("spectra") != fingerprint:
        failed = list(failures)
        try:
            build_from_files(
                files, work / "data", split_by="none", failures=failed, command=command, overwrite=True, **reading
            )
        except ValueError as error:
            if failed and "expected at least one spectrum" in str(error):
                raise ValueError(
                    f"spectra: expected at least one that can be read, got none in {len(files):,} files; first: "
                    f"{failed[0].cause}"
                ) from None
            raise
        unreadable = [{"file": each.file.name, "cause": f"{UNREADABLE}: {each.cause}"} for each in failed]
        found = {"spectra": fingerprint, "unreadable": unreadable}
        _write_json(told, found)
    stars = load_dataset(str(work / "data"), split="train", cache_dir=str(work / "cache"))
    return cast(Dataset, stars), found["unreadable"]


def _label(stars: Dataset, labels: Labels, id_column: str | None) -> tuple[Dataset, list[dict[str, str]], str]:
    """The spectra that have a label, with theirs and no others; what is dropped and why; how they were joined."""
    object_ids, files = _texts(stars, "object_id"), _texts(stars, "file")
    rows, names, how = join(labels, object_ids, files, id_column)
    known = np.any([np.isfinite(labels.values[name]) for name in labels.units], axis=0)[rows] & (rows >= 0)
    causes = {-1: "no row in the table of labels", -2: "different labels in several rows of the table"}
    dropped = [
        {"file": file, "object_id": star, "cause": causes.get(row, "all its labels are unknown")}
        for file, star, row, has_label in zip(files, object_ids, rows.tolist(), known.tolist(), strict=True)
        if not has_label
    ]
    own = [name for name in stars.column_names if name in labels.values or name.removesuffix("_err") in LABEL_UNITS]
    stars = stars.remove_columns([*own, "object_id"]).add_column("object_id", names)
    for name, values in labels.values.items():
        stars = stars.add_column(name, np.where(rows >= 0, values[rows], np.nan).astype(np.float32))
    return stars.select(np.flatnonzero(known)), dropped, how


def _check_labels(parts: Mapping[str, Dataset], names: Sequence[str]) -> None:
    """Each label has enough values in each split, and they differ."""
    for name in names:
        for split in ("test", "validation", "train"):
            values = np.asarray(parts[split][name][:], np.float64)
            values = values[np.isfinite(values)]
            if len(values) < 3:
                raise ValueError(f"{name}: expected at least 3 {split} spectra whose value is known, got {len(values)}")
        if robust_scatter(values) == 0:
            raise ValueError(
                f"{name}: expected values that differ, got {np.median(values):g} for most of the training spectra"
            )


def _texts(stars: Dataset, name: str) -> list[str]:
    return [str(text) for text in stars[name][:]]


# ---------------------------------------------------------------------------------------------------------- instruments


def _common_grid(spectra: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
    """Wavelengths of the spectrum with most pixels, which stands for an instrument whose spectra do not share them."""
    return np.sort(np.asarray(max(spectra, key=lambda row: len(row["wavelength"]))["wavelength"], np.float64))


def _on_grid(spectra: Sequence[Mapping[str, Any]], grid: NDArray[np.float64]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Flux and error on a grid, (spectra, pixels) each; NaN where a neighbour is masked or far."""
    columns = np.full((2, len(spectra), grid.size), np.nan, np.float32)
    for i, row in enumerate(spectra):
        wavelength = np.asarray(row["wavelength"], np.float64)
        pixels = [np.where(row["mask"], np.nan, np.asarray(row[name])) for name in ("flux", "flux_error")]
        if np.array_equal(wavelength, grid):
            columns[:, i] = pixels
            continue
        order = np.argsort(wavelength)
        wavelength = wavelength[order]
        place = np.searchsorted(wavelength, grid).clip(1, max(wavelength.size - 1, 1))
        near = wavelength[place] - wavelength[place - 1] < 2.5 * np.median(np.diff(wavelength))
        for column, values in zip(columns[:, i], pixels, strict=True):
            column[near] = np.interp(grid, wavelength, values[order], left=np.nan, right=np.nan)[near]
    return columns[0], columns[1]


def _sample(stars: Dataset, names: Sequence[str], number: int, seed: int) -> dict[str, Any]:
    """Columns to measure on, as `train` takes them: all labels, and some spectra, brought to one grid."""
    rows = np.sort(np.random.default_rng([seed, 3]).permutation(len(stars))[:number])
    spectra = [cast(Any, stars[int(row)]) for row in rows]
    grid = _common_grid(spectra)
    flux, flux_error = _on_grid(spectra, grid)
    return {
        "wavelength": np.tile(grid.astype(np.float32), (len(spectra), 1)),
        "flux": np.nan_to_num(flux),
        "flux_error": flux_error,
        "mask": np.isnan(flux),
        **{name: np.asarray(stars[name][:]) for name in names},
    }


def _fit(
    tokenizer: SpectraFMTokenizer, training_range: TrainingRange | None, wavelength: NDArray[Any]
) -> tuple[bool, dict[str, Any]]:
    """Whether the instrument is new to a checkpoint, and what of its tokenizer must change."""
    ranges = tokenizer.wavelength_ranges
    within = np.any([(wavelength >= low) & (wavelength <= high) for low, high in ranges or [(0, np.inf)]], axis=0)
    changes: dict[str, Any] = {"wavelength_ranges": None} if within.mean() < 0.5 else {}
    if training_range is None or training_range.wavelength is None or training_range.wavelength_step is None:
        return False, changes
    pairs = np.atleast_2d(training_range.wavelength), np.atleast_2d(training_range.wavelength_step)
    step = float(np.median(np.diff(wavelength)))
    for (low, high), (finest, widest) in zip(*pairs, strict=True):
        covered = np.mean((wavelength > low * 0.995) & (wavelength < high * 1.005))
        if covered > 0.95 and finest / 1.5 < step < widest * 1.5:
            return False, changes
    return True, changes


# ----------------------------------------------------------------------------------------------------------- all of it


@dataclass(frozen=True)
class Tuned:
    """What a fine-tuning made: the checkpoint in `folder`, of which `what` (a name of `FROZEN`) was trained for the
    labels of `units`; the `sizes` of the splits; how many spectra were `dropped` for which cause; `evaluation.json`.
    """

    folder: Path
    units: dict[str, str]
    what: str
    sizes: dict[str, int]
    dropped: dict[str, int]
    evaluation: dict[str, Any]

    def summary(self) -> str:
        """The figures of the test spectra as a table."""
        return format_table(self.evaluation["results"]["all stars"], self.units)


def finetune(
    files: Sequence[Path],
    labels: Path,
    out: Path,
    *,
    model: str | None = None,
    names: Sequence[str] | None = None,
    units: Mapping[str, str] | None = None,
    id_column: str | None = None,
    what: str | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    failures: Sequence[Failure] = (),
    command: str = "spectrafm finetune",
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
    **reading: Any,
) -> Tuned:
    """
    Fine-tune a checkpoint on spectra and a table of labels, and tell how good it is.

    Parameters
    ----------
    files, failures
        As `find_files` returns them.
    labels, names, units, id_column
        See [`read_label_table`] and [`join`].
    out : path
        Folder for the checkpoint, its card and pictures. In `out/report` are tables of what was dropped, of the splits
        and of the predictions for test stars; in `out/work` the data set and the run, from which a call with the same
        arguments goes on. (None of the two is pushed to the hub.)
    model, what : str, optional
        Checkpoint to go on from (default: the bundled one for the first spectrum), and what of it is trained, out of
        `FROZEN` (default: everything).
    steps, batch_size, seed
        See [`training_settings`].
    minutes : float, optional
        Train no longer; what else is done takes its own time.
    command : str
        For the card.
    overwrite : bool
        Begin again where `out` holds a fine-tuning with other arguments.
    say : callable
        Gets a line to print at each stage.
    **reading
        Goes to `read_spectra`.

    Raises
    ------
    ValueError
        In one line: for labels that cannot be used, no matches, fewer stars than `MIN_STARS`, another fine-tuning in
        `out`, and as `load_checkpoint` does.
    """
    if model is None:
        row = next(iter(read_spectra(files, failures=[], **reading)), None)
        model = suitable_checkpoint([] if row is None else row["wavelength"])
    base, tokenizer = load_checkpoint(model)
    demand_pixels(tokenizer, "fine-tune")
    known = dict(zip(base.config.label_names, base.config.label_units, strict=True))
    table = read_label_table(labels, names, units, known)
    names = list(table.units)
    join_columns(table.table, id_column)  # before the spectra are read, which takes long
    fingerprint = hashlib.sha256(
        json.dumps(
            [[(file.name, sha256(file) if file.is_file() else "") for file in files], reading],
            default=lambda grid: np.asarray(grid).tolist(),
        ).encode()
    ).hexdigest()
    settings = {
        "model": model, "labels": table.units, "table": sha256(labels), "spectra": fingerprint, "id_column": id_column,
        "train": what, "steps": steps, "minutes": minutes, "batch_size": batch_size, "seed": seed,
    }  # fmt: skip
    work = _working_folder(out, settings, overwrite)
    if done := json.loads((work / "settings.json").read_text(encoding="utf-8")).get("complete"):
        say(f"{out}: complete, kept as it is")
        return Tuned(out, table.units, **done, evaluation=read_evaluations(out)[0])

    spectra, dropped = _read(files, work, failures, fingerprint, command, **reading)
    stars, without, how = _label(spectra, table, id_column)
    dropped += without
    causes = Counter(entry["cause"].split(":")[0] for entry in dropped)
    splits = split_stars(_texts(stars, "object_id"))
    n_stars = len(set(_texts(stars, "object_id")))
    report = out / "report"
    report.mkdir(exist_ok=True)
    texts = pa.schema([(name, pa.string()) for name in ("file", "object_id", "cause")])
    _write_table(report / "dropped.csv", pa.Table.from_pylist(dropped, texts))
    identifiers = {name: _texts(stars, name) for name in ("object_id", "file")}
    _write_table(report / "splits.csv", pa.table({**identifiers, "split": splits}))
    say(f"{len(stars):,} spectra of {n_stars:,} stars have labels (joined by {how})")
    if dropped:
        counted = "; ".join(f"{cause}: {number:,}" for cause, number in causes.items())
        say(f"dropped {len(dropped):,} spectra, see {report / 'dropped.csv'}: {counted}")
    if moving := len(stars) - sum(stars["rest_frame"]):
        say(f"spectra that are not at rest, as no velocity is known (--radial-velocity): {moving:,}")
    for note in table.notes:
        say(note)
    if n_stars < MIN_STARS:
        raise ValueError(f"stars: expected at least {MIN_STARS} with a spectrum and a label, got {n_stars}")

    stars = stars.with_format("numpy")
    parts = {name: stars.select(np.flatnonzero(splits == name)) for name in ("train", "validation", "test")}
    sizes = {name: len(part) for name, part in parts.items()}
    _check_labels(parts, names)
    sample = _sample(parts["train"], list(table.values), 2000, seed)
    grid = sample["wavelength"][0].astype(np.float64)
    training_range = TrainingRange.load(str(base.name_or_path))
    is_new, changes = _fit(tokenizer, training_range, grid)
    n_train = len(set(_texts(parts["train"], "object_id")))
    what = what or DEFAULT
    recipe_settings, argument_settings = training_settings(
        n_train, what, new_instrument=is_new, steps=steps, batch_size=batch_size, seed=seed
    )
    recipe = Recipe(
        data=out.resolve().name,
        checkpoint=model,
        labels=names,
        units=list(table.units.values()),
        remeasure=is_new and tokenizer.standardize_wavelength is not None,
        tokenizer={"requests": names, **changes},
        error_dropout=0.0 if np.isfinite(sample["flux_error"]).any() else 1.0,
        **recipe_settings,
    )
    say(f"labels: {', '.join(f'{name} [{unit}]' if unit else name for name, unit in table.units.items())}")
    if new := [name for name in names if name not in known]:
        say(f"new to the checkpoint: {', '.join(new)}")
    say(f"split by star: {', '.join(f'{size:,} {name}' for name, size in sizes.items())} spectra")
    say(
        f"{model}: training {TRAINED[what]}, {argument_settings['max_steps']:,} steps of "
        f"{argument_settings['per_device_train_batch_size']} spectra"
        f"{'; the instrument is new to it' if is_new else ''}"
    )
    run = work / "run"
    if not (run / "curves.csv").is_file():  # the last that training writes
        arguments = TrainingArguments(output_dir=str(run), **argument_settings)
        arguments.resume_from_checkpoint = last_checkpoint(run)
        progress = Progress(say, minutes)
        train(recipe, arguments, parts["train"], parts["validation"], [progress], [sample], quiet=True)
    if training_range is None:
        limits = {name: (float(np.nanmin(sample[name])), float(np.nanmax(sample[name]))) for name in names}
        TrainingRange(limits, (float(grid[0]), float(grid[-1]))).save(run / "final")
    best = best_step(run / "curves.csv")
    kept = "No step was better on the validation spectra than the start: its weights are kept." if best == 0 else ""
    say(kept or f"best on the validation spectra: step {best:,}")

    of_before = [name for name in names if name in known]
    evaluation, answers = _evaluate(run / "final", model, of_before, parts, table, seed)
    evaluation |= {"command": command, "data": recipe.data}
    _write_table(report / "predictions.csv", _prediction_table(answers, parts["test"], table))
    # The config, which tells a checkpoint, last.
    for file in sorted((run / "final").iterdir(), key=lambda path: path.name == "config.json"):
        if file.is_file():
            with complete_file(out / file.name) as temporary:
                shutil.copyfile(file, temporary)
    plot_given(out / "predicted.png", *answers["fine-tuned"], parts["test"], table.units)
    plot_curves(out / "loss.png", run / "curves.csv", best)
    told = {name: value for name, value in asdict(recipe).items() if value != getattr(Recipe(), name)}
    write_model_card(
        out,
        recipe={**told, "data": None, **argument_settings},  # whose spectra they are, nobody has said
        evaluations=[evaluation],
        base_model=model,
        remarks=(
            f"Fine-tuned from `{model}` by `spectrafm finetune` on {sizes['train']:,} spectra "
            f"({sizes['validation']:,} validation, {sizes['test']:,} test spectra; {n_stars:,} stars; trained: "
            f"{TRAINED[what]}{'; the instrument was new to it' if is_new else ''}). {kept} Dropped spectra: "
            f"{'; '.join(f'{cause}: {number:,}' for cause, number in causes.items()) or 'none'}. If `{model}` was "
            "itself trained on some of these stars, the figures of the test stars are better than those of stars that "
            "are new to it."
        ),
    )
    complete: dict[str, Any] = {"what": what, "sizes": sizes, "dropped": dict(causes)}
    _write_json(work / "settings.json", {**settings, "complete": complete})
    return Tuned(out, table.units, **complete, evaluation=evaluation)


def _working_folder(out: Path, settings: Mapping[str, Any], overwrite: bool) -> Path:
    """`out/work`, in which a run with these settings goes on."""
    work = out / "work"
    told = work / "settings.json"
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not told.is_file()):
        raise ValueError(f"out: expected a new folder, or a fine-tuning to go on with, got other files in {out}")
    before = json.loads(told.read_text(encoding="utf-8")) if told.is_file() else None
    if before is not None and (differing := [name for name in settings if before.get(name) != settings[name]]):
        # What never came to training, as its input was refused, is in nobody's way.
        if not overwrite and ("complete" in before or any((work / "run").glob("checkpoint-*"))):
            name = differing[0]
            raise ValueError(
                f"out: expected a fine-tuning with {name}={settings[name]!r} in {out}, got {before.get(name)!r}; "
                "overwrite begins again"
            )
        (out / "config.json").unlink(missing_ok=True)
        shutil.rmtree(work / "run", ignore_errors=True)
        before = None
    work.mkdir(parents=True, exist_ok=True)
    if before is None:
        _write_json(told, settings)
    return work


def best_step(curves: Path) -> int:
    """The step whose weights were kept, from `curves.csv` of a run."""
    with curves.open(encoding="utf-8") as file:
        lines = [line for line in csv.DictReader(file) if line.get("eval_residual")]
    return int(min(lines, key=lambda line: float(line["eval_residual"]))["step"])


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with complete_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _write_table(path: Path, table: pa.Table) -> None:
    with complete_file(path) as temporary:
        arrow_csv.write_csv(table, temporary)


# ---------------------------------------------------------------------------------------------------------- evaluation

#: What the baselines are fitted to holds no more pixels: 400 MB, 12,000 APOGEE spectra.
MAX_PIXELS = 100_000_000
RIDGE_PENALTIES = (1e-6, 1e-4, 1e-2, 1.0, 100.0)
MLP_STEPS = 1500

#: Values and errors of each label, arrays of shape (spectra,).
Answers = tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]


def _evaluate(
    checkpoint: Path, base: str, known: Sequence[str], parts: Mapping[str, Dataset], labels: Labels, seed: int
) -> tuple[dict[str, Any], dict[str, Answers]]:
    """
    Test spectra by the tuned model, by the one before where it knows a label, and by baselines of the same stars.

    Returns
    -------
    evaluation : dict
        As `scripts/evaluate.py` writes it.
    answers : dict
        By model, that of the tuned one as `fine-tuned`.
    """
    test, names = parts["test"], list(labels.units)
    answers: dict[str, Answers] = {}
    models: dict[str, Any] = {}
    for row, path, wanted in (("fine-tuned", checkpoint, names), (f"{Path(base).name}, as it was", base, known)):
        if not wanted:
            continue
        model, tokenizer = load_checkpoint(path)
        rows = tqdm(cast(Any, test), desc="test spectra", delay=2, disable=None)
        found = list(predict_batches(model, tokenizer, batches_of(rows, tokenizer), wanted))
        columns = {name: np.concatenate([batch[name] for batch in found]) for name in found[0]}
        if np.isfinite(columns[wanted[0]]).all():
            answers[row] = {n: columns[n] for n in wanted}, {n: columns[f"{n}_err"] for n in wanted}
            models[row] = {"name": row, "parameters": str(model.num_parameters())}
        elif path == checkpoint:
            raise ValueError(
                f"test: expected answers, got none for {columns['object_id'][~np.isfinite(columns[wanted[0]])]}"
            )
    models["fine-tuned"] |= checksums(*load_checkpoint(checkpoint))
    for name, baseline, settings, grid in _baselines(parts, names, seed):
        means, sigmas = baseline.predict(*_pixels(test, grid))
        answers[name] = dict(zip(names, means.T, strict=True)), dict(zip(names, sigmas.T, strict=True))
        models[name] = {
            "settings": settings,
            "error_factors": np.atleast_1d(cast(Any, baseline.error_factors)).tolist(),
        }
    truth = {name: np.asarray(test[name][:], np.float64) for name in labels.values}
    errors = {name: truth[f"{name}_err"] for name in names}
    content = "\n".join(_texts(test, "object_id")).encode() + b"".join(column.tobytes() for column in truth.values())
    versions = {name: importlib.metadata.version(name) for name in ("numpy", "torch", "transformers")}
    evaluation = {
        "split": "test",
        "split_rule": "by the SHA-256 of the identifier of the star, all spectra of a star in one split",
        "stars": {"all stars": len(test)},
        "data_sha256": {"test": hashlib.sha256(content).hexdigest()},
        "versions": {"python": platform.python_version(), **versions},
        "models": models,
        "results": {"all stars": {row: table_metrics(*given, truth, errors) for row, given in answers.items()}},
    }
    return evaluation, answers


def _prediction_table(answers: Mapping[str, Answers], test: Dataset, labels: Labels) -> pa.Table:
    """Of each model the answers for all test spectra, beside what was given."""
    given = {f"given_{name}": np.asarray(test[name][:], np.float32) for name in labels.values}
    unknown, parts = np.full(len(test), np.nan, np.float32), []
    for row, (values, errors) in answers.items():
        columns = {name: values.get(name, unknown) for name in labels.units}
        columns |= {f"{name}_err": errors.get(name, unknown) for name in labels.units}
        columns = {name: column.astype(np.float32) for name, column in columns.items()}
        parts.append(pa.table({"model": [row] * len(test), "object_id": _texts(test, "object_id"), **columns, **given}))
    return pa.concat_tables(parts)


def _pixels(stars: Dataset, grid: NDArray[np.float64]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Fluxes over their medians, and errors, on a grid, (spectra, pixels) each."""
    rows = list(tqdm(cast(Any, stars), desc="spectra for baselines", delay=2, leave=False, disable=None))
    flux, error = _on_grid(rows, grid)
    median = np.nan_to_num(np.nanmedian(np.where(np.isfinite(flux).any(axis=1)[:, None], flux, 1.0), axis=1), nan=1.0)
    median = np.where(median > 0, median, 1.0)[:, None].astype(np.float32)
    return flux / median, error / median


def _baselines(
    parts: Mapping[str, Dataset], names: Sequence[str], seed: int
) -> Iterator[tuple[str, Baseline, dict[str, Any], NDArray[np.float64]]]:
    """
    Ridge regression, with the penalty that suits the validation stars, and PCA + MLP: fitted to the training stars, of
    more than `MAX_PIXELS` pixels to a part of them, drawn at random.
    """
    train_stars = parts["train"]
    some = np.random.default_rng([seed, 4]).permutation(len(train_stars))
    grid = _common_grid([cast(Any, train_stars[int(row)]) for row in some[:500]])
    train_stars = train_stars.select(np.sort(some[: max(MAX_PIXELS // grid.size, MIN_STARS)]))

    def spectra(stars: Dataset) -> Spectra:
        columns = [[np.asarray(stars[f"{name}{end}"][:], np.float64) for name in names] for end in ("", "_err")]
        values, errors = (np.stack(column, axis=1) for column in columns)
        return Spectra(*_pixels(stars, grid), values, errors, np.empty((len(stars), 0)))

    fitted_to, held_out = spectra(train_stars), spectra(parts["validation"])

    def misfit(baseline: Baseline) -> float:
        residuals = baseline.raw_predict(held_out.flux, held_out.flux_error)[0] - held_out.labels
        scatter = [robust_scatter(column[np.isfinite(column)]) for column in residuals.T]
        spread = [robust_scatter(column[np.isfinite(column)]) or 1.0 for column in held_out.labels.T]
        return float(np.mean(np.log(np.maximum(scatter, 1e-12) / np.array(spread))))

    about = {"training_spectra": len(train_stars)}
    ridges = [RidgeBaseline(alpha=alpha, transform="asinh").fit(fitted_to) for alpha in RIDGE_PENALTIES]
    best = min(ridges, key=misfit)
    yield "ridge", best.calibrate(held_out), {**about, "alpha": best.alpha, "transform": "asinh"}, grid
    batch_size = int(np.clip(len(train_stars) // 4, 16, 256))
    settings: dict[str, Any] = {
        "batch_size": batch_size,
        "epochs": int(np.clip(MLP_STEPS * batch_size // len(train_stars), 5, 200)),
        "degrees_of_freedom": 3.0, "dropout": 0.1, "noise": 1.0, "weight_decay": 0.1, "seed": seed,
    }  # fmt: skip
    yield "PCA + MLP", MLPBaseline(**settings).fit(fitted_to).calibrate(held_out), {**about, **settings}, grid
