# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Spectra out of files, star by star: Parquet, CSV, FITS, and data set folders.

Nothing is read before it is asked for, so a file may be larger than the memory. Every reader yields rows of the one
schema (`spectrafm_hf.data.schema`): wavelength in Angstrom in vacuum, flux, one-sigma error, mask (True = bad).
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from astropy import units
from astropy.io import fits
from astropy.utils.exceptions import AstropyUserWarning

from ...models.tokenization_spectrafm import air_to_vacuum


Row = dict[str, Any]


class Failure(NamedTuple):
    """A file that could not be read, and why, in one line."""

    file: Path
    cause: str


@dataclass(frozen=True)
class SpectrumFormat:
    """What the spectra of a kind of file are, and how they are told and read."""

    name: str
    survey: str
    wavelength_medium: str
    rest_frame: str
    flux_unit: str
    resolving_power: str
    normalisation: str
    note: str
    identify: Callable[[Path], bool]
    read: Callable[..., Iterator[Row]]


def formats() -> list[SpectrumFormat]:
    """All formats that are known."""
    return []


PIXEL_COLUMNS = ("wavelength", "flux", "flux_error", "mask")
FITS_SUFFIXES = (".fits", ".fit", ".fits.gz", ".fit.gz")
SUFFIXES = (*FITS_SUFFIXES, ".csv", ".parquet")
ERROR_NAMES = ("error", "err", "sigma", "uncertainty", "ivar", "flux_err", "flux_ivar", "e_flux", "std")
#: Spectra that are held at once: 256 of 8,000 pixels are 30 MB.
CHUNK_ROWS = 256


def find_files(
    paths: Iterable[str | os.PathLike[str]], split: str | None = None, failures: list[Failure] | None = None
) -> list[Path]:
    """The files behind `paths`, all checked before the first is read.

    Parameters
    ----------
    paths : iterable of path
        Files, or folders of data sets (`data/<split>-*.parquet`).
    split : str, optional
        Which split of the folders. Default: all.

    Returns
    -------
    list of pathlib.Path

    Raises
    ------
    ValueError
        For a path that does not exist or is of no known kind, a folder without data, a split that is not there.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            shards = sorted(path.glob("data/*.parquet"))
            splits = sorted(set(map(_split_of, shards)))
            if not shards:
                raise ValueError(f"{path}: expected a data set folder with data/*.parquet, got none")
            wanted = [shard for shard in shards if split in (None, _split_of(shard))]
            if not wanted:
                raise ValueError(f"split: expected one of {splits} in {path}, got {split!r}")
            files += wanted
        elif not path.exists():
            raise ValueError(f"{path}: expected a file or a data set folder, got nothing of this name")
        elif not path.name.lower().endswith(SUFFIXES):
            raise ValueError(f"{path}: expected a name that ends in {', '.join(SUFFIXES)}, got {path.suffix!r}")
        elif split is not None:
            raise ValueError(f"split: expected a data set folder to take {split!r} from, got the file {path}")
        else:
            files.append(path)
    return files


def _split_of(shard: Path) -> str:
    return shard.name.partition("-")[0]


def count_spectra(files: Iterable[Path]) -> int | None:
    """How many spectra some files hold, where all are Parquet files, which tell it at once; else None."""
    total = 0
    for file in files:
        if file.suffix.lower() != ".parquet":
            return None
        with _open_parquet(file) as parquet:
            total += parquet.metadata.num_rows
    return total


def read_spectra(
    files: Iterable[str | os.PathLike[str]],
    *,
    format: str | None = None,
    visits: bool = False,
    bad_bits: Iterable[str] | None = None,
    wavelength_unit: str = "Angstrom",
    wavelength_medium: str | None = None,
    grid: Any = None,
    radial_velocity: float | None = None,
    failures: list[Failure] | None = None,
) -> Iterator[Row]:
    """Spectra of some files, one after the other.

    ============ ======================================================================================================
    Parquet      the schema of this project, one row a spectrum
    CSV          one line a pixel: `wavelength`, `flux`, and where known `flux_error`, `mask` (1 = bad) and `object_id`,
                 which tells the stars apart where a file holds several (the lines of one stand together)
    FITS         a table with columns `wavelength` and `flux` (and where known the other three): one row a spectrum if
                 they hold vectors, one row a pixel if they hold numbers; or any file that specutils recognises
    ============ ======================================================================================================

    Parameters
    ----------
    files : iterable of path
        As `find_files` returns them.
    wavelength_unit : str
        Unit of wavelengths that bring none; astropy knows it.
    wavelength_medium : {"vacuum", "air"}
        What the wavelengths are measured in. FITS images that say air (`CTYPE1 = 'AWAV'`) are believed.

    Yields
    ------
    dict
        `object_id` (where a file gives none: the name of the file, and the row if it has several); `wavelength`,
        `flux`, `flux_error`, `mask`, arrays of one length (if they are not in the file, they are not here: the
        tokenizer says so), an error that is not known being NaN; `file`, the path.

    Raises
    ------
    ValueError
        Naming the file, what was expected and what was found.
    """
    factor = _angstrom(wavelength_unit)
    for file in map(Path, files):
        name = file.name.lower()
        reader = _read_fits if name.endswith(FITS_SUFFIXES) else _read_csv if name.endswith(".csv") else _read_parquet
        try:
            for row in reader(file, factor):
                in_air = row.pop("in_air", False) or wavelength_medium == "air"
                wavelength = row["wavelength"]
                if in_air:
                    # What is no wavelength stays what it is: the tokenizer judges it.
                    real = np.isfinite(wavelength) & (wavelength > 0)
                    wavelength = np.where(real, air_to_vacuum(np.where(real, wavelength, 1.0)), wavelength)
                yield {"survey": "", "snr": np.nan, **row, "wavelength": wavelength, "file": file}
        except (OSError, pa.ArrowException, ValueError) as error:
            if not isinstance(error, ValueError) or isinstance(error, pa.ArrowException):
                error = ValueError(f"{file}: expected a file that can be read, got {error}")
            if failures is None:
                raise error from error.__cause__
            failures.append(Failure(file, str(error)))


def _angstrom(unit: str | units.UnitBase) -> float:
    """Angstrom per unit."""
    try:
        return float(units.Unit(unit).to("Angstrom"))
    except (ValueError, TypeError) as error:
        raise ValueError(f"wavelength_unit: expected a unit of length, got {str(unit)!r}") from error


def batched(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """Rows in lists of `size`; the last may be shorter."""
    rows = iter(rows)
    while batch := list(itertools.islice(rows, size)):
        yield batch


def _demand_columns(file: Path, names: Iterable[str]) -> list[str]:
    names = list(names)
    for name in ("wavelength", "flux"):
        if name not in names:
            raise ValueError(f"{name}: expected among the columns of {file}, got {names}")
    # Errors under another name would be left out without a word.
    if "flux_error" not in names and (similar := [name for name in names if name.lower() in ERROR_NAMES]):
        raise ValueError(f"flux_error: expected one-sigma errors under this name in {file}, got {similar}")
    return names


def _row(object_id: str, wavelength: Any, flux: Any, flux_error: Any = None, mask: Any = None) -> Row:
    """A row of the schema, with what is not known filled in."""
    return {
        "object_id": object_id,
        "wavelength": wavelength,
        "flux": flux,
        "flux_error": np.full(np.shape(flux), np.nan, np.float32) if flux_error is None else flux_error,
        "mask": np.zeros(np.shape(flux), bool) if mask is None else mask,
    }


# ------------------------------------------------------------------------------------------------------------ Parquet


def _open_parquet(file: Path) -> pq.ParquetFile:
    try:
        # Without a buffer for what may be asked for next: it would grow with the file.
        return pq.ParquetFile(file, pre_buffer=False)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{file}: expected a Parquet file, got {error}") from error


def _read_parquet(file: Path, factor: float) -> Iterator[Row]:
    with _open_parquet(file) as parquet:
        names = _demand_columns(file, parquet.schema_arrow.names)
        wanted = [name for name in ("object_id", *PIXEL_COLUMNS) if name in names]
        for name in wanted[wanted.index("wavelength") :]:
            kind = parquet.schema_arrow.field(name).type
            expected = "bool" if name == "mask" else "float"
            right = pa.types.is_boolean if name == "mask" else pa.types.is_floating
            if not right(getattr(kind, "value_type", pa.null())):
                raise ValueError(f"{name}: expected a column of type list<{expected}> in {file}, got {kind}")
        start = 0
        for batch in parquet.iter_batches(CHUNK_ROWS, columns=wanted):
            pixels = {name: _lists(batch.column(name)) for name in PIXEL_COLUMNS if name in wanted}
            ids = batch.column("object_id").to_pylist() if "object_id" in wanted else [None] * len(batch)
            for i, given in enumerate(ids):
                row = {name: lists[i] for name, lists in pixels.items()}
                row["wavelength"] = row["wavelength"] * factor
                yield _row(f"{file.stem}:{start + i}" if given is None else str(given), **row)
            start += len(batch)


def _lists(column: pa.Array) -> list[np.ndarray]:
    """A list column as arrays; a missing list is empty, a missing number NaN, a missing bit of a mask True."""
    flat = pc.list_flatten(column)
    flat = pc.fill_null(flat, True) if pa.types.is_boolean(flat.type) else flat.cast(pa.float64())
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    return np.split(flat.to_numpy(zero_copy_only=False), np.cumsum(lengths)[:-1])


# ---------------------------------------------------------------------------------------------------------------- CSV


def _read_csv(file: Path, factor: float) -> Iterator[Row]:
    from pyarrow import csv as arrow_csv

    with file.open(encoding="utf-8-sig", newline="") as lines:
        try:
            # NumPy writes its header behind a "# ".
            header = next(csv.reader([next(lines, "").lstrip("# ")]), [])
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: expected text in UTF-8, got {error}") from error
    names = _demand_columns(file, [name.strip() for name in header])
    types = {"object_id": pa.string(), "mask": pa.bool_()}
    types |= dict.fromkeys(("wavelength", "flux", "flux_error"), pa.float64())
    wanted = [name for name in types if name in names]
    reader = arrow_csv.open_csv(
        file,
        arrow_csv.ReadOptions(column_names=names, skip_rows=1),
        convert_options=arrow_csv.ConvertOptions(include_columns=wanted, column_types=types),
    )
    # The lines of a star may lie in several blocks; `pieces` are those of the star that is being read.
    seen: set[str] = set()
    current: str | None = None
    pieces: list[pa.RecordBatch] = []
    with reader:
        for batch in reader:
            for object_id, piece in _runs(batch, "object_id" in wanted, file.stem):
                if object_id != current:
                    if pieces:
                        yield _csv_row(current, pieces, factor)
                    if object_id in seen:
                        raise ValueError(
                            f"object_id: expected the lines of a star together in {file}, got {object_id!r} again"
                        )
                    seen.add(object_id)
                    current, pieces = object_id, []
                pieces.append(piece)
    if pieces:
        yield _csv_row(current, pieces, factor)


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


def _csv_row(object_id: str | None, pieces: list[pa.RecordBatch], factor: float) -> Row:
    table = pa.Table.from_batches(pieces)
    columns = {name: table[name].to_numpy() for name in PIXEL_COLUMNS[:3] if name in table.column_names}
    if "mask" in table.column_names:
        columns["mask"] = pc.fill_null(table["mask"], True).to_numpy()
    columns["wavelength"] = columns["wavelength"] * factor
    return _row(str(object_id), **columns)


# --------------------------------------------------------------------------------------------------------------- FITS


def _read_fits(file: Path, factor: float) -> Iterator[Row]:
    with contextlib.ExitStack() as stack:
        try:
            with warnings.catch_warnings():
                # To astropy a file that ends too early is worth a warning.
                warnings.filterwarnings("error", "File may have been truncated", AstropyUserWarning)
                hdus = stack.enter_context(fits.open(file, memmap=not file.name.lower().endswith(".gz")))
                tables = [hdu for hdu in hdus if isinstance(hdu, fits.BinTableHDU)]
        except (OSError, AstropyUserWarning, fits.VerifyError) as error:
            raise ValueError(f"{file}: expected a FITS file, got {error}") from error
        for table in tables:
            # In the exact spelling of the schema: FLUX, WAVELENGTH, IVAR are other surveys' tables.
            names = set(table.columns.names)
            # With "uncertainty" instead of "flux_error" it is a table that specutils wrote.
            if {"wavelength", "flux"} <= names and not ("uncertainty" in names and "flux_error" not in names):
                yield from _read_fits_table(file, table, factor)
                return
        columns = [name for table in tables for name in table.columns.names]
    yield from _read_with_specutils(file, columns)


def _read_fits_table(file: Path, table: fits.BinTableHDU, factor: float) -> Iterator[Row]:
    names = [name for name in PIXEL_COLUMNS if name in _demand_columns(file, table.columns.names)]
    unit = table.columns["wavelength"].unit
    if unit:
        factor = _angstrom(unit)
    has_ids = "object_id" in table.columns.names
    n_rows = table.header["NAXIS2"]
    one_pixel_a_row = n_rows and np.ndim(table.data[:1]["flux"][0]) == 0
    for start in range(0, n_rows, n_rows if one_pixel_a_row else CHUNK_ROWS):
        # Rows before columns: a column as a whole would be converted, and kept.
        chunk = table.data[start : start + (n_rows if one_pixel_a_row else CHUNK_ROWS)]
        columns = {name: chunk[name] for name in names}
        if one_pixel_a_row:
            columns = {name: [column] for name, column in columns.items()}
        for i in range(len(columns["flux"])):
            row = {name: _native(column[i]) for name, column in columns.items()}
            row["wavelength"] = row["wavelength"] * factor
            # Rows of a table are equally long: shorter spectra are filled up with NaN.
            real = np.isfinite(row["wavelength"])
            if not real.all() and all(np.shape(values) == real.shape for values in row.values()):
                row = {name: values[real] for name, values in row.items()}
            if one_pixel_a_row:
                object_id = file.stem
            else:
                object_id = str(chunk["object_id"][i]).strip() if has_ids else f"{file.stem}:{start + i}"
            yield _row(object_id, **row)


def _native(values: Any) -> np.ndarray:
    """A copy in the byte order of this machine; the file can then be closed."""
    array = np.array(values)
    return array if array.dtype == bool else array.astype(np.float64)


def _read_with_specutils(file: Path, columns: list[str]) -> Iterator[Row]:
    from specutils import SpectrumList

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about header cards that play no part here
            spectra = list(SpectrumList.read(file))
    except Exception as error:  # whatever one of the many loaders stumbles over
        reason = " ".join(str(error).split())[:100]
        found = f"the columns {', '.join(columns[:8])}{' and others' * (len(columns) > 8)}" if columns else "no table"
        raise ValueError(
            f"{file}: expected a table with columns wavelength and flux, or a spectrum that specutils recognises, "
            f"got {found} ({reason})"
        ) from error
    rows = [row for spectrum in spectra for row in _specutils_rows(file, spectrum)]
    for i, row in enumerate(rows):
        yield {"object_id": file.stem if len(rows) == 1 else f"{file.stem}:{i}", **row}


def _specutils_rows(file: Path, spectrum: Any) -> Iterator[Row]:
    """Rows without an identifier; a two-dimensional flux holds several."""
    from astropy.nddata import StdDevUncertainty

    try:
        wavelength = spectrum.spectral_axis.to_value("Angstrom", units.spectral())
    except units.UnitConversionError as error:
        raise ValueError(
            f"wavelength: expected a length, frequency or energy in {file}, got {spectrum.spectral_axis.unit}"
        ) from error
    flux = np.asarray(spectrum.flux.value, np.float64)
    if spectrum.uncertainty is None:
        flux_error = np.full(flux.shape, np.nan)
    else:
        with np.errstate(divide="ignore", invalid="ignore"):  # an inverse variance of 0 is an infinite error
            flux_error = np.asarray(spectrum.uncertainty.represent_as(StdDevUncertainty).array, np.float64)
    mask = np.zeros(flux.shape, bool) if spectrum.mask is None else np.asarray(spectrum.mask, bool)
    # FITS writes "air wavelength" so; specutils passes it by.
    in_air = str(spectrum.meta.get("header", {}).get("CTYPE1", "")).startswith("AWAV")
    columns = {"flux": flux, "flux_error": flux_error, "mask": mask}
    for star in np.ndindex(flux.shape[:-1]):
        yield {"wavelength": wavelength, **{name: column[star] for name, column in columns.items()}, "in_air": in_air}
