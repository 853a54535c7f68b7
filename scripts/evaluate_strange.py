# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""What is no star of the training: are its spectra refused, flagged, or answered as if nothing were wrong?

    spectrafm data miles --out miles
    python scripts/evaluate_strange.py --miles miles --files FOLDER --output strange.md

Prism spectra of SpeX (M to T dwarfs, giants, galaxies, quasars) lie in the package `splat`, models of DA white dwarfs
in `corv`; both are read as data. Waves are a flat spectrum with a sine of up to 30 %. Hot and cool stars, and good ones
that should not be flagged, are those of MILES. FOLDER has observed files: Vega of CALSPEC, a quasar of LAMOST.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits
from evaluate_observed import answers
from numpy.typing import NDArray
from observed_samples import miles

from spectrafm_hf import load_checkpoint
from spectrafm_hf.data.readers import find_files, read_spectra
from spectrafm_hf.data.sources import fetch_package_file
from spectrafm_hf.files import complete_file
from spectrafm_hf.models import air_to_vacuum
from spectrafm_hf.models.basis_spectrafm import FWHM


Array = NDArray[Any]
SPLAT = ("splat", "1.14", "398a1ab79c4d25466032c3aad777cc6d1d171dc7ebf17da609296e4dc4ee9d4b")
CORV = ("corv", "0.2", "1caa0d707d6204d6a81d7911ec19f6a55c6d80e34e0db3efd145a233b5f8d1ab")
SPEX_POWER, POWER, SNR = 120.0, 1_800.0, 100.0
GRID = np.exp(np.arange(np.log(3_750.0), np.log(9_000.0), 1.0 / POWER / 2.5))
#: Flags that say "do not believe this".
WARNING_FLAGS = {"edge", "unlike_training"}
HOT, GOOD = (7_500.0, 8_500.0), (3_600.0, 7_500.0)
AIR_FROM = 2_000.0  # Angstrom: where wavelengths of the models of white dwarfs begin to be in air


def row_of(wavelength: Array, flux: Array, error: Array, power: float) -> dict[str, Any]:
    """One spectrum; what is not finite or has no error is masked."""
    bad = ~(np.isfinite(flux) & np.isfinite(error) & (error > 0))
    return {
        "object_id": "",
        "wavelength": wavelength,
        "flux": np.where(bad, 0.0, flux).astype(np.float32),
        "flux_error": np.where(bad, 1.0, error).astype(np.float32),
        "mask": bad,
        "resolving_power": power,
    }


def with_noise(flux: Array, generator: np.random.Generator) -> dict[str, Any]:
    """A spectrum on `GRID` with the noise of `SNR`."""
    error = np.sqrt(np.median(flux) * np.maximum(flux, 0.02 * np.median(flux))) / SNR
    return row_of(GRID, flux + error * generator.standard_normal(flux.shape), error, POWER)


def kind_of(source: Mapping[str, str]) -> str:
    """What an object of splat is, as the table of this script has it; "" for what it has no line for."""
    kind, spectral = source["OBJECT_TYPE"], source["OPT_TYPE"] or source["LIT_TYPE"]
    if kind in ("VLM", "STAR"):
        letter = spectral.strip().lstrip("sdeu/")[:1]
        return {"M": "M dwarfs", "L": "L dwarfs", "T": "T dwarfs"}.get(letter, "")
    return (
        {"GIANT": "giants", "GALAXY": "galaxies", "QSO": "quasars", "WD": "white dwarfs", "CARBON": "carbon stars"}[
            kind
        ]
        if kind in ("GIANT", "GALAXY", "QSO", "WD", "CARBON")
        else ""
    )


def spex(wheel: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows of the prism spectra of each kind, one an object: that of the highest signal."""
    found: dict[str, list[dict[str, Any]]] = {}
    with zipfile.ZipFile(wheel) as archive:
        tables = [
            list(csv.DictReader(io.StringIO(archive.read(f"splat/db/{name}.csv").decode("utf-8-sig", "replace"))))
            for name in ("source_data", "spectral_data")
        ]
        kinds = {row["SOURCE_KEY"]: kind_of(row) for row in tables[0]}
        members = set(archive.namelist())
        best = {row["SOURCE_KEY"]: row for row in sorted(tables[1], key=lambda row: float(row["MEDIAN_SNR"] or 0.0))}
        for source, row in sorted(best.items()):
            name = f"splat/resources/Spectra/Public/SPEX-PRISM/{row['DATA_FILE']}.gz"
            if not kinds.get(source) or name not in members:
                continue
            with fits.open(io.BytesIO(gzip.decompress(archive.read(name)))) as file:
                image = np.asarray(file[0].data, np.float64)
            if image.ndim == 2 and image.shape[0] == 3 and image.shape[1] > 300 and (np.diff(image[0]) > 0).all():
                found.setdefault(kinds[source], []).append(row_of(image[0] * 1e4, image[1], image[2], SPEX_POWER))
    return found


def white_dwarfs(wheel: Path, generator: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Rows of models of DA white dwarfs, 6,000 K and hotter."""
    with zipfile.ZipFile(wheel) as archive:
        for member in sorted(name for name in archive.namelist() if "/warwick_da/" in name):
            head, *models = archive.read(member).decode("ascii").split("Effective temperature =")
            numbers = np.array(head.split(), float)
            wavelength = numbers[1 : 1 + int(numbers[0])]
            wavelength = np.where(wavelength > AIR_FROM, air_to_vacuum(wavelength.clip(AIR_FROM)), wavelength)
            for text in models:
                line, _, rest = text.partition("\n")
                if float(line.split()[0]) >= 6_000.0:
                    flux = np.array(rest.split(), float)[: len(wavelength)]
                    yield with_noise(smoothed(wavelength, flux / flux.max()), generator)


def smoothed(wavelength: Array, flux: Array) -> Array:
    """Flux on `GRID` at `POWER`."""
    fine = np.exp(np.arange(np.log(GRID[0]) - 0.01, np.log(GRID[-1]) + 0.01, 0.2 / POWER / FWHM))
    own = np.interp(fine, wavelength, flux)
    x = np.arange(-20, 21) * 0.2
    kernel = np.exp(-0.5 * x**2)
    return np.interp(GRID, fine, np.convolve(own, kernel / kernel.sum(), mode="same"))


def waves(n: int, generator: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Rows of flat spectra with a sine."""
    position = np.log(GRID)
    for size in np.linspace(0.0, 0.3, n):
        period = np.exp(generator.uniform(np.log(0.005), np.log(0.5)))
        yield with_noise(1.0 + size * np.sin(2.0 * np.pi * (position / period + generator.random())), generator)


def of_miles(folder: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Rows of stars by temperature; good ones of the splits that took no part in training as well."""
    parts = {split: miles(folder, split) for split in ("train", "validation", "test")}
    rows = [row for part, _ in parts.values() for row in part]
    teff = np.concatenate([labels[:, 0] for _, labels in parts.values()])
    new = np.repeat([split != "train" for split in parts], [len(part) for part, _ in parts.values()])
    for name, chosen in (
        (f"MILES above {HOT[1]:,.0f} K", teff > HOT[1]),
        (f"MILES {HOT[0]:,.0f}-{HOT[1]:,.0f} K", (teff > HOT[0]) & (teff <= HOT[1])),
        (f"MILES below {GOOD[0]:,.0f} K", teff < GOOD[0]),
        (f"MILES {GOOD[0]:,.0f}-{GOOD[1]:,.0f} K", (teff > GOOD[0]) & (teff <= GOOD[1])),
        (f"MILES {GOOD[0]:,.0f}-{GOOD[1]:,.0f} K, not in training", new & (teff > GOOD[0]) & (teff <= GOOD[1])),
    ):
        yield name, [rows[i] for i in np.flatnonzero(chosen)]


def of_files(folder: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Rows of observed files: Vega, and the quasar, whatever its header calls it."""
    for path in sorted(find_files([folder])):
        name = Path(path).name
        if "alpha_lyr" in name or "cmost-lamost" in name:
            for row in read_spectra([path], keep_refused=True):
                yield f"{name}", [{**row, "reason": ""}]


def line_of(name: str, found: Array, flags: Array, refused: NDArray[np.bool_]) -> str:
    """One line of the table."""
    warned = np.array([bool(WARNING_FLAGS & set(flag.split(";"))) for flag in flags]) & ~refused
    plain = ~refused & ~warned
    teff = found[plain, 0]
    told = f"{np.median(teff):.0f} ({teff.min():.0f} to {teff.max():.0f})" if len(teff) else ""
    return f"| {name} | {len(flags)} | {refused.sum()} | {warned.sum()} | {plain.sum()} | {told} |"


def report(arguments: argparse.Namespace) -> str:
    model, tokenizer = load_checkpoint(arguments.model)
    generator = np.random.default_rng(0)
    samples = [(f"SpeX: {name}", rows) for name, rows in sorted(spex(fetch_package_file(*SPLAT)).items())]
    samples.append(("models of DA white dwarfs", list(white_dwarfs(fetch_package_file(*CORV), generator))))
    samples.append(("waves of 0 to 30 %", list(waves(40, generator))))
    samples += of_miles(arguments.miles) if arguments.miles else []
    samples += of_files(arguments.files) if arguments.files else []
    lines = [
        f"Spectra of what is no star of the training, and of stars, answered by {arguments.model}: refused (no label), "
        "flagged `edge` or `unlike_training`, or neither; median, lowest and highest Teff of those that are neither.",
        "",
        "| spectra | n | refused | flagged | neither | their Teff [K] |",
        "|---|---|---|---|---|---|",
    ]
    for name, rows in samples:
        found, _, flags = answers(model, tokenizer, rows)
        lines.append(line_of(name, found, flags, ~np.isfinite(found[:, 0])))
    return "\n".join([*lines, ""])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="evaluate_strange.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="spectrafm-base", help="a bundled checkpoint, or a folder")
    parser.add_argument("--miles", type=Path, metavar="DIR", help="made by `spectrafm data miles`")
    parser.add_argument("--files", type=Path, metavar="DIR", help="observed spectra of Vega and of a quasar")
    parser.add_argument("--output", type=Path, metavar="FILE.md", help="write the table here as well")
    arguments = parser.parse_args(argv)
    text = report(arguments)
    print(text)
    if arguments.output:
        with complete_file(arguments.output) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
