# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Predictions as tables: CSV, Parquet and FITS."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from astropy import units
from astropy.io import fits
from numpy.typing import NDArray

from ..data.schema import with_errors
from ..files import temporary_name


TABLE_SUFFIXES = (".csv", ".parquet", ".fits")


#: Rows in a row group: many small groups are slow to open. These are 4 MB of labels.
ROW_GROUP = 2**16


class PredictionWriter:
    """Write predictions batch after batch: `with PredictionWriter(path, names, units) as writer: writer.write(batch)`.

    The file is written atomically.

    Parameters
    ----------
    path : path
        Ends in .csv, .parquet or .fits. An existing file is replaced.
    label_names : sequence of str
    label_units : mapping of str to str
        Units of the columns in a FITS file.
    metadata : mapping of bytes to bytes
        Metadata of the schema of a Parquet file.
    files : bool
        Whether to add a column with the file of each spectrum, as object_ids may repeat.
    overwrite : bool
        If False, an existing file is an error.

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
        numbers = [pa.field(column, pa.float32()) for column in with_errors(label_names)]
        before, after = ["object_id", *["file"] * files], ["flags", "reason"]
        texts = {name: pa.field(name, pa.string()) for name in (*before, *after)}
        columns = [*(texts[name] for name in before), *numbers, *(texts[name] for name in after)]
        self.schema = pa.schema(columns, dict(metadata or {}))
        self._temporary = temporary_name(self.path)
        self._widths = dict.fromkeys(texts, 1)
        self._waiting: list[pa.Table] = []

    def __enter__(self) -> Self:
        # A FITS header needs the number of rows and the widths of texts first, so rows are collected in Parquet.
        if self.suffix == ".csv":
            options = pa_csv.WriteOptions(quoting_style="needed")
            self._writer = pa_csv.CSVWriter(str(self._temporary), self.schema, write_options=options)
        else:
            self._writer = pq.ParquetWriter(str(self._temporary), self.schema)
        return self

    def write(self, batch: Mapping[str, NDArray[Any]]) -> None:
        """Append one batch of `predict_batches`."""
        # Unknown values are left empty, because not all programs read NaN in text.
        columns = [
            pa.array(batch[column.name], column.type, from_pandas=self.suffix == ".csv") for column in self.schema
        ]
        for name, width in self._widths.items():
            self._widths[name] = max(width, *(len(_ascii(text)) for text in batch[name]))
        self._waiting.append(pa.Table.from_arrays(columns, schema=self.schema))
        if self.suffix == ".csv" or sum(map(len, self._waiting)) >= ROW_GROUP:
            self._flush()

    def note(self, metadata: Mapping[bytes, bytes]) -> None:
        """Add metadata to a Parquet file when it is complete."""
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
    """Replace characters that are not ASCII, as FITS requires."""
    return text.encode("ascii", "backslashreplace")


def _fits_unit(unit: str) -> str | None:
    """A unit of the FITS standard; "dex" is left out, because readers would warn about it."""
    try:
        return units.Unit(unit, format="fits").to_string("fits") or None
    except ValueError:
        return None
