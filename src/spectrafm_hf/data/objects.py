# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Spectra out of what Python programs hold: tables of pandas, astropy, Arrow and datasets, their rows, and paths.

They go the way that files go, by the same names of columns and through the same gate. Numbers keep their precision, so
that a table gives the answers of the arrays in it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from astropy.table import Row as AstropyRow
from astropy.table import Table

from .readers import Failure, find_files, read_spectra
from .readers.base import CHUNK_ROWS, OpenFile, Options, Row, finish
from .readers.gaia_continuous import CONTINUOUS
from .readers.parquet import MULTIMODAL_UNIVERSE, PARQUET
from .readers.tables import ECSV, rows_of_table
from .schema import with_errors


#: What a message calls an object, which has no path.
NAMES = {"Series": "row", "Row": "row", "Table": "table", "QTable": "table", "RecordBatch": "table"}


def rows_of(
    value: Any,
    columns: Mapping[str, str] | None = None,
    keep_refused: bool = False,
    scalars: Sequence[str] = (),
) -> tuple[list[Row], bool]:
    """
    Spectra in the schema of this project.

    Parameters
    ----------
    value : path, pandas DataFrame or row, astropy Table or Row, Arrow or polars table, Dataset
        A table has a spectrum in each row, with arrays in its cells, or a pixel in each row. Of a path, what
        `read_spectra` finds there.
    columns : mapping of role to name, optional
        As in `read_spectra`.
    keep_refused : bool
        Keep a spectrum of several that cannot be used, and a file of several that cannot be read, as rows with the
        reason in `refused`. Without it, that is an error.
    scalars : sequence of str
        As in `read_spectra`.

    Returns
    -------
    rows : list of dict
    one : bool
        Whether the object is one spectrum, not a table of them.

    Raises
    ------
    ValueError
        For a table without wavelength or flux, naming what it has; and what `read_spectra` raises.
    """
    if isinstance(value, str | os.PathLike):
        files = find_files([value])
        failures: list[Failure] | None = [] if keep_refused and len(files) > 1 else None
        rows = list(read_spectra(files, columns=columns, keep_refused=keep_refused, failures=failures, scalars=scalars))
        return rows + [{"object_id": each.file.name, "refused": each.cause} for each in failures or ()], False
    kind = type(value).__name__
    file = OpenFile(Path(NAMES.get(kind, kind)))
    rows, one = _rows(value, file, Options(columns=dict(columns or {}), scalars=with_errors(scalars)))
    if not rows:
        raise ValueError(f"{file.path}: expected at least one spectrum, got none")
    if not keep_refused and (refused := next((row for row in rows if row["refused"]), None)):
        raise ValueError(f"{refused['object_id']}: {refused['refused']}")
    return rows, one


def _rows(value: Any, file: OpenFile, options: Options) -> tuple[list[Row], bool]:
    one = False
    if isinstance(value, AstropyRow):
        value, one = value.table[value.index : value.index + 1], True
    if isinstance(value, Table):
        pixels = _one_pixel_a_row(value.colnames, lambda name: value[name].ndim == 1 and value[name].dtype != object)
        if "bp_coefficients" not in value.colnames:
            rows = [finish(row, ECSV, options, stored=False) for row in rows_of_table(file, value, options)]
            return rows, one or (pixels and len(rows) == 1)
        value = pa.table({name: _arrow(value[name]) for name in value.colnames if value[name].ndim < 3})
    if hasattr(value, "iloc"):
        value, one, pixels = _of_pandas(value)
        if pixels:
            rows, _ = _rows(Table({name: value[name].to_numpy() for name in value.columns}), file, options)
            return rows, len(rows) == 1
        value = pa.Table.from_pandas(value, preserve_index=False)
    elif hasattr(value, "with_format"):
        data = value.with_format("arrow")
        value = data[:] if hasattr(value, "__len__") else pa.concat_tables(data.iter(batch_size=CHUNK_ROWS))
    elif not isinstance(value, pa.Table | pa.RecordBatch):
        value = pa.table(value)
    table = pa.Table.from_batches([value]) if isinstance(value, pa.RecordBatch) else value
    if _one_pixel_a_row(table.column_names, lambda name: pa.types.is_primitive(table.schema.field(name).type)):
        rows, _ = _rows(Table({name: table[name].to_numpy() for name in table.column_names}), file, options)
        return rows, len(rows) == 1
    return list(_of_arrow(table, file, options)), one


def _of_pandas(value: Any) -> tuple[Any, bool, bool]:
    """A DataFrame; whether it is one row of one, and whether its rows are pixels."""
    one = not hasattr(value, "columns")
    if one:
        value = value.to_frame().T.infer_objects()
    value.columns = [str(name) for name in value.columns] if one else value.columns
    return value, one, _one_pixel_a_row(map(str, value.columns), lambda name: value[name].dtype.kind in "fiu")


def _one_pixel_a_row(names: Any, is_number: Any) -> bool:
    from .readers.columns import pixel_names, plain

    fluxes = [name for name in names if plain(name) in pixel_names("flux")]
    return bool(fluxes) and all(map(is_number, fluxes))


def _arrow(column: Any) -> pa.Array:
    values = np.ma.filled(np.ma.asarray(column), np.nan) if column.dtype.kind == "f" else np.asarray(column)
    return pa.array(list(values) if values.ndim > 1 or values.dtype == object else values)


def _of_arrow(table: pa.Table, file: OpenFile, options: Options) -> Iterator[Row]:
    """As a Parquet file with this table, with the same rules for its columns."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="none")
    file.__dict__.update(head=b"PAR1", parquet=pq.ParquetFile(pa.BufferReader(sink.getvalue())))
    format = next(each for each in (CONTINUOUS, MULTIMODAL_UNIVERSE, PARQUET) if each.identify(file))
    for row in format.read(file, options):
        yield finish(row, format, options, stored=False)
