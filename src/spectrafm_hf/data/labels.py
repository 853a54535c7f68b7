# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Labels from catalogues: APOGEE's allStar with the cuts of the paper, anybody's own table, their join onto spectra.

Tables have one row a star and columns in lower case; a label `fe_h` has its one-sigma error in `fe_h_err`.
"""

from __future__ import annotations

import csv
import gzip
import io
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import csv as arrow_csv

from .allstar import _is_allstar, arrow_column, as_text, read_allstar
from .schema import LABEL_UNITS, SCALAR_UNITS, label_names_of


# ------------------------------------------------------------------------------------------------------ anybody's table

#: Columns in which identifiers of a table are searched, in this order, by default.
ID_COLUMNS = ("object_id", "apogee_id", "source_id", "gaiaedr3_source_id", "sdss_id", "id", "name")
#: Columns that may hold the name of a spectrum's file instead of an identifier.
FILE_COLUMNS = ("file", "filename", "file_name", "path", "spectrum")
#: Numbers that are rather known of a star than to be learnt.
COORDINATES = {"ra", "dec", "glon", "glat", "l", "b", "pmra", "pmdec", "parallax"}
NO_LABELS = {*SCALAR_UNITS, *COORDINATES, "snr", "rv", "vhelio_avg"}
#: Flags, qualities and counts, which are numbers and no labels.
_FLAG = re.compile(r"(^|_)(flags?|qflag|quality|qual|warn|warning|bits?|mask|bad|good|n_?(obs|visits|used|lines))(_|$)")
#: A heading with a unit, `age[Gyr]`, `age (Gyr)` or `age [Gyr]_err`; VizieR's `e_[Fe/H]` has none.
HEADING = re.compile(r"^(?!e_\[)(.+?)\s*(?:\[([^\]]*)\]|\(([^)]*)\))\s*(_err)?$")
#: Placeholders in a column of numbers: those of astropy, pandas, Python, IRAF and people.
PLACEHOLDERS = ("", "--", "-", "nan", "null", "none", "n/a", "na", "<na>", "indef", "inf", "-inf", "...", "masked")
#: Numbers that catalogues write where they know nothing. Those that a label may have count only far from all others.
_NEVER = (-999, -999.9, -999.99, -999.999, -9999, -9999.9, -9999.99, -99999, -32768)
_FAR = (
    -99,
    -99.9,
    -99.99,
    -99.999,
    99.9,
    99.99,
    99.999,
    999,
    999.9,
    999.99,
    999.999,
    9999,
    9999.9,
    9999.99,
    99999,
    1e20,
)
#: Smaller numbers are placeholders.
MISSING = -9990.0


def read_labels(path: str | os.PathLike[str]) -> pa.Table:
    """Read a table of labels.

    Parameters
    ----------
    path : path
        A table as text, its columns between commas, semicolons, tabs or blanks, in UTF-8 or Latin-1, with or without
        comments before the heading; or .ecsv, .fits, .parquet, VOTable (.xml, .vot). APOGEE's allStar is read as
        `read_allstar` reads it.

    Returns
    -------
    pyarrow.Table
        Names in lower case; those of others are turned into ours, `e_Teff`, `Teff_error` and `sigma_Teff` into
        `teff_err` and `[Fe/H]` into `fe_h`. Of a heading `age[Gyr]`, `age [Gyr]` or `age (Gyr)` the name is `age`;
        `heading_units` has its unit, and those of the columns of FITS, ECSV and VOTable. Labels that this project knows
        come in its units. Identifiers keep their leading zeros. Columns that hold several numbers a star are left out.
        Placeholders are null: see `known_numbers`.

    Raises
    ------
    ValueError
        Naming the file and what was expected of it.
    """
    path = Path(path)
    name = path.name.lower()
    units: dict[str, str] = {}
    try:
        if name.removesuffix(".gz").endswith((".csv", ".tsv", ".txt", ".dat", ".tab")):
            table = _read_text(path)
        elif name.endswith((".parquet", ".pq")):
            # Of a file of spectra, its labels.
            columns = [field.name for field in pq.read_schema(path) if not pa.types.is_nested(field.type)]
            table = pq.read_table(path, columns=columns)
        elif name.endswith((".ecsv", ".fits", ".fit", ".fits.gz", ".xml", ".vot", ".votable")):
            if name.endswith((".fits", ".fit", ".fits.gz")) and _is_allstar(path):
                return read_allstar(path)
            table, units = _read_with_astropy(path)
        else:
            raise ValueError(
                "expected a name that ends in .csv, .tsv, .txt, .dat, .ecsv, .fits, .parquet, .xml or .vot"
            )
    except (OSError, ValueError, TypeError, pa.ArrowException) as error:
        raise ValueError(f"{path}: expected a table of labels that can be read, got: {_one_line(error)}") from error
    headings = [heading.strip() for heading in table.column_names]
    matches = [HEADING.match(heading) for heading in headings]
    plain = [m[1] + (m[4] or "") if m else heading for m, heading in zip(matches, headings, strict=True)]
    names = _our_names(plain)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path}: expected each column once, as capitals do not count, got {', '.join(twice)} again")
    stated = [
        {"unit": m[2] or m[3] or ""} if m and not m[4] else {"column_unit": units[column]} if column in units else None
        for m, column in zip(matches, table.column_names, strict=True)
    ]
    by_name = dict(zip(names, stated, strict=True))
    try:
        columns_and_units = [
            _in_our_unit(_error_in_unit_of_label(name, _clean(name, column), by_name), name, unit)
            for name, column, unit in zip(names, table.columns, stated, strict=True)
        ]
    except ValueError as error:
        raise ValueError(f"{path}: {_one_line(error)}") from error
    schema = pa.schema(
        [
            pa.field(name, column.type, metadata=unit)
            for name, (column, unit) in zip(names, columns_and_units, strict=True)
        ]
    )
    return pa.Table.from_arrays([column for column, _ in columns_and_units], schema=schema)


def _read_with_astropy(path: Path) -> tuple[pa.Table, dict[str, str]]:
    """Columns of an ECSV, FITS or VOTable file with one value a row, and the stated units."""
    from astropy.table import Table  # takes a second to import, which `predict` need not wait for
    from astropy.table.meta import YamlParseError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about units and header cards that play no part here
        kind = {"format": "votable"} if path.suffix.lower() in (".xml", ".vot", ".votable") else {}
        try:
            stars = Table.read(path, **kind)
        except YamlParseError as error:
            raise ValueError(str(error)) from error
    flat = [key for key in stars.colnames if stars[key].ndim == 1]
    units = {key: str(stars[key].unit) for key in flat if getattr(stars[key], "unit", None) is not None}
    return pa.table({key: arrow_column(stars[key]) for key in flat}), units


_COMMENT = re.compile(rb"^\s*[#%!]")


def _read_text(path: Path) -> pa.Table:
    """A table as text; numbers and texts are distinguished column by column, so that `00123` is kept."""
    opened = gzip.open if path.name.lower().endswith(".gz") else open
    with opened(path, "rb") as stream:
        content = stream.read()
    # Bytes that are in no text of any encoding.
    if set(content[:4096]) & {*range(9), *range(14, 32), 127}:
        raise ValueError("expected text, got a file of another kind")
    if content[:3] == b"\xef\xbb\xbf":
        content = content[3:]
    try:
        content.decode("utf-8")
        encoding = "utf-8"
    except UnicodeDecodeError:
        encoding = "latin-1"
    lines = content.splitlines()
    first = next((i for i, line in enumerate(lines) if line.strip() and not _COMMENT.match(line)), None)
    if first is None:
        raise ValueError("expected a heading and numbers, got an empty table")
    heading = lines[first].decode(encoding)
    delimiter = next((mark for mark in (",", ";", "\t", "|") if mark in heading), " ")
    # topcat and NumPy write the heading as a comment.
    before = [line for line in lines[:first] if _COMMENT.match(line)]
    cells = heading.split() if delimiter == " " else heading.split(delimiter)
    if before and all(_is_number(cell) for cell in cells):
        names = re.sub(r"^[#%!\s]+", "", before[-1].decode(encoding))
        names_split = names.split() if delimiter == " " else names.split(delimiter)
        if len(names_split) == len(cells):
            lines[first - 1], first = names.encode(encoding), first - 1
    body = [line for line in lines[first:] if line.strip() and not _COMMENT.match(line)]
    if delimiter == " ":
        rows = [_blank_cells(line.decode(encoding)) for line in body]
        if wrong := next((i for i, row in enumerate(rows) if len(row) != len(rows[0])), 0):
            raise ValueError(f"expected {len(rows[0])} columns in line {first + wrong + 1}, got {len(rows[wrong])}")
        table = (
            pa.table({name: [row[i] for row in rows[1:]] for i, name in enumerate(rows[0])})
            if len(set(rows[0])) == len(rows[0])
            else _twice(rows[0])
        )
    else:
        table = arrow_csv.read_csv(
            io.BytesIO(b"\n".join(body) + b"\n"),
            arrow_csv.ReadOptions(encoding=encoding),
            arrow_csv.ParseOptions(delimiter=delimiter),
            arrow_csv.ConvertOptions(column_types={name: pa.string() for name in _names_of(heading, delimiter)}),
        )
    return table


def _twice(names: Sequence[str]) -> NoReturn:
    again = next(name for name in names if names.count(name) > 1)
    raise ValueError(f"expected each column once, got {again} again")


def _names_of(heading: str, delimiter: str) -> list[str]:
    return next(csv.reader([heading], delimiter=delimiter))


def _blank_cells(line: str) -> list[str]:
    """Between blanks, with `"two words"` and `age [Gyr]` as one."""
    return [cell.strip('"') for cell in re.findall(r'"[^"]*"|[^\s"]+(?:\s+\[[^\]\s]*\](?!\S))?', line)]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text.strip().lower() in PLACEHOLDERS
    return True


def _clean(name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Numbers of a column of texts, if it has only numbers; texts with leading zeros stay texts."""
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        texts = pc.utf8_trim_whitespace(column.cast(pa.string()))
        nothing = pc.is_in(pc.utf8_lower(texts), pa.array(PLACEHOLDERS))
        texts = pc.if_else(nothing, pa.scalar(None, pa.string()), texts)
        if len(texts) == texts.null_count:
            return column if name in (*ID_COLUMNS, *FILE_COLUMNS) else texts.cast(pa.float64())
        if pc.any(pc.match_substring_regex(texts, r"^[+-]?0\d")).as_py():
            return column
        for number in (pa.int64(), pa.float64()):
            try:
                return texts.cast(number)
            except pa.ArrowInvalid:
                continue
        lower = pc.utf8_lower(texts)
        if pc.all(pc.is_in(lower, pa.array(["true", "false", None]))).as_py():
            return pc.equal(lower, "true")
    return column


def _in_our_unit(
    column: pa.ChunkedArray, name: str, unit: dict[str, str] | None
) -> tuple[pa.ChunkedArray, dict[str, str] | None]:
    """A label that this project knows, in its unit; others in their own. And the unit that remains to be stated."""
    ours = LABEL_UNITS.get(name.removesuffix("_err"))
    if unit is None or ours is None:
        return column, unit
    from .readers.columns import unit_of

    in_heading = "unit" in unit
    unit_of_column = unit_of(unit["unit" if in_heading else "column_unit"])
    if ours.startswith("dex"):
        # Units of what the logarithm was taken of, or of none: as loosely written as can be.
        return column, unit if in_heading else None
    if unit_of_column is None or not unit_of_column.is_equivalent(ours):
        written = unit if in_heading else {"unit": unit["column_unit"]}
        return column, written if in_heading or not name.endswith("_err") else None
    factor = float(unit_of_column.to(ours))
    return _times(column, factor), (unit if factor == 1 else {"unit": ours}) if in_heading else None


def _times(column: pa.ChunkedArray, factor: float) -> pa.ChunkedArray:
    return column if factor == 1 else pc.multiply(column.cast(pa.float64()), factor)


def _error_in_unit_of_label(
    name: str, column: pa.ChunkedArray, stated: Mapping[str, dict[str, str] | None]
) -> pa.ChunkedArray:
    """The error of a label that this project does not know, as `age_err` in Myr of an `age` in Gyr."""
    label = name.removesuffix("_err")
    own, of_label = (next(iter((stated.get(each) or {}).values()), None) for each in (name, label))
    if name == label or label in LABEL_UNITS or own is None or of_label is None or own == of_label:
        return column
    from .readers.columns import unit_of

    own_unit, wanted = unit_of(own), unit_of(of_label)
    if own_unit is None or wanted is None:
        return column
    if not own_unit.is_equivalent(wanted):
        raise ValueError(f"{name}: expected an error in the unit of {label}, {of_label}, got {own}")
    return _times(column, float(own_unit.to(wanted)))


def heading_units(table: pa.Table) -> dict[str, str]:
    """Units that stood in the headings of a table of labels, by column."""
    return {field.name: field.metadata[b"unit"].decode() for field in table.schema if b"unit" in (field.metadata or {})}


def stated_units(table: pa.Table) -> dict[str, str]:
    """Those, and the units of the columns of FITS, ECSV and VOTable."""
    columns = {
        field.name: field.metadata[b"column_unit"].decode()
        for field in table.schema
        if b"column_unit" in (field.metadata or {})
    }
    return columns | heading_units(table)


def known_numbers(table: pa.Table, name: str) -> NDArray[np.float64]:
    """A label, or its error, NaN where it is unknown: the one rule for all that learns or stores labels.

    Unknown are values that are not finite, errors that are not positive, and placeholders of catalogues (-9999, -999,
    99.99, ...). Placeholders that a label may really have, such as 9999 K, only if they are far from all other values.
    """
    try:
        values = np.array(table[name].cast(pa.float64()).to_numpy(zero_copy_only=False), np.float64)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{name}: expected numbers, got {_one_line(error)}") from error
    unknown = ~np.isfinite(values) | (values <= MISSING) | np.isin(values, _NEVER)
    if name.endswith("_err"):
        unknown |= values <= 0
    for number in sorted(_FAR, key=abs, reverse=True):
        here = np.isclose(values, number, rtol=1e-6, atol=0) & ~unknown
        if here.any():
            others = np.abs(values[~unknown & ~here])
            if others.size and abs(number) > 1.5 * others.max():
                unknown |= here
    return np.where(unknown, np.nan, values)


_ERROR_OF = re.compile(
    r"^(?:e_|err_|error_|sigma_|sig_|d_|u_)(.+)$|^(.+?)_(?:error|err|sigma|sig|unc|uncertainty|std|stddev|stat)$"
)


def _our_names(names: Sequence[str]) -> list[str]:
    names = [re.sub(r"\[(\w+)/(\w+)\]", r"\1_\2", name).lower() for name in names]
    ours = []
    for name in names:
        match = _ERROR_OF.match(name)
        of = (match[1] or match[2]) if match else None
        ours.append(f"{of}_err" if of in names and f"{of}_err" not in names else name)
    return ours


def number_columns(table: pa.Table) -> list[str]:
    """Columns of numbers that are neither identifiers nor errors."""
    return [
        field.name
        for field in table.schema
        if (pa.types.is_floating(field.type) or pa.types.is_integer(field.type))
        and not (field.name.endswith("_err") and field.name.removesuffix("_err") in table.column_names)
        and field.name not in (*ID_COLUMNS, *FILE_COLUMNS)
    ]


def label_columns(table: pa.Table, known: Iterable[str] = ()) -> list[str]:
    """
    Names of the labels in a table, by one rule for data sets and fine-tuning: numbers with an error beside them or a
    unit in their heading, and those with a name that this project, or a checkpoint (`known`), has. Where there are none
    of these, all numbers but coordinates, magnitudes, velocities, flags and the like.
    """
    with_error = label_names_of(table.column_names)
    likely = [name for name in number_columns(table) if name not in NO_LABELS and not _FLAG.search(name)]
    marked = {*LABEL_UNITS, *with_error, *heading_units(table), *known}
    return [name for name in likely if name in marked] or likely


@dataclass(frozen=True)
class LabelJoin:
    """Which row of a table of labels belongs to which spectrum.

    Attributes
    ----------
    index : array of int, shape (spectra,)
        Row of the table; -1 where it has none. Of an identifier that the table has several times, the first.
    unmatched_spectra, unmatched_labels : list of str
        Identifiers without a counterpart.
    duplicates : list of str
        Identifiers of spectra that the table has more than once.
    """

    index: NDArray[np.int64]
    unmatched_spectra: list[str]
    unmatched_labels: list[str]
    duplicates: list[str]


class LabelIndex:
    """Rows of a table of labels by identifier, for spectra that come batch by batch; see `join_labels`."""

    def __init__(self, labels: pa.Table, id_column: str | None = None) -> None:
        name = (id_column or next((name for name in ID_COLUMNS if name in labels.column_names), "")).lower()
        if name not in labels.column_names:
            expected = repr(id_column) if id_column else f"one of {', '.join(ID_COLUMNS)}"
            raise ValueError(
                f"id_column: expected {expected} among the columns of the labels, got {labels.column_names}"
            )
        if pa.types.is_floating(labels.schema.field(name).type):
            raise ValueError(f"{name}: expected identifiers as text or whole numbers, got decimals, which round them")
        self._rows: dict[str, int] = {}
        self._repeated: set[str] = set()
        self._found: set[str] = set()
        for row, object_id in enumerate(labels[name].to_pylist()):
            if object_id is not None and self._rows.setdefault(_identifier(object_id), row) != row:
                self._repeated.add(_identifier(object_id))

    def find(self, object_ids: Iterable[Any]) -> NDArray[np.int64]:
        """Row of each spectrum, -1 where there is none."""
        wanted = [_identifier(object_id) for object_id in object_ids]
        self._found.update(wanted)
        return np.array([self._rows.get(identifier, -1) for identifier in wanted], np.int64)

    @property
    def unmatched_spectra(self) -> list[str]:
        """Identifiers that were looked for and are not in the table."""
        return sorted(self._found - self._rows.keys())

    @property
    def unmatched_labels(self) -> list[str]:
        """Identifiers of the table without a spectrum."""
        return sorted(self._rows.keys() - self._found)

    @property
    def duplicates(self) -> list[str]:
        """Identifiers that were looked for and that the table has more than once."""
        return sorted(self._repeated & self._found)


def join_labels(object_ids: Iterable[Any], labels: pa.Table, id_column: str | None = None) -> LabelJoin:
    """Find the labels of spectra by identifier.

    Parameters
    ----------
    object_ids : iterable of str or int
        Of the spectra. Several spectra of one star find the same labels.
    labels : pyarrow.Table
        As `read_labels` or `read_allstar` returns it.
    id_column : str, optional
        Column with the identifiers, texts or whole numbers; `Gaia DR3 4295806720` is the same as 4295806720. Default:
        the first of `ID_COLUMNS` that the table has.

    Raises
    ------
    ValueError
        If the table has no such column, or it holds decimal numbers (which cannot hold the identifiers of Gaia).
    """
    rows = LabelIndex(labels, id_column)
    return LabelJoin(rows.find(object_ids), rows.unmatched_spectra, rows.unmatched_labels, rows.duplicates)


def _identifier(object_id: Any) -> str:
    # One that a table holds as a number has lost its zeros.
    plain = re.sub(r"^gaia (e?dr\d) ", "", as_text(object_id), flags=re.IGNORECASE)
    return plain.lstrip("0") or "0" if plain.isdecimal() else plain


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
