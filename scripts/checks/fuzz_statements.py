# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Spectra with random units, medium and frame, for `fuzz.py`: they must be read right.

The star is known: a flux per wavelength, in vacuum, at rest. It is written with a random form, unit, medium and frame,
which the file states or not. After the gate it must be the same star, or have a flag for missing statements, or be
refused; a wrong number without a flag is a fault.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from astropy import units
from astropy.io import fits
from astropy.table import Table

from spectrafm_hf.data.readers import read_spectra
from spectrafm_hf.models.gate_spectrafm import (
    FRAME_UNSTATED,
    MEDIUM_UNSTATED,
    SPEED_OF_LIGHT,
    to_rest,
    vacuum_to_air,
)


PIXELS = 300
#: Unit of wavelengths as written -> an Angstrom in it, and whether it is a logarithm (10, e).
WAVELENGTH_UNITS: dict[str, tuple[str, float]] = {
    **{"Angstrom": ("Angstrom", 0), "ANGSTROMS": ("Angstrom", 0), "A": ("Angstrom", 0), "0.1nm": ("Angstrom", 0)},
    **{"nm": ("nm", 0), "micron": ("um", 0), "um": ("um", 0), "m": ("m", 0), "": ("Angstrom", 0)},
    **{"log(Angstrom)": ("Angstrom", 10), "log10(nm)": ("nm", 10), "ln(Angstrom)": ("Angstrom", np.e)},
    **{"GHz": ("GHz", 0), "Hz": ("Hz", 0), "cm-1": ("cm-1", 0)},
}
#: Unit of fluxes as written -> unit of astropy, None for one without an absolute scale.
FLUX_UNITS: dict[str, str | None] = {
    **{"": None, "ct": None, "adu": None, "DN": None, "erg/s/cm2/A": "erg s-1 cm-2 Angstrom-1"},
    **{"10^-17 erg/s/cm^2/A": "1e-17 erg s-1 cm-2 Angstrom-1", "W m-2 um-1": "W m-2 um-1"},
    **{"FLAM": "erg s-1 cm-2 Angstrom-1"},
    **{"Jy": "Jy", "mJy": "mJy", "Janskys": "Jy", "erg/s/cm2/Hz": "erg s-1 cm-2 Hz-1", "erg/s/cm2": "erg s-1 cm-2"},
    **{"PHOTLAM": "photon s-1 cm-2 Angstrom-1", "photon/s/m2/nm": "photon s-1 m-2 nm-1"},
}  # fmt: skip
FORMS = ("fits-table", "fits-vectors", "fits-image", "ecsv", "votable", "csv")
FRAMES = {"": None, "SOURCE": "rest", "BARYCENT": "observed", "HELIOCENTRIC": "observed"}
VELOCITY_UNITS = {"": 1.0, "km/s": 1.0, "m/s": 1000.0}
WAVELENGTH_NAMES, FLUX_NAMES = ("wavelength", "wave", "LAMBDA", "wl"), ("flux", "FLUX", "spec", "flam")
ERRORS = {"sigma": "error", "ivar": "ivar", "variance": "variance"}


class Wrong(Exception):
    """A spectrum was read wrong, without a flag."""


def star() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Wavelengths in vacuum at rest, flux per wavelength, one-sigma errors."""
    wavelength = np.linspace(5000.0, 5300.0, PIXELS)
    lines = sum(0.6 * np.exp(-0.5 * ((wavelength - line) / 2.0) ** 2) for line in (5060.0, 5174.0, 5185.0))
    flux = 1e-14 * (wavelength / 5000) ** -2 * (1 - lines)
    return wavelength, flux, flux * (0.01 + 0.005 * np.sin(wavelength / 9))


def written(statement: Mapping[str, Any]) -> dict[str, tuple[np.ndarray, str]]:
    """Columns of a statement: values, and the text of the unit."""
    rest, flux, sigma = star()
    observed = to_rest(rest, -statement["velocity"])
    own = vacuum_to_air(observed) if statement["air"] else observed
    angstrom = own * units.AA
    unit, base = WAVELENGTH_UNITS[statement["wavelength_unit"]]
    values = angstrom.to_value(unit, units.spectral())
    values = np.log(values) / np.log(base) if base else values
    per_wavelength = units.Unit("erg s-1 cm-2 Angstrom-1")
    at = units.spectral_density(rest * units.AA)

    def as_written(array: np.ndarray, text: str) -> np.ndarray:
        target = FLUX_UNITS[text]
        return array * 1e14 if target is None else (array * per_wavelength).to_value(target, at)

    error = as_written(sigma, statement["error_unit"])
    kind = statement["error_kind"]
    error = error if kind == "sigma" else error**2 if kind == "variance" else error**-2
    flux = as_written(flux, statement["flux_unit"])
    if statement["null"]:
        flux[5:9] = {"nan": np.nan, "-9999": -9999.0}[statement["null"]]
    air = f"_{statement['suffix']}" if statement["suffix"] else ""
    columns = {
        f"{statement['wavelength_name']}{air}": (values, statement["wavelength_unit"]),
        statement["flux_name"]: (flux, statement["flux_unit"]),
        # A variance or inverse variance in the unit of the flux itself is usual.
        ERRORS[kind]: (error, statement["error_unit"]),
    }
    if statement["rv"]:
        columns["RV"] = (
            np.full(PIXELS, statement["velocity"] * VELOCITY_UNITS[statement["rv_unit"]]),
            statement["rv_unit"],
        )
    return columns


def write(statement: Mapping[str, Any], folder: Path) -> Path:
    """The file of a statement."""
    columns, form = written(statement), statement["form"]
    if form == "csv":
        headings = [f"{name} [{unit}]" if unit else name for name, (_, unit) in columns.items()]
        lines = [",".join(map(repr, map(float, row))) for row in zip(*(v for v, _ in columns.values()), strict=True)]
        path = folder / "a.csv"
        path.write_text("\n".join([",".join(headings), *lines]), encoding="utf-8")
        return path
    if form in ("ecsv", "votable"):
        table = Table({name: values for name, (values, _) in columns.items()})
        for name, (_, unit) in columns.items():
            if unit:
                table[name].unit = units.Unit(unit, parse_strict="silent")
        path = folder / f"a.{'xml' if form == 'votable' else 'ecsv'}"
        table.write(path, format="votable" if form == "votable" else "ascii.ecsv", overwrite=True)
        return path
    if form == "fits-image":
        names = ("FLUX", "WAVELENGTH", statement["error_kind"].replace("sigma", "ERROR"))
        own = [fits.ImageHDU(columns[name][0], name=shown) for name, shown in zip(_order(columns), names, strict=False)]
        for hdu, name in zip(own, _order(columns), strict=False):
            if columns[name][1]:
                hdu.header["BUNIT"] = columns[name][1]
        hdus = fits.HDUList([fits.PrimaryHDU(), *own])
    else:
        vector = form == "fits-vectors"
        made = [
            fits.Column(
                name,
                f"{PIXELS}D" if vector and name != "RV" else "D",
                unit=unit or None,
                array=_row(values, name, vector),
            )
            for name, (values, unit) in columns.items()
        ]
        hdus = fits.HDUList([fits.PrimaryHDU(), fits.BinTableHDU.from_columns(made)])
    for card, value in statement["cards"].items():
        hdus[0].header[card] = value
    path = folder / "a.fits"
    hdus.writeto(path, overwrite=True)
    return path


def _order(columns: Mapping[str, Any]) -> list[str]:
    """Flux, wavelength, error."""
    wavelength, flux, error, *_ = columns
    return [flux, wavelength, error]


def _row(values: np.ndarray, name: str, vector: bool) -> np.ndarray:
    return values if not vector else values[:1] if name == "RV" else values[None]


def stated_of(statement: Mapping[str, Any]) -> tuple[bool, str | None]:
    """Whether the file states the medium, and the stated frame."""
    in_header = statement["form"].startswith("fits")
    medium = bool(statement["suffix"]) and statement["form"] != "fits-image"
    medium |= in_header and any(card in statement["cards"] for card in ("AIRORVAC", "COMMENT"))
    frame = FRAMES[statement["cards"].get("SPECSYS", "")] if in_header else None
    return medium or statement["wavelength_unit"] in ("GHz", "Hz", "cm-1"), frame


def check(statement: Mapping[str, Any], folder: Path) -> None:
    """
    Raises
    ------
    Wrong
        For a spectrum that is another one than what was written, without a flag.
    ValueError
        Where the file is refused.
    """
    (row,) = read_spectra([write(statement, folder)])
    rest, flux, sigma = star()
    order = np.argsort(row["wavelength"], kind="stable")
    got = {name: row[name][order].astype(np.float64) for name in ("wavelength", "flux", "flux_error")}
    mask = row["mask"][order]
    bad = np.zeros(PIXELS, bool)
    bad[5:9] = bool(statement["null"])
    if not np.array_equal(mask, bad):
        raise Wrong(f"mask: {mask.sum()} pixels, of which {np.sum(mask & bad)} are the bad ones")
    off = float(np.median(got["wavelength"] / rest - 1)) * SPEED_OF_LIGHT
    flags = {*row["flags"], *(["not_at_rest"] if row["rest_frame"] is False else [])}
    moved = abs(statement["velocity"]) + 1.0 if flags & {FRAME_UNSTATED, "not_at_rest"} else 0.0
    if abs(off) > 1.0 + moved + (90.0 if MEDIUM_UNSTATED in flags else 0.0):
        raise Wrong(f"wavelength: off by {off:.1f} km/s with the flags {sorted(flags)}")
    is_stated, frame = stated_of(statement)
    if is_stated and MEDIUM_UNSTATED in flags:
        raise Wrong("medium: it is stated, but ignored")
    if frame == "rest" and row["rest_frame"] is not True or frame == "observed" and row["rest_frame"] is None:
        raise Wrong(f"frame: {frame} is stated, and rest_frame is {row['rest_frame']}")
    ratio = got["flux"][~bad] / flux[~bad]
    if not np.allclose(ratio, np.median(ratio), rtol=2e-3):
        raise Wrong(
            f"flux: another shape, from {ratio.min() / np.median(ratio):.3g} to {ratio.max() / np.median(ratio):.3g}"
        )
    share = (got["flux_error"] / got["flux"] / (sigma / flux))[~bad]
    if np.isfinite(share).any() and not np.allclose(share, 1, rtol=5e-3):
        raise Wrong(f"flux_error: {np.median(share):.3g} of what it is")


def statements(st: Any) -> Any:
    """A strategy of hypothesis for statements of files."""
    pick = st.sampled_from

    @st.composite
    def one(draw: Any) -> dict[str, Any]:
        form = draw(pick(FORMS))
        air = draw(st.booleans())
        unit = draw(pick(sorted(WAVELENGTH_UNITS)))
        flux_unit = draw(pick(sorted(FLUX_UNITS)))
        scaled = FLUX_UNITS[flux_unit] is not None
        kind = draw(pick(sorted(ERRORS)))
        # Only of one-sigma errors another unit than that of the flux is unambiguous.
        others = [text for text, known in FLUX_UNITS.items() if known is not None] if scaled and kind == "sigma" else []
        frame = draw(pick(sorted(FRAMES)))
        rv = draw(st.booleans()) and form != "fits-image"
        at_rest = frame == "SOURCE"
        cards = {"SPECSYS": frame} if frame else {}
        word = "air" if air else "vacuum"
        if draw(st.booleans()):
            cards |= draw(pick([{"AIRORVAC": word}, {"COMMENT": f"Wavelengths are in {word}"}]))
        spectral = unit in ("GHz", "Hz", "cm-1")
        return {
            "form": form,
            "air": air and not spectral,
            "velocity": 0.0 if at_rest else draw(st.floats(-400, 400)),
            "wavelength_unit": unit,
            "wavelength_name": draw(pick(WAVELENGTH_NAMES)),
            "suffix": "" if spectral else draw(pick(["", "", "air" if air else "vac"])),
            "flux_unit": flux_unit,
            "flux_name": draw(pick(FLUX_NAMES)),
            "error_unit": draw(pick([flux_unit, *others])),
            "error_kind": kind,
            "rv": rv,
            "rv_unit": draw(pick(sorted(VELOCITY_UNITS))),
            "null": draw(pick(["", "", "nan", "-9999"])),
            "cards": {}
            if spectral and "SPECSYS" not in cards
            else {k: v for k, v in cards.items() if not spectral or k == "SPECSYS"},
        }

    return one()
