# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""People's own tables, as text or FITS, with the column names of the schema."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from astropy.io import fits
from astropy.table import Table
from pyarrow import csv as arrow_csv

from ..schema import PIXEL_COLUMNS
from .base import AS_GIVEN, OpenFile, Options, Row, SpectrumFormat, angstrom_per
from .parquet import CHUNK_ROWS, demand_columns


# --------------------------------------------------------------------------------------------------------------- text


def _header(file: OpenFile) -> tuple[list[str], str, int]:
    """Column names, what is between the columns, and how many lines come before the numbers."""
    comments: list[str] = []
    for line in file.text():
        if line.startswith("#"):
            comments.append(line)
            continue
        # NumPy writes its header behind a "# ", others do not: where the first line holds numbers, it was the last one.
        start = line.replace(",", " ").replace(";", " ").split()[:1]
        named = not (start and comments and _is_number(start[0]))
        text = line if named else comments[-1].lstrip("# ")
        break
    else:
        named, text = False, comments[-1].lstrip("# ") if comments else ""
    delimiter = next((mark for mark in ",;\t" if mark in text), " ")
    names = text.split() if delimiter == " " else next(csv.reader([text], delimiter=delimiter), [])
    return [name.strip() for name in names], delimiter, len(comments) + named


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def is_ecsv(file: OpenFile) -> bool:
    return file.kind == "text" and file.head.startswith(b"# %ECSV")


def read_text(file: OpenFile, options: Options) -> Iterator[Row]:
    try:
        names, delimiter, n_before = _header(file)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file.path}: expected text in UTF-8, got {error}") from error
    demand_columns(file.path, names)
    if delimiter == " ":
        wanted = [name for name in PIXEL_COLUMNS if name in names]
        where = [names.index(name) for name in wanted]
        values = np.loadtxt(file.text(), skiprows=n_before, usecols=where, ndmin=2).T
        row = dict(zip(wanted, values, strict=True))
        yield {"object_id": file.stem, **row, "wavelength": row["wavelength"] * options.angstrom}
        return
    types = {"object_id": pa.string(), "mask": pa.bool_()}
    types |= dict.fromkeys(("wavelength", "flux", "flux_error"), pa.float64())
    wanted = [name for name in types if name in names]
    reader = arrow_csv.open_csv(
        pa.input_stream(str(file.path), compression="gzip" if file.path.suffix == ".gz" else None),
        arrow_csv.ReadOptions(column_names=names, skip_rows=n_before),
        arrow_csv.ParseOptions(delimiter=delimiter),
        arrow_csv.ConvertOptions(include_columns=wanted, column_types=types),
    )
    # The lines of a star may lie in several blocks; `pieces` are those of the star that is being read.
    seen: set[str] = set()
    current = ""
    pieces: list[pa.RecordBatch] = []
    with reader:
        for batch in reader:
            for object_id, piece in _runs(batch, "object_id" in wanted, file.stem):
                if object_id != current or not pieces:
                    if pieces:
                        yield _star(current, pieces, options)
                    if object_id in seen:
                        raise ValueError(
                            f"object_id: expected the lines of a star together in {file.path}, got {object_id!r} again"
                        )
                    seen.add(object_id)
                    current, pieces = object_id, []
                pieces.append(piece)
    if pieces:
        yield _star(current, pieces, options)


def _runs(batch: pa.RecordBatch, has_ids: bool, default: str) -> Iterator[tuple[str, pa.RecordBatch]]:
    """Consecutive lines of the same star."""
    if not len(batch):
        return
    if not has_ids:
        yield default, batch
        return
    ids = batch.column("object_id").to_numpy(zero_copy_only=False)
    starts = np.concatenate([[0], np.flatnonzero(ids[1:] != ids[:-1]) + 1, [len(batch)]])
    for start, stop in itertools.pairwise(starts.tolist()):
        yield str(ids[start]), batch.slice(start, stop - start)


def _star(object_id: str, pieces: list[pa.RecordBatch], options: Options) -> Row:
    table = pa.Table.from_batches(pieces)
    columns = {name: table[name].to_numpy() for name in PIXEL_COLUMNS[:3] if name in table.column_names}
    if "mask" in table.column_names:
        columns["mask"] = pc.fill_null(table["mask"], True).to_numpy()
    return {"object_id": object_id, **columns, "wavelength": columns["wavelength"] * options.angstrom}


def read_ecsv(file: OpenFile, options: Options) -> Iterator[Row]:
    table = Table.read(file.text().read(), format="ascii.ecsv")
    if {"wavelength", "flux"} <= set(table.colnames):
        names = [name for name in PIXEL_COLUMNS if name in demand_columns(file.path, table.colnames)]
        row: Row = {name: np.ma.filled(table[name], np.nan if name != "mask" else True) for name in names}
        unit = table["wavelength"].unit
        yield {
            "object_id": str(table.meta.get("object_id", file.stem)),
            **row,
            "wavelength": row["wavelength"] * (angstrom_per(unit) if unit else options.angstrom),
        }
        return
    from .other import read_any

    yield from read_any(file, options)


# --------------------------------------------------------------------------------------------------------------- FITS


def _table(file: OpenFile) -> fits.BinTableHDU | None:
    for hdu in file.hdus:
        # In the exact spelling of the schema: FLUX, WAVELENGTH, IVAR are other surveys' tables.
        names = set(hdu.columns.names) if isinstance(hdu, fits.BinTableHDU) else set()
        # With "uncertainty" instead of "flux_error" it is a table that specutils wrote.
        if {"wavelength", "flux"} <= names and not ("uncertainty" in names and "flux_error" not in names):
            return hdu
    return None


def read_fits_table(file: OpenFile, options: Options) -> Iterator[Row]:
    table = _table(file)
    if table is None:
        raise ValueError(f"{file.path}: expected a table with columns wavelength and flux, got none")
    names = [name for name in PIXEL_COLUMNS if name in demand_columns(file.path, table.columns.names)]
    unit = table.columns["wavelength"].unit
    factor = angstrom_per(unit) if unit else options.angstrom
    has_ids = "object_id" in table.columns.names
    n_rows = table.header["NAXIS2"]
    one_pixel_a_row = n_rows and np.ndim(table.data[:1]["flux"][0]) == 0
    step = n_rows if one_pixel_a_row else CHUNK_ROWS
    for start in range(0, n_rows, step):
        # Rows before columns: a column as a whole would be converted, and kept.
        chunk = table.data[start : start + step]
        columns: dict[str, Any] = {name: chunk[name] for name in names}
        if one_pixel_a_row:
            columns = {name: [column] for name, column in columns.items()}
        for i in range(len(columns["flux"])):
            # A copy: the file can then be closed.
            row: Row = {name: np.array(column[i]) for name, column in columns.items()}
            with np.errstate(over="ignore", invalid="ignore"):  # the tokenizer judges it
                row["wavelength"] = row["wavelength"] * factor
            # Rows of a table are equally long: shorter spectra are filled up with NaN.
            real = np.isfinite(row["wavelength"])
            if not real.all() and all(np.shape(values) == real.shape for values in row.values()):
                row = {name: values[real] for name, values in row.items()}
            if one_pixel_a_row:
                object_id = file.stem
            else:
                object_id = str(chunk["object_id"][i]).strip() if has_ids else f"{file.stem}:{start + i}"
            yield {"object_id": object_id, **row}


_OWN = {
    "survey": "",
    "wavelength_medium": AS_GIVEN,
    "rest_frame": AS_GIVEN,
    "flux_unit": "as given",
    "resolving_power": "as given",
    "normalisation": "as given",
}

FORMATS = (
    SpectrumFormat(
        name="fits-table",
        **_OWN,
        note="columns wavelength, flux, and where known flux_error, mask, object_id: vectors, or one pixel a row",
        identify=lambda file: _table(file) is not None,
        read=read_fits_table,
    ),
    SpectrumFormat(
        name="ecsv",
        **_OWN,
        note="columns wavelength and flux with units, or any that specutils makes a spectrum of",
        identify=is_ecsv,
        read=read_ecsv,
    ),
    SpectrumFormat(
        name="text",
        **_OWN,
        note="one line a pixel, named columns: wavelength, flux, and where known flux_error, mask, object_id",
        identify=lambda file: file.kind == "text",
        read=read_text,
    ),
)
