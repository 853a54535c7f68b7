#!/usr/bin/env python
# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Check `--radial-velocity measure`: on observed files, and on synthetic stars against the Cramer-Rao bound.

    python scripts/checks/check_velocities.py FOLDER [FOLDER ...] --output docs/velocities.md

Observed spectra that were shifted to rest by a published velocity should have a measured velocity of zero. Spectra
without one are compared with the velocity of strong lines (`check_files.py`). Synthetic FGKM stars have velocities of
up to 300 km/s, 2.5 pixels in a FWHM, noise, and a continuum that varies by 20 %. The Cramer-Rao bound is for a known
star and continuum. Templates come from the same grids as the synthetic stars; for observed stars no template is exact.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from check_files import lines
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline
from scipy.ndimage import gaussian_filter1d

from spectrafm_cli.arguments import Parser
from spectrafm_hf import SpectrumEmulator, bundled, load_checkpoint
from spectrafm_hf.data.readers import Failure, find_files, read_spectra
from spectrafm_hf.models.gate_spectrafm import SPEED_OF_LIGHT
from spectrafm_hf.models.velocity_spectrafm import VelocityMeter


MODEL = "spectrafm-base"
Array = NDArray[np.float64]
#: Emulator, ranges (Angstrom), resolving power.
KINDS: dict[str, tuple[str, tuple[tuple[float, float], ...], float]] = {
    "APOGEE": ("emulator-hband", ((15150.0, 16950.0),), 22_500.0),
    "GALAH": ("emulator-optical", ((4713, 4901), (5648, 5873), (6478, 6740), (7585, 7888)), 28_000.0),
    "Gaia RVS": ("emulator-optical", ((8460.0, 8700.0),), 11_500.0),
    "LAMOST MRS": ("emulator-optical", ((4950.0, 5350.0), (6300.0, 6800.0)), 7_500.0),
    "LAMOST LRS": ("emulator-optical", ((3700.0, 9000.0),), 1_800.0),
}
SNRS = (10, 30, 100)
FASTEST = 300.0  # km/s
INTRODUCTION = """\
Made by `python scripts/checks/check_velocities.py FOLDER ... --output docs/velocities.md`; km/s.

## Synthetic stars

{n} FGKM stars in each row, with velocities of up to 300 km/s. `off`: median of measured minus true; `scatter`: half of
the central 68 %; `bound`: Cramer-Rao bound for a known star and continuum, median over the stars; `off / error`: the
scatter in units of the stated errors, 1 for right errors."""
OBSERVED = """\
## Observed spectra

`stated` is the published velocity by which the file was shifted to rest; `left` should then be zero. Otherwise `left`
should agree with strong lines (`lines`, as in [observed files](files.md); -83 is a star at rest with air
wavelengths that are not stated)."""


def stars_of(emulator: SpectrumEmulator, n: int, generator: np.random.Generator) -> dict[str, Any]:
    """Labels of FGKM dwarfs and giants with [Fe/H] of -0.8 to 0.3."""
    teff = generator.uniform(4000, 6500, n)
    giant = (generator.random(n) < 0.5) & (teff < 5300)
    logg = np.where(giant, 1.0 + 2.0 * (teff - 4000) / 1300, 4.6 - 0.5 * (teff - 4000) / 2500)
    return {"teff": teff, "logg": logg, "fe_h": generator.uniform(-0.8, 0.3, n)}


def synthetic(meter: VelocityMeter, name: str, snr: float, n: int, seed: int = 0) -> dict[str, Any]:
    """A row of the table."""
    emulator_name, ranges, power = KINDS[name]
    generator = np.random.default_rng(seed)
    emulator = SpectrumEmulator.from_pretrained(bundled(emulator_name))
    grid, flux = emulator.synthesize(**stars_of(emulator, n, generator))
    ln = np.log(grid)
    step = (ln[-1] - ln[0]) / (len(ln) - 1)
    even = ln[0] + step * np.arange(len(ln))
    own = emulator.config.resolving_power or np.inf
    sigma = np.sqrt(max(power**-2.0 - own**-2.0, 0.0)) / 2.3548 / step
    pixels = [np.exp(np.arange(np.log(low), np.log(high), 0.4 / power)) for low, high in ranges]
    wavelength = np.concatenate(pixels)
    off, errors, bounds = [], [], []
    for star in flux:
        values = np.interp(even, ln, star)
        values = gaussian_filter1d(values, sigma, mode="nearest") if sigma > 0 else values
        spline = CubicSpline(even, values / np.median(values))
        velocity = generator.uniform(-FASTEST, FASTEST)
        beta = velocity / SPEED_OF_LIGHT
        moved = np.log(wavelength) - 0.5 * np.log((1 + beta) / (1 - beta))
        inside = (moved > even[0]) & (moved < even[-1])
        continuum = 1 + 0.2 * np.sin(wavelength / 200 + generator.uniform(0, 6))
        level = np.where(inside, spline(moved.clip(even[0], even[-1])), 1.0)
        error = level * continuum / snr
        slope = np.where(inside, spline(moved.clip(even[0], even[-1]), 1), 0.0) * continuum / SPEED_OF_LIGHT
        bounds.append(np.sum((slope / error)[inside] ** 2) ** -0.5)
        observed = level * continuum + error * generator.normal(size=len(level))
        found = meter(wavelength, observed, error, ~inside, power)
        off.append(found.value - velocity)
        errors.append(found.error)
    difference, stated = np.array(off), np.array(errors)
    known = np.isfinite(difference)
    low, middle, high = np.percentile(difference[known], [16, 50, 84]) if known.any() else (np.nan,) * 3
    pulls = np.percentile((difference / stated)[known], [16, 84]) if known.any() else np.full(2, np.nan)
    return {
        "spectra": name,
        "R": f"{power:,.0f}",
        "S/N of a pixel": str(snr),
        "measured": f"{known.sum()} of {n}",
        "off": f"{middle:+.2f}",
        "scatter": f"{0.5 * (high - low):.2f}",
        "bound": f"{np.median(bounds):.2f}",
        "off / error": f"{0.5 * (pulls[1] - pulls[0]):.2f}",
    }


def observed(meter: VelocityMeter, folders: list[Path]) -> Iterator[dict[str, Any]]:
    """Rows of the table, for each spectrum in a range with templates."""
    for path in find_files(folders):
        failures: list[Failure] = []
        seen: set[tuple[Any, Any]] = set()
        for visits in (False, True):
            for row in read_spectra([path], visits=visits, failures=failures):
                key = row["object_id"], row.get("visit")
                power = row["resolving_power"]
                wavelength, flux, error, mask = (row[name] for name in ("wavelength", "flux", "flux_error", "mask"))
                found = meter(wavelength, flux, error, mask, power)
                if key in seen or "narrow lines" in found.cause or "pixels" in found.cause:
                    continue
                seen.add(key)
                good = ~mask & np.isfinite(flux)
                fastest = 100.0 if row["rest_frame"] else 250.0
                order = np.argsort(wavelength[good], kind="stable")
                strong = lines(wavelength[good][order].astype(float), flux[good][order].astype(float), fastest)
                visit = f", visit {row['visit']}" if row.get("visit") else ""
                stated = np.isfinite(row["radial_velocity"]) and row["rest_frame"]
                yield {
                    "file": f"{path.name}{visit}",
                    "R": f"{power:,.0f}" if np.isfinite(power) else "",
                    "stated": f"{row['radial_velocity']:+.1f}" if stated else "at rest" if row["rest_frame"] else "",
                    "left": "not significant" if found.cause else f"{found.value:+.2f} ± {found.error:.2f}",
                    "lines": "" if strong is None else f"{strong[0]:+.1f} ({strong[1]})",
                    "_off": found.value if row["rest_frame"] else np.nan,
                    "_power": power,
                }


def table(rows: list[dict[str, Any]]) -> str:
    names = [name for name in rows[0] if not name.startswith("_")]
    heads = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    return "\n".join([*heads, *(f"| {' | '.join(row[name] for name in names)} |" for row in rows)])


def main() -> int:
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="*", help="folder of observed files")
    parser.add_argument("--output", type=Path, help="a Markdown file; default: the terminal")
    parser.add_argument("--stars", type=int, default=60, help="synthetic stars in each row (default: 60)")
    arguments = parser.parse_args()
    model, tokenizer = load_checkpoint(MODEL)
    basis: Any = tokenizer.basis
    meter = VelocityMeter(basis, model)
    rows = [synthetic(meter, name, snr, arguments.stars) for name in KINDS for snr in SNRS]
    text = ["# Velocities from lines", "", INTRODUCTION.format(n=arguments.stars), "", table(rows), ""]
    if arguments.folder:
        seen = list(observed(meter, arguments.folder))
        off = np.array([row["_off"] for row in seen])
        text += [OBSERVED, "", table(seen), ""]
        known = off[np.isfinite(off)]
        deviation = 1.4826 * np.median(np.abs(known - np.median(known)))
        text += [
            f"Of the {len(known)} that were measured and should be at rest: median {np.median(known):+.2f} km/s, "
            f"scatter {deviation:.2f} km/s (1.48 times the median absolute deviation).",
            "",
        ]
    if arguments.output:
        arguments.output.write_text("\n".join(text), encoding="utf-8")
    else:
        print("\n".join(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
