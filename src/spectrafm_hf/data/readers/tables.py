# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Tables of spectra, as text, FITS, ECSV or VOTable, whatever their columns are called."""

from __future__ import annotations

import csv
import itertools
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from astropy import units
from astropy.io import fits
from pyarrow import csv as arrow_csv

from .base import AS_GIVEN, CHUNK_ROWS, JWST_DO_NOT_USE, OpenFile, Options, Row, SpectrumFormat, column_of
from .columns import (
    by_meaning,
    find_columns,
    from_logarithm,
    heading,
    known_name,
    length_unit,
    logarithm,
    medium_of,
    plain,
    unit_of,
    velocity_factor,
)
from .headers import about
from .orders import as_one_or_each


if TYPE_CHECKING:
    from astropy.table import Table


#: Words that stand for no number.
NULLS = ["", "nan", "NaN", "NAN", "null", "NULL", "None", "none", "--", "-", "N/A", "NA", "n/a", "INDEF", "..."]
_PIXELS = ("wavelength", "log_wavelength", "flux", "flux_error", "ivar", "variance", "snr", "mask", "good")
#: More rows of a table without identifiers than an instrument has orders are stars.
MOST_ORDERS = 512


_NOT_IN_A_MEDIUM = {
    **dict.fromkeys(("frequency", "freq"), units.Hz),
    **dict.fromkeys(("wavenumber", "wavenumbers"), units.cm**-1),
    **dict.fromkeys(("energy", "photonenergy"), units.eV),
}
#: Of columns that state no unit: iSpec knows no other than nm.
_OWN_UNIT = {"waveobs": units.nm, **_NOT_IN_A_MEDIUM}


def spectrum_of(
    columns: Mapping[str, Any], names: Mapping[str, str], unit_names: Mapping[str, Any], options: Options
) -> Row:
    """
    One spectrum with what its columns state.

    Parameters
    ----------
    columns : mapping of role to array of shape (pixels,)
    names : mapping of role to heading
    unit_names : mapping of role to unit, or what is written for one
        Beside the headings, which may hold units as well.
    options : Options
    """

    def unit(role: str) -> Any:
        return unit_names.get(role) or heading(names[role]).unit

    row: Row = {"flux": columns["flux"], "flux_unit": unit_of(unit("flux"))}
    where = "wavelength" if "wavelength" in columns else "log_wavelength"
    row["medium"] = medium_of(names[where])
    log = logarithm(unit(where))
    written = unit(where) if log is None else log[1]
    row["wavelength_unit"] = length_unit(written, "wavelength") or options.wavelength_unit
    if log is None and where == "wavelength":
        row["wavelength"] = columns[where]
        if row["wavelength_unit"] is None:
            row["wavelength_unit"] = _OWN_UNIT.get(plain(names[where]))
        if plain(names[where]) in _NOT_IN_A_MEDIUM:
            row["medium"] = "vacuum"
    else:
        natural = math.e if plain(names[where]).startswith("ln") else None
        row["wavelength"] = from_logarithm(columns[where], natural if log is None else log[0])
    for role, kind in (("flux_error", "sigma"), ("ivar", "ivar"), ("variance", "variance")):
        if role in columns:
            row |= {"flux_error": columns[role], "error_kind": kind, "error_unit": unit_of(unit(role))}
    if "snr" in columns and np.shape(columns["snr"]) == np.shape(columns["flux"]):
        row["flux_error"] = _of_snr(columns["flux"], columns["snr"])
    if "mask" in columns:
        row["mask"] = _flags(columns["mask"])
        if plain(names["mask"]) == "andmask":
            from .sdss import BAD_PIXELS

            row["bad_bits"] = BAD_PIXELS
    elif "good" in columns:
        row["mask"] = _flags(columns["good"]) == 0
    name = plain(names["flux"])
    if "norm" in name:
        row["normalised"] = True
    if name in ("fnu", "fluxnu") and row["flux_unit"] is None:
        row["flux_unit"] = units.Jy
    # Rows of a table are equally long: shorter spectra are filled up with NaN or zeros.
    wavelength = np.asarray(row["wavelength"])
    if wavelength.dtype.kind == "f" and wavelength.ndim == 1:
        real = np.isfinite(wavelength)
        if (zeros := wavelength == 0).any() and not zeros.all():
            real &= ~zeros
        there = [key for key in ("wavelength", "flux", "flux_error", "mask") if row.get(key) is not None]
        if not real.all() and all(np.shape(row[key]) == real.shape for key in there):
            row |= {key: np.asarray(row[key])[real] for key in there}
    return row


def _of_snr(flux: Any, snr: Any) -> np.ndarray:
    """One-sigma errors; infinite where the signal is not above the noise at all, or the ratio is unknown."""
    flux, snr = np.asarray(flux, np.float64), np.asarray(snr, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((snr > 0) & (flux != 0), np.abs(flux / snr), np.inf)


def _flags(values: Any) -> np.ndarray:
    array = np.asarray(values)
    if array.dtype.kind in "SU":
        return np.isin(np.char.lower(array.astype(str)), ("true", "t", "1", "yes"))
    return array


# --------------------------------------------------------------------------------------------------------------- text

_COMMENT = re.compile(r"^\s*(#|%|!|;|//|\\|\|)")


def _header(file: OpenFile) -> tuple[list[str], str, int]:
    """Column names, what is between the columns, and how many lines come before the numbers."""
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
    if text is not None and not (numbers and all(numbers)) and not (numbers and numbers[0] and numbers.count(True) > 1):
        return _below(file, cells, delimiter, len(comments) + 1)
    # NumPy writes its header behind a "# ": a comment that has a name for each column.
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
    """A heading with the line below it, which may hold units; a title above columns without names is no heading."""
    second = next(itertools.islice(file.text(), n_before, None), "")
    if not known_name(cells):
        own = next((mark for mark in _between(file) if mark in second), " ")
        below = _cells(second, own)
        if len(below) in (2, 3) and all(map(_is_number, below)) and len(below) != len(cells):
            return [str(number) for number in range(1, len(below) + 1)], own, n_before
        return cells, delimiter, n_before
    below = _cells(second, delimiter)
    if len(below) == len(cells) and not any(map(_is_number, below)) and _are_units(cells, below):
        named = [cell if heading(cell).unit else f"{cell} [{unit}]" for cell, unit in zip(cells, below, strict=True)]
        return named, delimiter, n_before + 1
    return cells, delimiter, n_before


def _are_units(names: Sequence[str], below: Sequence[str]) -> bool:
    """Whether what stands below the name of a wavelength is a unit of it."""
    for name, text in zip(names, below, strict=True):
        if known_name([name]):
            try:
                return length_unit(text.strip("()[] ")) is not None
            except ValueError:
                continue
    return False


def _between(file: OpenFile) -> str:
    """What may lie between columns; no comma where that is in numbers, as in 4861,3."""
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
    """Columns by role; of two or three without names, wavelength, flux and error."""
    if names == [str(number) for number in range(1, len(names) + 1)] and not options.columns:
        if len(names) not in (2, 3):
            raise ValueError(
                f"wavelength: expected names of the {len(names)} columns of {file.path}, got none; name them with "
                "columns={'wavelength': '1', 'flux': '2'}"
            )
        return dict(zip(("wavelength", "flux", "flux_error"), names, strict=False))
    return find_columns(file.path, names, options.columns)


def is_ecsv(file: OpenFile) -> bool:
    return file.kind == "text" and file.head.startswith(b"# %ECSV")


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
        raise ValueError(f"{file.path}: expected spectra, got the sampling that gaiaxpy writes beside them")
    if re.match(rb"\s*[\[{]\s*[\[{\"']", file.head):
        raise ValueError(f"{file.path}: expected columns of numbers, got JSON; write them as CSV")
    if b"Byte-by-byte Description" in file.head:
        yield from _machine_readable(file, options)
        return
    names, delimiter, n_before = _header(file)
    if not names:
        raise ValueError(f"{file.path}: expected columns of numbers, got text without any")
    roles = _text_columns(file, names, options)
    wanted = [role for role in (*_PIXELS, "object_id", "radial_velocity", "redshift") if role in roles]
    if len(names) != len(set(names)):
        raise ValueError(f"{file.path}: expected each column once, got {', '.join(names)[:200]}")
    stated = _comments(file)
    if delimiter == " ":
        where = {role: names.index(roles[role]) for role in wanted if role != "object_id"}
        columns: dict[str, Any] = dict(zip(where, _loadtxt(file, n_before, [*where.values()]), strict=True))
        if "object_id" in roles:  # 007 is no number
            cells = np.loadtxt(file.text(), str, skiprows=n_before, usecols=names.index(roles["object_id"]), ndmin=1)
            columns["object_id"] = cells
        for object_id, part in by_star(columns, file.stem):
            yield {"object_id": object_id, **_one_star(part, roles, options, stated)}
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
    # The lines of a star may lie in several blocks; `pieces` are those of the star that is being read.
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
        return {"object_id": current, **_one_star(columns, roles, options, stated)}

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
            warnings.simplefilter("ignore")  # on units
            table = Table.read(file.text().read(), format="ascii.mrt")
    except Exception as error:  # whatever the description leads it to
        cause = " ".join(str(error).split())[:200]
        raise ValueError(f"{file.path}: expected a machine-readable table, got {cause}") from error
    yield from rows_of_table(file, table, options)


def _remark(line: Any) -> str:
    """Comments may stand below the numbers too."""
    return "skip" if _COMMENT.match(line.text or "") else "error"


def _comments(file: OpenFile) -> Row:
    """What the comments before the numbers state of the wavelengths."""
    text = " ".join(line for line in file.first_lines[:60] if _COMMENT.match(line)).lower()
    if re.search(r"\b(convert|correct|transform)", text):
        return {}
    if re.search(r"\b(in|=|:)\s*'?air\b|\bair wavelength", text):
        return {"medium": "air"}
    return {"medium": "vacuum"} if re.search(r"\b(in|=|:)\s*'?vac(uum)?\b|\bvacuum wavelength", text) else {}


def _text_mask(texts: np.ndarray) -> np.ndarray:
    """A mask as text; what is missing or no number says nothing good."""
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
        warnings.simplefilter("error")  # on a file without numbers
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


def by_star(columns: Mapping[str, Any], default: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Consecutive lines of the same star."""
    if "object_id" not in columns:
        yield default, dict(columns)
        return
    ids = np.array([str(name) for name in columns["object_id"]])
    for part in np.split(np.arange(len(ids)), np.flatnonzero(ids[1:] != ids[:-1]) + 1):
        name = ids[part[0]]
        yield name, {role: values[part] for role, values in columns.items()}


def _one_star(columns: Mapping[str, Any], roles: Mapping[str, str], options: Options, stated: Row) -> Row:
    pixels = {
        role: np.asarray(values, np.float64) if role != "mask" else values
        for role, values in columns.items()
        if role in _PIXELS
    }
    row = {**spectrum_of(pixels, roles, {}, options), **moving(columns, roles, {})}
    return {**row, "medium": row["medium"] or stated.get("medium")}


def moving(columns: Mapping[str, Any], names: Mapping[str, str], unit_names: Mapping[str, Any]) -> Row:
    """The velocity, in km/s, or the redshift of a star whose lines all state it."""
    row: Row = {}
    for role in ("radial_velocity", "redshift"):
        if role in columns:
            values = np.ravel(np.asarray(columns[role], np.float64))
            if values.size and np.all((values == values[0]) | np.isnan(values)):
                row[role] = float(values[0])
    if "radial_velocity" in row:
        own = "radial_velocity"
        row[own] *= velocity_factor(unit_names.get(own) or heading(names[own]).unit)
    return row


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


# ------------------------------------------------------------------------------------------------- ECSV and VOTable


def read_ecsv(file: OpenFile, options: Options) -> Iterator[Row]:
    if _is_sampling(file):
        raise ValueError(f"{file.path}: expected spectra, got the sampling that gaiaxpy writes beside them")
    from astropy.table import Table

    yield from rows_of_table(file, Table.read(file.text().read(), format="ascii.ecsv"), options)


def read_votable(file: OpenFile, options: Options) -> Iterator[Row]:
    from astropy.io import votable

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on details of the standard
        tables = list(votable.parse(str(file.path)).iter_tables())
    for given in tables:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            table = given.to_table(use_names_over_ids=True)
        # Units that astropy does not know come back as none: what is written is read once more.
        written = {each.name: each._unit if hasattr(each, "_unit") else each.unit for each in given.fields}
        roles = find_columns(file.path, table.colnames, options.columns, demanded=False)
        asked = options
        if not ("flux" in roles and {"wavelength", "log_wavelength"} & roles.keys()):
            meant = by_meaning((each.name, str(each.ucd or ""), str(each.utype or "")) for each in given.fields)
            asked = replace(options, columns={**meant, **options.columns})
        yield from rows_of_table(file, table, asked, {name: str(unit) for name, unit in written.items() if unit})


def _is_sampling(file: OpenFile) -> bool:
    return file.stem.endswith("_sampling") and b"\npos" in file.head


def rows_of_table(
    file: OpenFile, table: Table, options: Options, written: Mapping[str, str] | None = None
) -> Iterator[Row]:
    """Spectra of a table of astropy: vectors, or one pixel a row. Of the file no more is read than its name."""
    roles = find_columns(file.path, table.colnames, options.columns, demanded=False)
    if "flux" not in roles and len(table.colnames) == 2 and options.columns == {}:
        first, second = table.colnames
        if getattr(table[first].unit, "physical_type", None) == "length":
            roles = {"wavelength": first, "flux": second}
    if not {"flux"} <= roles.keys() or not {"wavelength", "log_wavelength"} & roles.keys():
        roles = find_columns(file.path, table.colnames, options.columns)
    stated = {role: (written or {}).get(name) or table[name].unit for role, name in roles.items()}
    columns = {role: _filled(table[name]) for role, name in roles.items()}
    object_id = str(table.meta.get("object_id", file.stem))
    if np.ndim(columns["flux"]) == 1 and columns["flux"].dtype != object:
        for name, part in by_star({role: values for role, values in columns.items()}, object_id):
            yield {
                "object_id": name,
                **spectrum_of(pixels_of(part), roles, stated, options),
                **moving(part, roles, stated),
            }
        return
    for i in range(len(table)):
        part = {role: values[i] for role, values in columns.items()}
        name = str(part["object_id"]) if "object_id" in part else f"{object_id}:{i}"
        yield {"object_id": name, **spectrum_of(pixels_of(part), roles, stated, options), **moving(part, roles, stated)}


def pixels_of(columns: Mapping[str, Any]) -> dict[str, Any]:
    return {role: values for role, values in columns.items() if role in _PIXELS}


def _filled(column: Any) -> np.ndarray:
    array = getattr(column, "value", column)
    if np.ma.isMaskedArray(array) and np.ma.getmaskarray(array).any() and array.dtype.kind in "fiu":
        return np.ma.filled(array.astype(np.float64), np.nan)
    return np.ma.filled(array, True) if np.ma.isMaskedArray(array) and array.dtype == bool else np.asarray(array)


# --------------------------------------------------------------------------------------------------------------- FITS


def spectrum_tables(file: OpenFile, asked: Mapping[str, str]) -> list[fits.BinTableHDU]:
    """The tables of a FITS file that hold a wavelength and a flux."""
    found = []
    for hdu in file.hdus:
        if isinstance(hdu, fits.BinTableHDU):
            roles = find_columns(file.path, hdu.columns.names, asked if asked else None, demanded=False)
            if "flux" in roles and {"wavelength", "log_wavelength"} & roles.keys():
                found.append(hdu)
    # DEEP2 and DEIMOS: each arm, extracted in several ways.
    for way in ("HORNE", "BXSPF"):
        if len(arms := [hdu for hdu in found if hdu.name.upper() in (f"{way}-B", f"{way}-R")]) == 2:
            return arms
    # The first says which: others hold exposures, models or lines.
    return [hdu for hdu in found if hdu.columns.names == found[0].columns.names]


def _is_table(file: OpenFile) -> bool:
    if file.kind != "fits":
        return False
    try:
        return bool(spectrum_tables(file, {}))
    except ValueError:  # ambiguous, which reading says better
        return True


def no_spectrum(file: OpenFile) -> ValueError:
    names = [name for hdu in file.hdus if isinstance(hdu, fits.BinTableHDU) for name in hdu.columns.names]
    found = f"the columns {', '.join(names[:8])}{' and others' * (len(names) > 8)}" if names else "no table"
    return ValueError(
        f"{file.path}: expected a table with columns wavelength and flux, or an image of a spectrum, got {found}; name "
        "the columns with columns={'wavelength': 'NAME', 'flux': 'NAME'}"
    )


def read_fits_table(file: OpenFile, options: Options) -> Iterator[Row]:
    tables = spectrum_tables(file, options.columns)
    if not tables:
        raise no_spectrum(file)
    rows = (row for hdu in tables for row in _rows(file, hdu, options))
    if sum(hdu.header["NAXIS2"] for hdu in tables) > MOST_ORDERS and any(map(_has_vectors, tables)):
        for row in rows:  # a survey, star by star
            row.pop("named")
            yield row
        return
    few = list(rows)
    named = any([row.pop("named") for row in few])
    yield from few if named else as_one_or_each(few, file.stem)


def _has_vectors(hdu: fits.BinTableHDU) -> bool:
    return any(isinstance(column.dtype, np.dtype) and column.dtype.shape != () for column in hdu.columns) or any(
        str(column.format)[:1] in "PQ" for column in hdu.columns
    )


def _rows(file: OpenFile, hdu: fits.BinTableHDU, options: Options) -> Iterator[Row]:
    roles = find_columns(file.path, hdu.columns.names, options.columns)
    units_of = {role: hdu.columns[name].unit for role, name in roles.items()}
    stated = about(
        [file.header, hdu.header], hdu.columns.names.index(roles.get("wavelength") or roles["log_wavelength"])
    )
    n_rows = hdu.header["NAXIS2"]
    if not n_rows:
        return
    one_pixel_a_row = np.ndim(hdu.data[:1][roles["flux"]][0]) == 0
    step = n_rows if one_pixel_a_row else CHUNK_ROWS
    step_name = next((name for name in hdu.columns.names if plain(name) in ("deltaw", "deltalambda")), None)
    lengths = "NELEM" if "NELEM" in hdu.columns.names else None
    classes = next((name for name in hdu.columns.names if plain(name) in ("class", "spectype")), None)
    for start in range(0, n_rows, step):
        # Rows before columns: a column as a whole would be converted, and kept.
        chunk = hdu.data[start : start + step]
        columns = {role: column_of(hdu, chunk, name) for role, name in roles.items()}
        for i in range(1 if one_pixel_a_row else len(chunk)):
            # A copy: the file can then be closed.
            part = {role: np.array(values if one_pixel_a_row else values[i]) for role, values in columns.items()}
            pixels = pixels_of(part)
            if step_name is not None and "wavelength" in pixels and np.ndim(pixels["wavelength"]) == 0:
                # IUE: where the first pixel lies, and how far they are apart.
                count = np.arange(np.size(pixels["flux"]))
                pixels["wavelength"] = pixels["wavelength"] + float(chunk[step_name][i]) * count
            if lengths is not None and not one_pixel_a_row:
                length = int(chunk[lengths][i])
                pixels = {role: values[:length] if np.ndim(values) else values for role, values in pixels.items()}
            row = {**stated, **spectrum_of(pixels, roles, units_of, options), **moving(part, roles, units_of)}
            row["medium"] = row["medium"] or stated.get("medium")
            row.setdefault("bad_bits", _serious(hdu, file, roles))
            if classes is not None and not one_pixel_a_row:
                row["object_class"] = str(chunk[classes][i])
            named = "object_id" in roles and not one_pixel_a_row
            if one_pixel_a_row:
                object_id = file.stem
            else:
                object_id = str(part["object_id"]).strip() if named else f"{file.stem}:{start + i}"
            yield {"object_id": object_id, "named": named, **row}


def _serious(hdu: fits.BinTableHDU, file: OpenFile, roles: Mapping[str, str]) -> int | None:
    """Which bits of a data quality matter: the header of HST says it, the manual of JWST."""
    if "mask" not in roles:
        return None
    if str(file.header.get("TELESCOP", "")).strip() == "JWST":
        return JWST_DO_NOT_USE
    return hdu.header.get("SDQFLAGS", file.header.get("SDQFLAGS"))


_OWN = {
    "survey": "",
    "wavelength_medium": AS_GIVEN,
    "rest_frame": AS_GIVEN,
    "flux_unit": "as given",
    "resolving_power": "as given",
    "normalisation": "as given",
}

ECSV = SpectrumFormat(
    name="ecsv",
    **_OWN,
    note="columns of wavelength and flux, with units",
    identify=is_ecsv,
    read=read_ecsv,
)
FORMATS = (
    SpectrumFormat(
        name="fits-table",
        **_OWN,
        note="columns of wavelength and flux, and where known of error, mask, object_id: vectors, or one pixel a row",
        identify=_is_table,
        read=read_fits_table,
    ),
    ECSV,
    SpectrumFormat(
        name="votable",
        **_OWN,
        note="columns of wavelength and flux, with units",
        identify=lambda file: file.kind == "votable",
        read=read_votable,
    ),
    SpectrumFormat(
        name="text",
        **_OWN,
        note="one line a pixel; columns with names, or two or three without: wavelength, flux, error",
        identify=lambda file: file.kind == "text",
        read=read_text,
    ),
)
