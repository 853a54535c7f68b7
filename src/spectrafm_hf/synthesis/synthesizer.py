"""From stellar labels to a spectrum: Turbospectrum with MARCS atmospheres and linemake lines, in LTE."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..models.gate_spectrafm import air_to_vacuum, vacuum_to_air
from ..models.modeling_emulator import default_vmicro
from . import turbospectrum
from .atmospheres import MarcsGrid, effective_metallicity
from .labels import LABEL_NAMES, OPTICAL_LABEL_NAMES
from .lines import cached_line_lists


#: Range in Angstrom that the line lists and opacities cover.
WAVELENGTH_RANGE = (3300.0, 25000.0)

#: Solar abundances of the MARCS models (Grevesse, Asplund & Sauval 2007), log10 of the number with hydrogen 12.
SOLAR_ABUNDANCES: dict[int, float] = {
    **dict(enumerate((10.93, 1.05, 1.38, 2.70, 8.39, 7.78, 8.66, 4.56, 7.84), start=2)),
    **dict(enumerate((6.17, 7.53, 6.37, 7.51, 5.36, 7.14, 5.50, 6.18, 5.08, 6.31), start=11)),
    **dict(enumerate((3.17, 4.90, 4.00, 5.64, 5.39, 7.45, 4.92, 6.23, 4.21, 4.60), start=21)),
    **dict(enumerate((2.88, 3.58, 2.29, 3.33, 2.56, 3.25, 2.60, 2.92, 2.21, 2.58), start=31)),
    **dict(enumerate((1.42, 1.92), start=41)),
    **dict(enumerate((1.84, 1.12, 1.66, 0.94, 1.77, 1.60, 2.00), start=44)),
    **dict(enumerate((1.00, 2.19, 1.51, 2.24, 1.07, 2.17, 1.13, 1.70, 0.58, 1.45), start=51)),
    **dict(enumerate((1.00, 0.52, 1.11, 0.28, 1.14, 0.51, 0.93, 0.00, 1.08), start=62)),
    **dict(enumerate((0.06, 0.88, -0.17, 1.11, 0.23, 1.25, 1.38, 1.64, 1.01, 1.13), start=71)),
    **dict(enumerate((0.90, 2.00, 0.65), start=81)),
    90: 0.06,
    92: -0.52,
}

_ATOMIC_NUMBERS = {
    **dict(c_fe=6, n_fe=7, o_fe=8, mg_fe=12, al_fe=13, si_fe=14, ca_fe=20, ti_fe=22, mn_fe=25, ni_fe=28),
    **dict(li_fe=3, na_fe=11, s_fe=16, k_fe=19, sc_fe=21, v_fe=23, cr_fe=24, co_fe=27, cu_fe=29, zn_fe=30),
    **dict(sr_fe=38, y_fe=39, zr_fe=40, ba_fe=56, la_fe=57, ce_fe=58, nd_fe=60, eu_fe=63),
}
_ABUNDANCE_RANGE = (-1.0, 1.0)
_LITHIUM_RANGE = (-4.0, 6.0)  # destroyed in most stars, and left over from the Big Bang in the oldest
_VMICRO_RANGE = (0.0, 10.0)
_GIANT_LOGG = 3.5
_MARGIN = 5.0  # Angstrom on both sides: lines just outside have wings inside


class Spectrum(NamedTuple):
    """A synthetic spectrum at the native step of the synthesis."""

    wavelength: NDArray[np.floating]  # Angstrom, vacuum
    flux: NDArray[np.floating]  # divided by the continuum
    continuum: NDArray[np.floating]  # erg/s/cm2/Angstrom at the surface of the star; times `flux` it is the flux there


class Synthesizer:
    """Synthesis of one range of wavelengths.

    Making one fetches what is missing, builds Turbospectrum and converts the line lists; all stays in the cache. Each
    call runs two programs on one core, and threads may share a synthesizer.

    Parameters
    ----------
    wavelength_min, wavelength_max : float
        Angstrom, vacuum, within `WAVELENGTH_RANGE`.
    step : float, default 0.05
        Angstrom. The time is proportional to 1/step. In the H band at R = 22,500, 0.05 is 2.6e-4 rms from 0.01, and 0.1
        is 1e-3 away. In the optical at FWHM 5 A, 0.06 is 0.2-0.3 % from 0.02.
    loggf_corrections : bool, default True
        Use the corrected oscillator strengths of 382 atomic lines in the H band.
    relative : bool, default False
        `step` is one in ln(wavelength), and all stars are plane-parallel. In the optical at R = 20,000, 4e-6 is below
        0.03 % rms from 1.5e-6 in a dwarf of 5,800 K and a giant of 4,200 K, 0.1 % in a dwarf of 3,500 K; 5e-6 is below
        0.07 and 0.3 %.
    spherical_below : float, default 1
        log g below which the transfer is solved in spherical geometry: 0.4 % of difference at 0.5, three times as long.

    Raises
    ------
    ValueError
        If the range or the step is not covered.
    RuntimeError, OSError
        If a package cannot be fetched or Turbospectrum not be built.
    """

    def __init__(
        self,
        wavelength_min: float,
        wavelength_max: float,
        step: float = 0.05,
        *,
        loggf_corrections: bool = True,
        relative: bool = False,
        spherical_below: float = 1.0,
    ) -> None:
        low, high = WAVELENGTH_RANGE
        for name, value in (("wavelength_min", wavelength_min), ("wavelength_max", wavelength_max)):
            if not low <= value <= high:
                raise ValueError(f"{name}: expected {low:g} to {high:g} Angstrom, got {value:g}")
        if not wavelength_min < wavelength_max:
            raise ValueError(f"wavelength_max: expected above {wavelength_min:g}, got {wavelength_max:g}")
        if relative and not 1e-7 <= step <= 1e-4:
            raise ValueError(f"step: expected 1e-7 to 1e-4 in ln(wavelength), got {step:g}")
        if not relative and not 0.001 <= step <= 1:
            raise ValueError(f"step: expected 0.001 to 1 Angstrom, got {step:g}")
        self.wavelength_min, self.wavelength_max, self.step = wavelength_min, wavelength_max, step
        self.loggf_corrections, self.spherical_below = loggf_corrections, spherical_below
        self._air = (
            float(vacuum_to_air(wavelength_min)) - _MARGIN,
            float(vacuum_to_air(wavelength_max)) + _MARGIN,
        )
        self.relative = relative
        points = (math.log(self._air[1] / self._air[0]) if relative else self._air[1] - self._air[0]) / step
        if points > 990_000:
            raise ValueError(f"step: expected at most 990,000 steps in the range, got {points:.0f}; split the range")
        self._programs = turbospectrum.build()
        self._grid = MarcsGrid.load()
        self._lines = cached_line_lists(*self._air, step, corrected=loggf_corrections, relative=relative)

    def covers(self, labels: Mapping[str, NDArray[np.floating]]) -> NDArray[np.bool_]:
        """Which of some stars have a model atmosphere that is to be trusted; arrays of all labels -> bool array."""
        stars = zip(labels["teff"], labels["logg"], labels["fe_h"], labels["mg_fe"], strict=True)
        found = [self._grid.covers(teff, logg, effective_metallicity(fe_h, mg)) for teff, logg, fe_h, mg in stars]
        return np.array(found, bool)

    def synthesize(self, labels: Mapping[str, float]) -> Spectrum:
        """Spectrum of a star.

        Parameters
        ----------
        labels : mapping
            ``teff`` (K) and ``logg``; of the others in `spectrafm_hf.synthesis.labels.OPTICAL_LABEL_NAMES`, ``fe_h``
            and the ``[X/Fe]`` default to 0 and ``vmicro`` (km/s) to `default_vmicro`. Elements without a label follow
            iron.

        Returns
        -------
        Spectrum

        Raises
        ------
        ValueError
            If a label is unknown or missing, or where no model atmosphere is to be trusted; the label, its value and
            the reason are named.
        RuntimeError
            If the synthesis fails.
        """
        star = check_labels(labels)
        try:
            m_h = effective_metallicity(star["fe_h"], star["mg_fe"])
            atmosphere = self._grid.interpolate(star["teff"], star["logg"], m_h)
        except ValueError as error:
            made_of = (
                f"m_h is the metallicity of the atmosphere, from fe_h {star['fe_h']:g} and mg_fe {star['mg_fe']:g}"
            )
            raise ValueError(f"{error} ({made_of})") from None
        abundances = {number: solar + star["fe_h"] * (number > 2) for number, solar in SOLAR_ABUNDANCES.items()}
        for name, number in _ATOMIC_NUMBERS.items():
            abundances[number] += star.get(name, 0.0)
        giant = star["logg"] < _GIANT_LOGG
        # TiO is a third of all lines and is gone in warm stars.
        cool = star["teff"] < (5000 if star["logg"] > 3.3 else 4700)
        wavelength, flux, surface_flux = turbospectrum.synthesize(
            self._programs,
            atmosphere,
            abundances,
            star["vmicro"],
            self._lines if cool else self._lines[:1],
            *self._air,
            self.step,
            carbon_ratio=15.0 if giant else 89.0,
            spherical=not self.relative and star["logg"] < self.spherical_below,
            relative=self.relative,
        )
        # Fluxes have few digits in the cores of strong lines, where the continuum would be lost.
        shallow = flux > 0.3
        continuum = np.interp(wavelength, wavelength[shallow], surface_flux[shallow] / flux[shallow])
        vacuum = air_to_vacuum(wavelength)
        inside = (vacuum >= self.wavelength_min) & (vacuum <= self.wavelength_max)
        return Spectrum(vacuum[inside], (surface_flux / continuum)[inside], continuum[inside])


def check_labels(labels: Mapping[str, float]) -> dict[str, float]:
    """Labels of a star: all of `LABEL_NAMES`, with defaults for those left out, and any others in `labels`.

    Raises
    ------
    ValueError
        If one is unknown, missing, not finite or out of the range in which a mixture is near to that of the atmosphere.
    """
    if unknown := [name for name in labels if name not in OPTICAL_LABEL_NAMES]:
        raise ValueError(f"{unknown[0]}: expected one of the labels {', '.join(OPTICAL_LABEL_NAMES)}, got another")
    for name in ("teff", "logg"):
        if name not in labels:
            raise ValueError(f"{name}: expected among the labels, got {', '.join(labels) or 'none'}")
    names = (*LABEL_NAMES, *(name for name in labels if name not in LABEL_NAMES))
    star = {name: float(labels.get(name, 0.0)) for name in names}
    for name, value in star.items():
        if not math.isfinite(value):
            raise ValueError(f"{name}: expected a finite number, got {value}")
    if "vmicro" not in labels:
        star["vmicro"] = float(default_vmicro(star["teff"], star["logg"]))
    ranges = {**dict.fromkeys(_ATOMIC_NUMBERS, _ABUNDANCE_RANGE), "li_fe": _LITHIUM_RANGE, "vmicro": _VMICRO_RANGE}
    for name, (low, high) in ranges.items():
        if name in star and not low <= star[name] <= high:
            raise ValueError(f"{name}: expected {low:g} to {high:g}, got {star[name]:g}")
    return star
