# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Recognise columns and their units by the names that people write, with the same rules for all tables."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .late import units


#: Names of columns without case, blanks and punctuation, the most specific ones first.
_NAMES: dict[str, tuple[str, ...]] = {
    "wavelength": (
        *(
            "wavelength",
            "wave",
            "lambda",
            "lam",
            "wavelengths",
            "wl",
            "wav",
            "spectralaxis",
            "wlen",
            "awav",
            "ll",
            "waveobs",
            "arg",
            "frequency",
            "freq",
            "wavenumber",
            "wavenumbers",
            "energy",
            "photonenergy",
        ),
        *("wavelengthair", "waveair", "lambdaair", "airwavelength", "airwave"),
        *("wavelengthvac", "wavevac", "lambdavac", "vacuumwavelength", "wavelengthvacuum", "wvac", "wvl"),
    ),
    "log_wavelength": (
        *("loglam", "loglambda", "logwave", "logwavelength", "log10wavelength", "loglamb"),
        *("lnlam", "lnwave", "lnlambda", "lnwavelength"),
    ),
    "flux": (
        *("flux", "fluxes", "spec", "spectrum", "flam", "fluxlambda", "flambda", "fluxdensity", "f", "fnu", "fluxnu"),
        *("fluxreduced", "fluxcal", "fluxcalibrated"),
        *("normflux", "fluxnorm", "normalizedflux", "normalisedflux", "fluxnormalized", "intensity", "counts", "fun"),
        # The last two are of SPIRou.
        *("fluxnormalised", "signal", "fluxabtellucorrected", "fluxab"),
    ),
    "flux_error": (
        *("fluxerror", "fluxerr", "error", "err", "sigma", "uncertainty", "unc", "eflux", "staterror", "errflux"),
        *("errorflux", "sigmaflux", "fluxsigma", "fluxunc", "fluxuncertainty", "fluxerrors", "errors", "specerr"),
        *("specerror", "spectrumerror", "spectrumerr", "std", "stddev", "fluxstd", "fluxstddev", "noise", "fluxnoise"),
        *(
            "specsigma",
            "specstd",
            "specunc",
            "errs",
            "sig",
            "stat",
            "fluxlambdaerr",
            "flamerr",
            "ferr",
            "fluxuncert",
            "properr",
            "errreduced",
            "staterr",
            "yerr",
            "fluxerrabtellucorrected",
            "fluxerrab",
        ),
    ),
    "ivar": ("ivar", "fluxivar", "ivarflux", "invvar", "inversevariance", "specivar", "fluxinvvar"),
    "variance": ("variance", "var", "fluxvar", "fluxvariance", "specvar", "specvariance"),
    # For each pixel: errors are derived from it if there are none.
    "snr": ("snr", "sn", "sovern", "signaltonoise", "signaltonoiseratio", "signalnoise", "snratio", "fluxsnr", "s2n"),
    "mask": (
        *("mask", "bad", "badpixels", "pixelmask", "andmask", "dq", "qual", "quality", "pixmask", "flags"),
        *("badpix", "badpixelmask", "badmask", "isbad", "bpm", "rejected", "flag", "badpixel", "badflag"),
    ),
    # The first is that of CALSPEC: 1 = good.
    "good": ("dataqual", "good", "goodpix", "goodpixels", "goodpixelmask", "goodmask", "isgood", "valid", "isvalid"),
    "object_id": (
        *("objectid", "sourceid", "apogeeid", "sdssid", "gaiaedr3sourceid", "gaiadr3sourceid", "targetid", "sobjectid"),
        *("objid", "obsid", "starid", "star", "object", "objname", "mangaid", "name", "id"),
    ),
    "radial_velocity": (
        "radialvelocity",
        "rv",
        "vhelio",
        "vrad",
        "vheliobest",
        "radvel",
        "rvhelio",
        "heliorv",
        "heliov",
        "vlos",
        "hrv",
        "rvkms",
    ),
    "redshift": ("z", "redshift", "zbest"),
}
#: Words before or after the name of a flux, as in `e_fnu` and `fnu_ivar`.
_OF_FLUX = {
    "flux_error": ("e", "err", "error", "sigma", "sig", "unc", "uncertainty", "std", "d", "u", "delta"),
    "ivar": ("ivar", "invvar"),
    "variance": ("var", "variance"),
}
#: Roles in `--columns ROLE=NAME`.
ROLES = tuple(_NAMES)
_HEADING = re.compile(r"^\s*(.*?)\s*(?:\[([^\]]*)\]|\(([^)]*)\))\s*$")
_IN_A_MEDIUM = re.compile(r"(?<=.)(in)?(air|vac(uum)?)$")
_SUFFIX = re.compile(
    r"^(wave|wavelength|lambda|lam|wl|wav)_(nm|um|micron|microns|angstroms?|aa?)$"
    r"|^(flux|(?:e_)?flux_?(?:err|error|unc|uncertainty|sigma)|err|error|unc|e_flux)_"
    r"([unm]?jy|MJy|w_m2_(?:um|nm)|ergs?_s_cm2_(?:aa?|angstrom|hz))$",
    re.IGNORECASE,
)
#: Suffixes of the name of a flux, and their units.
_WRITTEN = {"w": "W m-2 {}-1", "erg": "erg s-1 cm-2 {}-1", "ergs": "erg s-1 cm-2 {}-1"}


class Heading(NamedTuple):
    """A heading such as `wavelength [nm]`: the name, and the unit in brackets."""

    name: str
    unit: str


def heading(text: str) -> Heading:
    """Name and unit of a heading; `e_[Fe/H]` has no unit."""
    if (suffixed := _SUFFIX.match(text.strip())) is not None:
        parts = (suffixed[2] or suffixed[4]).split("_")
        written = _WRITTEN.get(parts[0].lower(), "{}").format(parts[-1])
        return Heading(suffixed[1] or suffixed[3], written)
    match = _HEADING.match(text)
    return Heading(match[1], match[2] or match[3] or "") if match and match[1] else Heading(text.strip(), "")


def plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "", heading(name).name.lower())


def pixel_names(role: str) -> tuple[str, ...]:
    """Known names of a role, without case, blanks and punctuation."""
    return _NAMES[role]


def find_columns(
    file: Path, names: Iterable[str], wanted: Mapping[str, str] | None = None, *, demanded: bool = True
) -> dict[str, str]:
    """
    Find the columns of a table by role.

    Parameters
    ----------
    file : path
        Used in messages.
    names : iterable of str
        Headings, with or without units.
    wanted : mapping of role to heading, optional
        As in `--columns`: `{"wavelength": "wave", "mask": "none"}`.
    demanded : bool
        Whether wavelength and flux are required.

    Returns
    -------
    dict of role to heading
        Has at most one of `flux_error`, `ivar`, `variance` and `snr`, one of `wavelength` and `log_wavelength`, one of
        `mask` and `good`, and one of `radial_velocity` and `redshift`.

    Raises
    ------
    ValueError
        If wavelength or flux is missing or ambiguous; names the option to set.
    """
    names = list(names)
    wanted = dict(wanted or {})
    found: dict[str, str] = {}
    for role, name in wanted.items():
        if role not in ROLES:
            raise ValueError(f"columns: expected {', '.join(ROLES)} = the name of a column, got {role}={name}")
        if name.lower() == "none":
            continue
        same = [named for named in names if name in (named, named.strip(), heading(named).name)]
        same = same or [named for named in names if plain(named) == plain(name)]
        if not same:
            raise ValueError(
                f"columns: expected {role} among the columns of {file}, got {name}; the file has {_some(names)}"
            )
        found[role] = same[0]
    left = [name for name in names if name not in found.values()]
    for role, known in _NAMES.items():
        if role in wanted:
            continue
        words = [plain(name) for name in left]
        if role in ("wavelength", "log_wavelength"):
            words = [word if word in known else _IN_A_MEDIUM.sub("", word) for word in words]
        ranked = sorted((known.index(word), i) for i, word in enumerate(words) if word in known)
        if not ranked:
            continue
        best = [left[i] for rank, i in ranked if rank == ranked[0][0]]
        # Case is ignored, unless both flux and FLUX exist: then the spelling of the schema wins.
        exact = [name for name in best if heading(name).name == role] or best
        if len(exact) > 1:
            raise ValueError(
                f"{role}: expected one such column in {file}, got {', '.join(best)}; name it with "
                f"columns={{{role!r}: {heading(exact[0]).name!r}}}"
            )
        found[role] = exact[0]
    if "flux" in found and not {"flux_error", "ivar", "variance"} & {*found, *wanted}:
        own = plain(found["flux"])
        for role, suffixes in _OF_FLUX.items():
            spelt = {each for word in suffixes for each in (f"{word}{own}", f"{own}{word}")}
            same = [name for name in left if plain(name) in spelt and name not in found.values()]
            if len(same) == 1:
                found[role] = same[0]
                break
    for several in (
        ("wavelength", "log_wavelength"),
        ("flux_error", "ivar", "variance", "snr"),
        ("mask", "good"),
        ("radial_velocity", "redshift"),
    ):
        there = sorted((role for role in several if role in found), key=lambda role: role not in wanted)
        for role in there[1:]:
            del found[role]
    if demanded:
        for role in ("wavelength", "flux"):
            if role not in found and not (role == "wavelength" and "log_wavelength" in found):
                raise ValueError(
                    f"{role}: expected a column of this name in {file}, got {_some(names)}; name it with "
                    f"columns={{{role!r}: 'NAME'}}"
                )
    return found


def groups(file: Path, names: Iterable[str]) -> dict[str, dict[str, str]]:
    """
    Columns by role of each of several spectra in a table, by their common prefix or suffix, such as `OPT_WAVE` and
    `OPT_FLAM` (PypeIt) or `01_01_WL` and `01_01_SPEC` (CRIRES+).
    """
    found: dict[str, dict[str, str]] = {}
    parts: dict[str, dict[str, str]] = {}
    for name in names:
        for place in (match.start() for match in re.finditer(r"(?<=.)[_.](?=.)", name)):
            parts.setdefault(name[: place + 1], {})[name[place + 1 :]] = name
            parts.setdefault(name[place:], {})[name[:place]] = name
    for common, own in parts.items():
        roles = find_columns(file, own, demanded=False)
        if "flux" in roles and {"wavelength", "log_wavelength"} & roles.keys():
            found[common] = {role: own[name] for role, name in roles.items()}
    # PypeIt extracts a spectrum twice, with and without weights; keep the first.
    if "OPT_" in found:
        found.pop("BOX_", None)
    return found


#: A role, and how unified content descriptors and names of the spectral data model (IVOA) for it begin.
_MEANINGS = (
    ("wavelength", ("em.wl", "em.freq", "em.energy", "em.wavenumber"), "spectralaxis.value"),
    ("flux_error", ("stat.error;phot", "stat.error;arith"), "fluxaxis.accuracy.staterror"),
    ("flux", ("phot.flux", "phot.fluxdens", "phot.flux.density", "arith.ratio"), "fluxaxis.value"),
)


def by_meaning(fields: Iterable[tuple[str, str, str]]) -> dict[str, str]:
    """
    Columns by role from their UCDs and utypes (Virtual Observatory), independent of their names.
    """
    found: dict[str, str] = {}
    for name, ucd, utype in fields:
        for role, ucds, ending in _MEANINGS:
            if utype.lower().endswith(ending) or (not utype and ucd.lower().startswith(ucds)):
                found.setdefault(role, name)
                break
    return found


def known_name(names: Iterable[str]) -> bool:
    """Whether one of some words is a name of a wavelength or a flux."""
    known = {*_NAMES["wavelength"], *_NAMES["log_wavelength"], *_NAMES["flux"]}
    return any(plain(name) in known for name in names)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(str(name)[:40] for name in names[:20])
    return (shown or "none") + (", ..." if len(names) > 20 else "")


def medium_of(name: str) -> str | None:
    """The medium in a name such as `wave_air`."""
    word = plain(name)
    return "air" if "air" in word or word == "awav" else "vacuum" if "vac" in word else None


def medium_beside(name: str, names: Iterable[str]) -> str | None:
    """The medium of `wavelength` if the table also has `wavelength_air` (ESPRESSO) or `wavelength_vac`."""
    beside = {medium_of(other) for other in names if _IN_A_MEDIUM.sub("", plain(other)) == plain(name) != plain(other)}
    return None if medium_of(name) or len(beside) != 1 else {"air": "vacuum", "vacuum": "air"}[str(beside.pop())]


# --------------------------------------------------------------------------------------------------------------- units

_WORDS = {
    "flam": "erg s-1 cm-2 Angstrom-1",
    "photlam": "photon s-1 cm-2 Angstrom-1",
    "photnu": "photon s-1 cm-2 Hz-1",
    "janskys": "Jy",
    "stmag": "mag",
    "abmag": "mag",
    "fnu": "erg s-1 cm-2 Hz-1",
    "angstroms": "Angstrom",
    "angstrom": "Angstrom",
    "ang": "Angstrom",
    "aa": "Angstrom",
    "a": "Angstrom",  # an ampere in astropy
    "å": "Angstrom",
    "microns": "um",
    "micron": "um",
    "micrometer": "um",
    "µm": "um",
    "nanometer": "nm",
    "nanometers": "nm",
    "ergs": "erg",
    "sec": "s",
    "jansky": "Jy",
    "photons": "photon",
    "%": "percent",
}
_NOTHING = {
    "",
    "none",
    "null",
    "relative",
    "relative flux",
    "dimensionless",
    "unitless",
    "normalized",
    "normalised",
    "-",
}


def unit_of(text: Any) -> units.UnitBase | None:
    """
    Parse a unit in the loose notations that people use; None if it is not a unit.

    If the unit of a flux cannot be parsed, a similar one is returned: per frequency, in photons, or a magnitude.
    """
    if text is None or (hasattr(text, "physical_type") and not _is_misread(text)):
        return None if text is None or text == units.one else text
    words = " ".join(str(text).split())
    if words.lower() in _NOTHING:
        return None
    if logarithm(words) is not None:
        return units.dex
    # [10^-17 erg/s/cm^2/A], erg cm**(-2) s**(-1) angstrom**(-1), Wm-2um-1, ERG/CM2/S/A
    tidy = re.sub(r"\*\*|\^", "", words.strip("[] "))
    tidy = re.sub(r"\(([+-]?\d+)\)", r"\1", tidy)
    scale = re.match(r"\s*(10\s*[+-]\d+|1\.?0*[eE][+-]?\d+)\s*\*?\s*", tidy)
    rest = tidy[scale.end() :] if scale else tidy
    rest = re.sub(r"\bW\s*m-2", "W m-2 ", rest)
    for case in (str, str.lower):
        parts = re.split(r"([A-Za-zÅµ%]+)", case(rest))
        spelt = "".join(_WORDS.get(part.lower(), part) if i % 2 else part for i, part in enumerate(parts))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                unit = units.Unit(" ".join(re.sub(r"\s*/\s*", "/", spelt).split()))
            except (ValueError, TypeError):
                continue
        power = re.sub(r"\s", "", scale[1]) if scale else ""
        factor = 1.0 if not scale else 10.0 ** int(power[2:]) if power.startswith("10") else float(power)
        return units.Unit(factor * unit) if factor != 1 else None if unit == units.one else unit
    lower = words.lower()
    for sign, unit in (
        ("mag", units.mag),
        ("jy", units.Jy),
        ("jansky", units.Jy),
        ("hz", units.Jy),
        ("photon", units.Unit("photon s-1 m-2 nm-1")),
    ):
        if sign in lower:
            return unit
    return None


def _is_misread(unit: Any) -> bool:
    """Whether astropy did not know a unit, or took A for ampere, as it does in tables."""
    return isinstance(unit, units.UnrecognizedUnit) or units.A in getattr(unit, "bases", ())


def logarithm(text: Any) -> tuple[float, str] | None:
    """Base and inner unit of `log(Angstrom)`; None for other units."""
    match = re.match(r"^\s*(log10|log|lg|dex|ln)\s*[(\[ ]\s*(.*?)\s*[)\]]?\s*$", str(text or ""), re.IGNORECASE)
    return None if match is None else (math.e if match[1].lower() == "ln" else 10.0, match[2])


#: Range of ln of wavelengths in Angstrom; their log10 is below 5.5.
_NATURAL = (6.9, 12.7)


def from_logarithm(values: Any, base: float | None = None) -> np.ndarray:
    """Wavelengths from their logarithms; the base follows from their size if it is not stated."""
    array = np.asarray(values, np.float64)
    real = array[np.isfinite(array)]
    if base in (None, 10.0):  # some write log for ln; 10 ** 6.9 Angstrom is impossible
        base = math.e if real.size and _NATURAL[0] <= real.min() and real.max() <= _NATURAL[1] else 10.0
    with np.errstate(over="ignore"):  # the tokenizer checks it
        return np.asarray(base**array)


def velocity_factor(text: Any) -> float:
    """km/s per unit of a column of velocities; 1 if the column states no unit."""
    unit = unit_of(text)
    if unit is None:
        return 1.0
    try:
        return float(unit.to(units.km / units.s))
    except units.UnitConversionError as error:
        raise ValueError(f"radial_velocity: expected a unit of velocity, got {str(text)!r}") from error


def length_unit(text: Any, field: str = "wavelength_unit") -> units.UnitBase | None:
    """The unit of wavelengths, frequencies or energies; None if there is none."""
    unit = unit_of(text)
    if unit is not None and not any(unit.is_equivalent(each) for each in (units.AA, units.Hz, units.eV, 1 / units.cm)):
        raise ValueError(f"{field}: expected a unit of length, got {str(text)!r}")
    return unit
