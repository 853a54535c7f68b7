# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Stars of the bundled emulator of the optical, as templates of velocities, for `models.velocity_spectrafm`."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from ..checkpoints import bundled
from ..models import SpectrumEmulator


#: Teff, logg, [Fe/H]: giants, then dwarfs, of all the temperatures that the emulator knows.
STARS = (
    *((3600.0, 1.0, 0.0), (4200.0, 1.7, -0.2), (4400.0, 1.2, -1.5), (4800.0, 2.6, -0.1), (5000.0, 2.2, -2.0)),
    *((3500.0, 4.8, 0.0), (4000.0, 4.6, 0.0), (4700.0, 4.6, -0.2), (5300.0, 4.4, 0.0), (6000.0, 4.2, -0.2)),
    *((6500.0, 4.1, -0.2), (5900.0, 4.0, -1.5), (7200.0, 4.1, 0.0)),
)
#: In ln wavelength: pixels of the grid, a fourth of the FWHM at R = 12,500.
STEP = 2e-5


@functools.lru_cache(maxsize=1)
def velocity_templates() -> tuple[float, float, NDArray[np.float32]]:
    """
    Returns
    -------
    start, step : float
        ln of the first wavelength (Angstrom, vacuum), and from pixel to pixel.
    flux : array of shape (templates, pixels)
    """
    emulator = SpectrumEmulator.from_pretrained(bundled("emulator-optical"))
    teff, logg, fe_h = np.array(STARS).T
    wavelength, flux = emulator.synthesize(teff=teff, logg=logg, fe_h=fe_h)
    start, end = np.log(wavelength[[0, -1]])
    grid = start + STEP * np.arange(int((end - start) / STEP))
    return float(start), STEP, np.array([np.interp(grid, np.log(wavelength), each) for each in flux], np.float32)
