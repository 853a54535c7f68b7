# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Spectra out of files of any survey, star by star, as rows of the one schema.

`find_files` makes files of what a person names, `read_spectra` rows of files. Nothing is read before it is asked for,
so a file may be larger than the memory. Each format has a module of its own and states what its spectra are, in air or
vacuum, at rest or not, in what units; `formats` lists them.
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

#: As a radial velocity: that of each star is to be measured.
MEASURE = "measure"
#: In the order in which they are asked whether a file is theirs: those that look closest first.
_MODULES = (
    *(gaia_continuous, parquet, arrays, apogee, sdss, desi, galah, lamost, gaia, miles, other, tables, text),
    images,
)


def formats() -> list[SpectrumFormat]:
    """All formats that are known."""
    return [format for module in _MODULES for format in module.FORMATS]


def find_files(
    paths: Iterable[str | os.PathLike[str]], split: str | None = None, failures: list[Failure] | None = None
) -> list[Path]:
    """The files behind `paths`, all checked before the first is read.

    Parameters
    ----------
    paths : iterable of path
        Files; folders of data sets (`data/<split>-*.parquet`); any other folders, all files in and below them whose
        names end as those of spectra do.
    split : str, optional
        Which split of the data sets. Default: all.
    failures : list of Failure, optional
        Gets what is not there. Without it, that is an error.

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
    # Hidden ones are other programs' business, such as builds that were interrupted.
    inside = (file for file in path.rglob("*") if "/." not in f"/{file.relative_to(path).as_posix()}")
    files = sorted(file for file in inside if file.is_file() and _looks_like_a_spectrum(file))
    # What GaiaXPy writes beside its spectra is read with them.
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
    """How many spectra some files hold, where all are Parquet files, which tell it at once; else None."""
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
    """Spectra of some files, one after the other, in the schema of this project.

    Parameters
    ----------
    files : iterable of path
        As `find_files` returns them.
    format : str, optional
        Name out of `formats()`. Default: each file tells by its content.
    visits : bool
        The visits or exposures of a star, where a file holds them beside their combination (apStar, LAMOST MRS).
    bad_bits : sequence of str, optional
        Which flags of `APOGEE_PIXEL_BITS` mask a pixel of APOGEE. Default: `BAD_BITS`.
    wavelength_unit : str
        Unit of wavelengths that bring none; astropy knows it.
    wavelength_medium : {"vacuum", "air"}, optional
        What wavelengths are measured in where neither file nor format states it. Default: vacuum, with the flag
        `medium_unstated` where the difference shows.
    grid : array of shape (pixels,), optional
        Wavelengths of NumPy files that hold fluxes alone.
    radial_velocity : float or "measure", optional
        km/s by which to shift to the rest frame, instead of what the files say. For spectra at rest it does nothing.
        "measure" leaves all others where they are, with a `rest_frame` of False, to be measured behind.
    radial_velocity_column : str, optional
        Column with the velocity of each star (km/s), which shifts it to the rest frame.
    at_rest : bool
        Wavelengths are at rest where the file does not state the frame. Default: they are taken so, with the flag
        `frame_unstated` where a velocity would show.
    resolving_power : float, optional
        Wavelength / FWHM of all spectra, instead of what the files say.
    columns : mapping of str to str, optional
        Names of columns by role, where they do not tell: `{"wavelength": "wave", "flux_error": "err"}`; "none" leaves
        one out.
    failures : list of Failure, optional
        Gets the files that cannot be read, and the others go on. Without it, the first is an error.
    keep_refused : bool
        Yield what is no spectrum of a star too, with the reason in `refused`. Without it, that is a failure.
    scalars : sequence of str
        Columns of numbers, one for each star, to be read too, as is `<name>_err`: of tables with a spectrum in a row.
    scalar_table : path, optional
        Table with these columns, see `ScalarTable`: for spectra that do not bring them.

    Yields
    ------
    dict
        `object_id` (where a file gives none: the name of the file, and the row if it has several), `survey` (may be
        empty); `wavelength` (Angstrom, vacuum), `flux`, `flux_error` (one sigma, NaN where not known), float32, and
        `mask` (True = bad), arrays of one length, if the file holds them so: the tokenizer says what it cannot use;
        `snr`, `radial_velocity` (km/s, NaN if not known) and the scalars that the file tells, and the labels of a
        Parquet file; `rest_frame`, False if the wavelengths are not at rest for want of a velocity, None if nobody
        states the frame; `resolving_power` (NaN if not known), `normalised` (by a continuum; None if not known);
        `flags`, a list of what was assumed and matters; `visit`, which of a star, whose `object_id` they share; `file`,
        the path.

    Raises
    ------
    ValueError
        Naming the file, what was expected and what was found.
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
    """`read_spectra` with checked arguments."""
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
        except Exception as error:  # Files hold anything, and any of the many libraries may stumble over it.
            _fail(path, error, failures, found)


def _refuse(row: Row, path: Path, failures: list[Failure] | None) -> None:
    cause = f"{row['object_id']}: {row['refused']}"
    if failures is None:
        raise ValueError(f"{path}: {cause}")
    failures.append(Failure(path, cause))


def _fail(path: Path, error: Exception, failures: list[Failure] | None, format: SpectrumFormat | None = None) -> None:
    """One line that names the file and the cause, kept or raised."""
    cause = one_line(error) or type(error).__name__
    if isinstance(error, MemoryError):
        said = f" ({cause})" if str(error) else ""
        cause = f"{path}: expected a file whose arrays fit into the memory, got a header that states larger ones{said}"
    elif not (isinstance(error, ValueError) and str(path) in cause):
        known = isinstance(error, (ValueError, OSError))
        what = "that can be read" if known or format is None else f"as those of {format.name} are"
        cause = f"{path}: expected a file {what}, got {'' if known else f'{type(error).__name__}: '}{cause}"
    if failures is None:
        raise ValueError(cause) from error
    failures.append(Failure(path, cause, _may_pass(error)))


def _may_pass(error: BaseException | None) -> bool:
    """
    Whether the system, not what is in the file, is at fault: only its errors have a number. One of them is that of a
    place which a damaged file names and does not have.
    """
    if error is None:
        return False
    by_system = isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)
    return by_system or _may_pass(error.__cause__)


def _at_least_one(rows: Iterator[Row], path: Path) -> Iterator[Row]:
    """The rows; a file without any, or whose only one has no pixel that counts, is an error."""
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
