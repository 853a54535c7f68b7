# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Emulators with wider pixels, for instruments that do not resolve those of the bundled ones."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from ..models import SpectrumEmulator, SpectrumEmulatorConfig
from .instruments import Instrument
from .line_spread import FWHM, REACH


PIXELS_IN_FWHM = 8
MARGIN = 8  # pixels of the emulator, for interpolation between them


def fwhm_of(instrument: Instrument) -> NDArray[np.float64]:
    """FWHM [Angstrom] in each pixel of an instrument, the smaller one where two parts overlap."""
    own = instrument.wavelength
    widths = [np.where((s.start <= own) & (own < s.stop), s(own), np.inf) for s in instrument.line_spread]
    smallest: NDArray[np.float64] = np.min(widths, axis=0)
    return smallest


def emulator_for(
    emulator: SpectrumEmulator, instrument: Instrument
) -> tuple[SpectrumEmulator, tuple[float, float] | None]:
    """
    The emulator with pixels as wide as an instrument allows, and the range of wavelengths that the instrument needs.

    An emulator without intervals is returned as it is.

    Parameters
    ----------
    emulator : SpectrumEmulator
    instrument : Instrument

    Returns
    -------
    emulator : SpectrumEmulator
        `PIXELS_IN_FWHM` of its pixels or more fit into the FWHM of the instrument everywhere, if those of the original
        did.
    wavelength_range : (float, float), or None for all
        Angstrom, vacuum.
    """
    own, native = instrument.wavelength, emulator.wavelength.double().numpy()
    size = emulator.config.interval_pixels
    if not size or own[0] < native[0] or own[-1] > native[-1]:
        return emulator, None
    fwhm, step = fwhm_of(instrument), float(np.log(native[-1] / native[0]) / (len(native) - 1))
    widest = max(1.0, float(np.min(fwhm / own)) / PIXELS_IN_FWHM / step)
    pixels = max(n for n in range(1, size + 1) if size % n == 0 and n <= widest)
    low, high = (own[end] + sign * (REACH / FWHM * fwhm[end] + MARGIN * pixels * step * own[end])
                 for end, sign in ((0, -1), (-1, 1)))  # fmt: skip
    return binned(emulator, pixels), (float(low), float(high))


@torch.no_grad()
def binned(emulator: SpectrumEmulator, pixels: int) -> SpectrumEmulator:
    """
    An emulator of the means over `pixels` pixels of another one. It shares the weights of that one.

    The continuum counts as constant over these pixels, in the product of flux and continuum.

    Parameters
    ----------
    emulator : SpectrumEmulator
        With intervals.
    pixels : int
        A divisor of `config.interval_pixels`. Pixels at the end that do not fill a wide one are left out.

    Raises
    ------
    ValueError
        If the emulator has no intervals, or `pixels` does not divide them.
    """
    config = emulator.config
    if pixels < 1 or not config.interval_pixels or config.interval_pixels % pixels:
        raise ValueError(f"pixels: expected a divisor of interval_pixels={config.interval_pixels}, got {pixels}")
    if pixels == 1:
        return emulator
    settings = {name: getattr(config, name) for name in SpectrumEmulatorConfig.__annotations__ if name != "model_type"}
    size, interval = config.num_pixels // pixels, config.interval_pixels // pixels
    with torch.device("meta"):
        made = SpectrumEmulator(SpectrumEmulatorConfig(**settings | {"num_pixels": size, "interval_pixels": interval}))

    def means(values: torch.Tensor) -> torch.Tensor:
        return values[..., : values.shape[-1] // pixels * pixels].double().unflatten(-1, (-1, pixels)).mean(-1).float()

    made.center, made.scale, made.stars, made.regimes = (
        emulator.center, emulator.scale, emulator.stars, emulator.regimes,
    )  # fmt: skip
    made.wavelength = means(emulator.wavelength)
    made.mean = means(emulator.mean.unflatten(0, (-1, config.num_pixels))).flatten()
    made.basis, made.basis_steps = means(emulator.basis * emulator.basis_steps), torch.ones_like(emulator.basis_steps)
    if config.fluxed:
        made.continuum_basis, made.continuum_regimes = means(emulator.continuum_basis), emulator.continuum_regimes
    made.name_or_path = emulator.name_or_path
    return made.eval()
