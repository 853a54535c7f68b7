# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Check the reading of observed files: a table of all files of a folder, in Markdown.

    python scripts/checks/check_files.py FOLDER [--output docs/files.md]

For each file: format, instrument, number of spectra, identifier of the first one, medium, frame, and two checks without
a catalogue. (1) Strong stellar lines (NIST; vacuum): the velocity at which they are deepest together, their number, and
their median distance in Angstrom from that velocity. (2) The scatter from pixel to pixel over the stated error, in the
quietest part: 1 for right errors, less for resampled pixels. Refused files are listed with the reason and the time.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spectrafm_hf.data.readers import find_files, formats, read_spectra
from spectrafm_hf.data.readers.base import OpenFile
from spectrafm_hf.models.gate_spectrafm import overlaps


#: Angstrom in vacuum (NIST Atomic Spectra Database; in the H band Shetrone et al. 2015, ApJS 221, 24; K I and the bands
#: of cool dwarfs from Cushing, Rayner & Vacca 2005, ApJ 623, 1115).
LINES = {
    **{"Mg II k": 2796.35, "Mg II h": 2803.53, "Ca II K": 3934.78, "Ca II H": 3969.59, "H delta": 4102.89},
    **{"H gamma": 4341.68, "H beta": 4862.68, "Mg I b4": 5168.76, "Mg I b2": 5174.13, "Mg I b1": 5185.05},
    **{"Na I D2": 5891.58, "Na I D1": 5897.56, "H alpha": 6564.61, "K I": 7701.08, "O I": 7774.08, "Na I": 8185.51},
    **{"Ca II 1": 8500.36, "Ca II 2": 8544.44, "Ca II 3": 8664.52},
    **{
        "K I a": 15167.21,
        "K I b": 15172.52,
        "Mg I": 15753.29,
        "Si I": 15892.77,
        "Al I a": 16723.52,
        "Al I b": 16755.14,
    },
}
INTRODUCTION = """\
Made by `python scripts/checks/check_files.py FOLDER --output docs/files.md`. Wavelengths are in vacuum.

- `lines`: velocity of strong lines, their number, and their median distance from it. A star at rest with unstated air
  wavelengths is at -83 km/s; it has the flag `medium_unstated`.
- `scatter / error`: 1 for right errors, less for resampled pixels.
- `read`: for refused files the reason and the time."""
SPEED_OF_LIGHT = 299_792.458


def lines(wavelength: NDArray[Any], flux: NDArray[Any], fastest: float) -> tuple[float, int, float] | None:
    """Velocity (km/s, at most `fastest`) of the lines, their number, and their median distance from it (Angstrom)."""
    step = float(np.median(np.diff(np.log(wavelength)))) * SPEED_OF_LIGHT
    if not 0 < step < 800:
        return None
    trials = np.arange(-fastest, fastest + 1, 4.0)
    profiles = []
    for line in LINES.values():
        near = (wavelength > line * 0.997) & (wavelength < line * 1.003)
        if near.sum() < 8 or wavelength[near].min() > line * 0.9985 or wavelength[near].max() < line * 1.0015:
            continue
        velocity = (wavelength[near] / line - 1) * SPEED_OF_LIGHT
        level = np.percentile(flux[near], 80)
        if not level > 0:
            continue
        depth = 1 - flux[near] / level
        if depth.min() < -1:  # an emission line
            depth = flux[near] / np.median(flux[near]) - 1
        width = max(15.0, 1.2 * step)
        weight = np.exp(-0.5 * ((velocity - trials[:, None]) / width) ** 2)
        smooth = (weight @ depth) / np.maximum(weight.sum(axis=1), 1e-9)
        if smooth.max() > 0.06:
            profiles.append((line, velocity, depth, np.clip(smooth, 0, None) / smooth.max()))
    if not profiles:
        return None
    best = trials[np.argmax(np.sum([smooth for *_, smooth in profiles], axis=0))]
    found = []
    for line, velocity, depth, _ in profiles:
        core = abs(velocity - best) < max(30.0, 2.2 * step)
        weight = np.clip(depth[core] - 0.5 * depth[core].max(initial=0), 0, None)
        if weight.sum() > 0 and depth[core].max() > 0.06:
            found.append((line, float((velocity[core] * weight).sum() / weight.sum())))
    if not found:
        return None
    centre = float(np.median([velocity for _, velocity in found]))
    off = [abs(velocity - centre) / SPEED_OF_LIGHT * line for line, velocity in found]
    return centre, len(found), float(np.median(off))


def scatter(flux: NDArray[Any], error: NDArray[Any]) -> float | None:
    """Scatter from pixel to pixel over the stated error, in the quietest of twenty parts."""
    if not np.isfinite(error).any() or flux.size < 100:
        return None
    ratio = (flux[1:-1] - 0.5 * (flux[:-2] + flux[2:])) / np.sqrt(
        error[1:-1] ** 2 + 0.25 * (error[:-2] ** 2 + error[2:] ** 2)
    )
    parts = [1.4826 * np.median(abs(part)) for part in np.array_split(ratio[np.isfinite(ratio)], 20) if part.size]
    return float(min(parts)) if parts else None


def check(path: Path) -> dict[str, str]:
    """A line of the table."""
    start = time.perf_counter()
    with OpenFile(path) as file:
        try:
            found = next((known.name for known in formats() if known.identify(file)), "none")
            instrument = " ".join(str(file.header.get(card, "")).strip() for card in ("TELESCOP", "INSTRUME")).strip()
        except (ValueError, OSError):
            found, instrument = "none", ""
    line = {"file": path.name, "format": found, "instrument": instrument or "not stated"}
    try:
        rows = list(read_spectra([path], keep_refused=True))
    except ValueError as cause:
        seconds = time.perf_counter() - start
        return {**line, "read": f"refused in {seconds:.2f} s: {cause}".replace(str(path), path.name)}
    first = max(rows, key=lambda row: (not row["refused"]) * int(np.sum(~row["mask"])))
    refused = [row["refused"] for row in rows if row["refused"]]
    good = ~first["mask"] & np.isfinite(first["flux"]) & (first["wavelength"] > 0)
    good &= ~overlaps(np.where(good, first["wavelength"], np.nan))
    order = np.argsort(first["wavelength"][good], kind="stable")
    wavelength, flux, error = (first[name][good][order].astype(float) for name in ("wavelength", "flux", "flux_error"))
    fastest = 100.0 if first["rest_frame"] else 250.0
    measured = lines(wavelength, flux, fastest) if wavelength.size > 20 and not first["refused"] else None
    noise = scatter(flux, error)
    frame = {True: "rest", False: "not at rest", None: "unstated"}[first["rest_frame"]]
    return {
        **line,
        "spectra": str(len(rows)),
        "id": str(first["object_id"]),
        "Angstrom": f"{wavelength[0]:.1f}-{wavelength[-1]:.1f}" if wavelength.size else "none",
        "frame": f"{frame} ({first['radial_velocity']:.1f} km/s)" if np.isfinite(first["radial_velocity"]) else frame,
        "lines": "none" if measured is None else f"{measured[0]:+.1f} km/s, {measured[1]} lines, {measured[2]:.2f} A",
        "scatter / error": "no errors" if noise is None else f"{noise:.2f}",
        "flags": ";".join(first["flags"]),
        "read": f"{len(refused)} refused: {refused[0]}" if refused else "yes",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, help="a Markdown file; default: the terminal")
    arguments = parser.parse_args()
    table = [check(path) for path in find_files(arguments.folder)]
    names = [
        "file",
        "format",
        "instrument",
        "spectra",
        "id",
        "Angstrom",
        "frame",
        "lines",
        "scatter / error",
        "flags",
        "read",
    ]
    text = [f"| {' | '.join(line.get(name, '').replace('|', '/') for name in names)} |" for line in table]
    lines_of_text = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}", *text]
    lines_of_text = ["# Observed files", "", INTRODUCTION, "", *lines_of_text]
    if arguments.output:
        arguments.output.write_text("\n".join(lines_of_text) + "\n", encoding="utf-8")
    else:
        print("\n".join(lines_of_text))
    times = [float(line["read"].split()[2]) for line in table if "spectra" not in line]
    slowest = f", the slowest in {max(times):.2f} s" if times else ""
    print(f"{len(table)} files, {len(table) - len(times)} read, {len(times)} refused{slowest}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
