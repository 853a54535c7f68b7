# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Apertures and bands of IRAF, and their dispersions.

`onedspec.package` in the help pages of IRAF ("specwcs", "apall"); Valdes 1993, ASPC 52, 467.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np

from .base import OpenFile, Row
from .columns import length_unit
from .late import fits


def attributes(header: fits.Header, axis: int) -> dict[str, str]:
    """Attributes of an axis in IRAF's cards, which cut one text into pieces of 68 letters."""
    cards = sorted(name for name in header if re.fullmatch(rf"WAT{axis}_\d\d\d", name))
    # Trailing blanks of a card are lost, so each piece is padded to the length of a card.
    text = "".join(str(header[name]).ljust(68) for name in cards[:-1]) + "".join(
        str(header[name]) for name in cards[-1:]
    )
    found = re.findall(r"(\w+)\s*=\s*(\"[^\"]*\"|\S+)", text)
    return {name: value.strip('"') for name, value in found}


def errors_among(header: fits.Header, n_bands: int) -> int | None:
    """Index of the band with the errors: by its card, else the last of four. The first band is the spectrum."""
    names = [str(header.get(f"BANDID{number + 1}", "")).lower() for number in range(n_bands)]
    error = next((number for number, name in enumerate(names) if name.startswith("sigma")), None)
    return 3 if error is None and n_bands == 4 and not any(names) else error


def apertures(file: OpenFile, data: np.ndarray, header: fits.Header, stated: Row) -> Iterator[Row]:
    """Each aperture of an IRAF multispec image: band 1 is the spectrum, one may hold its errors."""
    bands = data if data.ndim == 3 else np.atleast_2d(data)[None]
    specs = attributes(header, 2)
    unit = length_unit(attributes(header, 1).get("units"), "wavelength")
    error = errors_among(header, len(bands))
    for number in range(bands.shape[1]):
        text = specs.get(f"spec{number + 1}")
        if text is None:
            raise ValueError(f"wavelength: expected spec{number + 1} in the cards WAT2 of {file.path}, got none")
        try:
            wavelength = iraf_wavelengths(text, bands.shape[2])
        except (IndexError, ValueError) as cause:
            raise ValueError(
                f"wavelength: expected a dispersion of IRAF in spec{number + 1} of {file.path}, got {cause}"
            ) from cause
        row: Row = {**stated, "wavelength": wavelength, "wavelength_unit": unit, "flux": bands[0, number]}
        yield row if error is None else {**row, "flux_error": bands[error, number]}


def iraf_wavelengths(text: str, pixels: int) -> np.ndarray:
    """
    Wavelengths of an aperture, from "ap beam dtype w1 dw nw z aplow aphigh [functions]".

    NaN outside the pixels of the dispersion. Several functions are added with their weights.
    """
    # IRAF writes 1.E-5 and 1.D-5 alike, and leaves out blanks before a sign.
    numbers: Sequence[float] = [float(word.upper().replace("D", "E")) for word in text.split()]
    kind, start, step, count, redshift = int(numbers[2]), numbers[3], numbers[4], int(numbers[5]), numbers[6]
    pixel = np.arange(1, pixels + 1, dtype=np.float64)
    if kind in (0, 1):
        wavelength = start + step * (pixel - 1)
        wavelength = 10**wavelength if kind == 1 else wavelength
    elif kind == 2:
        wavelength = np.zeros(pixels)
        rest = numbers[9:]
        while rest:
            weight, offset, shape = rest[0], rest[1], int(rest[2])
            values, rest = _function(shape, rest[3:], pixel)
            wavelength += weight * (offset + values)
    else:
        raise ValueError(f"a dispersion of type {kind}")
    if kind == 2 and not abs(wavelength[0] - start) < 0.05 * abs(start):
        # The functions contradict the stated w1 and dw: this aperture has no valid wavelengths.
        return np.full(pixels, np.nan)
    wavelength = wavelength / (1 + redshift)
    return np.where(pixel <= count, wavelength, np.nan)


def _function(shape: int, numbers: Sequence[float], pixel: np.ndarray) -> tuple[np.ndarray, Sequence[float]]:
    """A function of IRAF at the pixels, and what follows it."""
    if shape in (1, 2, 3, 4):
        order, low, high = int(numbers[0]), numbers[1], numbers[2]
    if shape in (1, 2):  # Chebyshev, Legendre
        coefficients, rest = numbers[3 : 3 + order], numbers[3 + order :]
        x = (2 * pixel - (high + low)) / (high - low)
        evaluate = np.polynomial.chebyshev.chebval if shape == 1 else np.polynomial.legendre.legval
        return evaluate(x, coefficients), rest
    if shape in (3, 4):  # cubic and linear splines of `order` pieces
        n_coefficients = order + (3 if shape == 3 else 1)
        knots, rest = np.array(numbers[3 : 3 + n_coefficients]), numbers[3 + n_coefficients :]
        s = (pixel - low) / (high - low) * order
        j = np.clip(np.floor(s).astype(int), 0, order - 1)
        a, b = (j + 1) - s, s - j
        if shape == 4:
            return knots[j] * a + knots[j + 1] * b, rest
        z = (a**3, 1 + 3 * a * (1 + a * b), 1 + 3 * b * (1 + a * b), b**3)
        return sum(knots[j + k] * z[k] for k in range(4)), rest
    if shape == 5:  # a wavelength for each pixel
        count = int(numbers[0])
        knots, rest = np.array(numbers[1 : 1 + count]), numbers[1 + count :]
        return np.interp(pixel, np.arange(1, count + 1), knots, right=np.nan), rest
    raise ValueError(f"a function of type {shape}")
