# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Add the strongest lines of the synthetic spectra to `resources/lines.csv` (rank 4), for `spectrafm explain`.

    python scripts/generate/make_line_list.py

A line is a minimum of the emulated spectrum of one of three stars (`STARS`). Its element is that whose abundance
changes its depth most in the emulator; its transition is the strongest of that species within half a resolution element
in the line list. Lines that depend on no abundance are assigned to iron and elements that the emulator does not vary.
Downloads the line list (20 MB) the first time, and takes a minute.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.signal import find_peaks

from spectrafm_hf import SpectrumEmulator, bundled
from spectrafm_hf.data.lines import line_list
from spectrafm_hf.files import complete_file
from spectrafm_hf.inference.explain import TOLERANCE
from spectrafm_hf.models.gate_spectrafm import air_to_vacuum, vacuum_to_air
from spectrafm_hf.synthesis.binned import binned
from spectrafm_hf.synthesis.lines import Species
from spectrafm_hf.synthesis.lines import line_list as synthesis_list


#: Hot to cool: a line is named after the star in which molecules blend it least.
STARS: tuple[dict[str, Any], ...] = (
    {"teff": 5772.0, "logg": 4.44, "fe_h": 0.0},
    {"teff": 4500.0, "logg": 1.8, "fe_h": -0.2},
    {"teff": 3900.0, "logg": 1.0, "fe_h": -0.3},
)
#: Emulator -> how many lines.
EMULATORS = {"emulator-hband": 120, "emulator-optical": 60}
#: Pixels of the optical emulator that are averaged: R = 2,000, as in most surveys. At full resolution all strong lines
#: have a similar depth.
BINNED = 24
#: Angstrom: at shorter wavelengths every such pixel has several strong lines.
LOWEST = 4000.0
STEP = 0.1  # dex
#: Line shares by elements that change a line: carbon and nitrogen make CN, carbon alone CO or, in hot stars, C I.
MOLECULES = {"n_fe": (607,), "c_fe": (608, 6), "o_fe": (108,)}
ATOMS = {"mg_fe": 12, "si_fe": 14, "al_fe": 13, "ca_fe": 20, "ti_fe": 22, "mn_fe": 25, "ni_fe": 28}
#: The other elements with significant lines, and log abundances (Grevesse, Asplund & Sauval 2007).
OTHERS = {26: 7.45, 11: 6.17, 19: 5.08, 23: 4.00, 24: 5.64, 27: 4.92, 29: 4.21, 16: 7.14, 21: 3.17, 38: 2.92, 56: 2.17}
SYMBOLS = {
    6: "C I", 11: "Na I", 12: "Mg I", 13: "Al I", 14: "Si I", 16: "S I", 19: "K I", 20: "Ca I", 21: "Sc I", 22: "Ti I",
    23: "V I", 24: "Cr I", 25: "Mn I", 26: "Fe I", 27: "Co I", 28: "Ni I", 29: "Cu I", 38: "Sr I", 56: "Ba I",
    108: "OH", 607: "CN", 608: "CO",
}  # fmt: skip


def main() -> None:
    path = files("spectrafm_hf") / "resources" / "lines.csv"
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if ",synthesis," not in line]
    known = [line.wavelength for line in line_list() if line.rank < 4]
    added = []
    for name, number in EMULATORS.items():
        emulator = SpectrumEmulator.from_pretrained(bundled(name))
        emulator = binned(emulator, BINNED) if emulator.config.interval_pixels else emulator
        added += strongest_lines(emulator, number, known)
    header = [line for line in kept if line.startswith(("#", "wavelength"))]
    rows = sorted([line for line in kept if line not in header] + added, key=lambda row: float(row.split(",")[0]))
    with complete_file(str(path)) as temporary:
        temporary.write_text("\n".join([*header, *rows]) + "\n", encoding="utf-8")
    print(f"{path}: {len(added)} lines of the synthesis list added to {len(rows) - len(added)}")


def strongest_lines(emulator: SpectrumEmulator, number: int, known: list[float]) -> list[str]:
    """Rows of the table for the deepest minima that are not near a known line."""
    wavelength, _ = emulator.synthesize(**STARS[0])
    width = float(np.median(np.diff(wavelength)))
    if emulator.config.resolving_power:
        width = max(width, 0.5 * float(wavelength.mean()) / emulator.config.resolving_power)
    low, high = vacuum_to_air(wavelength[[0, -1]])
    species = [one for one in synthesis_list(low, high) if one.charge in (0, 1) and one.number in SYMBOLS]
    rows: list[str] = []
    taken = list(known)
    for turn, star in enumerate(STARS, start=1):  # each star gives its share
        found: list[tuple[float, float, str]] = []
        flux = emulator.synthesize(normalized=True, **star)[1][0]
        changed = {
            label: flux - emulator.synthesize(normalized=True, **{**star, label: star.get(label, 0.0) + STEP})[1][0]
            for label in (*MOLECULES, *ATOMS, "fe_h")
        }
        # [Fe/H] changes all of them together: what is left is due to iron and the elements without a label.
        changed["fe_h"] = 2 * changed["fe_h"] - sum(changed.values())
        for pixel in find_peaks(1 - flux, prominence=0.05)[0]:
            depth = float(1 - flux[pixel])
            label = max(changed, key=lambda label: changed[label][pixel])
            numbers = tuple(OTHERS) if label == "fe_h" else MOLECULES.get(label) or (ATOMS[label],)
            theta = 5040 / star["teff"]
            line = strongest(species, numbers, float(wavelength[pixel]), width, theta)
            if line is not None:
                found.append((depth, *line))
        for _, place, name in sorted(found, reverse=True):
            apart = place > LOWEST and min(abs(place - other) for other in taken) > max(TOLERANCE, width)
            if apart and len(rows) < number * turn // len(STARS):
                taken.append(place)
                rows.append(f"{place:.2f},{name},4,synthesis,")
    return rows


def strongest(
    species: list[Species], numbers: tuple[int, ...], wavelength: float, width: float, theta: float
) -> tuple[float, str] | None:
    """Vacuum wavelength and name of the strongest line of some species near a wavelength."""
    place = float(vacuum_to_air(wavelength))
    best: tuple[float, float, str] | None = None
    for one in species:
        if one.number not in numbers:
            continue
        near = slice(*np.searchsorted(one.wavelength, [place - width, place + width]))
        strength: NDArray[np.float64] = one.loggf[near] - theta * one.excitation[near] + OTHERS.get(one.number, 0.0)
        if strength.size and (best is None or strength.max() > best[0]):
            i = int(np.argmax(strength))
            name = SYMBOLS[one.number] + ("I" if one.charge and one.number < 100 else "")
            best = float(strength[i]), float(air_to_vacuum(one.wavelength[near][i])), name
    return None if best is None else best[1:]


if __name__ == "__main__":
    main()
