# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""The arrays published with the paper (Koblischke & Bovy 2024) as a Hugging Face data set.

A folder holds, for SPLIT train and test, ``labels_SPLIT.npy`` and ``label_errs_SPLIT.npy`` (stars, 5), in the order of
`LABELS`, ``aspcap_spectra_SPLIT.npy`` (observed) or ``synspec_SPLIT.npy`` (best fits), each (stars, pixels) with NaN
for what is not to be used, and the wavelengths of the pixels in one of `WAVELENGTHS`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pooch
import pyarrow as pa
from numpy.typing import NDArray

from .building import Card, Shard, build_folder, write_card, write_shards
from .schema import LABEL_UNITS, pixel_column, spectrum_features


LABELS = ("teff", "logg", "o_fe", "mg_fe", "fe_h")
FEATURES = spectrum_features(LABELS)
#: Names of the files of spectra, and what their rows are called in `survey`.
SPECTRA = {"aspcap_spectra": "apogee-dr17", "synspec": "apogee-dr17-synthetic"}
#: The paper's own programs spell it in two ways.
WAVELENGTHS = ("apogee_wavelength_sol.csv", "apogee_wavelengt_sol.csv", "apogee_wavelength_sol.npy", "wavelength.npy")
RANGE = (15_000.0, 17_000.0)
BATCH = 200


def build_original_zenodo(
    out_dir: str | os.PathLike[str],
    source: str | os.PathLike[str],
    *,
    shard_rows: int = 2000,
    overwrite: bool = False,
) -> Path:
    """Build the data set: Parquet files of the splits that are there, and a data card.

    Parameters
    ----------
    out_dir : path
        Folder to make. It appears under this name only when it is complete.
    source : path
        Folder with the arrays (see above). They are read from the disk bit by bit, and nothing in them is ever run.
    shard_rows : int
        Stars in a Parquet file.
    overwrite : bool
        Build again where `out_dir` holds a complete build.

    Returns
    -------
    pathlib.Path
        `out_dir`. A complete build that is there already, from the same files, is kept.

    Raises
    ------
    ValueError
        If a file is missing, cannot be read, or does not fit the others; the file is named.
    """
    folder = Path(source)
    if not folder.is_dir():
        raise ValueError(f"source: expected a folder, got {folder}")
    wavelength_file = next((folder / name for name in WAVELENGTHS if (folder / name).is_file()), None)
    if wavelength_file is None:
        raise ValueError(f"source: expected one of {', '.join(WAVELENGTHS)} in {folder}, found none")
    wavelength = _wavelengths(wavelength_file)
    arrays: dict[str, list[tuple[str, dict[str, NDArray[Any]]]]] = {}
    files = [wavelength_file]
    for split in ("train", "test"):
        for kind, survey in SPECTRA.items():
            if (folder / f"{kind}_{split}.npy").is_file():
                names = {"flux": kind, "labels": "labels", "errors": "label_errs"}
                parts = {part: folder / f"{name}_{split}.npy" for part, name in names.items()}
                arrays.setdefault(split, []).append((survey, _open(parts, len(wavelength))))
                files += [path for path in parts.values() if path not in files]
    if not arrays:
        raise ValueError(f"source: expected {' or '.join(f'{name}_train.npy' for name in SPECTRA)} in {folder}")
    checksums = {path.name: pooch.file_hash(str(path)) for path in files}
    settings = {"builder": "original-zenodo", "sha256": checksums, "shard_rows": shard_rows}

    def tables(shard: Shard) -> Iterator[pa.Table]:
        # Rows of the split: all stars of the first file, then all of the second.
        row = shard.start
        while row < shard.stop:
            skipped = 0
            for survey, parts in arrays[shard.split]:
                n_stars = len(parts["flux"])
                if row < skipped + n_stars:
                    first = row - skipped
                    last = min(first + BATCH, n_stars, first + shard.stop - row)
                    yield _table(shard.split, survey, parts, wavelength, first, last)
                    row += last - first
                    break
                skipped += n_stars

    def fill(partial: Path) -> None:
        sizes = {split: sum(len(parts["flux"]) for _, parts in kinds) for split, kinds in arrays.items()}
        write_shards(partial, sizes, shard_rows, tables, FEATURES)
        write_card(partial, FEATURES, _card(sizes, checksums))

    return build_folder(out_dir, settings, fill, overwrite=overwrite)


def _wavelengths(file: Path) -> NDArray[np.float64]:
    """Angstrom, shape (pixels,)."""
    try:
        values = np.load(file, allow_pickle=False) if file.suffix == ".npy" else np.loadtxt(file, delimiter=",")
        values = np.asarray(values, np.float64).ravel()
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{file}: expected numbers, got: {' '.join(str(error).split())}") from error
    if values.size and np.nanmax(values) < 100:
        values = values * 1e4  # micrometres
    if not (values.size and RANGE[0] < values[0] and values[-1] < RANGE[1] and (np.diff(values) > 0).all()):
        raise ValueError(f"{file}: expected rising wavelengths of APOGEE in Angstrom or micrometres, got {values}")
    return values


def _open(files: dict[str, Path], n_pixels: int) -> dict[str, NDArray[Any]]:
    """The arrays of a split, in the file until they are asked for."""
    arrays = {}
    for part, file in files.items():
        try:
            arrays[part] = np.load(file, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"{file}: expected an array of numbers, got: {' '.join(str(error).split())}") from error
    n_stars = len(arrays["flux"]) if arrays["flux"].ndim else 0
    for part, width in (("flux", n_pixels), ("labels", len(LABELS)), ("errors", len(LABELS))):
        if arrays[part].dtype.kind != "f" or arrays[part].shape != (n_stars, width):
            actual = f"{arrays[part].dtype} of shape {arrays[part].shape}"
            raise ValueError(f"{files[part]}: expected floats of shape ({n_stars}, {width}), got {actual}")
    return arrays


def _table(
    split: str, survey: str, parts: dict[str, NDArray[Any]], wavelength: NDArray[np.float64], first: int, last: int
) -> pa.Table:
    flux = np.asarray(parts["flux"][first:last], np.float32)
    unknown = np.full(len(flux), np.nan, np.float32)
    columns: dict[str, Any] = {
        "object_id": [f"{split}-{i}" for i in range(first, last)],
        "survey": [survey] * len(flux),
        "wavelength": pixel_column(np.broadcast_to(wavelength, flux.shape)),
        "flux": pixel_column(flux),
        "flux_error": pixel_column(np.full_like(flux, np.nan)),
        "mask": pixel_column(~np.isfinite(flux)),
        "snr": unknown,
    }
    for i, label in enumerate(LABELS):
        columns[label] = np.asarray(parts["labels"][first:last, i], np.float32)
        columns[f"{label}_err"] = np.asarray(parts["errors"][first:last, i], np.float32)
    return pa.table(columns).select(list(FEATURES))


def _card(sizes: dict[str, int], checksums: dict[str, str]) -> Card:
    files = "\n".join(f"- `{name}`: `{checksum}`" for name, checksum in checksums.items())
    return Card(
        title="The spectra of the SpectraFM paper",
        description=f"{sum(sizes.values()):,} spectra of APOGEE DR17 stars, as Koblischke & Bovy (2024) published them "
        "with the paper on SpectraFM: 7,514 pixels, with five labels of ASPCAP.",
        command="spectrafm data original-zenodo --source FOLDER --out DIR",
        license="other",
        license_name="see-terms",
        tags=["apogee"],
        split="The split is that of the paper; it has no validation split.",
        columns={
            "object_id": "split and row in the arrays, which name no stars; the observed and the synthetic spectrum of "
            "a star have the same",
            "survey": "`apogee-dr17` for observed, `apogee-dr17-synthetic` for synthetic spectra",
            "wavelength": "Angstrom in vacuum, rest frame; the same in every row",
            "flux": "over the continuum of ASPCAP",
            "flux_error": "NaN: not published",
            "mask": "True = do not use: flux below 0.05, above 1.2 or missing",
            "snr": "NaN: not published; above 200",
            **{label: f"{LABEL_UNITS[label]}; ASPCAP, DR17" for label in LABELS},
        },
        flaws=[
            "The arrays hold no errors of the flux and no names of stars. `spectrafm data apogee-dr17` builds the same "
            "stars from the archive with both.",
        ],
        source=f"SHA-256 of the files:\n\n{files}",
        terms="As published with the paper; the data are public data of SDSS-IV, to be acknowledged as SDSS asks.",
        citations=[
            "Koblischke & Bovy 2024, arXiv:2411.04750 (SpectraFM)",
            "Abdurro'uf et al. 2022, ApJS 259, 35 (SDSS DR17); Majewski et al. 2017, AJ 154, 94 (APOGEE)",
        ],
    )
