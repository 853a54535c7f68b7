# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint of one's own, from one's own spectra and a table of labels, in one call: `spectrafm finetune`.

Spectra are joined with labels, split by star, and stored as a data set; a checkpoint is trained further on it, its
errors are calibrated on validation stars, and test stars tell how good it is beside classical models of the same stars.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import itertools
import json
import math
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import pyarrow as pa
import torch
from astropy.table import Table
from datasets import load_dataset
from matplotlib.figure import Figure
from numpy.typing import NDArray
from tqdm.auto import tqdm
from transformers import TrainingArguments
from transformers.utils import cached_file

from .baselines import Baseline, MLPBaseline, RidgeBaseline, Spectra
from .cards import read_evaluations, sha256, write_model_card
from .checkpoints import load_checkpoint, suitable_checkpoint
from .data.building import Card, spectra_table, write_dataset
from .data.labels import ID_COLUMNS, LabelIndex, label_columns, read_labels
from .data.readers import SUFFIXES, Failure, Row, batched, read_spectra
from .data.readers.base import usable
from .data.schema import LABEL_UNITS, SCALAR_UNITS, label_names_of, spectrum_features
from .files import complete_file
from .metrics import format_table, label_metrics, robust_scatter, table_metrics
from .models import SpectraFMForPrediction, SpectraFMTokenizer
from .plots import BLUE, GREY, INK, ORANGE, axis_label
from .prediction import TrainingRange, predict_batches
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
#: From so many training stars on. Not measured, see scripts/recipes/finetune.tried.md.
CHOICES = ((0, "frozen"), (1000, "all"))


def choose(n_stars: int) -> str:
    """What to train with so many training stars: a name of `FROZEN`."""
    return [what for least, what in CHOICES if n_stars >= least][-1]


def training_settings(
    n_stars: int, what: str, *, steps: int | None = None, batch_size: int | None = None, seed: int = 0
) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    How long, in what steps, and what of the model is trained.

    Parameters
    ----------
    n_stars : int
        Stars to train on.
    what : str
        A name of `FROZEN`.
    steps : int, optional
        Of the optimizer. Default: 200 for up to 100 stars, more with the square root of their number, 2,000 at most.
    batch_size : int, optional
        Default: a quarter of the stars, between 16 and 128.
    seed : int
        Of order, noise and dropout.

    Returns
    -------
    recipe, arguments : dict
        For [`Recipe`] and `transformers.TrainingArguments`.
    """
    if what not in FROZEN:
        raise ValueError(f"train: expected one of {', '.join(FROZEN)}, got {what!r}")
    batch_size = batch_size or int(np.clip(n_stars // 4, 16, 128))
    steps = steps or int(np.clip(20 * math.sqrt(n_stars), 200, 2000))
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
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": 256,
        "learning_rate": 5e-4 if what in ("all", "frozen") else 2e-3,
        "adam_beta2": 0.98,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "eval_strategy": "steps",
        "eval_steps": often,
        "save_strategy": "steps",
        "save_steps": often,
        "save_total_limit": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "logging_steps": max(1, often // 2),
        "report_to": "none",
        # Without an accelerator the loader warns of it.
        "dataloader_pin_memory": torch.cuda.is_available(),
        "seed": seed,
    }
    return recipe, arguments


# -------------------------------------------------------------------------------------------------------------- labels

#: Columns that may hold the name of a spectrum's file instead of an identifier.
FILE_COLUMNS = ("file", "filename", "file_name", "path", "spectrum")
#: Numbers that are no labels, unless they are asked for by name.
NO_LABELS = {*SCALAR_UNITS, "snr", "ra", "dec", "glon", "glat", "l", "b", "pmra", "pmdec", "rv", "vhelio_avg"}
#: Below this a number stands for nothing, as -9999 does.
MISSING = -9990.0
MIN_STARS = 20
#: Rows that show how spectra and labels are joined.
FIRST_ROWS = 256


@dataclass(frozen=True)
class Labels:
    """A table of labels, ready to be joined.

    Attributes
    ----------
    table : pyarrow.Table
        `<label>` and `<label>_err`, and identifiers; names in lower case, without units.
    names : list of str
        Labels to learn.
    units : dict of str to str
        Of those labels; "" where nobody says.
    n_missing, n_errors : int
        Values and errors that count as unknown: not finite, below -9990, errors that are not positive.
    """

    table: pa.Table
    names: list[str]
    units: dict[str, str]
    n_missing: int
    n_errors: int

    @property
    def columns(self) -> list[str]:
        """Labels and their errors."""
        return [name for label in self.names for name in (label, f"{label}_err")]


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
        Labels to learn. Default: columns of numbers with an `_err` beside them or a unit, and those with names that
        this project knows.
    units : mapping of label to unit, optional
        Instead of what the table says.
    known : mapping of label to unit
        Of the checkpoint: these labels must be in these units.

    Raises
    ------
    ValueError
        For a label that is not there, not of numbers, without a value, or in another unit than the checkpoint's.
    """
    known = known or {}
    table, found = _without_units(path, read_labels(path))
    units = {name.lower(): unit for name, unit in (units or {}).items()}
    numbers = [
        column.name
        for column in table.schema
        if (pa.types.is_floating(column.type) or pa.types.is_integer(column.type))
        and not column.name.endswith("_err")
        and column.name not in ID_COLUMNS
    ]
    if names is None:
        wanted = {*label_columns(table), *label_names_of(table.column_names), *found, *units} - NO_LABELS
        names = [name for name in numbers if name in wanted]
        if not names:
            raise ValueError(
                f"labels: expected a column of {path.name} that is known, has a unit (age[Gyr]) or an error (age_err) "
                f"beside it; name one with --label out of {', '.join(numbers) or 'none'}"
            )
    names = list(dict.fromkeys(name.lower() for name in names))
    if unknown := [name for name in names if name not in numbers]:
        raise ValueError(
            f"labels: expected columns of numbers in {path.name} ({', '.join(numbers)}), got {', '.join(unknown)}"
        )
    if unknown := sorted(set(units) - set(names)):
        raise ValueError(f"units: expected units of labels to learn ({', '.join(names)}), got {', '.join(unknown)}")
    n_missing = n_errors = 0
    for name in names:
        values = _numbers(table, name)
        bad = ~np.isfinite(values) | (values < MISSING)
        if bad.all():
            raise ValueError(f"{name}: expected values in this column of {path.name}, got none in {len(values):,} rows")
        n_missing += int(bad.sum())
        values[bad] = np.nan
        table = _with_column(table, name, values)
        if f"{name}_err" in table.column_names:
            errors = _numbers(table, f"{name}_err")
            wrong = ~(np.isfinite(errors) & (errors > 0))
            n_errors += int((wrong & ~bad).sum())
            table = _with_column(table, f"{name}_err", np.where(wrong, np.nan, errors))
    said = {name: units.get(name, found.get(name)) for name in names}
    for name, unit in said.items():
        if unit is not None and known.get(name) and unit.lower() != known[name].lower():
            raise ValueError(f"{name}: expected {known[name]}, the unit of the checkpoint, got {unit}")
    usual = {name: unit.split(" ")[0] for name, unit in LABEL_UNITS.items()}
    final = {name: unit if unit is not None else known.get(name, usual.get(name, "")) for name, unit in said.items()}
    return Labels(table, names, final, n_missing, n_errors)


def _without_units(path: Path, table: pa.Table) -> tuple[pa.Table, dict[str, str]]:
    """Columns without the units in their headings, and the units, by column."""
    suffix = path.name.lower().removesuffix(".gz")
    units: dict[str, str] = {}
    headings = list(table.column_names)
    if suffix.endswith(".csv"):
        with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
            headings = next(csv.reader(file), [])
    elif suffix.endswith((".ecsv", ".fits", ".fit")) and "aspcapflag" not in table.column_names:
        stars = Table.read(path)
        units = {name.lower(): str(stars[name].unit) for name in stars.colnames if stars[name].unit}
    # Names come in lower case, units must not.
    pattern = re.compile(r"^(.+?)\s*\[([^\]]*)\]\s*(_err)?$")
    cases = {match[2].lower(): match[2] for match in map(pattern.match, headings) if match}
    names = []
    for name in table.column_names:
        match = pattern.match(name)
        names.append(f"{match[1]}{match[3] or ''}" if match else name)
        if match:
            units[names[-1]] = cases.get(match[2], match[2])
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path.name}: expected each column once, got {', '.join(twice)} again")
    units = {name: unit for name, unit in units.items() if name in names and not name.endswith("_err")}
    return table.rename_columns(names), units


def _numbers(table: pa.Table, name: str) -> NDArray[np.float64]:
    try:
        return np.array(table[name].cast(pa.float64()).to_numpy(zero_copy_only=False), np.float64)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{name}: expected numbers, got {' '.join(str(error).split())}") from error


def _with_column(table: pa.Table, name: str, values: NDArray[Any]) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, pa.array(values))


class Join:
    """Which row of the labels belongs to a spectrum: by identifier or, where that fits better, by name of the file.

    Parameters
    ----------
    labels : Labels
    first : sequence of rows
        Spectra by which to see what fits.
    id_column : str, optional
        Column to join by. Default: the one out of `ID_COLUMNS` and `FILE_COLUMNS` that fits most of `first`.

    Attributes
    ----------
    column, by : str
        Column of the labels, and what of a spectrum it is compared with: object_id, or file (its name without folder
        and suffix).
    """

    def __init__(self, labels: Labels, first: Sequence[Row], id_column: str | None = None) -> None:
        table = labels.table
        usual = (*ID_COLUMNS, *FILE_COLUMNS)
        columns = [id_column.lower()] if id_column else [name for name in usual if name in table.column_names]
        if not columns or columns[0] not in table.column_names:
            expected = repr(id_column) if id_column else f"one of {', '.join(usual)}"
            raise ValueError(
                f"id_column: expected {expected} among the columns of the labels, got {', '.join(table.column_names)}"
            )
        # Decimals would round identifiers.
        decimals = {column for column in columns if pa.types.is_floating(table.schema.field(column).type)}
        ways = [(column, by) for column in columns if column not in decimals for by in ("object_id", "file")]
        if not ways:
            raise ValueError(f"{columns[0]}: expected identifiers as text or whole numbers, got decimals")
        counts = [int((self._index(table, *way).find(self._keys(first, way[1])) >= 0).sum()) for way in ways]
        self.column, self.by = ways[int(np.argmax(counts))]
        self._rows = self._index(table, self.column, self.by)
        star = next((name for name in ID_COLUMNS if name in table.column_names), None)
        self._stars = table[star].to_pylist() if self.by == "file" and star not in (None, self.column) else None
        # Of several rows of one identifier, the first counts if the others say the same, else none.
        values = np.stack([_numbers(table, name) for name in labels.names], axis=1)
        keys = self._table_keys(table, self.column, self.by)
        firsts = self._index(table, self.column, self.by).find("" if key is None else key for key in keys)
        differs = ~((values == values[firsts]) | (np.isnan(values) & np.isnan(values[firsts]))).all(axis=1)
        self._contradictory = np.unique(firsts[differs & (firsts >= 0)])

    @staticmethod
    def _table_keys(table: pa.Table, column: str, by: str) -> list[str | None]:
        keys = [None if key is None else str(key) for key in table[column].to_pylist()]
        return [None if key is None else _stem(key) for key in keys] if by == "file" else keys

    @classmethod
    def _index(cls, table: pa.Table, column: str, by: str) -> LabelIndex:
        return LabelIndex(pa.table({"id": pa.array(cls._table_keys(table, column, by), pa.string())}), "id")

    @staticmethod
    def _keys(rows: Sequence[Row], by: str) -> list[str]:
        return [_stem(str(row["file"])) if by == "file" else str(row["object_id"]) for row in rows]

    def find(self, rows: Sequence[Row]) -> NDArray[np.int64]:
        """Row of the labels of each spectrum; -1 for none, -2 where the table contradicts itself."""
        found = self._rows.find(self._keys(rows, self.by))
        return np.where(np.isin(found, self._contradictory), -2, found)

    def examples(self, rows: Sequence[Row]) -> str:
        """What was compared, for one that looks for the reason why nothing matches."""
        return f"{', '.join(self._keys(rows, self.by)[:3])}, ..."

    def star(self, row: Row, index: int) -> str:
        """Identifier of the star of a spectrum: where it is joined by its file, that of the table if it has one."""
        if self._stars is not None and self._stars[index] is not None:
            return str(self._stars[index]).strip()
        return str(row["object_id"])

    @property
    def unmatched_labels(self) -> list[str]:
        return self._rows.unmatched_labels

    @property
    def duplicates(self) -> list[str]:
        return self._rows.duplicates


def _stem(file: str) -> str:
    """Name of a file without folder and suffix."""
    name = Path(file.strip()).name
    plain = name.removesuffix(".gz")
    return next((plain[: -len(suffix)] for suffix in SUFFIXES if plain.lower().endswith(suffix)), plain)


# ------------------------------------------------------------------------------------------------------------- spectra


@dataclass
class Kept:
    """What of the input is used, and what is not.

    Attributes
    ----------
    n_spectra, n_stars : int
        That are used.
    joined_by : str
    dropped : list of (file, object_id, cause)
    notes : list of str
        What else the user should know, a line each.
    """

    n_spectra: int = 0
    n_stars: int = 0
    joined_by: str = ""
    dropped: list[tuple[str, str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def causes(self) -> dict[str, int]:
        """How many spectra are dropped for each cause."""
        causes: dict[str, int] = {}
        for _, _, cause in self.dropped:
            kind = "cannot be read" if cause.startswith("cannot be read") else cause
            causes[kind] = causes.get(kind, 0) + 1
        return causes


def build_stars(
    files: Sequence[Path],
    labels: Labels,
    folder: Path,
    *,
    id_column: str | None = None,
    failures: Sequence[Failure] = (),
    settings: Mapping[str, Any],
    command: str,
    reading: Mapping[str, Any],
) -> Kept:
    """
    Spectra that have a label, as a data set in the schema of this project, star by star and in little memory.

    `kept.json` beside `folder` holds what is returned; a data set that is there already is kept.

    Raises
    ------
    ValueError
        If no spectrum can be used, or none has a label.
    """
    report = folder.with_name("kept.json")
    if report.is_file():
        return _read_report(folder)
    unreadable = list(failures)
    rows = tqdm(read_spectra(files, failures=unreadable, **reading), desc="reading", unit=" spectra", delay=2)
    stream = iter(rows)
    first = list(itertools.islice(stream, FIRST_ROWS))
    if not first:
        why = f"; first: {unreadable[0].cause}" if unreadable else ""
        raise ValueError(f"spectra: expected at least one that can be read, got none in {len(files):,} files{why}")
    join = Join(labels, first, id_column)
    kept = Kept(joined_by=f"{join.by} = column {join.column}")
    stars: set[str] = set()
    not_at_rest = 0
    features = spectrum_features(labels.names)
    features["file"] = datasets.Value("string")
    unknown = np.full(len(labels.table), np.nan)
    columns = {
        name: _numbers(labels.table, name) if name in labels.table.column_names else unknown for name in labels.columns
    }

    def tables() -> Iterator[tuple[str, pa.Table]]:
        nonlocal not_at_rest
        for batch in batched(itertools.chain(first, stream), FIRST_ROWS):
            good = []
            for row, index in zip(batch, join.find(batch).tolist(), strict=True):
                cause = _unusable(row)
                if index == -1:
                    cause = cause or "no row in the table of labels"
                elif index == -2:
                    cause = cause or "different labels in several rows of the table"
                elif all(np.isnan(columns[name][index]) for name in labels.names):
                    cause = cause or "all its labels are unknown"
                if cause:
                    kept.dropped.append((Path(row["file"]).name, str(row["object_id"]), cause))
                    continue
                star = join.star(row, index)
                stars.add(star)
                not_at_rest += row.get("rest_frame") is False
                own = {name: values[index] for name, values in columns.items()}
                good.append({**row, "object_id": star, "file": Path(row["file"]).name, **own})
            kept.n_spectra += len(good)
            if good:
                yield "train", spectra_table(good, features)
        if not kept.n_spectra and any(cause.startswith("no row") for _, _, cause in kept.dropped):
            raise ValueError(
                f"labels: expected identifiers of the spectra ({join.examples(first)}) in the column {join.column}, "
                f"got none of them ({', '.join(map(str, labels.table[join.column].to_pylist()[:3]))}, ...)"
            )
        if not kept.n_spectra:
            raise ValueError(f"spectra: expected some that can be used, got none: {_counted(kept.causes())}")

    card = Card(
        title="Stellar spectra with labels",
        description="Spectra that `spectrafm finetune` joined with labels.",
        command=command,
        license="other",
        license_name="not-stated",
        source="Files of its author.",
        split="In `splits.csv` of the fine-tuning.",
        columns={name: unit or "no unit" for name, unit in labels.units.items()},
    )
    settings = {"builder": "finetune", **settings}
    write_dataset(folder, tables(), features=features, card=lambda: card, settings=settings, overwrite=True)
    kept.dropped += [(failure.file.name, "", f"cannot be read: {failure.cause}") for failure in unreadable]
    kept.n_stars = len(stars)
    for what, number in {
        "rows of the labels without a spectrum": len(join.unmatched_labels),
        "identifiers with several rows in the table of labels, equal ones count once": len(join.duplicates),
        "values of labels that count as unknown (empty, not finite, below -9990)": labels.n_missing,
        "errors of labels that count as unknown (empty, not positive)": labels.n_errors,
        "spectra that are not at rest, as no velocity is known (--radial-velocity)": not_at_rest,
    }.items():
        if number:
            kept.notes.append(f"{what}: {number:,}")
    with complete_file(report) as temporary:
        temporary.write_text(json.dumps(asdict(kept), indent=1) + "\n", encoding="utf-8")
    return kept


def _read_report(folder: Path) -> Kept:
    content = json.loads(folder.with_name("kept.json").read_text(encoding="utf-8"))
    return Kept(**{**content, "dropped": [tuple(entry) for entry in content["dropped"]]})


def _unusable(row: Row) -> str:
    wavelength = np.asarray(row["wavelength"])
    if len({np.shape(row[name]) for name in ("wavelength", "flux", "flux_error", "mask")}) > 1:
        return "wavelength, flux, error and mask differ in length"
    if wavelength.ndim != 1 or not (np.isfinite(wavelength) & (wavelength > 0)).all():
        return "wavelengths that are not finite and positive"
    return "" if usable(row) else "no valid pixel"


def _counted(causes: Mapping[str, int]) -> str:
    return "; ".join(f"{cause}: {number:,}" for cause, number in causes.items())


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


# ------------------------------------------------------------------------------------------------------- the checkpoint


def _common_grid(spectra: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
    """Wavelengths that all spectra share, else the range of all in a typical step, even in ln wavelength."""
    grids = [np.asarray(row["wavelength"], np.float64) for row in spectra]
    first = grids[0]
    if all(np.array_equal(first, grid) for grid in grids):
        return first
    ordered = [np.sort(grid) for grid in grids]
    step = float(np.median([np.median(np.diff(np.log(grid))) for grid in ordered if grid.size > 1]))
    low = float(np.percentile([grid[0] for grid in ordered], 5))
    high = float(np.percentile([grid[-1] for grid in ordered], 95))
    grid = np.exp(np.arange(math.log(low), math.log(high), step))
    # A gap between detectors stays one.
    near = np.zeros(grid.size, bool)
    for other in ordered:
        place = np.searchsorted(other, grid).clip(1, other.size - 1)
        near |= np.minimum(abs(other[place] - grid), abs(grid - other[place - 1])) < step * grid
    return grid[near]


def _on_grid(row: Mapping[str, Any], grid: NDArray[np.float64]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Flux and error of a spectrum on a grid, (pixels,) each; NaN where a neighbour is masked or far."""
    wavelength = np.asarray(row["wavelength"], np.float64)
    flux, error = (np.where(row["mask"], np.nan, np.asarray(row[name], np.float64)) for name in ("flux", "flux_error"))
    if np.array_equal(wavelength, grid):
        return flux.astype(np.float32), error.astype(np.float32)
    order = np.argsort(wavelength)
    wavelength, flux, error = wavelength[order], flux[order], error[order]
    parts = [np.interp(grid, wavelength, values, left=np.nan, right=np.nan) for values in (flux, error)]
    place = np.searchsorted(wavelength, grid).clip(1, max(wavelength.size - 1, 1))
    wide = wavelength[place] - wavelength[place - 1] > 2.5 * np.median(np.diff(wavelength))
    return np.where(wide, np.nan, parts[0]).astype(np.float32), np.where(wide, np.nan, parts[1]).astype(np.float32)


def _sample(stars: datasets.Dataset, names: Sequence[str], number: int, seed: int) -> dict[str, Any]:
    """Columns to measure on: all labels, and some spectra, brought to one grid."""
    rows = np.sort(np.random.default_rng([seed, 3]).permutation(len(stars))[:number])
    spectra = [stars[int(row)] for row in rows]
    grid = _common_grid(spectra)
    pixels = [_on_grid(spectrum, grid) for spectrum in spectra]
    flux, flux_error = (np.stack(parts) for parts in zip(*pixels, strict=True))
    sample: dict[str, Any] = {
        "wavelength": np.tile(grid.astype(np.float32), (len(spectra), 1)),
        "flux": np.nan_to_num(flux),
        "flux_error": flux_error,
        "mask": np.isnan(flux),
    }
    return {**sample, **{name: np.asarray(stars[name][:]) for name in names}}


def _fit(
    tokenizer: SpectraFMTokenizer, training_range: TrainingRange | None, wavelength: NDArray[Any]
) -> tuple[bool, dict[str, Any]]:
    """Whether the instrument is new to a checkpoint, and what of its tokenizer must change."""
    changes: dict[str, Any] = {}
    if tokenizer.wavelength_ranges:
        within = np.zeros(wavelength.size, bool)
        for low, high in tokenizer.wavelength_ranges:
            within |= (wavelength >= low) & (wavelength <= high)
        if within.mean() < 0.5:
            changes["wavelength_ranges"] = None
    if training_range is None or training_range.wavelength is None or training_range.wavelength_step is None:
        return False, changes
    pairs = np.atleast_2d(training_range.wavelength), np.atleast_2d(training_range.wavelength_step)
    step = float(np.median(np.diff(wavelength)))
    for (low, high), (finest, widest) in zip(*pairs, strict=True):
        covered = np.mean((wavelength > low * 0.995) & (wavelength < high * 1.005))
        if covered > 0.95 and finest / 1.5 < step < widest * 1.5:
            return False, changes
    return True, changes


# --------------------------------------------------------------------------------------------------------- all of it


@dataclass(frozen=True)
class Tuned:
    """What a fine-tuning made.

    Attributes
    ----------
    folder : pathlib.Path
        The checkpoint, with its card and pictures.
    kept : Kept
    units : dict of str to str
        Of the labels that were learnt.
    what : str
        That was trained, a name of `FROZEN`.
    sizes : dict of str to int
        Spectra of train, validation and test.
    evaluation : dict
        As it stands in `evaluation.json`.
    """

    folder: Path
    kept: Kept
    units: dict[str, str]
    what: str
    sizes: dict[str, int]
    evaluation: dict[str, Any]


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
    files : sequence of path
        As `find_files` returns them.
    labels : path
        Table of labels, see [`read_label_table`]; `<label>_err` is used where it is there.
    out : path
        Folder for the checkpoint, its card and pictures. In `out/report` are tables of what was dropped, of the splits
        and of the predictions for test stars; in `out/work` the data set and the run, from which a call with the same
        arguments goes on. (None of the two is pushed to the hub.)
    model : str, optional
        Checkpoint to go on from. Default: the bundled one for the first spectrum.
    names, units, id_column
        See [`read_label_table`] and [`Join`].
    what : str, optional
        What is trained, out of `FROZEN`. Default: by the number of training stars, see [`choose`]; for a new instrument
        everything, as the layers that read pixels must learn it.
    steps, batch_size, seed
        See [`training_settings`].
    failures : sequence of Failure
        Of files that were looked for in vain, to be told with the rest.
    command : str
        For the card.
    overwrite : bool
        Begin again where `out` holds a fine-tuning with other arguments.
    say : callable
        Gets a line to print at each stage.
    **reading
        Goes to `read_spectra`.

    Returns
    -------
    Tuned

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
    known = dict(zip(base.config.label_names, base.config.label_units, strict=True))
    table = read_label_table(labels, names, units, known)
    settings = {
        "model": model,
        "labels": {name: table.units[name] for name in table.names},
        "table": sha256(labels),
        "files": hashlib.sha256(
            "\n".join(f"{file.name} {file.stat().st_size if file.exists() else 0}" for file in files).encode()
        ).hexdigest(),
        "id_column": id_column,
        "reading": json.loads(json.dumps(reading, default=lambda grid: np.asarray(grid).tolist())),
    }
    chosen = {"train": what, "steps": steps, "batch_size": batch_size, "seed": seed}
    work = _working_folder(out, {**settings, **chosen}, overwrite)
    done = json.loads((work / "settings.json").read_text(encoding="utf-8")).get("complete")
    if done:
        say(f"{out}: complete, kept as it is")
        (evaluation,) = read_evaluations(out)
        return Tuned(out, _read_report(work / "data"), table.units, done["train"], done["sizes"], evaluation)
    kept = build_stars(
        files, table, work / "data", id_column=id_column, failures=failures, settings=settings, command=command,
        reading=reading,
    )  # fmt: skip
    report = out / "report"
    report.mkdir(exist_ok=True)
    _write_table(report / "dropped.csv", ["file", "object_id", "cause"], kept.dropped)
    say(f"{kept.n_spectra:,} spectra of {kept.n_stars:,} stars have labels (joined by {kept.joined_by})")
    if kept.dropped:
        say(f"dropped {len(kept.dropped):,} spectra, see {report / 'dropped.csv'}: {_counted(kept.causes())}")
    for note in kept.notes:
        say(note)
    if kept.n_stars < MIN_STARS:
        raise ValueError(f"stars: expected at least {MIN_STARS} with a spectrum and a label, got {kept.n_stars}")

    stars = load_dataset(str(work / "data"), split="train", cache_dir=str(work / "cache")).with_format("numpy")
    stars = cast(datasets.Dataset, stars)
    splits = split_stars(_texts(stars, "object_id"))
    identifiers = zip(_texts(stars, "object_id"), _texts(stars, "file"), splits, strict=True)
    _write_table(report / "splits.csv", ["object_id", "file", "split"], identifiers)
    parts = {name: stars.select(np.flatnonzero(splits == name)) for name in ("train", "validation", "test")}
    sizes = {name: len(part) for name, part in parts.items()}
    _check_labels(parts, table.names)
    sample = _sample(parts["train"], table.columns, 2000, seed)
    training_range = TrainingRange.load(str(base.name_or_path))
    is_new, changes = _fit(tokenizer, training_range, sample["wavelength"][0].astype(np.float64))
    n_train = len(set(_texts(parts["train"], "object_id")))
    what = what or ("all" if is_new else choose(n_train))
    recipe_settings, argument_settings = training_settings(n_train, what, steps=steps, batch_size=batch_size, seed=seed)
    recipe = Recipe(
        data=out.resolve().name,
        checkpoint=model,
        labels=table.names,
        units=[table.units[name] for name in table.names],
        remeasure=is_new and tokenizer.standardize_wavelength is not None,
        tokenizer={"requests": table.names, **changes},
        error_dropout=0.0 if np.isfinite(sample["flux_error"]).any() else 1.0,
        **recipe_settings,
    )
    new = [name for name in table.names if name not in known]
    say(f"labels: {', '.join(f'{name} [{unit}]' if unit else name for name, unit in table.units.items())}")
    if new:
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
        train(recipe, arguments, parts["train"], parts["validation"], samples=[sample])
    if training_range is None:
        values = {name: _finite(parts["train"][name]) for name in table.names}
        limits = {name: (float(column.min()), float(column.max())) for name, column in values.items()}
        grid = sample["wavelength"][0].astype(np.float64)
        TrainingRange(limits, (float(grid[0]), float(grid[-1]))).save(run / "final")
    evaluation, predictions = _evaluate(
        run / "final", model, [name for name in table.names if name in known], parts, table, seed
    )
    evaluation |= {"command": command, "data": out.resolve().name}
    header = [name for name in next(iter(predictions.values())) if name != "object_id"]
    rows = [
        [model_name, star, *(f"{columns[name][i]:.6g}" for name in header)]
        for model_name, columns in predictions.items()
        for i, star in enumerate(columns["object_id"])
    ]
    _write_table(report / "predictions.csv", ["model", "object_id", *header], rows)
    _publish(run, out)
    title = f"{out.resolve().name}: {sizes['test']:,} test spectra"
    plot_given(out / "predicted.png", next(iter(predictions.values())), table.units, title)
    plot_curves(out / "loss.png", out / "curves.csv")
    told = {name: value for name, value in asdict(recipe).items() if value != getattr(Recipe(), name)}
    write_model_card(
        out,
        recipe={**told, "data": recipe.data, **argument_settings},
        evaluations=[evaluation],
        base_model=model,
        remarks=_remarks(kept, sizes, what, model, is_new),
    )
    _write_json(work / "settings.json", {**settings, **chosen, "complete": {"train": what, "sizes": sizes}})
    return Tuned(out, kept, table.units, what, sizes, evaluation)


def _working_folder(out: Path, settings: Mapping[str, Any], overwrite: bool) -> Path:
    """`out/work`, in which a run with these settings goes on."""
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / "work" / "settings.json").is_file()):
        raise ValueError(f"out: expected a new folder, or a fine-tuning to go on with, got other files in {out}")
    work = out / "work"
    if (work / "settings.json").is_file():
        before = json.loads((work / "settings.json").read_text(encoding="utf-8"))
        differing = [name for name in settings if before.get(name) != json.loads(json.dumps(settings[name]))]
        # What never came to training, as its input was refused, is in nobody's way.
        started = "complete" in before or any((work / "run").glob("checkpoint-*"))
        if differing and started and not overwrite:
            name = differing[0]
            raise ValueError(
                f"out: expected a fine-tuning with {name}={settings[name]!r} in {out}, got {before.get(name)!r}; "
                "overwrite begins again"
            )
        if differing:
            shutil.rmtree(work)
            (out / "config.json").unlink(missing_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "settings.json").is_file():
        _write_json(work / "settings.json", settings)
    return work


def _check_labels(parts: Mapping[str, datasets.Dataset], names: Sequence[str]) -> None:
    """Each label has enough values in each split, and they differ."""
    for name in names:
        for split, part in parts.items():
            values = np.asarray(part[name][:], np.float64)
            n_known = int(np.isfinite(values).sum())
            if n_known < 3:
                raise ValueError(f"{name}: expected at least 3 {split} spectra whose value is known, got {n_known}")
        if robust_scatter(values := _finite(parts["train"][name])) == 0:
            raise ValueError(
                f"{name}: expected values that differ, got {np.median(values):g} for most of the training spectra"
            )


def _texts(stars: datasets.Dataset, name: str) -> list[str]:
    return [str(text) for text in stars[name][:]]


def _finite(column: Any) -> NDArray[np.float64]:
    values = np.asarray(column[:], np.float64)
    return values[np.isfinite(values)]


def _publish(run: Path, out: Path) -> None:
    """The files of the checkpoint and the curves of its run, each whole; the config, which tells a checkpoint, last."""
    files = sorted((run / "final").iterdir(), key=lambda path: path.name == "config.json")
    for file in [*(path for path in files if path.is_file()), run / "curves.csv"]:
        with complete_file(out / file.name) as temporary:
            shutil.copyfile(file, temporary)


def _remarks(kept: Kept, sizes: Mapping[str, int], what: str, model: str, is_new: bool) -> str:
    dropped = f" Dropped spectra: {_counted(kept.causes())}." if kept.dropped else ""
    return (
        f"Fine-tuned from `{model}` by `spectrafm finetune` on {sizes['train']:,} spectra ({sizes['validation']:,} "
        f"validation, {sizes['test']:,} test spectra; {kept.n_stars:,} stars; trained: {what}"
        f"{'; the instrument was new to it' if is_new else ''}).{dropped} If `{model}` was itself trained on some of "
        "these stars, the figures of the test stars are better than those of stars that are new to it."
    )


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with complete_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _write_table(path: Path, header: Sequence[str], rows: Any) -> None:
    with complete_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8", errors="replace") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


# ---------------------------------------------------------------------------------------------------------- evaluation

#: What the baselines are fitted to holds no more pixels: 400 MB, 12,000 APOGEE spectra.
MAX_PIXELS = 100_000_000
RIDGE_PENALTIES = (1e-6, 1e-4, 1e-2, 1.0, 100.0)
MLP_STEPS = 1500


def _evaluate(
    checkpoint: Path,
    base: str,
    known: Sequence[str],
    parts: Mapping[str, datasets.Dataset],
    labels: Labels,
    seed: int,
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """
    Test spectra by the tuned model, by the one before where it knows a label, and by baselines of the same stars.

    Returns
    -------
    evaluation : dict
        As `scripts/evaluate.py` writes it.
    predictions : dict of dict of array
        By model, that of the tuned one first: object_id, `<label>`, `<label>_err`, and `given_<label>`, its error.
    """
    names = labels.names
    test = parts["test"]
    given = {name: np.asarray(test[name][:], np.float64) for name in labels.columns}
    answers: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    models: dict[str, Any] = {}
    seconds: dict[str, Any] = {}
    own = "fine-tuned"
    for row, path, wanted in ((own, str(checkpoint), names), (f"{Path(base).name}, as it was", base, list(known))):
        if not wanted:
            continue
        start = time.perf_counter()
        model, tokenizer = load_checkpoint(path)
        values, errors = _predict(model, tokenizer, test, wanted)
        seconds[row] = {"predict": time.perf_counter() - start}
        if all(np.isfinite(column).all() for column in (*values.values(), *errors.values())):
            answers[row] = values, errors
            models[row] = {
                "name": row,
                "model_sha256": sha256(_weights(model)),
                "parameters": str(model.num_parameters()),
            }
        elif row == own:
            bad = sum(not np.isfinite(value) for value in values[names[0]])
            raise ValueError(f"test: expected an answer for each spectrum, got none for {bad:,} of {len(test):,}")
    for name, baseline, settings in _baselines(parts, labels, seed):
        start = time.perf_counter()
        grid = settings.pop("grid")
        flux, flux_error = _arrays(test, grid)
        means, sigmas = baseline.predict(flux, flux_error)
        answers[name] = dict(zip(names, means.T, strict=True)), dict(zip(names, sigmas.T, strict=True))
        factors = np.atleast_1d(cast(Any, baseline.error_factors)).tolist()
        models[name] = {"settings": settings, "error_factors": dict(zip(names, factors, strict=True))}
        seconds[name] = {"predict": time.perf_counter() - start}
    checksums = {}
    for split, part in parts.items():
        digest = hashlib.sha256()
        for row in part:
            digest.update(str(row["object_id"]).encode())
            for name in ("flux", *names):
                digest.update(np.asarray(row[name], np.float32).tobytes())
        checksums[split] = digest.hexdigest()
    evaluation = {
        "split": "test",
        "split_rule": "by the SHA-256 of the identifier of the star, all spectra of a star in one split",
        "stars": {"all stars": len(test)},
        "data_sha256": checksums,
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("numpy", "torch", "transformers")},
        },
        "threads": torch.get_num_threads(),
        "models": models,
        "seconds": seconds,
        "results": {
            "all stars": {
                row: table_metrics(values, errors, given, {n: given[f"{n}_err"] for n in names})
                for row, (values, errors) in answers.items()
            }
        },
    }
    unknown = np.full(len(test), np.nan)
    predictions = {
        row: {
            "object_id": _texts(test, "object_id"),
            **{
                column: array
                for name in names
                for column, array in {
                    name: values.get(name, unknown),
                    f"{name}_err": errors.get(name, unknown),
                    f"given_{name}": given[name],
                    f"given_{name}_err": given[f"{name}_err"],
                }.items()
            },
        }
        for row, (values, errors) in answers.items()
    }
    return evaluation, predictions


def _weights(model: SpectraFMForPrediction) -> str:
    return str(cached_file(str(model.name_or_path), "model.safetensors"))


def _predict(
    model: SpectraFMForPrediction, tokenizer: SpectraFMTokenizer, stars: datasets.Dataset, names: Sequence[str]
) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    rows = tqdm(stars, desc="test spectra", delay=2)
    found = list(predict_batches(model, tokenizer, batched(cast(Any, rows), 128), names))
    columns = {name: np.concatenate([batch[name] for batch in found]) for name in found[0] if name != "flags"}
    return {name: columns[name] for name in names}, {name: columns[f"{name}_err"] for name in names}


def _arrays(stars: datasets.Dataset, grid: NDArray[np.float64]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Fluxes over their medians, and errors, on a grid, (spectra, pixels) each."""
    pixels = [_on_grid(cast(Any, row), grid) for row in tqdm(stars, desc="spectra for baselines", delay=2, leave=False)]
    flux, error = (np.stack(parts) for parts in zip(*pixels, strict=True))
    median = np.nan_to_num(np.nanmedian(np.where(np.isfinite(flux).any(axis=1)[:, None], flux, 1.0), axis=1), nan=1.0)
    median = np.where(median > 0, median, 1.0)[:, None].astype(np.float32)
    return flux / median, error / median


def _baselines(
    parts: Mapping[str, datasets.Dataset], labels: Labels, seed: int
) -> Iterator[tuple[str, Baseline, dict[str, Any]]]:
    """
    Ridge regression, with the penalty that suits the validation stars, and PCA + MLP: fitted to the training stars, of
    more than `MAX_PIXELS` pixels to a part of them, drawn at random.
    """
    train_stars = parts["train"]
    some = np.random.default_rng([seed, 4]).permutation(len(train_stars))
    grid = _common_grid([cast(Any, train_stars[int(row)]) for row in some[:500]])
    train_stars = train_stars.select(np.sort(some[: max(MAX_PIXELS // grid.size, MIN_STARS)]))

    def spectra(stars: datasets.Dataset) -> Spectra:
        flux, flux_error = _arrays(stars, grid)
        values, errors = (
            np.stack([np.asarray(stars[f"{name}{end}"][:], np.float64) for name in labels.names], axis=1)
            for end in ("", "_err")
        )
        return Spectra(flux, flux_error, values, errors, np.empty((len(stars), 0)))

    train_spectra, held_out = spectra(train_stars), spectra(parts["validation"])
    fitted: list[tuple[float, float, Baseline]] = []
    for alpha in tqdm(RIDGE_PENALTIES, desc="ridge", delay=2, leave=False):
        ridge = RidgeBaseline(alpha=alpha, transform="asinh").fit(train_spectra)
        residuals = ridge.raw_predict(held_out.flux, held_out.flux_error)[0] - held_out.labels
        scatter = [robust_scatter(column[np.isfinite(column)]) for column in residuals.T]
        spread = [robust_scatter(column[np.isfinite(column)]) or 1.0 for column in train_spectra.labels.T]
        fitted.append((float(np.mean(np.log(np.maximum(scatter, 1e-12) / np.array(spread)))), alpha, ridge))
    _, alpha, best = min(fitted, key=lambda fit: fit[0])
    about = {"grid": grid, "training_spectra": len(train_stars)}
    yield "ridge", best.calibrate(held_out), {**about, "alpha": alpha, "transform": "asinh"}
    batch_size = int(np.clip(len(train_stars) // 4, 16, 256))
    settings: dict[str, Any] = {
        "batch_size": batch_size,
        "epochs": int(np.clip(MLP_STEPS * batch_size // len(train_stars), 5, 200)),
        "degrees_of_freedom": 3.0,
        "dropout": 0.1,
        "noise": 1.0,
        "weight_decay": 0.1,
        "seed": seed,
    }
    yield "PCA + MLP", MLPBaseline(**settings).fit(train_spectra).calibrate(held_out), {**about, **settings}


# ------------------------------------------------------------------------------------------------------------ pictures


def plot_given(path: Path, predicted: Mapping[str, Any], units: Mapping[str, str], title: str) -> None:
    """Predicted over given labels with the errors of both, above error over sigma.

    Parameters
    ----------
    path : path
        PNG file to write.
    predicted : mapping of array, shape (spectra,)
        `<label>`, `<label>_err`, `given_<label>` and `given_<label>_err`.
    units : mapping of label to str
        The labels to show.
    title : str
    """
    figure = Figure(figsize=(4.2 * len(units), 6.6), layout="constrained")
    axes = figure.subplots(2, len(units), squeeze=False, height_ratios=[2.2, 1])
    for above, below, name in zip(*axes, units, strict=True):
        truth, value = np.asarray(predicted[f"given_{name}"]), np.asarray(predicted[name])
        shown = np.isfinite(truth)
        truth, value, error = truth[shown], value[shown], np.asarray(predicted[f"{name}_err"])[shown]
        truth_error = np.nan_to_num(np.asarray(predicted[f"given_{name}_err"])[shown])
        above.errorbar(
            truth, value, error, truth_error if truth_error.any() else None, fmt="o", ms=3 if truth.size < 2000 else 1,
            color=BLUE, ecolor=GREY, elinewidth=0.5, alpha=0.7, rasterized=True,
        )  # fmt: skip
        above.axline((truth[0], truth[0]), slope=1, color=ORANGE, lw=1)
        figures = label_metrics(value, error, truth, truth_error)
        above.set_title(
            f"scatter {figures['robust_scatter']:.3g}, bias {figures['bias']:.2g}", loc="left", fontsize=10, color=INK
        )
        above.set(xlabel=axis_label(name, units, "Given "), ylabel=axis_label(name, units, "Predicted "))
        z = (value - truth) / np.hypot(error, truth_error)
        below.hist(np.clip(z, -5, 5), np.linspace(-5, 5, 31), density=True, color=BLUE, alpha=0.6)
        normal = np.linspace(-5, 5, 200)
        below.plot(normal, np.exp(-(normal**2) / 2) / math.sqrt(2 * math.pi), color=INK, lw=1)
        below.set(xlabel=r"(predicted $-$ given) / $\sigma$", yticks=[], xlim=(-5, 5))
        for each in (above, below):
            each.tick_params(direction="in", top=True, right=True, colors=INK)
    figure.suptitle(title, color=INK)
    with complete_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def plot_curves(path: Path, curves: Path) -> None:
    """The loss of training and validation stars over the steps, from `curves.csv` of a run."""
    with curves.open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, text, color in (("loss", "training", GREY), ("eval_loss", "validation", BLUE)):
        points = [(float(line["step"]), float(line[name])) for line in lines if line.get(name)]
        if points:
            axes.plot(*zip(*points, strict=True), color=color, marker="o", ms=3, label=text)
    axes.set(xlabel="Steps of the optimizer", ylabel="Loss (negative log-likelihood)")
    axes.legend(frameon=False)
    axes.tick_params(direction="in", top=True, right=True, colors=INK)
    with complete_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def summary(tuned: Tuned) -> str:
    """The figures of the test spectra as a table."""
    return format_table(tuned.evaluation["results"]["all stars"], tuned.units)
