# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Spectra with the labels of a table: joining, dropping and splitting, for `spectrafm finetune`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
from datasets import Dataset, load_dataset
from numpy.typing import NDArray

from ..files import complete_file, spectrum_stem
from .from_files import build_from_files
from .labels import (
    FILE_COLUMNS,
    ID_COLUMNS,
    LabelIndex,
    known_numbers,
    label_columns,
    number_columns,
    read_labels,
    stated_units,
)
from .readers import Failure
from .schema import LABEL_UNITS, with_errors


MIN_STARS, FEW_STARS = 20, 300
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
        Units of the labels to learn; "" where unknown.
    notes : list of str
        What the user should know, a line each.
    scalars : dict of array, shape (rows,)
        The scalars that are asked for, and their errors, as far as the table has them.
    """

    table: pa.Table
    values: dict[str, NDArray[np.float64]]
    units: dict[str, str]
    notes: list[str]
    scalars: dict[str, NDArray[np.float64]] = field(default_factory=dict)


def read_label_table(
    path: Path,
    names: Sequence[str] | None = None,
    units: Mapping[str, str] | None = None,
    known: Mapping[str, str] | None = None,
    scalars: Sequence[str] = (),
) -> Labels:
    """Read a table of labels with their units.

    Parameters
    ----------
    path : path
        As `read_labels` takes it. A heading `age[Gyr]` or `age [Gyr]` is a label and its unit.
    names : sequence of str, optional
        Labels to learn. Default: columns of numbers with an `_err` column or a unit in their heading, and those
        with names that this project knows. Without such, all numbers but coordinates, magnitudes and the like; without
        any, these too.
    units, known : mapping of label to unit, optional
        Units instead of those of the table, and those of the checkpoint, which are fixed.
    scalars : sequence of str
        Columns that are inputs, not labels.

    Raises
    ------
    ValueError
        For a label that is not there, not of numbers, without a value, or in another unit than the checkpoint's.
    """
    known, wanted = known or {}, {name.lower(): unit for name, unit in (units or {}).items()}
    table = read_labels(path)
    found = stated_units(table)
    numbers = number_columns(table)
    notes = []
    if names is None:
        others = [name for name in numbers if name not in scalars]
        names = [name for name in label_columns(table, {*known, *wanted}) if name not in scalars] or others
        if left := [name for name in others if name not in names]:
            notes.append(f"numeric columns that are not used as labels (choose with --label): {', '.join(left)}")
        # A column with a word among its numbers is text: it may have been meant.
        texts = [
            field.name
            for field in table.schema
            if field.name in {*LABEL_UNITS, *known}
            and not pa.types.is_floating(field.type)
            and field.name not in numbers
        ]
        if texts:
            notes.append(f"text columns, which cannot be labels: {', '.join(texts)}")
    names = list(dict.fromkeys(name.lower() for name in names))
    if not names or set(names) - set(numbers):
        raise ValueError(
            f"labels: expected columns of numbers in {path.name} ({', '.join(numbers) or 'there are none'}), got "
            f"{', '.join(name for name in names if name not in numbers) or 'none'}"
        )
    if both := [name for name in names if name in scalars]:
        raise ValueError(f"scalars: expected columns that are no labels, got {', '.join(both)}")
    if wrong := sorted(set(wanted) - set(names)):
        raise ValueError(f"units: expected units of labels to learn ({', '.join(names)}), got {', '.join(wrong)}")
    values = {}
    for name in with_errors(names):
        values[name] = known_numbers(table, name) if name in table.column_names else np.full(len(table), np.nan)
        n_unknown = int(np.isnan(values[name]).sum())
        if n_unknown == len(table) and not name.endswith("_err"):
            raise ValueError(f"{name}: expected values in this column of {path.name}, got none in {n_unknown:,} rows")
        if n_unknown and name in table.column_names:
            notes.append(f"{name}: unknown (empty, no number, or one for nothing) in {n_unknown:,} rows of the table")
    final = {}
    for name in names:
        unit = wanted.get(name, found.get(name))
        if unit and known.get(name) and unit.lower() != known[name].lower():
            raise ValueError(f"{name}: expected {known[name]}, the unit of the checkpoint, got {unit}")
        final[name] = unit or known.get(name) or LABEL_UNITS.get(name, "").split(" ")[0]
    columns = [name for name in with_errors(scalars) if name in (*numbers, *(f"{number}_err" for number in numbers))]
    return Labels(
        table,
        values,
        final,
        notes,
        {name: known_numbers(table, name) for name in columns if name in table.column_names},
    )


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
    joined_by : str
        In words, with the number of rows that were not needed.
    """
    keys = {"object_id": list(object_ids), "file": [spectrum_stem(file) for file in files]}
    fits = []
    for column in join_columns(labels.table, id_column):
        texts = [None if key is None else str(key) for key in labels.table[column].to_pylist()]
        for by in keys:
            own = pa.array([key and spectrum_stem(key) for key in texts] if by == "file" else texts, pa.string())
            index = LabelIndex(pa.table({"id": own}), "id")
            fits.append((index.find(keys[by]), column, by, own, len(index.unmatched_labels)))
    rows, column, by, own, n_left = max(fits, key=lambda fit: int((fit[0] >= 0).sum()))
    if not (rows >= 0).any():
        raise ValueError(
            f"labels: expected identifiers of the spectra ({', '.join(keys[by][:3])}, ...) in the column {column}, "
            f"got none of them ({', '.join(map(str, labels.table[column].to_pylist()[:3]))}, ...)"
        )
    # Of several rows of one identifier, the first counts if the others agree, otherwise none.
    values = np.stack([labels.values[name] for name in labels.units], axis=1)
    firsts = LabelIndex(pa.table({"id": own}), "id").find("" if key is None else key for key in own.to_pylist())
    differs = ~((values == values[firsts]) | (np.isnan(values) & np.isnan(values[firsts]))).all(axis=1)
    rows = np.where(np.isin(rows, firsts[differs & (firsts >= 0)]), -2, rows)
    stars = list(object_ids)
    star = next((name for name in ID_COLUMNS if name in labels.table.column_names), None)
    if by == "file" and star not in (None, column):
        noted = labels.table[star].to_pylist()
        stars = [
            star if row < 0 or noted[row] is None else str(noted[row]).strip()
            for star, row in zip(stars, rows.tolist(), strict=True)
        ]
    return rows, stars, f"{by} = column {column}" + (f"; rows without a spectrum: {n_left:,}" if n_left else "")


# ---------------------------------------------------------------------------------------------- spectra with labels


def split_stars(object_ids: Sequence[str]) -> NDArray[np.str_]:
    """
    train or test for each spectrum; all spectra of a star are in one of them.

    Stars are ordered by the SHA-256 of their identifiers. Of fewer than `FEW_STARS` all are train, as they are judged
    by cross-validation; of fewer than 1,000 the first fifth is test, of more the first tenth. The same stars are always
    split alike.
    """
    stars = sorted(set(object_ids), key=lambda star: hashlib.sha256(star.encode()).digest())
    share = 0.0 if len(stars) < FEW_STARS else 0.2 if len(stars) < 1000 else 0.1
    test = set(stars[: round(share * len(stars))])
    return np.array(["test" if star in test else "train" for star in object_ids])


def read_data_set(
    files: Sequence[Path], work: Path, failures: Sequence[Failure], fingerprint: str, command: str, **options: Any
) -> tuple[Dataset, list[dict[str, str]]]:
    """
    All spectra as a data set on disk, read once, and what could not be used: file, identifier and cause. Options are
    those of `build_from_files`.
    """
    noted = work / "unreadable.json"
    found = json.loads(noted.read_text(encoding="utf-8")) if noted.is_file() else {}
    if found.get("spectra") != fingerprint:
        failed = list(failures)
        try:
            build_from_files(
                files, work / "data", split_by="none", failures=failed, command=command, overwrite=True, **options
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
        write_json(noted, found)
    stars = load_dataset(str(work / "data"), split="train", cache_dir=str(work / "cache"))
    return cast(Dataset, stars), found["unreadable"]


def with_labels(
    stars: Dataset, labels: Labels, id_column: str | None, scalars: Sequence[str] = ()
) -> tuple[Dataset, list[dict[str, str]], str]:
    """
    The spectra with labels, and with scalars and their errors (their own or else those of the table); dropped spectra
    and reasons; the columns of the join.
    """
    object_ids, files = texts_of(stars, "object_id"), texts_of(stars, "file")
    rows, names, joined_by = join(labels, object_ids, files, id_column)
    known = np.any([np.isfinite(labels.values[name]) for name in labels.units], axis=0)[rows] & (rows >= 0)
    causes = {-1: "no row in the table of labels", -2: "different labels in several rows of the table"}
    dropped = [
        {"file": file, "object_id": star, "cause": causes.get(row, "all its labels are unknown")}
        for file, star, row, has_label in zip(files, object_ids, rows.tolist(), known.tolist(), strict=True)
        if not has_label
    ]
    own = [name for name in stars.column_names if name in labels.values or name.removesuffix("_err") in LABEL_UNITS]
    known_scalars = _scalars_of(stars, labels, rows, scalars)
    own += [name for name in known_scalars if name in stars.column_names and name not in own]
    stars = stars.remove_columns([*own, "object_id"]).add_column("object_id", names)
    for name, values in known_scalars.items():
        stars = stars.add_column(name, values.astype(np.float32))
    for name, values in labels.values.items():
        stars = stars.add_column(name, np.where(rows >= 0, values[rows], np.nan).astype(np.float32))
    return stars.select(np.flatnonzero(known)), dropped, joined_by


def _scalars_of(
    stars: Dataset, labels: Labels, rows: NDArray[np.int64], names: Sequence[str]
) -> dict[str, NDArray[np.float64]]:
    """Scalars of all spectra, and their errors, NaN where unknown."""
    found = {}
    for name in names:
        if name not in labels.scalars and name not in stars.column_names:
            there = ", ".join(number_columns(labels.table))
            raise ValueError(
                f"scalars: expected columns of the spectra or of the labels ({there}), got {name} in neither"
            )
    for name in with_errors(names):
        of_table = np.where(rows >= 0, labels.scalars[name][rows], np.nan) if name in labels.scalars else np.nan
        own = np.full(len(stars), np.nan)
        if name in stars.column_names:
            own = known_numbers(pa.table({name: column_of(stars, name)}), name)
        found[name] = np.where(np.isfinite(own), own, of_table)
    return found


def check_labels(stars: Dataset, names: Sequence[str]) -> None:
    """Each label has enough values, and they differ."""
    for name in names:
        values = column_of(stars, name)
        values = values[np.isfinite(values)]
        if len(values) < MIN_STARS:
            raise ValueError(f"{name}: expected at least {MIN_STARS} spectra whose value is known, got {len(values)}")
        if values.min() == values.max():
            raise ValueError(f"{name}: expected values that differ, got {values[0]:g} for all spectra")


def texts_of(stars: Dataset, name: str) -> list[str]:
    return [str(text) for text in stars[name][:]]


def column_of(stars: Dataset, name: str) -> NDArray[np.float64]:
    return np.asarray(stars[name][:], np.float64)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    with complete_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
