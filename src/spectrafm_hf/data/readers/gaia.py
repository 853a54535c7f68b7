# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Gaia DR3: sampled XP spectra and RVS spectra from the archive (DataLink or bulk files).

The archive writes VOTable, FITS, CSV and ECSV, in three structures. INDIVIDUAL and COMBINED have one pixel a row and
the columns wavelength (nm), flux, flux_error; the star is named in the header of the table, in a column, or in the name
of the file only ("XP_SAMPLED-Gaia DR3 30343944744320.csv"). RAW and the bulk files (XpSampledMeanSpectrum_*.csv.gz)
have one star a row, with fluxes as an array or as text in brackets, and no wavelengths, because the grids are fixed.

Data model: gea.esac.esa.int/archive/documentation/GDR3, 20.12.1 (rvs_mean_spectrum) and 20.12.4
(xp_sampled_mean_spectrum). Gaia measures in space, in vacuum.
"""

from __future__ import annotations

import csv
import itertools
import re
import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from .base import AT_REST, TOO_COARSE, VACUUM, OpenFile, Options, Row, SpectrumFormat
from .late import fits


if TYPE_CHECKING:
    from astropy.table import Table

#: Angstrom: 336 to 1020 nm in steps of 2 nm, and 846 to 870 nm in steps of 0.01 nm.
XP_GRID = np.arange(3360.0, 10201.0, 20.0)
RVS_GRID = np.round(8460 + 0.1 * np.arange(2401), 1)

_NAMES = {"xp": r"XP_SAMPLED|XpSampledMeanSpectrum", "rvs": r"(^|[-_ ])RVS([-_ .]|$)|RvsMeanSpectrum"}


def _is(product: str, file: OpenFile) -> bool:
    if file.kind not in ("fits", "votable", "text"):
        return False
    if re.search(_NAMES[product], file.name):
        return True
    # If the file was renamed, the grid identifies it.
    if file.kind == "text":
        lines = [line for line in file.first_lines if line.strip() and not line.startswith("#")][:2]
        names = split_heading(lines[0]) if len(lines) == 2 else []
        first_wavelengths = [split_heading(lines[1])[names.index("wavelength")]] if "wavelength" in names else []
        likely = "source_id" in names or first_wavelengths in (["336.0"], ["846.0"], ["336"], ["846"])
    elif file.kind == "fits":
        tables = [hdu for hdu in file.hdus if isinstance(hdu, fits.BinTableHDU)][:1]
        names = [name for table in tables for name in table.columns.names]
        likely = "source_id" in names or any(
            table.header["NAXIS2"] in (XP_GRID.size, RVS_GRID.size) for table in tables
        )
    else:
        if b"source_id" not in file.head and b'"wavelength"' not in file.head:
            return False
        names, likely = next(iter(tables_of(file))).colnames, True
    if not (likely and {"flux", "flux_error"} <= set(names) and {"source_id", "wavelength"} & set(names)):
        return False
    return _product(next(_stars(file))[1]) == product


def is_gaiaxpy(file: OpenFile) -> bool:
    """Output of GaiaXPy: source_id, flux, flux_error as vectors, and the sampling in the file or in a second one."""
    return not re.search("|".join(_NAMES.values()), file.name) and bool(_gaiaxpy_columns(file))


def _gaiaxpy_columns(file: OpenFile) -> list[str]:
    """Columns of a file that may be of GaiaXPy; none for other files."""
    names: list[str] = []
    if file.kind == "text" and b"source_id" in file.head:
        header, first = [*itertools.islice(_content(file), 2), "", ""][:2]
        # Vectors as text.
        names = split_heading(header) if re.search(r"[\[(]", first) else []
    elif file.kind == "fits":
        tables = [hdu for hdu in file.hdus if isinstance(hdu, fits.BinTableHDU)][:1]
        names = [name for hdu in tables if "Sampling" in hdu.header for name in hdu.columns.names]
    elif file.kind == "votable" and b"source_id" in file.head and b'name="sampling"' in file.head:
        names = list(next(iter(tables_of(file))).colnames)
    known = {"source_id", "flux", "flux_error", "xp", "solution_id", "correlation", "standard_deviation"}
    return names if {"source_id", "flux", "flux_error"} <= set(names) <= known else []


def _content(file: OpenFile) -> Iterator[str]:
    return (line for line in file.text() if line.strip() and not line.startswith("#"))


def _sampling(file: OpenFile) -> np.ndarray | None:
    """The sampling in nm or in pseudo-wavelengths; None if there is none."""
    text = None
    if file.kind == "fits":
        text = str(file.hdus[1].header.get("Sampling"))
    elif file.kind == "votable":
        return _array(next(iter(tables_of(file))).meta["sampling"])
    else:
        comments = itertools.takewhile(lambda line: line.startswith("#"), file.text())
        text = next((line for line in comments if re.match(r"#\s*sampling:", line)), None)
    for suffix in (file.path.suffix, ".csv", ".ecsv"):
        beside = file.path.with_name(f"{file.stem}_sampling{suffix}")
        if text is None and beside.is_file():
            with beside.open(encoding="utf-8") as lines:
                text = "".join(line for line in lines if not line.startswith("#"))
    # Under NumPy 2 GaiaXPy writes np.float64(336.0).
    plain = re.sub(r"np\.float\d+\(([^)]*)\)", r"\1", text or "")
    found = re.search(r"[\[(]([^\])]*)[\])]", plain)
    return None if found is None else _array(found[1])


def read_gaiaxpy(file: OpenFile, options: Options) -> Iterator[Row]:
    if "xp" in _gaiaxpy_columns(file):
        raise ValueError(
            f"{file.path}: expected spectra in wavelengths, got output of gaiaxpy.convert, in pseudo-wavelengths; use "
            "gaiaxpy.calibrate"
        )
    sampling = _sampling(file)
    grid = options.grid * options.angstrom if options.grid is not None else None if sampling is None else sampling * 10
    if grid is None:
        raise ValueError(
            f"wavelength: expected {file.stem}_sampling.csv, which gaiaxpy writes, in the folder of {file.path}, got "
            "none; copy it there, or give the wavelengths (Angstrom) with grid=WAVELENGTHS"
        )
    same = grid.size == XP_GRID.size and np.allclose(grid, XP_GRID)
    for row in _scaled(_read("xp", np.round(grid, 3), file)):
        # No checkpoint was trained on another grid.
        yield row if same else {**row, "survey": "gaia-xp-resampled"}


def _product(star: dict[str, Any]) -> str | None:
    wavelength = star.get("wavelength")
    if wavelength is None:
        return {XP_GRID.size: "xp", RVS_GRID.size: "rvs"}.get(len(star["flux"]))
    for product, grid in (("xp", XP_GRID), ("rvs", RVS_GRID)):
        if len(wavelength) and np.allclose([wavelength[0] * 10, wavelength[-1] * 10], grid[[0, -1]]):
            return product
    return None


def _stars(file: OpenFile) -> Iterator[tuple[str, dict[str, Any]]]:
    """Identifiers and columns (wavelengths in nm, or none) of the stars of a file."""
    if file.kind == "text":
        yield from _stars_of_lines(file)
        return
    for table in tables_of(file):
        if np.ndim(table["flux"]) > 1 or table["flux"].dtype == object:
            for line in table:
                yield str(line["source_id"]), {name: _array(line[name]) for name in ("flux", "flux_error")}
            continue
        columns = {name: _array(table[name]) for name in ("wavelength", "flux", "flux_error")}
        if "source_id" in table.colnames:
            ids = np.asarray(table["source_id"])
            for part in np.split(np.arange(len(ids)), np.flatnonzero(ids[1:] != ids[:-1]) + 1):
                yield str(ids[part[0]]), {name: values[part] for name, values in columns.items()}
        else:
            yield str(table.meta.get("source_id") or _named(file)), columns


def tables_of(file: OpenFile) -> Iterator[Table]:
    from astropy.table import Table

    if file.kind == "fits":
        for hdu in file.hdus[1:]:
            table = Table.read(hdu)
            table.meta["source_id"] = hdu.header.get("SOURCE_ID", hdu.header.get("source_id"))
            yield table
        return
    from astropy.io import votable

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about details of the standard
        for parsed in votable.parse(str(file.path)).iter_tables():
            table = parsed.to_table(use_names_over_ids=True)
            parameters = {parameter.name: parameter.value for parameter in parsed.params}
            table.meta["source_id"] = parameters.get("source_id")
            table.meta["sampling"] = parameters.get("sampling")
            yield table


def _stars_of_lines(file: OpenFile) -> Iterator[tuple[str, dict[str, Any]]]:
    # The bulk files have gigabytes, so they are read line by line. Their lines exceed the default limit of the module.
    csv.field_size_limit(1 << 24)
    lines: Iterable[str] = (line for line in file.text() if not line.startswith("#"))
    header = next(iter(lines), "")
    names = split_heading(header)
    for name in ("flux", "flux_error"):
        if name not in names:
            raise ValueError(f"{name}: expected a column of this name in {file.path}, got {names}")
    # ECSV may have blanks between its columns.
    reader = csv.DictReader(lines, names, delimiter="," if "," in header else " ")
    for object_id, rows in itertools.groupby(reader, lambda row: row.get("source_id") or _named(file)):
        pixels = []
        for row in rows:
            if re.match(r"\s*[\[(]", row["flux"]):
                yield object_id, {name: _array(row[name]) for name in ("flux", "flux_error")}
            else:
                pixels.append([float(row[name] or "nan") for name in ("wavelength", "flux", "flux_error")])
        if pixels:
            yield object_id, dict(zip(("wavelength", "flux", "flux_error"), np.array(pixels).T, strict=True))


def split_heading(line: str) -> list[str]:
    return re.split(r"[, ]+", line.replace('"', "").strip())


def _named(file: OpenFile) -> str:
    found = re.search(r"\d{4,19}", file.stem.partition("DR3")[2])
    return found.group() if found else file.stem


def _array(values: Any) -> np.ndarray:
    """Numbers of a column, or of text in brackets; NaN where missing."""
    if isinstance(values, str):
        numbers = (number.strip() for number in values.strip("[]() ").split(","))
        values = ["nan" if number in ("", "null", "None") else number for number in numbers]
    with np.errstate(invalid="ignore"):  # NaN of every kind may be converted
        return np.ma.filled(np.ma.asarray(values).astype(np.float64), np.nan)


def _read(product: str, grid: np.ndarray, file: OpenFile) -> Iterator[Row]:
    for object_id, columns in _stars(file):
        wavelength = columns.get("wavelength")
        if wavelength is None and len(columns["flux"]) != grid.size:
            raise ValueError(
                f"flux: expected {grid.size} values in {file.path}, got {len(columns['flux'])} ({object_id})"
            )
        with np.errstate(over="ignore"):  # an infinite median is refused
            wavelength = grid if wavelength is None else np.round(wavelength * 10, 3)
        yield {"object_id": object_id, **columns, "wavelength": wavelength}


def read_xp(file: OpenFile, options: Options) -> Iterator[Row]:
    yield from _scaled(_read("xp", XP_GRID, file))


def _scaled(rows: Iterator[Row]) -> Iterator[Row]:
    for row in rows:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # about spectra of NaN
            median = np.nanmedian(row["flux"])
        # As in the data set gaia-xp, on which the bundled checkpoint was trained.
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):  # such pixels are masked
            row["flux"], row["flux_error"] = row["flux"] / median, row["flux_error"] / median
        yield {**row, "medflux": float(median)}


def read_rvs(file: OpenFile, options: Options) -> Iterator[Row]:
    yield from _read("rvs", RVS_GRID, file)


FORMATS = (
    SpectrumFormat(
        name="gaiaxpy",
        survey="gaia-xp",
        wavelength_medium=VACUUM,
        rest_frame=TOO_COARSE,
        flux_unit="the median flux, which becomes `medflux` in W m-2 nm-1",
        resolving_power="30 to 100",
        normalisation="the median over the pixels",
        note="output of gaiaxpy.calibrate, with its sampling; output of gaiaxpy.convert is refused",
        identify=is_gaiaxpy,
        read=read_gaiaxpy,
    ),
    SpectrumFormat(
        name="gaia-xp",
        survey="gaia-xp",
        wavelength_medium=VACUUM,
        rest_frame=TOO_COARSE,
        flux_unit="the median flux, which becomes `medflux` in W m-2 nm-1",
        resolving_power="30 to 100",
        normalisation="the median over the pixels",
        note="sampled mean spectra of DR3; not corrected for extinction",
        identify=lambda file: _is("xp", file),
        read=read_xp,
    ),
    SpectrumFormat(
        name="gaia-rvs",
        survey="gaia-rvs",
        wavelength_medium=VACUUM,
        rest_frame=AT_REST,
        flux_unit="1",
        resolving_power="11,500",
        normalisation="the continuum of the pipeline",
        note="mean spectra of DR3; pixels without transits are masked",
        identify=lambda file: _is("rvs", file),
        read=read_rvs,
    ),
)
