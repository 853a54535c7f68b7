# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Parquet: data sets in the schema of this project, and in the layout of the Multimodal Universe."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ...models.gate_spectrafm import FRAME_UNSTATED
from ..schema import PIXEL_COLUMNS, SCALAR_UNITS, from_multimodal_universe, label_names_of, with_errors
from .base import AS_STATED, AT_REST, BY_VELOCITY, CHUNK_ROWS, VACUUM, OpenFile, Options, Row, SpectrumFormat
from .columns import find_columns, heading, length_unit, unit_of


#: Fewer rows are read at once if spectra have more than 8,000 pixels.
CHUNK_VALUES = CHUNK_ROWS * 8000


def columns_of(file: pq.ParquetFile) -> Iterator[Any]:
    """The metadata of each column in each group of rows."""
    for i in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(i)
        yield from map(group.column, range(group.num_columns))


def _chunk_rows(file: pq.ParquetFile) -> int:
    """Number of rows to read at once, from the longest mean length of lists in a row group."""
    groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
    longest = [
        max(group.column(j).num_values for j in range(group.num_columns)) / group.num_rows
        for group in groups
        if group.num_rows and group.num_columns
    ]
    return int(max(1, min(CHUNK_ROWS, CHUNK_VALUES / max([1, *longest]))))


def _has_spectrum(file: OpenFile) -> bool:
    if file.kind != "parquet" or "spectrum" not in file.parquet.schema_arrow.names:
        return False
    # Other structs are read as if their fields were columns.
    kind = file.parquet.schema_arrow.field("spectrum").type
    return not pa.types.is_struct(kind) or "lambda" in [part.name for part in kind] or not _parts(kind)


def _parts(kind: pa.DataType) -> bool:
    """Whether a column is a struct with a wavelength and a flux in it."""
    if not pa.types.is_struct(kind):
        return False
    roles = find_columns(Path("struct"), [part.name for part in kind], demanded=False)
    return "flux" in roles and bool({"wavelength", "log_wavelength"} & roles.keys())


def _flat(table: pa.Table) -> pa.Table:
    """Replace the struct of a spectrum by its fields as columns."""
    for name in [field.name for field in table.schema if _parts(field.type)][:1]:
        column = table[name].combine_chunks()
        others = table.drop_columns(name)
        for part in column.type:
            if part.name not in others.column_names:
                others = others.append_column(part.name, pc.struct_field(column, part.name))
        return others
    return table


#: A table with all of these is in the schema of this project: wavelengths in vacuum and at rest.
_SCHEMA = {"object_id", *PIXEL_COLUMNS}


_STATED = ("rest_frame", "resolving_power", "normalised", "reading_flags")


def read_parquet(file: OpenFile, options: Options) -> Iterator[Row]:
    whole = file.parquet.schema_arrow
    nested = any(_parts(field.type) for field in whole)
    schema = _flat(whole.empty_table()).schema if nested else whole  # an empty table imports pandas
    roles = find_columns(file.path, schema.names, options.columns)
    own = set(schema.names) >= _SCHEMA and not options.columns
    # A velocity under another name has not been applied, unlike that of the schema.
    own &= "redshift" not in roles and roles.get("radial_velocity", "radial_velocity") == "radial_velocity"
    for role in ("snr", "mask", "good"):
        if (
            role in roles
            and role not in options.columns
            and _is_list(schema, roles["flux"]) > _is_list(schema, roles[role])
        ):
            del roles[role]  # one number for each star, not for each pixel
    pixel_roles = [role for role in roles if role not in ("object_id", "radial_velocity", "redshift")]
    kinds = {role: schema.field(roles[role]).type for role in pixel_roles}
    if all(
        _is_number(kind) or (role in ("mask", "good") and pa.types.is_boolean(kind)) for role, kind in kinds.items()
    ):
        yield from _pixel_by_pixel(file, roles, options)
        return
    for role in pixel_roles:
        kind = schema.field(roles[role]).type
        expected = "bool" if role in ("mask", "good") else "float"
        value = getattr(kind, "value_type", pa.null())
        right = pa.types.is_boolean(value) or pa.types.is_integer(value) if expected == "bool" else _is_number(value)
        if not right:
            raise ValueError(f"{role}: expected a column of type list<{expected}> in {file.path}, got {kind}")
    numbers = _numbers(schema, options.scalars)
    about = [name for name in ("survey", *_STATED) if name in schema.names]
    speeds = [roles[role] for role in ("radial_velocity", "redshift") if role in roles and roles[role] not in numbers]
    others = [*([roles["object_id"]] if "object_id" in roles else []), *about, *numbers, *speeds]
    wanted = list(dict.fromkeys([*others, *(roles[role] for role in pixel_roles)]))
    from .tables import moving, spectrum_of

    units = _units(roles, options)
    start = 0
    for batch in file.parquet.iter_batches(_chunk_rows(file.parquet), columns=None if nested else wanted):
        if nested:
            batch = _flat(pa.Table.from_batches([batch])).combine_chunks()
        pixels = {role: _lists(_one_chunk(batch.column(roles[role]))) for role in pixel_roles}
        columns = {name: batch.column(name).to_pylist() for name in dict.fromkeys(others)}
        for i in range(len(batch)):
            row: Row = {name: column[i] for name, column in columns.items() if column[i] is not None}
            row |= {name: np.nan for name in options.scalars if name in columns and name not in row}
            object_id = row.get(roles.get("object_id", ""), f"{file.stem}:{start + i}")
            there = [role for role in ("radial_velocity", "redshift") if roles.get(role, "") in row]
            row |= moving({role: row[roles[role]] for role in there}, roles, {})
            part = {role: lists[i] for role, lists in pixels.items()}
            row |= spectrum_of(part, roles, {}, options) if not own and part["flux"].size else {**part, **units}
            row["object_id"] = re.sub(r"^b'(.*)'$", r"\1", str(object_id))
            at_rest = row.pop("rest_frame", None)
            if assumed := row.pop("reading_flags", ""):
                row["flags"] = [flag for flag in str(assumed).split(";") if flag != FRAME_UNSTATED]
            if own and "rest_frame" in about:
                row |= {"frame": {True: "rest", False: "observed"}.get(at_rest), "medium": "vacuum"}
                # The velocity that was or could not be applied.
                if at_rest is False:
                    row["radial_velocity"] = np.nan
            elif own:
                row |= {"frame": "rest", "medium": "vacuum"}
            yield row
        start += len(batch)


def _one_chunk(column: Any) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _pixel_by_pixel(file: OpenFile, roles: Mapping[str, str], options: Options) -> Iterator[Row]:
    """A table with one pixel a row, of one or several stars."""
    from .tables import by_star, moving, pixels_of, spectrum_of

    table = file.parquet.read(columns=list(roles.values()))
    columns = {role: table[name].to_numpy() for role, name in roles.items()}
    for name, part in by_star(columns, file.stem):
        yield {"object_id": name, **spectrum_of(pixels_of(part), roles, {}, options), **moving(part, roles, {})}


def _is_list(schema: pa.Schema, name: str) -> bool:
    return hasattr(schema.field(name).type, "value_type")


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind))


def _units(roles: Mapping[str, str], options: Options) -> Row:
    """Units that stand in the headings."""
    written = {role: heading(name).unit for role, name in roles.items()}
    units: Row = {"wavelength_unit": length_unit(written.get("wavelength"), "wavelength") or options.wavelength_unit}
    return units | {"flux_unit": unit_of(written["flux"]), "error_unit": unit_of(written.get("flux_error"))}


def _numbers(schema: pa.Schema, scalars: Sequence[str]) -> list[str]:
    """Signal-to-noise ratio, known and requested scalars, and labels with their errors."""
    names = dict.fromkeys(["snr", *SCALAR_UNITS, *with_errors(label_names_of(schema.names)), *scalars])
    return [name for name in names if name in schema.names and pa.types.is_floating(schema.field(name).type)]


def _lists(column: pa.Array) -> list[np.ndarray]:
    """A list column as arrays; a missing list is empty, a missing number NaN, a missing bit of a mask True."""
    flat = pc.list_flatten(column)
    flat = pc.fill_null(flat, True) if pa.types.is_boolean(flat.type) and flat.null_count else flat
    lengths = pc.list_value_length(column)
    lengths = pc.fill_null(lengths, 0) if lengths.null_count else lengths
    return np.split(_numpy(flat), np.cumsum(_numpy(lengths))[:-1])


def _numpy(column: pa.Array) -> np.ndarray:
    """The values of a column; by `to_numpy`, which imports pandas (a second), only with nulls or of other types."""
    if column.null_count or not len(column) or not (pa.types.is_boolean(column.type) or _is_number(column.type)):
        return np.asarray(column.to_numpy(zero_copy_only=False))
    if pa.types.is_boolean(column.type):  # a bit each
        return np.from_dlpack(column.cast(pa.uint8())).view(bool)
    return np.from_dlpack(column)


def read_multimodal_universe(file: OpenFile, options: Options) -> Iterator[Row]:
    for batch in file.parquet.iter_batches(_chunk_rows(file.parquet)):
        table = pa.Table.from_batches([batch])
        names = {name.lower(): name for name in table.column_names}
        stated: dict[str, list[Any]] = {}
        # SDSS and DESI have Z and observed wavelengths; APOGEE has radial_velocity and restframe.
        for role in ("restframe", "z", "zwarning", "class", "spectype"):
            if role in names:
                stated[role] = table[names[role]].to_pylist()
                table = table.drop_columns(names[role])
        lower = [name.lower() for name in table.column_names]
        table = table.rename_columns(lower if len(set(lower)) == len(lower) else table.column_names)
        flags = _pixel_flags(table, options)
        table = from_multimodal_universe(table, survey=MULTIMODAL_UNIVERSE.survey)
        numbers = _numbers(table.schema, options.scalars)
        pixels = {name: _lists(table[name].combine_chunks()) for name in PIXEL_COLUMNS}
        others: dict[str, list[Any]] = {name: table[name].to_pylist() for name in ("object_id", "survey", *numbers)}
        for i in range(len(table)):
            row = {name: column[i] for name, column in (others | pixels).items()}
            # Some of the published sets have identifiers like "b'...'".
            row["object_id"] = re.sub(r"^b'(.*)'$", r"\1", row["object_id"])
            if flags is not None:
                row["mask"] = row["mask"] | flags[i]
            about = {role: values[i] for role, values in stated.items()}
            if "z" in about and "restframe" not in about:
                kind = str(about.get("class") or about.get("spectype") or "")
                # True, or the bits of the survey.
                doubtful = bool(about.get("zwarning"))
                redshift = np.nan if about["z"] is None or doubtful else float(about["z"])
                row |= {"frame": BY_VELOCITY, "redshift": redshift, "object_class": kind}
                row.pop("radial_velocity", None)
                yield row
            else:
                yield row | {"frame": AT_REST if about.get("restframe") is not False else BY_VELOCITY}


def _pixel_flags(table: pa.Table, options: Options) -> list[np.ndarray] | None:
    """Bad pixels of APOGEE spectra, whose flags are a part of `spectrum`."""
    spectrum = table["spectrum"].combine_chunks()
    if pa.types.is_struct(spectrum.type) and spectrum.type.get_field_index("pix_bitmask") >= 0:
        wavelength, flags = (_lists(pc.struct_field(spectrum, part)) for part in ("lambda", "pix_bitmask"))
        # This also removes padding.
        return [options.bad(bits)[where > 0] for where, bits in zip(wavelength, flags, strict=True)]
    return None


PARQUET = SpectrumFormat(
    name="parquet",
    survey="",
    wavelength_medium=AS_STATED,
    rest_frame=AS_STATED,
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
