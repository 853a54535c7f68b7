# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
Gaia DR3: XP spectra as coefficients of basis functions, the most common form.

The archive provides them by DataLink (RAW) as CSV, ECSV, FITS and VOTable, one star a row, and in bulk as
`XpContinuousMeanSpectrum_*.csv.gz`. Arrays are columns, or text in brackets. They are converted to sampled spectra on
the grid of the archive.

Data model: gea.esac.esa.int/archive/documentation/GDR3, 20.12.3 (xp_continuous_mean_spectrum).
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ..xp_basis import BANDS, N_COEFFICIENTS, N_CORRELATIONS, SAMPLING, Band, XPBasis, xp_basis
from .base import TOO_COARSE, VACUUM, OpenFile, Options, Row, SpectrumFormat
from .gaia import XP_GRID, split_heading, tables_of
from .late import fits


#: Stars per batch: the covariances of a star have 800 kB.
CHUNK_ROWS = 64
BLOCK_BYTES = 1 << 20
_KINDS = {
    "coefficients": N_COEFFICIENTS,
    "coefficient_errors": N_COEFFICIENTS,
    "coefficient_correlations": N_CORRELATIONS,
}
#: Numbers of a star in each column.
COLUMNS = {f"{band}_{kind}": size for band in BANDS for kind, size in _KINDS.items()}
#: Flags of spectra without one of the bands.
NO_BAND = {band: f"no_{band}" for band in BANDS}
_GRID = XP_GRID.astype(np.float32)  # exact
_MISSING = (b"", b"null", b"nan", b"NaN", b"None", b"[]", b"()", b"--")

#: A star: identifier, and for each column its numbers, text in brackets, or None.
Line = tuple[str, Sequence[Any]]


def is_continuous(file: OpenFile) -> bool:
    """Whether a file has coefficients of XP spectra."""
    if file.kind == "parquet":
        return "bp_coefficients" in map(str.lower, file.parquet.schema_arrow.names)
    if file.kind == "fits":
        names = {name.lower() for hdu in file.hdus[1:] for name in getattr(getattr(hdu, "columns", None), "names", ())}
        return "bp_coefficients" in names
    if file.kind not in ("text", "votable") or b"bp_coefficients" in file.head.lower():
        return file.kind in ("text", "votable")
    if not all(line.startswith("#") for line in file.first_lines):
        return False
    # The description of the columns is longer than `head`.
    return "bp_coefficients" in next((line for line in file.text() if not line.startswith("#")), "").lower()


def read_continuous(file: OpenFile, options: Options) -> Iterator[Row]:
    basis = xp_basis()
    chunks = {"parquet": _of_parquet, "fits": _of_fits, "votable": _of_votable}.get(file.kind, _of_text)(file)
    for identifiers, columns, causes in chunks:
        yield from _rows(basis, identifiers, columns, causes)


def _rows(
    basis: XPBasis, identifiers: Sequence[str], columns: Sequence[NDArray[np.float64]], causes: Sequence[str]
) -> Iterator[Row]:
    bands = {band: Band(*columns[3 * i : 3 * i + 3]) for i, band in enumerate(BANDS)}
    flux, error = basis.sample(bands)
    # As for sampled spectra of the archive.
    median = _median(flux)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):  # such pixels are masked
        # In the types of the schema: converting all stars at once is faster.
        scaled, sigma = ((values / median[:, None]).astype(np.float32) for values in (flux, error))
    known = {band: bands[band].known for band in BANDS}
    for i, object_id in enumerate(identifiers):
        missing = [band for band in BANDS if not known[band][i]]
        row: Row = {"object_id": object_id, "wavelength": _GRID, "flux": scaled[i], "flux_error": sigma[i]}
        row["medflux"] = float(median[i])
        if causes[i] or len(missing) == len(BANDS):
            row["refused"] = causes[i] or "bp_coefficients, rp_coefficients: expected at least one of them, got none"
        elif missing:
            row["flags"] = [NO_BAND[band] for band in missing]
        yield row


def _median(flux: NDArray[np.float64]) -> NDArray[np.float64]:
    """(stars, pixels) -> (stars,), over the finite pixels; NaN without any."""
    median = np.median(flux, axis=1)
    for i in np.flatnonzero(np.isnan(median)):
        there = flux[i][np.isfinite(flux[i])]
        median[i] = np.median(there) if there.size else np.nan
    return median


#: Identifiers, the six columns (stars, numbers) with NaN where a band is missing, and the reason if a star is unusable.
Chunk = tuple[Sequence[str], list[NDArray[np.float64]], list[str]]


def _chunk(identifiers: Sequence[str], columns: dict[str, Any]) -> Chunk:
    """Arrays (stars, numbers) from arrays or from lists of numbers, whose lengths are checked here."""
    causes = [""] * len(identifiers)
    found = []
    for name, size in COLUMNS.items():
        stated = columns[name]
        if type(stated) is np.ndarray and stated.shape == (len(identifiers), size):
            found.append(stated.astype(np.float64))
            continue
        values = np.full((len(identifiers), size), np.nan)
        for i, numbers in enumerate(stated):
            length = 0 if numbers is None else np.size(numbers)
            if length == size:
                values[i] = np.ma.filled(numbers, np.nan) if np.ma.isMaskedArray(numbers) else numbers
            elif length > 1:
                causes[i] = causes[i] or f"{name}: expected {size} numbers, got {length}"
        found.append(values)
    return identifiers, found, causes


# ---------------------------------------------------------------------------------------------------------------- text


def _of_text(file: OpenFile) -> Iterator[Chunk]:
    lines = _lines(file)
    header = next((line for line in lines if line and not line.startswith(b"#")), b"").decode(file.encoding)
    names = split_heading(header.removeprefix("\ufeff").lower())
    if absent := [name for name in ("source_id", *COLUMNS) if name not in names]:
        raise ValueError(f"{absent[0]}: expected a column of this name in {file.path}, got {', '.join(names)}")
    delimiter = b"," if "," in header else b" "
    where = [names.index(name) for name in ("source_id", *COLUMNS)]
    batch = []
    for line in lines:
        if line.strip():
            batch.append(_fields(line, len(names), delimiter, where, file))
        if len(batch) == CHUNK_ROWS:
            yield _parsed(batch)
            batch = []
    if batch:
        yield _parsed(batch)


def _lines(file: OpenFile) -> Iterator[bytes]:
    """Read in large blocks: those of the standard library are shorter than a line of these files."""
    rest = b""
    with _opened(file) as stream:
        while block := stream.read(BLOCK_BYTES):
            first, *others = block.split(b"\n")
            rest += first
            for line in others:
                yield rest
                rest = line
    if rest:
        yield rest


def _opened(file: OpenFile) -> Any:
    with file.path.open("rb") as start:
        if start.read(2) != b"\x1f\x8b":
            return file.path.open("rb")
    try:
        from isal import igzip  # of the extra `gaia`: three times as fast
    except ImportError:
        return pa.input_stream(str(file.path), compression="gzip")
    return igzip.open(file.path)


def _fields(line: bytes, n_fields: int, delimiter: bytes, where: Sequence[int], file: OpenFile) -> list[bytes]:
    """The needed fields of a line: arrays are in quotes and contain none."""
    fields: list[bytes] = []
    parts = line.rstrip(b"\r").split(b'"')
    last = len(parts) - 1
    for i, part in enumerate(parts):
        if i % 2:
            fields.append(part)
            continue
        # Delimiters next to quotes are split off with them.
        part = part[(i > 0) : len(part) - (i < last)] if part else part
        if part or (i in (0, last) and last == 0):
            fields += part.split(delimiter)
    if len(fields) != n_fields:
        csv.field_size_limit(1 << 24)
        text = line.decode(file.encoding)
        fields = [field.encode() for field in next(csv.reader([text], delimiter=delimiter.decode()))]
    if len(fields) != n_fields:
        raise ValueError(f"{file.path}: expected {n_fields} fields in each line, got {len(fields)}: {line[:40]!r}...")
    return [fields[place] for place in where]


def _parsed(lines: Sequence[Sequence[bytes]]) -> Chunk:
    identifiers = [fields[0].decode("ascii", "replace").strip() for fields in lines]
    columns, causes = [], [""] * len(lines)
    for place, (name, size) in enumerate(COLUMNS.items(), start=1):
        texts = [fields[place] for fields in lines]
        stars = [i for i, text in enumerate(texts) if len(text) > 5 or text.strip() not in _MISSING]
        found = arrays_of([texts[i] for i in stars])
        if len(stars) == len(lines) and all(numbers.size == size for numbers in found):
            columns.append(np.stack(found))
            continue
        values = np.full((len(lines), size), np.nan)
        for i, numbers in zip(stars, found, strict=True):
            if numbers.size == size:
                values[i] = numbers
            else:
                causes[i] = causes[i] or f"{name}: expected {size} numbers, got {numbers.size}"
        columns.append(values)
    return identifiers, columns, causes


def arrays_of(texts: Sequence[bytes]) -> list[NDArray[np.float64]]:
    """
    Parse texts such as `[1.5, -2E-3]`, with any brackets or none; words that are not numbers become NaN.

    simdjson (extra `gaia`) is three times as fast as [`decimals`], but reads only JSON, as nearly all of these are.
    """
    try:
        import simdjson
    except ImportError:
        if not texts:
            return []
        ends = np.cumsum([text.count(b",") + 1 for text in texts])
        return np.split(decimals(b",".join(texts)), ends[:-1])
    parser = simdjson.Parser()

    def numbers(text: bytes) -> NDArray[np.float64]:
        try:
            parsed: Any = parser.parse(text)
            return np.frombuffer(parsed.as_buffer(of_type="d"))
        except (ValueError, TypeError, AttributeError):
            return decimals(text)

    return [numbers(b"[" + text[1:-1] + b"]" if text[:1] == b"(" else text) for text in texts]


def decimals(text: bytes) -> NDArray[np.float64]:
    """
    Parse numbers between commas, all at once; brackets and blanks are skipped, words become NaN.

    Arrow is the fastest parser here: it gets one array of strings without a copy of each.
    """
    plain = text.translate(None, b" []()\r\t")
    commas = np.flatnonzero(np.frombuffer(plain, np.uint8) == ord(","))
    ends = np.concatenate(([0], commas - np.arange(len(commas)), [len(plain) - len(commas)])).astype(np.int32)
    numbers = plain.translate(None, b",")
    strings = pa.StringArray.from_buffers(len(ends) - 1, pa.py_buffer(ends), pa.py_buffer(numbers))
    try:
        return strings.cast(pa.float64()).to_numpy()
    except pa.ArrowInvalid:
        return np.array([_number(part) for part in plain.split(b",")])


def _number(text: bytes) -> float:
    try:
        return float(text)
    except ValueError:
        return np.nan


# ------------------------------------------------------------------------------------------------------------- tables


def _of_parquet(file: OpenFile) -> Iterator[Chunk]:
    names = {name.lower(): name for name in file.parquet.schema_arrow.names}
    if absent := [name for name in ("source_id", *COLUMNS) if name not in names]:
        raise ValueError(f"{absent[0]}: expected a column of this name in {file.path}, got {', '.join(names)}")
    for batch in file.parquet.iter_batches(CHUNK_ROWS, columns=[names[name] for name in ("source_id", *COLUMNS)]):
        identifiers = list(map(str, batch.column(names["source_id"]).to_pylist()))
        yield _chunk(identifiers, {name: _lists(batch.column(names[name]), size) for name, size in COLUMNS.items()})


def _lists(column: pa.Array, size: int) -> Any:
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        found = iter(arrays_of([text.encode() for text in column.to_pylist() if text is not None]))
        return [next(found) if there else None for there in column.is_valid().to_pylist()]
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    flat = pc.list_flatten(column).to_numpy(zero_copy_only=False)
    return flat.reshape(-1, size) if (lengths == size).all() else np.split(flat, np.cumsum(lengths)[:-1])


def _of_fits(file: OpenFile) -> Iterator[Chunk]:
    for hdu in file.hdus[1:]:
        names = {name.lower(): name for name in getattr(getattr(hdu, "columns", None), "names", ())}
        if "bp_coefficients" not in names:
            continue
        if absent := [name for name in ("source_id", *COLUMNS) if name not in names]:
            raise ValueError(f"{absent[0]}: expected a column of this name in {file.path}, got {', '.join(names)}")
        heap = _heap(file, hdu)
        for start in range(0, hdu.header["NAXIS2"], CHUNK_ROWS):
            rows = hdu.data[start : start + CHUNK_ROWS]
            identifiers = [str(number) for number in rows[names["source_id"]].tolist()]
            yield _chunk(identifiers, {name: _vectors(rows, hdu.columns[names[name]], heap) for name in COLUMNS})


def _heap(file: OpenFile, hdu: fits.BinTableHDU) -> NDArray[np.uint8] | None:
    """Where the arrays of a table lie whose rows say how long they are; None if they have to be decompressed."""
    with file.path.open("rb") as stream:
        if stream.read(2) == b"\x1f\x8b":
            return None
    begin = hdu.fileinfo()["datLoc"] + hdu.header.get("THEAP", hdu.header["NAXIS1"] * hdu.header["NAXIS2"])
    return np.memmap(file.path, np.uint8, mode="r")[begin:]


def _vectors(rows: fits.FITS_rec, column: fits.Column, heap: NDArray[np.uint8] | None) -> Any:
    """A column of some rows, read directly, because astropy makes an array for each star."""
    kind = re.fullmatch(r"[PQ]([DE])(\(\d*\))?", str(column.format))
    if heap is None or kind is None or column.bscale not in (None, "", 1) or column.bzero not in (None, "", 0):
        return rows[column.name]
    words = rows.view(np.ndarray)[column.name]
    number = np.dtype(">f8" if kind[1] == "D" else ">f4")
    return [np.frombuffer(heap, number, count, offset) if count else None for count, offset in words.tolist()]


def _of_votable(file: OpenFile) -> Iterator[Chunk]:
    for table in tables_of(file):
        names = {name.lower(): name for name in table.colnames}
        if absent := [name for name in ("source_id", *COLUMNS) if name not in names]:
            raise ValueError(f"{absent[0]}: expected a column of this name in {file.path}, got {', '.join(names)}")
        for start in range(0, len(table), CHUNK_ROWS):
            rows = table[start : start + CHUNK_ROWS]
            identifiers = [str(number) for number in rows[names["source_id"]].tolist()]
            yield _chunk(identifiers, {name: list(rows[names[name]]) for name in COLUMNS})


CONTINUOUS = SpectrumFormat(
    name="gaia-xp-continuous",
    survey="gaia-xp",
    wavelength_medium=VACUUM,
    rest_frame=TOO_COARSE,
    flux_unit="the median flux, which becomes `medflux` in W m-2 nm-1",
    resolving_power="30 to 100",
    normalisation="the median over the pixels",
    note="coefficients of DR3 (CSV, ECSV, FITS, VOTable, Parquet, and the bulk files), sampled at 336 to 1020 nm as "
    "by gaiaxpy.calibrate; flagged if BP or RP is missing. Needs GaiaXPy: pip install 'spectrafm_hf[gaia]'",
    identify=is_continuous,
    read=read_continuous,
)
FORMATS = (CONTINUOUS,)
assert np.array_equal(XP_GRID, SAMPLING * 10)
