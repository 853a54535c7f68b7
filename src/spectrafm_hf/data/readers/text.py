# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Spectra in text files, one line a pixel: any delimiter, with or without names, and tables of the AAS and the CDS."""

from __future__ import annotations

import csv
import itertools
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import csv as arrow_csv

from .base import OpenFile, Options, Row, SpectrumFormat
from .columns import find_columns, heading, known_name, length_unit, medium_beside
from .late import units
from .tables import PIXELS, STATED_BY_FILES, are_no_errors, by_star, moving, rows_of_table, spectrum_of


#: Words for missing numbers; Fortran prints stars for a number that is too large.
NULLS = [
    *("", "nan", "NaN", "NAN", "null", "NULL", "None", "none", "--", "-", "N/A", "NA", "n/a", "INDEF", "..."),
    *("*" * width for width in range(3, 25)),
]
#: A row of numbers that ends as in LaTeX, or has bars at both ends (Markdown).
_FOR_PRINT = re.compile(r"^\s*(-?\d[^&]*(&[^&]*)+\\\\|\|\s*-?\d[^|]*(\|[^|]*)+\|\s*$)")
#: A line between headings and numbers.
_RULE = re.compile(r"[\s;,\t|+]*-[-=\s;,\t|+]*")
#: Most lines of text above the numbers, such as header cards, and how many lines of numbers after them have to agree.
MOST_TITLES, ALIKE = 1000, 3
_COMMENT = re.compile(r"^\s*(#|%|!|;|//|\\|\|)")


def _header(file: OpenFile) -> tuple[list[str], str, int]:
    """Column names, the delimiter, and the number of lines before the numbers."""
    comments: list[str] = []
    text = None
    for line in file.text():
        if not line.strip() or _COMMENT.match(line):
            comments.append(line)
            continue
        text = line
        break
    delimiter = next((mark for mark in _between(file) if mark in (text or "".join(comments[-1:]))), " ")
    cells = [] if text is None else _cells(text, delimiter)
    numbers = [_is_number(cell) for cell in cells if cell]
    if len(cells) == 1 and all(numbers) and (found := _below_titles(file, len(comments))) is not None:
        return found  # how many lines come
    if text is not None and not (numbers and all(numbers)) and not (numbers and numbers[0] and numbers.count(True) > 1):
        return _below(file, cells, delimiter, len(comments) + 1)
    # NumPy writes its header after "# ": a comment with a name for each column.
    for comment in reversed(comments):
        named = _cells(re.sub(r"^[\s#%!;/\\|]+", "", comment), delimiter)
        named = (
            named
            if len(named) == len(cells) or text is None
            else re.sub(r"[,|]", " ", comment.strip("#%!;/\\ \r\n")).split()
        )
        if (len(named) == len(cells) or text is None) and known_name(named):
            return named, delimiter, len(comments)
    return [str(number) for number in range(1, len(cells) + 1)], delimiter, len(comments)


def _below(file: OpenFile, cells: list[str], delimiter: str, n_before: int) -> tuple[list[str], str, int]:
    """A heading, with units from the line below if it holds any; titles are skipped."""
    if not known_name(cells):
        return _below_titles(file, n_before - 1) or (cells, delimiter, n_before)
    second = next(itertools.islice(file.text(), n_before, None), "")
    below = _cells(second, delimiter)
    if len(below) == len(cells) and not any(map(_is_number, below)) and _are_units(cells, below):
        third = next(itertools.islice(file.text(), n_before + 1, None), "")
        n_ruled = int(bool(_RULE.fullmatch(third)))  # as of VizieR
        named = [cell if heading(cell).unit else f"{cell} [{unit}]" for cell, unit in zip(cells, below, strict=True)]
        return named, delimiter, n_before + 1 + n_ruled
    return cells, delimiter, n_before + int(bool(_RULE.fullmatch(second)))


def _below_titles(file: OpenFile, n_before: int) -> tuple[list[str], str, int] | None:
    """
    A heading below some lines of text, or two or three columns of numbers below them; None if there is neither. A line
    with as many words as there are numbers below it is a heading, even if its names are unknown.
    """
    lines = list(itertools.islice(file.text(), n_before, n_before + MOST_TITLES))
    for number, line in enumerate(lines[1:], 1):
        own = next((mark for mark in _between(file) if mark in line), " ")
        cells = _cells(line, own)
        if len(cells) > 1 and known_name(cells) and not any(map(_is_number, cells)):
            return _below(file, cells, own, n_before + number + 1)
        following = [_cells(each, own) for each in lines[number : number + ALIKE] if each.strip()]
        if len(cells) in (2, 3) and all(len(each) == len(cells) and all(map(_is_number, each)) for each in following):
            above = next((_cells(each, own) for each in reversed(lines[:number]) if each.strip()), [])
            if len(above) == len(cells) and not any(map(_is_number, above)):
                return above, own, n_before + number
            return [str(column) for column in range(1, len(cells) + 1)], own, n_before + number
    return None


def _are_units(names: Sequence[str], below: Sequence[str]) -> bool:
    """Whether the word below the name of a wavelength is its unit."""
    for name, text in zip(names, below, strict=True):
        if known_name([name]):
            try:
                return length_unit(text.strip("()[] ")) is not None
            except ValueError:
                continue
    return False


def _between(file: OpenFile) -> str:
    """The possible delimiters; no comma if it is the decimal sign, as in 4861,3."""
    line = next((line for line in reversed(file.first_lines[:-1]) if line.strip()), "")
    # IPAC has bars around its headings, others between columns.
    bars = "|" if re.match(r"\s*[^|\s][^|]*\|", line) else ""
    return (";\t" if re.search(r"\d,\d+[;\t]", line) else ",;\t") + bars


def _cells(line: str, delimiter: str) -> list[str]:
    if delimiter != " ":
        return [cell.strip() for cell in next(csv.reader([line.strip("\r\n")], delimiter=delimiter), [])]
    # "wave (nm)" is one heading.
    return re.findall(r"[^\s(\[]+(?:\s*(?:\([^)]*\)|\[[^\]]*\]))?|\([^)]*\)|\[[^\]]*\]", line.strip())


def _is_number(text: str) -> bool:
    return text in NULLS or _NUMBER.fullmatch(text) is not None


#: Fortran writes 4.8D+03, and much of Europe 4,8.
_NUMBER = re.compile(r"[+-]?(\d+[.,]?\d*|[.,]\d+)([eEdD][+-]?\d+)?|[+-]?(nan|inf(inity)?)", re.IGNORECASE)


def _text_columns(file: OpenFile, names: list[str], options: Options) -> dict[str, str]:
    """Columns by role; two or three unnamed ones are wavelength, flux and error."""
    if names == [str(number) for number in range(1, len(names) + 1)] and not options.columns:
        if len(names) not in (2, 3):
            raise ValueError(
                f"wavelength: expected names of the {len(names)} columns of {file.path}, got none; name them with "
                "columns={'wavelength': '1', 'flux': '2'}"
            )
        return dict(zip(("wavelength", "flux", "flux_error"), names, strict=False))
    return find_columns(file.path, names, options.columns)


def _is_polarbase(file: OpenFile) -> bool:
    return file.head.startswith(b"***Reduced spectrum of")


def read_polarbase(file: OpenFile) -> Iterator[Row]:
    """Libre-ESpRIT (ESPaDOnS, Narval; polarbase.irap.omp.eu): nm in air, I, and the error in the last column."""
    values = np.loadtxt(file.text(), skiprows=2, ndmin=2).T
    if values.shape[0] not in (2, 3, 6):
        raise ValueError(f"{file.path}: expected 2, 3 or 6 columns of Libre-ESpRIT, got {values.shape[0]}")
    row: Row = {"object_id": file.stem, "wavelength": values[0], "wavelength_unit": units.nm, "flux": values[1]}
    row |= {"medium": "air", "frame": "observed"}
    # Its orders overlap, one after the other.
    yield row if values.shape[0] == 2 else {**row, "flux_error": values[-1]}


def read_text(file: OpenFile, options: Options) -> Iterator[Row]:
    if _is_polarbase(file):
        yield from read_polarbase(file)
        return
    if file.stem.endswith("_sampling") and file.head.startswith(b"pos"):
        raise ValueError(f"{file.path}: expected spectra, got only their sampling (a file of gaiaxpy)")
    for start, what in (
        (b"<", "a web page"),
        (b"version https://git-lfs", "a pointer of Git LFS, not the file itself"),
    ):
        if file.head.lstrip().lower().startswith(start):
            raise ValueError(f"{file.path}: expected columns of numbers, got {what}; download it again")
    if re.match(rb"\s*[\[{]\s*[\[{\"']", file.head):
        raise ValueError(f"{file.path}: expected columns of numbers, got JSON; write them as CSV")
    if any(map(_FOR_PRINT.match, file.first_lines)):
        raise ValueError(
            f"{file.path}: expected columns of numbers, got a table for print (LaTeX or Markdown); write it as CSV"
        )
    if b"Byte-by-byte Description" in file.head:
        yield from _machine_readable(file, options)
        return
    names, delimiter, n_before = _header(file)
    if not names:
        raise ValueError(f"{file.path}: expected columns of numbers, got text without any")
    roles = _text_columns(file, names, options)
    wanted = [role for role in (*PIXELS, "object_id", "radial_velocity", "redshift") if role in roles]
    if len(names) != len(set(names)):
        raise ValueError(f"{file.path}: expected each column once, got {', '.join(names)[:200]}")
    stated = {"medium": medium_beside(roles.get("wavelength", ""), names), **_comments(file)}
    if delimiter == " ":
        where = {role: names.index(roles[role]) for role in wanted if role != "object_id"}
        columns: dict[str, Any] = dict(zip(where, _loadtxt(file, n_before, [*where.values()]), strict=True))
        if "object_id" in roles:  # keep leading zeros
            cells = np.loadtxt(file.text(), str, skiprows=n_before, usecols=names.index(roles["object_id"]), ndmin=1)
            columns["object_id"] = cells
        for object_id, part in by_star(columns, file.stem):
            yield {"object_id": object_id, **_one_star(file, part, roles, options, stated)}
        return
    types: dict[str, Any] = {roles[role]: pa.float64() for role in wanted}
    types |= {roles[role]: pa.string() for role in ("object_id", "mask") if role in roles}
    reader = arrow_csv.open_csv(
        pa.input_stream(str(file.path), compression="gzip" if file.path.suffix == ".gz" else None),
        arrow_csv.ReadOptions(column_names=names, skip_rows=n_before, encoding=file.encoding),
        arrow_csv.ParseOptions(delimiter=delimiter, invalid_row_handler=_remark),
        arrow_csv.ConvertOptions(
            include_columns=list(types),
            column_types=types,
            null_values=NULLS,
            decimal_point="," if "," not in _between(file) else ".",
        ),
    )
    # The lines of a star may span several blocks; `pieces` are those of the current star.
    seen: set[str] = set()
    current = ""
    pieces: list[pa.RecordBatch] = []

    def star() -> Row:
        table = pa.Table.from_batches(pieces)
        columns: dict[str, Any] = {}
        for role in wanted:
            column = table[roles[role]]
            columns[role] = column.to_numpy() if role not in ("object_id", "mask") else np.array(column.to_pylist())
        if "mask" in columns:
            columns["mask"] = _text_mask(columns["mask"])
        return {"object_id": current, **_one_star(file, columns, roles, options, stated)}

    with reader:
        for batch in reader:
            for object_id, piece in _runs(batch, roles.get("object_id"), file.stem):
                if object_id != current or not pieces:
                    if pieces:
                        yield star()
                    if object_id in seen:
                        raise ValueError(
                            f"object_id: expected the lines of a star together in {file.path}, got {object_id!r} again"
                        )
                    seen.add(object_id)
                    current, pieces = object_id, []
                pieces.append(piece)
    if pieces:
        yield star()


def _machine_readable(file: OpenFile, options: Options) -> Iterator[Row]:
    """A table as the AAS and the CDS print it, with its description above it."""
    from astropy.table import Table

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about units
            table = Table.read(file.text().read(), format="ascii.mrt")
    except Exception as error:  # a damaged description raises all kinds of errors
        cause = " ".join(str(error).split())[:200]
        raise ValueError(f"{file.path}: expected a machine-readable table, got {cause}") from error
    yield from rows_of_table(file, table, options)


def _remark(line: Any) -> str:
    """A line without its comment; there may be comments below the numbers."""
    return "skip" if _COMMENT.match(line.text or "") else "error"


def _comments(file: OpenFile) -> Row:
    """Statements about the wavelengths in the comments before the numbers."""
    text = " ".join(line for line in file.first_lines[:60] if _COMMENT.match(line)).lower()
    if re.search(r"\b(convert|correct|transform)", text):
        return {}
    if re.search(r"\b(in|=|:)\s*'?air\b|\bair wavelength", text):
        return {"medium": "air"}
    return {"medium": "vacuum"} if re.search(r"\b(in|=|:)\s*'?vac(uum)?\b|\bvacuum wavelength", text) else {}


def _text_mask(texts: np.ndarray) -> np.ndarray:
    """A mask from text; missing or invalid values mask the pixel."""
    words = {"false": 0, "f": 0, "no": 0, "0": 0, "true": 1, "t": 1, "yes": 1, "1": 1}

    def number(text: Any) -> int:
        word = str(text).strip().lower()
        if word in words:
            return words[word]
        try:
            return int(float(word))
        except (ValueError, OverflowError):
            return 1

    return np.array([number(text) for text in texts], np.int64)


def _loadtxt(file: OpenFile, n_before: int, where: Sequence[int]) -> np.ndarray:
    def number(text: str) -> Any:
        return np.nan if text in NULLS else re.sub("[dD]", "E", text)

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # about a file without numbers
        try:
            return np.loadtxt(file.text(), skiprows=n_before, usecols=where, ndmin=2, comments=("#", "%", "!")).T
        except (ValueError, UserWarning) as error:
            first = error
        try:
            table = np.genfromtxt(
                itertools.islice(file.text(), n_before, None), dtype=str, usecols=where, comments="#", ndmin=2
            )
            return np.array([[number(cell) for cell in row] for row in table.T], dtype=object)
        except (ValueError, UserWarning):
            raise ValueError(f"{file.path}: expected columns of numbers, got {first}") from first


def _one_star(
    file: OpenFile, columns: Mapping[str, Any], roles: Mapping[str, str], options: Options, stated: Row
) -> Row:
    pixels = {
        role: np.asarray(values, np.float64) if role != "mask" else values
        for role, values in columns.items()
        if role in PIXELS
    }
    if roles.get("flux_error") == "3" and not options.columns and are_no_errors(pixels["flux"], pixels["flux_error"]):
        raise ValueError(
            f"{file.path}: expected errors in the third column, which has no name, got numbers as large as the flux; "
            "leave it out with columns={'wavelength': '1', 'flux': '2'}, or keep it with columns={'wavelength': '1', "
            "'flux': '2', 'flux_error': '3'}"
        )
    own = np.asarray(pixels["wavelength" if "wavelength" in pixels else "log_wavelength"])
    if own.size > 1 and not own.size % 2 and bool((own[: own.size // 2] == own[own.size // 2 :]).all()):
        raise ValueError(
            f"{file.path}: expected each wavelength once, got all {own.size // 2} twice, as of two stars; add a column "
            "object_id, or write each star to its own file"
        )
    row = {**spectrum_of(pixels, roles, {}, options), **moving(columns, roles, {})}
    return {**row, "medium": row["medium"] or stated.get("medium")}


def _runs(batch: pa.RecordBatch, id_column: str | None, default: str) -> Iterator[tuple[str, pa.RecordBatch]]:
    """Consecutive lines of the same star."""
    if not len(batch):
        return
    if id_column is None:
        yield default, batch
        return
    ids = batch.column(id_column).to_numpy(zero_copy_only=False)
    starts = np.concatenate([[0], np.flatnonzero(ids[1:] != ids[:-1]) + 1, [len(batch)]])
    for start, stop in itertools.pairwise(starts.tolist()):
        yield str(ids[start]), batch.slice(start, stop - start)


FORMATS = (
    SpectrumFormat(
        name="text",
        **STATED_BY_FILES,
        note="one line a pixel; columns with names, or two or three without: wavelength, flux, error",
        identify=lambda file: file.kind == "text",
        read=read_text,
    ),
)
