# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Parquet: data sets in the schema of this project, and in the layout of the Multimodal Universe."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..schema import PIXEL_COLUMNS, SCALAR_UNITS, from_multimodal_universe, label_names_of
from .base import AS_GIVEN, AT_REST, BY_VELOCITY, VACUUM, OpenFile, Options, Row, SpectrumFormat


#: Spectra that are held at once: 256 of 8,000 pixels are 30 MB. Of longer ones, fewer.
CHUNK_ROWS = 256
CHUNK_VALUES = CHUNK_ROWS * 8000
#: Names, without case and underscores, under which others keep errors.
ERROR_NAMES = {
    f"{flux}{error}"
    for flux in ("", "flux", "spec", "spectrum")
    for error in ("error", "err", "sigma", "uncertainty", "unc", "ivar", "var", "variance", "std", "stddev", "noise")
} | {"eflux", "errflux", "errorflux", "sigmaflux", "fluxerrors", "errors"}


def demand_columns(file: Path, names: Iterable[str]) -> list[str]:
    """The names, if wavelength and flux are among them."""
    names = list(names)
    for name in ("wavelength", "flux"):
        if name not in names:
            raise ValueError(f"{name}: expected among the columns of {file}, got {names}")
    # Errors under another name would be left out without a word.
    if "flux_error" not in names and (
        similar := [name for name in names if name.lower().replace("_", "") in ERROR_NAMES]
    ):
        raise ValueError(f"flux_error: expected one-sigma errors under this name in {file}, got {similar}")
    return names


def columns_of(file: pq.ParquetFile) -> Iterator[Any]:
    """The metadata of each column in each group of rows."""
    for i in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(i)
        yield from map(group.column, range(group.num_columns))


def _chunk_rows(file: pq.ParquetFile) -> int:
    """How many rows to read at once, by the longest lists that a group of rows has on average."""
    groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
    longest = [
        max(group.column(j).num_values for j in range(group.num_columns)) / group.num_rows
        for group in groups
        if group.num_rows and group.num_columns
    ]
    return int(max(1, min(CHUNK_ROWS, CHUNK_VALUES / max([1, *longest]))))


def _has_spectrum(file: OpenFile) -> bool:
    return file.kind == "parquet" and "spectrum" in file.parquet.schema_arrow.names


def read_parquet(file: OpenFile, options: Options) -> Iterator[Row]:
    schema = file.parquet.schema_arrow
    names = demand_columns(file.path, schema.names)
    pixel_columns = [name for name in PIXEL_COLUMNS if name in names]
    for name in pixel_columns:
        kind = schema.field(name).type
        expected = "bool" if name == "mask" else "float"
        right = pa.types.is_boolean if name == "mask" else pa.types.is_floating
        if not right(getattr(kind, "value_type", pa.null())):
            raise ValueError(f"{name}: expected a column of type list<{expected}> in {file.path}, got {kind}")
    numbers = _numbers(schema)
    texts = [name for name in ("object_id", "survey") if name in names]
    start = 0
    for batch in file.parquet.iter_batches(_chunk_rows(file.parquet), columns=[*texts, *pixel_columns, *numbers]):
        pixels = {name: _lists(batch.column(name)) for name in pixel_columns}
        others = {name: batch.column(name).to_pylist() for name in (*texts, *numbers)}
        for i in range(len(batch)):
            row: Row = {name: column[i] for name, column in others.items() if column[i] is not None}
            row["object_id"] = str(row.get("object_id", f"{file.stem}:{start + i}"))
            row |= {name: lists[i] for name, lists in pixels.items()}
            if options.angstrom != 1:
                row["wavelength"] = row["wavelength"] * options.angstrom
            yield row
        start += len(batch)


def _numbers(schema: pa.Schema) -> list[str]:
    """Signal-to-noise ratio, scalars, and labels with their errors."""
    labels = [name for label in label_names_of(schema.names) for name in (label, f"{label}_err")]
    names = ["snr", *SCALAR_UNITS, *labels]
    return [name for name in names if name in schema.names and pa.types.is_floating(schema.field(name).type)]


def _lists(column: pa.Array) -> list[np.ndarray]:
    """A list column as arrays; a missing list is empty, a missing number NaN, a missing bit of a mask True."""
    flat = pc.list_flatten(column)
    flat = pc.fill_null(flat, True) if pa.types.is_boolean(flat.type) else flat
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    return np.split(flat.to_numpy(zero_copy_only=False), np.cumsum(lengths)[:-1])


def read_multimodal_universe(file: OpenFile, options: Options) -> Iterator[Row]:
    for batch in file.parquet.iter_batches(_chunk_rows(file.parquet)):
        table = pa.Table.from_batches([batch])
        at_rest = [True] * len(table)
        if "restframe" in table.column_names:
            at_rest = [answer is not False for answer in table["restframe"].to_pylist()]
            table = table.drop_columns("restframe")
        flags = _pixel_flags(table, options)
        table = from_multimodal_universe(table, survey=MULTIMODAL_UNIVERSE.survey)
        numbers = _numbers(table.schema)
        pixels = {name: _lists(table[name].combine_chunks()) for name in PIXEL_COLUMNS}
        others: dict[str, list[Any]] = {name: table[name].to_pylist() for name in ("object_id", "survey", *numbers)}
        for i in range(len(table)):
            row = {name: column[i] for name, column in (others | pixels).items()}
            # Some of the published sets were made from bytes.
            row["object_id"] = re.sub(r"^b'(.*)'$", r"\1", row["object_id"])
            if flags is not None:
                row["mask"] = row["mask"] | flags[i]
            yield row | {"frame": AT_REST if at_rest[i] else BY_VELOCITY}


def _pixel_flags(table: pa.Table, options: Options) -> list[np.ndarray] | None:
    """Bad pixels of APOGEE spectra, whose flags are a part of `spectrum`."""
    spectrum = table["spectrum"].combine_chunks()
    if pa.types.is_struct(spectrum.type) and spectrum.type.get_field_index("pix_bitmask") >= 0:
        wavelength, flags = (_lists(pc.struct_field(spectrum, part)) for part in ("lambda", "pix_bitmask"))
        # Padding is cut off there as well.
        return [options.bad(bits)[where > 0] for where, bits in zip(wavelength, flags, strict=True)]
    return None


PARQUET = SpectrumFormat(
    name="parquet",
    survey="",
    wavelength_medium=AS_GIVEN,
    rest_frame=AS_GIVEN,
    flux_unit="as in the data set's card",
    resolving_power="as in the card",
    normalisation="as in the card",
    note="data sets in the schema of this project, one row a spectrum",
    identify=lambda file: file.kind == "parquet",
    read=read_parquet,
)
MULTIMODAL_UNIVERSE = SpectrumFormat(
    name="multimodal-universe",
    survey="multimodal-universe",
    wavelength_medium=VACUUM,
    rest_frame=AT_REST,
    flux_unit="as in the data set's card",
    resolving_power="lsf_sigma, which is not used",
    normalisation="as in the card",
    note="Parquet with a struct `spectrum`; rows whose restframe is False are shifted by their radial_velocity",
    identify=_has_spectrum,
    read=read_multimodal_universe,
)
FORMATS = (MULTIMODAL_UNIVERSE, PARQUET)
