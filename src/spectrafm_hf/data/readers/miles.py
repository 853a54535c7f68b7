# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""The MILES library of stars (Sanchez-Blazquez et al. 2006, MNRAS 371, 703; Falcon-Barroso et al. 2011, A&A 532, A95).

FITS images with a linear grid, from the library or packages that contain it, or text files with two unnamed columns,
wavelength and flux. There are no errors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from .base import AIR, AT_REST, OpenFile, Options, Row, SpectrumFormat


#: File names of the library: m0001V in version 9, s0001 before.
_NAME = re.compile(r"(?<![A-Za-z0-9])(m\d{4}V|s\d{4})(?![A-Za-z0-9])")


def is_miles(file: OpenFile) -> bool:
    if file.kind == "fits":
        linear = file.header.get("NAXIS1") and "CRVAL1" in file.header and "CTYPE1" not in file.header
        return bool(linear) and (file.header.get("TPLLIB") == "MILES" or bool(_NAME.search(file.stem)))
    return bool(_NAME.search(file.stem)) and file.kind == "text" and len(file.first_lines[0].split()) == 2


def read_miles(file: OpenFile, options: Options) -> Iterator[Row]:
    name = _NAME.search(file.stem)
    if file.kind == "fits":
        header, flux = file.header, np.ravel(file.hdus[0].data)
        step = header.get("CDELT1", header.get("CD1_1"))
        with np.errstate(over="ignore", invalid="ignore"):  # the tokenizer checks it
            wavelength = header["CRVAL1"] + step * (np.arange(flux.size) + 1 - header.get("CRPIX1", 1))
    else:
        wavelength, flux = np.loadtxt(file.text(), unpack=True)
    yield {
        "object_id": name.group() if name else file.stem,
        "wavelength": wavelength,
        "flux": flux,
        # Unobserved ends.
        "mask": flux == 0,
    }


FORMATS = (
    SpectrumFormat(
        name="miles",
        survey="miles",
        wavelength_medium=AIR,
        rest_frame=AT_REST,
        flux_unit="relative",
        resolving_power="1,400 to 3,000 (2.5 Angstrom)",
        normalisation="1 near 5,500 Angstrom",
        note="no errors",
        identify=is_miles,
        read=read_miles,
    ),
)
