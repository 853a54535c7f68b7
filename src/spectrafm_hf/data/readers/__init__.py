# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Read spectra from files of any survey, star by star, as rows of the schema.

`find_files` lists the files below some paths, `read_spectra` reads their rows. Rows are read lazily, so a file may be
larger than the memory. Each format has its own module, which states the medium, the frame and the units of its spectra;
`formats` lists them.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from ...files import SPECTRUM_SUFFIXES, one_line
from ...models.gate_spectrafm import SPEED_OF_LIGHT
from ..scalars import join_scalars
from ..schema import with_errors
from . import (
    apogee,
    arrays,
    desi,
    gaia,
    gaia_continuous,
    galah,
    images,
    lamost,
    miles,
    other,
    parquet,
    sdss,
    tables,
    text,
)
from .base import (
    APOGEE_PIXEL_BITS,
    BAD_BITS,
    Failure,
    OpenFile,
    Options,
    Row,
    SpectrumFormat,
    angstrom_per,
    finish,
    usable,
)


__all__ = [
    "APOGEE_PIXEL_BITS",
    "BAD_BITS",
    "Failure",
    "Row",
    "SpectrumFormat",
    "batched",
    "count_spectra",
    "find_files",
    "formats",
    "read_spectra",
]

#: Value of `radial_velocity` that has the velocity of each star measured.
MEASURE = "measure"
#: In the order in which they are tried on a file: the most specific first.
_MODULES = (
    *(gaia_continuous, parquet, arrays, apogee, sdss, desi, galah, lamost, gaia, miles, other, tables, text),
    images,
)


def formats() -> list[SpectrumFormat]:
    """All file formats."""
    return [format for module in _MODULES for format in module.FORMATS]


def find_files(
    paths: Iterable[str | os.PathLike[str]], split: str | None = None, failures: list[Failure] | None = None
) -> list[Path]:
    """List the files of `paths`; all are checked before the first is read.

    Parameters
    ----------
    paths : iterable of path
        Files; folders of data sets (`data/<split>-*.parquet`); other folders, which are searched with all folders in
        them for names that end like those of spectra.
    split : str, optional
        Split of the data sets. Default: all.
    failures : list of Failure, optional
        Missing paths are appended to this list. Without it, they are an error.

    Returns
    -------
    list of pathlib.Path

    Raises
    ------
    ValueError
        For a path that does not exist, a folder without spectra, a split that is not there.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        try:
            files += _files_of(path, split)
        except (ValueError, OSError) as error:
            _fail(path, error, failures)
    return files


def _files_of(path: Path, split: str | None) -> list[Path]:
    if not path.exists():
        raise ValueError(f"{path}: expected a file or a folder, got nothing of this name")
    if not path.is_dir():
        if split is not None:
            raise ValueError(f"split: expected a data set folder to take {split!r} from, got the file {path}")
        return [path]
    shards = sorted(path.glob("data/*.parquet"))
    if shards:
        splits = sorted(set(map(_split_of, shards)))
        if split is not None and split not in splits:
            raise ValueError(f"split: expected one of {splits} in {path}, got {split!r}")
        return [shard for shard in shards if split in (None, _split_of(shard))]
    if split is not None:
        raise ValueError(f"split: expected a data set folder with data/*.parquet to take {split!r} from, got {path}")
    # Hidden files belong to other programs or to interrupted builds.
    inside = (file for file in path.rglob("*") if "/." not in f"/{file.relative_to(path).as_posix()}")
    files = sorted(file for file in inside if file.is_file() and _looks_like_a_spectrum(file))
    # The sampling files of GaiaXPy are read with their spectra.
    stems = {file.name.partition(".")[0] for file in files}
    files = [
        file
        for file in files
        if file.name.partition(".")[0].removesuffix("_sampling") not in stems - {file.name.partition(".")[0]}
    ]
    if not files:
        raise ValueError(f"{path}: expected a data set folder with data/*.parquet, or files of spectra, got none")
    return files


def _looks_like_a_spectrum(file: Path) -> bool:
    return file.name.lower().removesuffix(".gz").endswith(SPECTRUM_SUFFIXES)


def _split_of(shard: Path) -> str:
    return shard.name.partition("-")[0]


def count_spectra(files: Iterable[Path]) -> int | None:
    """Number of spectra in some Parquet files, from their metadata; None if another kind of file is among them."""
    total = 0
    for path in files:
        if path.suffix.lower() != ".parquet":
            return None
        with OpenFile(path) as file:
            total += file.parquet.metadata.num_rows
    return total


def read_spectra(
    files: Iterable[str | os.PathLike[str]],
    *,
    format: str | None = None,
    visits: bool = False,
    bad_bits: Sequence[str] | None = None,
    wavelength_unit: str = "Angstrom",
    wavelength_medium: str | None = None,
    grid: ArrayLike | None = None,
    radial_velocity: float | str | None = None,
    radial_velocity_column: str | None = None,
    at_rest: bool = False,
    resolving_power: float | None = None,
    columns: Mapping[str, str] | None = None,
    failures: list[Failure] | None = None,
    keep_refused: bool = False,
    scalars: Sequence[str] = (),
    scalar_table: str | os.PathLike[str] | None = None,
) -> Iterator[Row]:
    """Read the spectra of some files, one after the other, as rows of the schema.

    Parameters
    ----------
    files : iterable of path
        As `find_files` returns them.
    format : str, optional
        One of the names in `formats()`. Default: detected from the content of each file.
    visits : bool
        Read single visits or exposures instead of their combination, where a file has both (apStar, LAMOST MRS).
    bad_bits : sequence of str, optional
        Flags of `APOGEE_PIXEL_BITS` that mask a pixel of APOGEE. Default: `BAD_BITS`.
    wavelength_unit : str
        Unit of wavelengths in files that state none, as astropy writes it.
    wavelength_medium : {"vacuum", "air"}, optional
        Medium of the wavelengths where neither file nor format states it. Default: vacuum, with the flag
        `medium_unstated` where the difference matters.
    grid : array of shape (pixels,), optional
        Wavelengths of NumPy files that hold only fluxes.
    radial_velocity : float or "measure", optional
        Velocity in km/s by which to shift to the rest frame, instead of those in the files. It has no effect on
        spectra at rest. With "measure" the others are not shifted and get `rest_frame` = False; the velocity is
        measured later.
    radial_velocity_column : str, optional
        Column with the velocity of each star (km/s), which shifts it to the rest frame.
    at_rest : bool
        Wavelengths are at rest where the file does not state the frame. By default this is assumed too, with the flag
        `frame_unstated` where a velocity would matter.
    resolving_power : float, optional
        Wavelength / FWHM of all spectra, instead of the values in the files.
    columns : mapping of str to str, optional
        Names of columns by role, where they are not recognised: `{"wavelength": "wave", "flux_error": "err"}`; "none"
        ignores a column.
    failures : list of Failure, optional
        Files that cannot be read are appended to this list and skipped. Without it, the first one is an error.
    keep_refused : bool
        Also yield spectra that are not of stars, with the reason in `refused`. Without it, they are failures.
    scalars : sequence of str
        Further columns to read, with one number for each star, and their `<name>_err`; from tables with one spectrum a
        row.
    scalar_table : path, optional
        Table with these columns, see `ScalarTable`, for files that do not have them.

    Yields
    ------
    dict
        `object_id` (if the file has none, the name of the file, and the row if it has several); `survey` (may be
        empty); `wavelength` (Angstrom, vacuum), `flux`, `flux_error` (one sigma, NaN if unknown), float32, and `mask`
        (True = bad), arrays of one length if they are so in the file (the tokenizer checks them); `snr`,
        `radial_velocity` (km/s, NaN if unknown), the scalars in the file, and the labels of a Parquet file;
        `rest_frame`, False if the wavelengths are not at rest because the velocity is unknown, None if the frame is not
        stated; `resolving_power` (NaN if unknown); `normalised` (by a continuum; None if unknown); `flags`, a list of
        assumptions that matter; `visit`, the number of a visit (visits of a star share their `object_id`); `file`, the
        path.

    Raises
    ------
    ValueError
        Names the file, what was expected and what was found.
    """
    chosen = [known for known in formats() if format in (None, known.name)]
    if not chosen:
        raise ValueError(f"format: expected one of {[known.name for known in formats()]}, got {format!r}")
    if wavelength_medium not in (None, "vacuum", "air"):
        raise ValueError(f"wavelength_medium: expected 'vacuum' or 'air', got {wavelength_medium!r}")
    if unknown := sorted(set(bad_bits or ()) - APOGEE_PIXEL_BITS.keys()):
        raise ValueError(f"bad_bits: expected names out of {list(APOGEE_PIXEL_BITS)}, got {unknown}")
    if resolving_power is not None and not 1 < resolving_power < np.inf:
        raise ValueError(f"resolving_power: expected wavelength / FWHM, a number above 1, got {resolving_power}")
    if isinstance(radial_velocity, str) and radial_velocity != MEASURE:
        raise ValueError(f"radial_velocity: expected km/s or {MEASURE!r}, got {radial_velocity!r}")
    if isinstance(radial_velocity, str):
        velocity: float | None = np.nan
    elif radial_velocity is None or abs(radial_velocity) < SPEED_OF_LIGHT:
        velocity = radial_velocity
    else:
        raise ValueError(f"radial_velocity: expected km/s below the speed of light, got {radial_velocity}")
    wavelengths = None if grid is None else np.asarray(grid, np.float64)
    bits = BAD_BITS if bad_bits is None else tuple(bad_bits)
    options = Options(
        visits,
        bits,
        angstrom_per(wavelength_unit),
        wavelengths,
        {**(columns or {}), **({"radial_velocity": radial_velocity_column} if radial_velocity_column else {})},
        wavelength_medium,
        velocity,
        radial_velocity_column,
        at_rest,
        resolving_power,
        keep_refused,
        with_errors(scalars),
    )
    rows = _read(files, chosen, options, format, failures, keep_refused)
    yield from rows if scalar_table is None else join_scalars(rows, scalars, scalar_table)


def _read(
    files: Iterable[str | os.PathLike[str]],
    chosen: Sequence[SpectrumFormat],
    options: Options,
    format: str | None,
    failures: list[Failure] | None,
    keep_refused: bool,
) -> Iterator[Row]:
    """`read_spectra` after its arguments were checked."""
    for path in map(Path, files):
        found = None
        try:
            with OpenFile(path) as file:
                found = next((known for known in chosen if format is not None or known.identify(file)), None)
                if found is None and file.kind == "fits":
                    raise tables.no_spectrum(file)
                if found is None:
                    what = "an empty one" if file.kind == "empty" else "one of another kind"
                    raise ValueError(f"{path}: expected a FITS, Parquet, VOTable, NumPy or text file, got {what}")
                rows = (finish(row, found, options) for row in found.read(file, options))
                for row in _at_least_one(rows, path):
                    if row["refused"] and not keep_refused:
                        _refuse(row, path, failures)
                    else:
                        yield {**row, "file": path}
        except Exception as error:  # The libraries raise all kinds of errors on damaged files.
            _fail(path, error, failures, found)


def _refuse(row: Row, path: Path, failures: list[Failure] | None) -> None:
    cause = f"{row['object_id']}: {row['refused']}"
    if failures is None:
        raise ValueError(f"{path}: {cause}")
    failures.append(Failure(path, cause))


def _fail(path: Path, error: Exception, failures: list[Failure] | None, format: SpectrumFormat | None = None) -> None:
    """Raise an error of one line that names the file and the cause, or append it to `failures`."""
    cause = one_line(error) or type(error).__name__
    if isinstance(error, MemoryError):
        detail = f" ({cause})" if str(error) else ""
        cause = f"{path}: expected a file whose arrays fit into memory, got a header with larger ones{detail}"
    elif not (isinstance(error, ValueError) and str(path) in cause):
        known = isinstance(error, (ValueError, OSError))
        what = "that can be read" if known or format is None else f"of the format {format.name}"
        cause = f"{path}: expected a file {what}, got {'' if known else f'{type(error).__name__}: '}{cause}"
    if failures is None:
        raise ValueError(cause) from error
    failures.append(Failure(path, cause, _may_pass(error)))


def _may_pass(error: BaseException | None) -> bool:
    """
    Whether the operating system caused an error, not the content of the file. Only its errors have a number; EINVAL
    also comes from damaged files that point outside themselves.
    """
    if error is None:
        return False
    by_system = isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)
    return by_system or _may_pass(error.__cause__)


def _at_least_one(rows: Iterator[Row], path: Path) -> Iterator[Row]:
    """The rows; raises if there are none, or if the only one has no usable pixel."""
    first = next(rows, None)
    if first is None:
        raise ValueError(f"{path}: expected at least one spectrum, got none")
    if not usable(first) and not first["refused"]:
        second = next(rows, None)
        if second is None:
            what = f"{first['flux'].size} that are masked or not finite" if first["flux"].size else "none"
            raise ValueError(f"{path}: expected pixels with a flux, got {what}")
        rows = itertools.chain([second], rows)
    yield first
    yield from rows


def batched(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """Rows in lists of `size`; the last may be shorter."""
    rows = iter(rows)
    while batch := list(itertools.islice(rows, size)):
        yield batch
