# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""A data set in the one schema out of anybody's files, with labels from a table of their own."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from tqdm.auto import tqdm

from ..models.gate_spectrafm import FRAME_UNSTATED, MEDIUM_UNSTATED
from .building import SPLITS, Card, write_dataset
from .labels import LabelIndex, known_numbers, label_columns, read_labels, stated_units
from .readers import Failure, Row, batched, read_spectra
from .schema import (
    LABEL_UNITS,
    PIXEL_COLUMNS,
    SCALAR_UNITS,
    label_names_of,
    pixel_column,
    spectrum_features,
    with_errors,
)


CHUNK_ROWS = 256


@dataclass
class Report:
    """Counts of a build, for its card and the command line.

    Attributes
    ----------
    splits, surveys, unstated : Counter
        Spectra of each split, survey, and flag of what was assumed.
    n_labelled, n_not_at_rest : int
        Spectra with labels; spectra whose velocity is not known, which are not in the rest frame.
    labels : LabelIndex or None
        With the identifiers that match nothing, or twice.
    """

    splits: Counter[str] = field(default_factory=Counter)
    surveys: Counter[str] = field(default_factory=Counter)
    n_labelled: int = 0
    n_not_at_rest: int = 0
    unstated: Counter[str] = field(default_factory=Counter)
    labels: LabelIndex | None = None


def split_of_id(object_id: str) -> str:
    """Split of a star: of the first 8 bytes of the SHA-256 of its identifier, modulo 10, 0 is test, 1 is validation."""
    digit = int.from_bytes(hashlib.sha256(object_id.encode()).digest()[:8], "big") % 10
    return {0: "test", 1: "validation"}.get(digit, "train")


def build_from_files(
    files: Sequence[Path],
    out_dir: str | os.PathLike[str],
    *,
    labels: str | os.PathLike[str] | None = None,
    id_column: str | None = None,
    split_by: str = "star",
    failures: list[Failure] | None = None,
    command: str = "spectrafm data from-files INPUT... --out DIR",
    overwrite: bool = False,
    transform: Callable[[Iterable[Row]], Iterable[Row]] | None = None,
    **reading: Any,
) -> tuple[Path, Report]:
    """Build a data set from files of spectra, star by star.

    Parameters
    ----------
    files : sequence of path
        As `find_files` returns them.
    out_dir : path
        Folder to make. It appears under this name only when it is complete.
    labels : path, optional
        Table that `read_labels` reads. A spectrum that matches none of its rows has the labels of its file, as in
        data sets, otherwise NaN.
    id_column : str, optional
        Its column of identifiers; see `join_labels`.
    split_by : str
        `star`: 80, 10, 10 percent by the identifier (`split_of_id`), so that all spectra of a star are in one split;
        `none`: all in train; or a column of the labels with train, validation or test (empty: train).
    failures : list, optional
        Gets files and spectra that cannot be used; the others go on. Without it the first raises.
    command : str
        For the card.
    overwrite : bool
        Build again where `out_dir` holds a complete build.
    transform : callable, optional
        Applied to the rows as they are read, such as `inference.velocities.settled`.
    **reading
        Goes to `read_spectra`.

    Returns
    -------
    pathlib.Path
        `out_dir`. A complete build that is there already, from the same files and settings, is kept.
    Report
        Empty if the build is kept.

    Raises
    ------
    ValueError
        If nothing can be used, for labels that cannot be joined, and as `write_dataset` does.
    """
    table = None if labels is None else read_labels(labels)
    report = Report(labels=None if table is None else LabelIndex(table, id_column))
    names = [] if table is None else label_columns(table)
    split_by = split_by.lower()
    if split_by not in ("star", "none") and split_by not in (table.column_names if table is not None else ()):
        raise ValueError(f"split_by: expected star, none or a column of the labels, got {split_by!r}")
    spectra: Iterable[Row] = read_spectra(files, failures=failures, **reading)
    spectra = transform(spectra) if transform else spectra
    usable = _usable(tqdm(spectra, desc="reading", unit=" spectra", delay=2, disable=None), failures)
    # The first rows have the scalars of the files.
    first = list(itertools.islice(usable, CHUNK_ROWS))
    in_files = label_names_of({name for row in first for name in row})
    names += sorted(set(in_files) - set(names))
    dropped_causes = {
        "radial_velocity",
        *(() if table is None else table.column_names),
        *(name for row in first for name in row),
    }
    wanted = with_errors(reading.get("scalars", ()))
    scalars = [
        name
        for name in dict.fromkeys([*SCALAR_UNITS, *wanted])
        if name in dropped_causes and name not in with_errors(names)
    ]
    features = spectrum_features(names, scalars)
    features["rest_frame"], features["file"] = datasets.Value("bool"), datasets.Value("string")
    features["resolving_power"], features["normalised"] = datasets.Value("float32"), datasets.Value("bool")
    features["reading_flags"] = datasets.Value("string")

    labels_of_table = {} if table is None else _given(table, names, scalars)

    def tables() -> Iterator[tuple[str, pa.Table]]:
        for batch in batched(itertools.chain(first, usable), CHUNK_ROWS):
            columns, index = _columns(batch, labels_of_table, report.labels, names, scalars)
            splits = _splits(batch, table, index, split_by)
            report.splits.update(splits.tolist())
            report.surveys.update(str(row["survey"]) for row in batch)
            own = [any(np.isfinite(row.get(name, np.nan)) for name in names) for row in batch]
            report.n_labelled += int(((index >= 0) | own).sum())
            report.n_not_at_rest += sum(row.get("rest_frame") is False for row in batch)
            report.unstated.update(flag for row in batch for flag in row.get("flags", ()))
            whole = pa.table(columns)
            for split in np.unique(splits).tolist():
                yield split, whole.filter(pa.array(splits == split))

    settings = {
        "builder": "from-files",
        "files": _fingerprint([*files, *([] if labels is None else [Path(labels)])]),
        "id_column": id_column,
        "split_by": split_by,
        "reading": json.loads(json.dumps(reading, default=lambda grid: np.asarray(grid).tolist())),
    }
    folder = write_dataset(
        out_dir,
        tables(),
        features=features,
        card=lambda: _card(report, len(files), command, split_by, {} if table is None else stated_units(table)),
        settings=settings,
        overwrite=overwrite,
    )
    return folder, report


def _fingerprint(files: Sequence[Path]) -> str:
    """Changes when a file does, or another is added."""
    digest = hashlib.sha256()
    for file in files:
        state = file.stat() if file.exists() else None
        digest.update(
            f"{file.name}\0{state and (state.st_size, state.st_mtime_ns)}\0".encode("utf-8", "surrogateescape")
        )
    return digest.hexdigest()


def _usable(rows: Iterable[Row], failures: list[Failure] | None) -> Iterator[Row]:
    """Rows that the schema can hold."""
    for row in rows:
        shapes = {name: np.shape(row[name]) for name in PIXEL_COLUMNS}
        wavelength = np.asarray(row["wavelength"])
        if len(set(shapes.values())) > 1 or wavelength.ndim != 1:
            cause = (
                f"expected lists of one length, got {', '.join(f'{name} {shape}' for name, shape in shapes.items())}"
            )
        elif not (np.isfinite(wavelength) & (wavelength > 0)).all():
            cause = "wavelength: expected finite and positive Angstrom in all pixels"
        elif np.asarray(row["mask"], bool).all():
            cause = "no valid pixel"
        else:
            yield row
            continue
        failure = Failure(Path(row["file"]), f"{row['object_id']}: {cause}")
        if failures is None:
            raise ValueError(f"{failure.file}: {failure.cause}")
        failures.append(failure)


def _given(table: pa.Table, names: Sequence[str], scalars: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """Columns of a table of labels that go into the data set, NaN where unknown."""
    columns = {name: known_numbers(table, name) for name in with_errors(names) if name in table.column_names}
    for name in scalars:
        if name in table.column_names and pa.types.is_primitive(table.schema.field(name).type):
            values = pc.fill_null(table[name].cast(pa.float64()), np.nan).to_numpy()
            columns[name] = np.where(values > -999, values, np.nan)  # a velocity may be -99
    return columns


def _columns(
    rows: Sequence[Row],
    labels_of_table: Mapping[str, NDArray[np.float64]],
    index: LabelIndex | None,
    names: Sequence[str],
    scalars: Sequence[str],
) -> tuple[dict[str, Any], NDArray[np.int64]]:
    """Columns of some rows with their labels, and which row of the labels is theirs, -1 for none."""
    lengths = np.array([len(row["flux"]) for row in rows])
    columns: dict[str, Any] = {name: pa.array([str(row[name]) for row in rows]) for name in ("object_id", "survey")}
    for name in PIXEL_COLUMNS:
        columns[name] = pixel_column(np.concatenate([np.asarray(row[name]) for row in rows]), lengths)
    columns["snr"] = _float32([row.get("snr") for row in rows])
    found = np.full(len(rows), -1, np.int64) if index is None else index.find(row["object_id"] for row in rows)
    for name in (*with_errors(names), *scalars):
        values = np.full(len(rows), np.nan)
        if name in labels_of_table and labels_of_table[name].size:
            values = np.where(found >= 0, labels_of_table[name][np.maximum(found, 0)], np.nan)
        own = np.array([row.get(name, np.nan) for row in rows], np.float64)
        # Metadata of the file have priority; labels are those of the table.
        first, second = (own, values) if name in scalars else (values, own)
        columns[name] = _float32(np.where(np.isfinite(first), first, second))
    # Null where the frame is not stated.
    columns["rest_frame"] = pa.array([row.get("rest_frame", True) for row in rows], pa.bool_())
    columns["resolving_power"] = _float32([row.get("resolving_power", np.nan) for row in rows])
    columns["normalised"] = pa.array([row.get("normalised") for row in rows], pa.bool_())
    columns["reading_flags"] = pa.array([";".join(row.get("flags", ())) for row in rows], pa.string())
    columns["file"] = pa.array([Path(row["file"]).name for row in rows])
    return columns, found


def _float32(values: Any) -> pa.Array:
    return pa.array(np.array(values, np.float32), from_pandas=False)


def _splits(rows: Sequence[Row], labels: pa.Table | None, index: NDArray[np.int64], split_by: str) -> NDArray[np.str_]:
    if split_by in ("star", "none"):
        return np.array([split_of_id(str(row["object_id"])) if split_by == "star" else "train" for row in rows])
    assert labels is not None  # checked by the caller
    labels_of_table = labels[split_by].take(pa.array(np.maximum(index, 0))).to_pylist()
    splits = [text or "train" if i >= 0 else "train" for text, i in zip(labels_of_table, index.tolist(), strict=True)]
    if wrong := sorted({str(split) for split in splits} - set(SPLITS)):
        raise ValueError(f"{split_by}: expected {', '.join(SPLITS)} in this column of the labels, got {wrong[0]!r}")
    return np.array(splits)


def _card(report: Report, n_files: int, command: str, split_by: str, units: Mapping[str, str]) -> Card:
    n = report.splits.total()
    surveys = ", ".join(
        f"{count:,} {survey or 'of no stated survey'}" for survey, count in report.surveys.most_common()
    )
    flaws = [
        "Made from files of its author; their terms and citations are not known to the program that wrote this card."
    ]
    for what, count in {
        "Spectra that are not in the rest frame (`rest_frame` is False), as no velocity is known": report.n_not_at_rest,
        "Spectra without a stated frame, assumed to be at rest (`rest_frame` is null)": report.unstated[FRAME_UNSTATED],
        "Spectra without a stated medium, assumed to be in vacuum": report.unstated[MEDIUM_UNSTATED],
        "Spectra without labels, as their identifier is not in the table": (n - report.n_labelled)
        * (report.labels is not None),
        "Identifiers that are in the table of labels more than once, of which the first row counts": len(
            report.labels.duplicates if report.labels is not None else ()
        ),
    }.items():
        if count:
            flaws.append(f"{what}: {count:,}.")
    split = {
        "star": "The split is by star: of the first 8 bytes of the SHA-256 of `object_id`, modulo 10, 0 is test, 1 is "
        "validation, the rest is train.",
        "none": "All spectra are in one split.",
    }
    columns: Mapping[str, str] = {
        "radial_velocity": "km/s; shift of the wavelengths to the rest frame",
        "rest_frame": "False = not at rest, as the velocity is unknown; null = frame not stated",
        "resolving_power": "wavelength over the width of a line, NaN if not known",
        "normalised": "whether the flux is divided by a continuum, null if not known",
        "reading_flags": "assumptions about the file, empty if none",
        "file": "name of the file that the spectrum comes from",
        "flux": "as in the file",
        **{
            name: f"{unit}; from the table of labels, else from the file"
            for name, unit in {**LABEL_UNITS, **units}.items()
        },
    }
    return Card(
        title="Stellar spectra",
        description=f"{n:,} spectra from {n_files:,} files ({surveys}), {report.n_labelled:,} of them with labels.",
        command=command,
        license="other",
        license_name="not-stated",
        source="Files of its author.",
        split=split.get(split_by, f"The split is that of the column `{split_by}` of the table of labels."),
        columns=columns,
        flaws=flaws,
    )
