# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
The gate that every spectrum passes, whether it comes from a file, a table, a data set or an object in memory.

Readers only pass on what their input states (`Stated`). `admit` converts it to Angstrom in vacuum at rest, to flux per
wavelength with one-sigma errors and a mask; it refuses spectra that are not of a star, and flags statements that are
missing.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np


SPEED_OF_LIGHT = 299_792.458  # km/s
MIN_WAVELENGTH, MAX_WAVELENGTH = 1_000.0, 300_000.0  # Angstrom
AIR_ABOVE = 2_000.0  # Angstrom; below it wavelengths are by convention in vacuum
ANGSTROM_PER_UNIT = {"Angstrom": 1.0, "nm": 10.0, "um": 1e4, "mm": 1e7, "cm": 1e8, "m": 1e10}
# No star of the Galaxy is known to move faster; larger redshifts are of galaxies.
MAX_VELOCITY = 3_000.0  # km/s
# Pixels wider than this, in ln wavelength, hide the velocity of a star and most of the 80 km/s between air and vacuum.
COARSE = 1e-3
FRAME_UNSTATED, MEDIUM_UNSTATED = "frame_unstated", "medium_unstated"
#: Flag of a spectrum that could not be shifted to the rest frame, because its velocity is unknown.
NOT_AT_REST = "not_at_rest"
PER_WAVELENGTH = "1e-17 erg s-1 cm-2 Angstrom-1"
NOT_STARS = ("QSO", "QUASAR", "GALAXY", "GAL", "AGN")
# Placeholders for fluxes that were not measured.
PLACEHOLDERS = (-999.0, -9999.0, -99999.0)
# Minimum number of pixels of an arm or order; shorter runs are wavelengths that are not sorted.
MIN_ARM = 8


# ------------------------------------------------------------------------------------------------------- air, velocity


def _index_of_air(vacuum: np.ndarray) -> np.ndarray:
    """Refractive index at vacuum wavelengths in Angstrom (IAU standard, Morton 2000, ApJS 130, 403, eq. 8)."""
    s2 = (1e4 / np.maximum(vacuum, AIR_ABOVE)) ** 2
    return 1.0 + 8.34254e-5 + 2.406147e-2 / (130.0 - s2) + 1.5998e-4 / (38.9 - s2)


def vacuum_to_air(wavelength):
    """Vacuum -> air wavelengths in Angstrom (Morton 2000); unchanged below 2,000 A."""
    vacuum = np.asarray(wavelength, dtype=np.float64)
    return np.where(vacuum < AIR_ABOVE, vacuum, vacuum / _index_of_air(vacuum))


def air_to_vacuum(wavelength):
    """Air -> vacuum wavelengths in Angstrom: the inverse of [`vacuum_to_air`] to rounding; unchanged below 2,000 A."""
    air = np.asarray(wavelength, dtype=np.float64)
    vacuum = air
    for _ in range(4):  # the index varies slowly: each step gains four digits
        with np.errstate(over="ignore"):
            vacuum = air * _index_of_air(vacuum)
    return np.where(air < AIR_ABOVE, air, vacuum)


def velocity_of(redshift: float) -> float:
    """km/s of a redshift, by the relativistic Doppler formula; NaN for the placeholders of an unknown one."""
    ratio = (1 + redshift) ** 2
    return SPEED_OF_LIGHT * (ratio - 1) / (ratio + 1) if redshift > -1 else np.nan


def to_rest(wavelength, velocity):
    """Wavelengths of a star that recedes with `velocity` (km/s), as the star itself would see them."""
    beta = velocity / SPEED_OF_LIGHT
    with np.errstate(over="ignore"):
        return wavelength * np.sqrt((1 - beta) / (1 + beta))


# ------------------------------------------------------------------------------------------------------------ the gate


@dataclass
class Stated:
    """
    The statements of an input about one spectrum; None if it makes none. Readers never guess.

    Parameters
    ----------
    wavelength, flux : array of shape (pixels,)
    flux_error : array of shape (pixels,), optional
        As `error_kind` says, in `error_unit`.
    mask : array of shape (pixels,), optional
        True is bad; of whole numbers those that share a bit with `bad_bits`, or all but 0 where that is None.
    bad_bits : int, optional
    wavelength_unit, flux_unit, error_unit : unit of astropy, optional
        Plain wavelengths are Angstrom. An error without a unit has that of the flux.
    error_kind : {"sigma", "variance", "ivar"}
    null : number, optional
        Placeholder for missing values in flux and error.
    medium : {"vacuum", "air"}, optional
    frame : {"rest", "observed"}, optional
        Whether the wavelengths are in the rest frame of the star.
    radial_velocity, redshift : float, optional
        Velocity (km/s) or redshift of the star in the frame of the wavelengths; one is enough.
    object_class : str
        As the survey classifies the object: STAR, QSO, GALAXY, ...
    resolving_power : float, optional
    normalised : bool, optional
        Whether the flux is divided by a continuum.
    """

    wavelength: Any
    flux: Any
    flux_error: Any = None
    mask: Any = None
    bad_bits: int | None = None
    wavelength_unit: Any = None
    flux_unit: Any = None
    error_unit: Any = None
    error_kind: str = "sigma"
    null: float | None = None
    medium: str | None = None
    frame: str | None = None
    radial_velocity: float | None = None
    redshift: float | None = None
    object_class: str = ""
    resolving_power: float | None = None
    normalised: bool | None = None


@dataclass
class Admitted:
    """
    A spectrum after the gate.

    `wavelength` (Angstrom, vacuum; at rest where `rest_frame` is True), `flux` (per wavelength), `flux_error` (one
    sigma, NaN where unknown) and `mask` (True is bad), of shape (pixels,). `rest_frame` is None where the frame
    is not stated. `radial_velocity` in km/s is that of the star, NaN if unknown. `flags` name relevant
    assumptions; `refused` is the reason why the spectrum cannot be used, otherwise "".
    """

    wavelength: np.ndarray
    flux: np.ndarray
    flux_error: np.ndarray
    mask: np.ndarray
    radial_velocity: float = np.nan
    rest_frame: bool | None = True
    resolving_power: float = np.nan
    normalised: bool | None = None
    flags: list[str] = field(default_factory=list)
    refused: str = ""


def admit(
    stated: Stated, medium: str | None = None, radial_velocity: float | None = None, at_rest: bool = False
) -> Admitted:
    """
    Convert a spectrum to the form that all later steps rely on.

    Parameters
    ----------
    stated : Stated
    medium : {"vacuum", "air"}, optional
        Medium of the wavelengths, if the input does not state it.
    radial_velocity : float, optional
        km/s, instead of what the input states. A spectrum that is stated to be at rest is not shifted.
    at_rest : bool
        Wavelengths are at rest, if the input does not state the frame.

    Raises
    ------
    ValueError
        For units that are not of wavelength, flux or error; names field, expectation, value and what to do.
    """
    wavelength = in_angstrom(stated.wavelength, stated.wavelength_unit)
    flux, error = _numbers(stated.flux), None if stated.flux_error is None else _numbers(stated.flux_error)
    if stated.null is not None:
        flux = np.where(flux == stated.null, np.nan, flux)
        error = None if error is None else np.where(error == stated.null, np.nan, error)
    mask = _bad_pixels(stated, flux.shape)
    placeholders = np.logical_or.reduce([flux == number for number in PLACEHOLDERS])
    if error is not None and stated.error_kind != "ivar" and error.size and not np.any(error):
        error = None  # zero for all pixels: the errors are unknown
    if error is None:
        error = np.full(flux.shape, np.nan)
    else:
        error = sigma_of(error, stated.error_kind)
        error = _in_unit_of_flux(error, stated, wavelength)
    if (factor := per_wavelength(stated.flux_unit, wavelength)) is not None and flux.shape[-1:] == wavelength.shape:
        with np.errstate(over="ignore", invalid="ignore"):
            flux, error = flux * factor, error * factor
    if flux.shape == error.shape == mask.shape:
        mask = mask | ~(np.isfinite(flux) & ~(error <= 0) & (error != np.inf)) | placeholders
        if stated.wavelength_unit is not None and wavelength.shape == flux.shape:
            # Model spectra reach further. Without a unit, they may be nanometres: the tokenizer raises.
            inside = (wavelength >= MIN_WAVELENGTH) & (wavelength <= MAX_WAVELENGTH)
            if (inside & ~mask).any():
                mask = mask | ~inside

    flags = []
    if stated.medium is None and not _is_length(stated.wavelength_unit):
        medium = "vacuum"  # a frequency or an energy is in no medium
    unsettled = stated.medium is medium is None or stated.frame is None
    coarse = unsettled and _is_coarse(wavelength, stated.resolving_power)
    if (stated.medium or medium) == "air":
        # Invalid wavelengths are not changed: the tokenizer checks them.
        real = np.isfinite(wavelength) & (wavelength > 0)
        wavelength = np.where(real, air_to_vacuum(np.where(real, wavelength, 1.0)), wavelength)
    elif stated.medium is None and medium is None and not coarse:
        flags.append(MEDIUM_UNSTATED)
    refused = _not_a_star(stated)
    known = np.nan if refused else _velocity(stated)
    rest_frame: bool | None = True
    if stated.frame == "observed" or (stated.frame is None and radial_velocity is not None):
        used = known if radial_velocity is None else radial_velocity
        rest_frame = bool(abs(used) < SPEED_OF_LIGHT)
        if rest_frame:
            wavelength, known = to_rest(wavelength.astype(np.float64), used), used
    elif stated.frame is None and not at_rest:
        rest_frame = None
        if not coarse:
            flags.append(FRAME_UNSTATED)
    return Admitted(
        wavelength,
        flux,
        error,
        mask,
        float(known),
        rest_frame,
        np.nan if stated.resolving_power is None else float(stated.resolving_power),
        stated.normalised,
        flags,
        refused,
    )


def sigma_of(error, kind: str):
    """One-sigma errors from errors of this `kind`; infinite where an inverse variance is 0."""
    if kind == "sigma":
        return error
    if kind not in ("variance", "ivar"):
        raise ValueError(f"error_kind: expected 'sigma', 'variance' or 'ivar', got {kind!r}")
    array = np.asarray(error, np.float64)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        sigma = np.abs(array) ** (0.5 if kind == "variance" else -0.5)
    return np.where(array < 0, -sigma, sigma)  # the sign survives, for the check of errors


def per_wavelength(unit, wavelength):
    """
    Factor from a flux in `unit` to one per wavelength, at each wavelength (Angstrom); None if it is already per
    wavelength, in counts, or without a unit. Flux per frequency differs by the square of the wavelength.

    Raises
    ------
    ValueError
        For magnitudes, whose zero point is not always known, logarithms, and units of no flux.
    """
    if unit is None or not hasattr(unit, "physical_type"):
        return None
    from astropy import units

    target = units.Unit(PER_WAVELENGTH)
    if "dex" in str(unit):
        raise ValueError(
            f"flux: expected a flux density or numbers without a unit, got its logarithm ({unit}); convert it first, "
            "with 10 ** flux"
        )
    if hasattr(unit, "function_unit") or units.mag in unit.decompose().bases + unit.bases:
        raise ValueError(
            f"flux: expected a flux density or numbers without a unit, got magnitudes ({unit}); convert them first, "
            "with 10 ** (-0.4 * magnitude) for AB magnitudes to a flux per frequency"
        )
    for base, power in zip(unit.bases, unit.powers, strict=True):
        if base in (units.beam, units.pix):
            unit = unit / base**power
    # Per solid angle, and of the star itself, the shape is the same.
    for same_shape in (unit, unit * units.sr, unit / units.cm**2):
        if same_shape.is_equivalent(target):
            return None
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            at = np.where(np.isfinite(wavelength) & (wavelength > 0), wavelength, np.nan) * units.AA
            try:
                return same_shape.to(target, np.ones(np.shape(wavelength)), units.spectral_density(at))
            except units.UnitConversionError:
                continue
    bases = {*unit.decompose().bases}
    # Programs write counts in many ways, of which some, such as du, are units of other things to astropy.
    if units.K in bases or {units.kg, units.s} <= bases:
        raise ValueError(
            f"flux: expected a flux density, counts or numbers without a unit, got {unit}; convert it first"
        )
    return None


def _numbers(values) -> np.ndarray:
    if type(values) is np.ndarray and values.dtype.kind == "f" and values.dtype.isnative:
        return values
    array = np.asarray(values)
    hidden = np.ma.getmaskarray(values) if np.ma.isMaskedArray(values) else False
    if array.dtype.kind not in "fiub":
        raise ValueError(f"flux: expected an array of numbers, got {array.dtype}")
    with np.errstate(over="ignore", invalid="ignore"):  # NaN of every kind may be converted
        array = array.astype(np.float64) if array.dtype.kind != "f" else array.astype(array.dtype.newbyteorder("="))
    return np.where(hidden, np.nan, array) if np.any(hidden) else array


def in_angstrom(wavelength, unit) -> np.ndarray:
    """Wavelengths, frequencies or energies in a unit of astropy; None: plain numbers, of Angstrom or metres."""
    array = _numbers(wavelength)
    if unit is None:
        if not (array.size and abs(array.flat[array.size // 2]) < 1e-5):
            return array
        real = array[np.isfinite(array) & (array > 0)]
        # Of the units of light, metres alone give numbers so small.
        return array.astype(np.float64) * 1e10 if real.size and real.min() >= 1e-7 and real.max() < 1e-5 else array
    from astropy import units

    try:
        if not unit.is_equivalent(units.AA):
            with np.errstate(divide="ignore", invalid="ignore"):
                return unit.to(units.AA, array.astype(np.float64), units.spectral())
        factor = float(unit.to(units.AA))
    except units.UnitConversionError as error:
        raise ValueError(f"wavelength: expected a length, frequency or energy, got {unit}") from error
    with np.errstate(over="ignore"):
        return array if factor == 1 else array.astype(np.float64) * factor


def _is_length(unit) -> bool:
    if not hasattr(unit, "is_equivalent"):
        return True
    from astropy import units

    return unit.is_equivalent(units.AA)


def _bad_pixels(stated: Stated, shape: tuple[int, ...]) -> np.ndarray:
    if stated.mask is None:
        return np.zeros(shape, bool)
    flags = np.asarray(stated.mask)
    if flags.dtype == bool:
        return flags.copy()
    with np.errstate(invalid="ignore"):
        whole = flags.astype(np.int64)
    bad = whole != 0 if stated.bad_bits is None else (whole & stated.bad_bits) != 0
    # Flags that are not whole numbers, such as NaN, count as bad.
    return bad | (whole != flags)


def _in_unit_of_flux(sigma, stated: Stated, wavelength):
    """One-sigma errors from their own unit into that of the flux."""
    own, unit = stated.error_unit, stated.flux_unit
    if own is None or not hasattr(own, "is_equivalent"):
        return sigma
    from astropy import units

    if own == units.percent:
        return np.abs(_numbers(stated.flux)) * sigma / 100
    if unit is None or own == unit or not hasattr(unit, "is_equivalent"):
        return sigma
    # A variance has the square of the unit of the flux; many files give the unit itself.
    power = {"sigma": 1, "variance": 2, "ivar": -2}[stated.error_kind]
    bare = own ** (1 / power) if power != 1 and not own.is_equivalent(unit) else own
    try:
        if bare.is_equivalent(unit):
            return sigma * float(bare.to(unit))
        at = np.where(np.isfinite(wavelength) & (wavelength > 0), wavelength, np.nan) * units.AA
        return sigma * bare.to(unit, 1.0, units.spectral_density(at))
    except (units.UnitConversionError, units.UnitTypeError) as error:
        raise ValueError(f"flux_error: expected the unit of flux, {unit}, got {own}") from error


def _is_coarse(wavelength: np.ndarray, resolving_power: float | None) -> bool:
    """Whether the resolution (else the pixel size) is too low for the velocity of a star or the medium to matter."""
    if resolving_power is not None and resolving_power > 0:
        return resolving_power * COARSE < 0.5
    real = np.sort(wavelength[np.isfinite(wavelength) & (wavelength > 0)].astype(np.float64).ravel())
    return real.size < 2 or bool(np.median(np.diff(np.log(real))) > COARSE)


def _not_a_star(stated: Stated) -> str:
    kind = stated.object_class.strip().upper()
    if kind in NOT_STARS:
        return f"object_class: expected a star, got {kind}"
    if stated.redshift is not None and np.isfinite(stated.redshift) and stated.redshift > MAX_VELOCITY / SPEED_OF_LIGHT:
        return f"redshift: expected a star, with one below 0.01, got {stated.redshift:.4g}"
    return ""


def _velocity(stated: Stated) -> float:
    """km/s; NaN where none is stated, or a placeholder of an unknown one."""
    velocity = np.nan
    if stated.radial_velocity is not None:
        velocity = float(stated.radial_velocity)
    elif stated.redshift is not None:
        velocity = velocity_of(float(stated.redshift))
    return velocity if abs(velocity) < MAX_VELOCITY else np.nan


# ---------------------------------------------------------------------------------------------------- arms and orders


def overlaps(wavelength: np.ndarray) -> np.ndarray:
    """
    Which pixels of arms or echelle orders, one after the other, to leave out so that they do not overlap.

    Two arms are cut in the middle of what they share, where both are far from their ends. No pixel is averaged: their
    errors would no longer be independent.

    Parameters
    ----------
    wavelength : array of shape (pixels,)
        Each arm increasing, or each decreasing; NaN and infinite ones are skipped.

    Returns
    -------
    array of bool, shape (pixels,)
        All False for a single arm, and for wavelengths in any other order.
    """
    left_out = np.zeros(wavelength.shape, bool)
    place = np.flatnonzero(np.isfinite(wavelength))
    steps = np.diff(wavelength[place])
    if steps.size == 0 or np.all(steps > 0) or np.all(steps < 0):
        return left_out
    forward = np.sum(steps > 0) >= np.sum(steps < 0)
    arms = np.split(place, np.flatnonzero(steps <= 0 if forward else steps >= 0) + 1)
    if min(map(len, arms)) < MIN_ARM:
        return left_out
    spans = [np.sort(wavelength[arm[[0, -1]]]) for arm in arms]
    order = sorted(range(len(arms)), key=lambda i: spans[i].tolist())
    last = order[0]
    for i in order[1:]:
        (_, end), (start, own_end) = spans[last], spans[i]
        if start <= end and _interleave(wavelength, arms[last], arms[i], start, min(end, own_end)):
            if own_end <= end:
                left_out[arms[i]] = True
                continue
            middle = 0.5 * (start + end)
            left_out[arms[last]] |= wavelength[arms[last]] >= middle
            left_out[arms[i]] |= wavelength[arms[i]] < middle
        last = i if own_end > end else last
    return left_out


def _interleave(wavelength, first, second, low: float, high: float) -> bool:
    """Whether pixels of two arms alternate in a range; those of one spectrum do not."""
    inside = [arm[(wavelength[arm] >= low) & (wavelength[arm] <= high)] for arm in (first, second)]
    both = np.concatenate(inside)
    whose = np.repeat([0, 1], [len(part) for part in inside])
    order = np.argsort(wavelength[both], kind="stable")
    turns = int(np.sum(np.diff(whose[order]) != 0))
    return turns >= max(3, 0.5 * min(map(len, inside))) or bool(np.any(np.diff(wavelength[both][order]) == 0))


__all__ = ["Admitted", "Stated", "admit", "air_to_vacuum", "overlaps", "per_wavelength", "vacuum_to_air"]
