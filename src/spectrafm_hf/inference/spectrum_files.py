# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Predicted spectra as files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from astropy.io import fits

from ..data.building import spectra_table, write_shard
from ..data.schema import PIXEL_COLUMNS, SURFACE, spectrum_features
from ..files import complete_file
from .emulated import Spectra


class SpectrumWriter:
    """
    Write spectra, star after star: `with SpectrumWriter(path) as writer: writer.write(spectra, names)`. The file
    appears under its name when all is written, and `spectrafm predict` reads it.

    Parameters
    ----------
    path : path
        .parquet in the schema of this project; .fits, a table with a star in each row; .csv with a pixel in each line,
        of one star.

    Raises
    ------
    ValueError
        For another ending, a folder that does not exist, or several stars in a .csv file.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.suffix = self.path.suffix.lower()
        if self.suffix not in (".parquet", ".fits", ".csv"):
            raise ValueError(f"output: expected a name that ends in .parquet, .fits or .csv, got {self.path}")
        if not self.path.parent.is_dir():
            raise ValueError(f"output: expected a folder that exists, got {self.path.parent}")
        self._rows: list[dict[str, Any]] = []
        self._unit = ""

    def __enter__(self) -> Self:
        return self

    def write(self, spectra: Spectra, names: Sequence[str]) -> None:
        """Append spectra of stars with these names."""
        if self.suffix == ".csv" and len(self._rows) + len(names) > 1:
            raise ValueError("output: expected a .parquet or .fits file for several stars, got a .csv file")
        self._rows += spectra.rows(names)
        self._unit = spectra.unit

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None or not self._rows:
            return
        with complete_file(self.path) as temporary:
            if self.suffix == ".parquet":
                write_shard(temporary, [spectra_table(self._rows, FEATURES)], FEATURES)
            elif self.suffix == ".csv":
                (row,) = self._rows
                columns = [row[name] for name in PIXEL_COLUMNS[:3]]
                header = "wavelength_vacuum[Angstrom],flux,flux_error"
                np.savetxt(temporary, np.stack(columns, axis=1), "%.9g", ",", header=header, comments="")
            else:
                _fits_table(self._rows, self._unit).writeto(temporary, overwrite=True)


#: Of the files of spectra: those of stars without known labels.
FEATURES = spectrum_features([], ["resolving_power"])


def _fits_table(rows: Sequence[Mapping[str, Any]], unit: str) -> fits.HDUList:
    length = max(len(row["wavelength"]) for row in rows)
    width = max(len(str(row["object_id"]).encode("ascii", "backslashreplace")) for row in rows)
    names = [str(row["object_id"]).encode("ascii", "backslashreplace") for row in rows]
    columns = [fits.Column("object_id", f"{width}A", array=np.array(names))]
    flux_unit = unit if unit == SURFACE else None
    for name, format, own_unit in (
        ("wavelength", "D", "Angstrom"),
        ("flux", "E", flux_unit),
        ("flux_error", "E", flux_unit),
    ):
        table = np.full((len(rows), length), np.nan)
        for place, row in zip(table, rows, strict=True):
            place[: len(row[name])] = row[name]
        columns.append(fits.Column(name, f"{length}{format}", unit=own_unit, array=table))
    table = fits.BinTableHDU.from_columns(columns)
    table.header["COMMENT"] = "Wavelengths are in vacuum, at rest; written by spectrafm spectrum."
    return fits.HDUList([fits.PrimaryHDU(), table])
