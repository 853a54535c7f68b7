# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Objects unlike the training stars: are their spectra refused, flagged, or predicted without a warning?

    spectrafm data miles --out miles
    python scripts/paper/evaluate_strange.py --miles miles --files FOLDER --output strange.md

Prism spectra of SpeX (M to T dwarfs, giants, galaxies, quasars) are from the package `splat`, models of DA white dwarfs
from `corv`; both are read as data. Waves are a flat spectrum with a sine of up to 30 %. Hot and cool stars, and good
ones that should not be flagged, are from MILES. FOLDER has observed files: Vega of CALSPEC, a quasar of LAMOST.
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
from typing import Any, NamedTuple

import numpy as np
from astropy.io import fits
from evaluate_observed import answers
from numpy.typing import NDArray
from observed_samples import miles
from report_files import add_output, print_and_write

from spectrafm_hf import load_checkpoint
from spectrafm_hf.data.readers import find_files, read_spectra
from spectrafm_hf.data.sources import fetch_package_file
from spectrafm_hf.models import air_to_vacuum
from spectrafm_hf.models.rungs_spectrafm import FWHM


Array = NDArray[Any]
SPLAT = ("splat", "1.14", "398a1ab79c4d25466032c3aad777cc6d1d171dc7ebf17da609296e4dc4ee9d4b")
CORV = ("corv", "0.2", "1caa0d707d6204d6a81d7911ec19f6a55c6d80e34e0db3efd145a233b5f8d1ab")
SPEX_POWER, POWER, SNR = 120.0, 1_800.0, 100.0
GRID = np.exp(np.arange(np.log(3_750.0), np.log(9_000.0), 1.0 / POWER / 2.5))
#: Flags of unreliable predictions.
WARNING_FLAGS = {"edge", "unlike_training"}
SIGMAS = 2.0  # largest deviation of a right prediction
VEGA = (9_500.0, 9_700.0)
#: Teff in K of what SpeX saw: Pecaut & Mamajek 2013, ApJS 208, 9, of M dwarfs; else Kirkpatrick 2005, ARA&A 43, 195.
SPEX_TEFF = {
    "M dwarfs": (2_300.0, 3_900.0),
    "L dwarfs": (1_300.0, 2_400.0),
    "T dwarfs": (500.0, 1_500.0),
    "giants": (2_800.0, 5_200.0),
    "carbon stars": (2_500.0, 4_500.0),
    "white dwarfs": (5_000.0, 60_000.0),
}
HOT, GOOD = (7_500.0, 8_500.0), (3_600.0, 7_500.0)
AIR_FROM = 2_000.0  # Angstrom: where wavelengths of the models of white dwarfs begin to be in air


class Sample(NamedTuple):
    """Rows of one kind, and the range (stars, 2) of their true effective temperatures; NaN if they have none."""

    name: str
    rows: list[dict[str, Any]]
    teff: Array


def of_any(name: str, rows: list[dict[str, Any]], limits: tuple[float, float] = (np.nan, np.nan)) -> Sample:
    return Sample(name, rows, np.tile(limits, (len(rows), 1)))


def row_of(wavelength: Array, flux: Array, error: Array, power: float) -> dict[str, Any]:
    """One spectrum; pixels that are not finite or have no error are masked."""
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
    """Kind of an object of splat in the table of this script; "" if it is not in the table."""
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
    """Rows of the prism spectra of each kind, for each object the one with the highest signal."""
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


def white_dwarfs(wheel: Path, generator: np.random.Generator) -> Iterator[tuple[dict[str, Any], float]]:
    """Rows of models of DA white dwarfs, 6,000 K and hotter, and their temperatures."""
    with zipfile.ZipFile(wheel) as archive:
        for member in sorted(name for name in archive.namelist() if "/warwick_da/" in name):
            head, *models = archive.read(member).decode("ascii").split("Effective temperature =")
            numbers = np.array(head.split(), float)
            wavelength = numbers[1 : 1 + int(numbers[0])]
            wavelength = np.where(wavelength > AIR_FROM, air_to_vacuum(wavelength.clip(AIR_FROM)), wavelength)
            for text in models:
                line, _, rest = text.partition("\n")
                teff = float(line.split()[0])
                if teff >= 6_000.0:
                    flux = np.array(rest.split(), float)[: len(wavelength)]
                    yield with_noise(smoothed(wavelength, flux / flux.max()), generator), teff


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


def of_miles(folder: Path) -> Iterator[Sample]:
    """Stars by temperature; good ones of the splits that took no part in training as well."""
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
        yield Sample(name, [rows[i] for i in np.flatnonzero(chosen)], np.repeat(teff[chosen, None], 2, axis=1))


def of_files(folder: Path) -> Iterator[Sample]:
    """Observed files: Vega, and the quasar."""
    for path in sorted(find_files([folder])):
        name = Path(path).name
        if "alpha_lyr" in name:
            yield of_any(f"Vega, {name}", list(read_spectra([path])), VEGA)
        if "cmost-lamost" in name:  # read without its header, which states that it is a quasar
            rows = [{**row, "refused": ""} for row in read_spectra([path], keep_refused=True)]
            yield of_any(f"a quasar, {name}", rows)


def line_of(sample: Sample, found: Array, sigma: Array, flags: Array) -> str:
    """One line of the table, from Teff and its error (stars,)."""
    refused = ~np.isfinite(found)
    warned = np.array([bool(WARNING_FLAGS & set(flag.split(";"))) for flag in flags]) & ~refused
    plain = ~refused & ~warned
    low, high = sample.teff.T
    with np.errstate(invalid="ignore"):
        right = plain & (found > low - SIGMAS * sigma) & (found < high + SIGMAS * sigma)
    shown = ""
    if (wrong := plain & ~right).any():
        shown = f"{np.median(found[wrong]):.0f} ± {np.median(sigma[wrong]):.0f}"
    counts = (len(flags), refused.sum(), warned.sum(), right.sum(), wrong.sum())
    return f"| {sample.name} | {' | '.join(map(str, counts))} | {shown} |"


def report(arguments: argparse.Namespace) -> str:
    model, tokenizer = load_checkpoint(arguments.model)
    generator = np.random.default_rng(0)
    prisms = sorted(spex(fetch_package_file(*SPLAT)).items())
    samples = [of_any(f"SpeX: {name}", rows, SPEX_TEFF.get(name, (np.nan, np.nan))) for name, rows in prisms]
    dwarfs, teff = zip(*white_dwarfs(fetch_package_file(*CORV), generator), strict=True)
    samples.append(Sample("models of DA white dwarfs", list(dwarfs), np.repeat(np.array(teff)[:, None], 2, axis=1)))
    samples.append(of_any("waves of 0 to 30 %", list(waves(40, generator))))
    samples += of_miles(arguments.miles) if arguments.miles else []
    samples += of_files(arguments.files) if arguments.files else []
    lines = [
        f"Objects unlike the training stars, and stars, predicted by {arguments.model}: refused (no label), flagged "
        f"`edge` or `unlike_training`, or neither; the latter are right (Teff within {SIGMAS:g} sigma) or wrong, with "
        "the median Teff and sigma of the wrong ones. For galaxies, quasars and waves any prediction is wrong.",
        "",
        "| spectra | n | refused | flagged | right | wrong | Teff of the wrong ones [K] |",
        "|---|---|---|---|---|---|---|",
    ]
    for sample in samples:
        found, errors, flags = answers(model, tokenizer, sample.rows)
        lines.append(line_of(sample, found[:, 0], errors[:, 0], flags))
    return "\n".join([*lines, ""])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="evaluate_strange.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="spectrafm-base", help="a bundled checkpoint, or a folder")
    parser.add_argument("--miles", type=Path, metavar="DIR", help="made by `spectrafm data miles`")
    parser.add_argument("--files", type=Path, metavar="DIR", help="observed spectra of Vega and of a quasar")
    add_output(parser)
    arguments = parser.parse_args(argv)
    return print_and_write(report(arguments), arguments.output)


if __name__ == "__main__":
    sys.exit(main())
