# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Spectra as FITS images: with a dispersion in the header, as IRAF apertures, as rows of wavelength, flux and error, or
with an image extension for each of these.

IRAF's dispersions: `onedspec.package` in the help pages of IRAF ("specwcs"); Valdes 1993, ASPC 52, 467.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .base import AS_GIVEN, OpenFile, Options, Row, SpectrumFormat
from .columns import from_logarithm, length_unit, logarithm, plain, unit_of
from .headers import about
from .late import fits
from .orders import as_one_or_each


#: Names of extensions, without case and punctuation; the last ones are those of ESPRESSO and NEID.
_FLUX = {"flux", "data", "sci", "spec", "spectrum", "fluxlambda", "normalized", "normalizedflux", "scidata", "sciflux"}
_WAVELENGTH = {
    *("wavelength", "wave", "lambda", "wavelengths", "wl", "lam", "sciwave", "wavedatavacbary", "wavedataairbary"),
}
_LOG_WAVELENGTH = {"loglam", "loglambda", "logwave"}
_ERROR = {
    **dict.fromkeys(
        ("err", "errs", "error", "errors", "sigma", "fluxerror", "fluxerr", "noise", "std", "sig", "errdata"), "sigma"
    ),
    **dict.fromkeys(("uncertainty", "unc"), "sigma"),
    **dict.fromkeys(("ivar", "invvar", "inversevariance"), "ivar"),
    # The last is that of MUSE.
    **dict.fromkeys(("var", "variance", "scivar", "stat"), "variance"),
}
_MASK = {"mask", "qual", "dq", "quality", "andmask", "qualdata"}
#: Spectra of a triplet of rows: wavelength, flux, error, and perhaps flags.
_ROWS = (2, 3, 4)


def _images(file: OpenFile) -> list[Any]:
    """HDUs of images that hold numbers, whose header says how many."""
    return [
        hdu
        for hdu in file.hdus
        if not isinstance(hdu, fits.BinTableHDU | fits.TableHDU)
        and hdu.header.get("NAXIS", 0)
        and hdu.header.get("NAXIS1", 0)
    ]


def is_image(file: OpenFile) -> bool:
    return file.kind == "fits" and bool(_images(file))


def read_image(file: OpenFile, options: Options) -> Iterator[Row]:
    images = _images(file)
    images = _pair(images) or images
    flux = next((hdu for hdu in images if plain(hdu.name) in _FLUX), images[0])
    header = fits.Header(flux.header, copy=True)
    for name in (
        "INSTRUME",
        "TELESCOP",
        "SPECSYS",
        "VACUUM",
        "BUNIT",
        "UNIT",
        "CONTNORM",
        "XUNITS",
        "YUNITS",
        "AIRORVAC",
    ):
        if name in file.header:
            header.setdefault(name, file.header[name])
    data = _along_first_axis(_array(flux), header)
    stated = about([file.header, header])
    stated["flux_unit"] = unit_of(header.get("BUNIT") or header.get("UNIT") or header.get("YUNITS"))
    system = _wat(header, 0).get("system", "")
    if system == "multispec" or str(header.get("CTYPE1", "")).startswith("MULTISPE"):
        rows = list(_apertures(file, data, header, stated))
    elif (grid := _grid_beside(images, stated, options)) is not None:
        rows = list(_beside(file, data, flux, images, stated, *grid))
    elif "WV_0_01" in header and data.ndim == 2:
        rows = [{**stated, "flux": part, "wavelength": _makee(header, i, part.size)} for i, part in enumerate(data, 1)]
    elif data.ndim == 1 or (data.ndim <= 3 and data.shape[-1] == data.size):
        rows = [_one(file, data.ravel(), flux, images, header, stated, options)]
    elif (triplets := _triplets(data)) is not None:
        unit = length_unit(header.get("XUNITS") or header.get("CUNIT1"), "wavelength") or options.wavelength_unit
        keys = ("wavelength", "flux", "flux_error")
        rows = [{**stated, **dict(zip(keys, part[:3], strict=False)), "wavelength_unit": unit} for part in triplets]
    elif data.ndim == 2 and (labelled := _labelled_rows(header, data)) is not None:
        row = _one(file, data[labelled[0]], flux, (), header, stated, options)
        rows = [row if labelled[1] is None else {**row, "flux_error": data[labelled[1]]}]
    elif data.ndim == 2 and flux.name.upper().startswith("SPECTRUM ") and data.shape[0] in (3, 4):
        # 6dFGS: flux, variance, sky, in V, in R, and last in both.
        last = [hdu for hdu in images if hdu.name.upper().startswith("SPECTRUM ")][-1]
        values = _array(last)
        row = _one(file, values[0], last, (), last.header, stated, options)
        rows = [{**row, "flux_error": values[1], "error_kind": "variance"}]
    elif data.ndim == 2 and "COEFF0" in header and data.shape[0] == 5:
        # SDSS to DR8, spSpec: flux, flux without continuum, error, mask, ...
        row = _one(file, data[0], flux, (), header, stated, options)
        kind = {2: "GALAXY", 3: "QSO", 4: "QSO"}.get(header.get("SPEC_CLN"), "")
        rows = [{**row, "flux_error": data[2], "redshift": header.get("Z"), "frame": "observed", "object_class": kind}]
    elif data.ndim == 2 and system == "equispec":
        rows = [_one(file, part, flux, (), header, stated, options) for part in data]
    else:
        raise ValueError(
            f"{file.path}: expected a spectrum, got an image of {' x '.join(map(str, data.shape))} pixels; extract "
            "spectra from it first"
        )
    rows = [row for row in map(_real, rows) if np.size(row["flux"])]
    if not rows:
        raise ValueError(f"wavelength: expected positive wavelengths in {file.path}, got none")
    for row in rows:
        # Floats that are exactly 0 are where nothing was measured: gaps between detectors, and ends.
        values = np.asarray(row["flux"])
        if values.dtype.kind == "f" and row.get("mask") is None:
            row["mask"] = values == 0
    yield from as_one_or_each(rows, file.stem)


def _pair(images: Sequence[Any]) -> list[Any] | None:
    """
    A flux and its companions, where extensions are named in pairs such as FluxAB and WaveAB, GREEN_SCI_FLUX1 and
    GREEN_SCI_WAVE1; renamed. None where a name alone says what is the flux.
    """
    names = {plain(hdu.name): hdu for hdu in images}
    if names.keys() & _FLUX:
        return None
    for name, hdu in names.items():
        if "flux" in name and (wave := names.get(name.replace("flux", "wave"))) is not None:
            found = {"flux": hdu, "wave": wave}
            for word in ("ivar", "var", "error", "err", "sigma"):
                if (other := names.get(name.replace("flux", word))) is not None:
                    found[word] = other
                    break
            return [fits.ImageHDU(each.data, each.header, name=role) for role, each in found.items()]
    return None


def _labelled_rows(header: fits.Header, data: np.ndarray) -> tuple[int, int | None] | None:
    """Which row is the flux, which the error, where cards ARRAY1, ARRAY2, ... say so (UVES_popler)."""
    words = [str(header.get(f"ARRAY{number}", "")).lower() for number in range(1, data.shape[0] + 1)]
    flux = next((number for number, word in enumerate(words) if "flux" in word), None)
    error = next((number for number, word in enumerate(words) if "error" in word and "expected" not in word), None)
    return None if flux is None else (flux, error)


def _along_first_axis(data: np.ndarray, header: fits.Header) -> np.ndarray:
    """One spectrum that lies along another axis, as in a cube of one place, with the cards of that axis in `header`."""
    axis = data.ndim - int(np.argmax(data.shape))
    if axis == 1 or data.size != max(data.shape):
        return data
    for first, own in ((f"{name}1", f"{name}{axis}") for name in ("CRVAL", "CDELT", "CRPIX", "CTYPE", "CUNIT")):
        header[first] = header.get(own)
    for name in ("CD", "PC"):
        header[f"{name}1_1"] = header.get(f"{name}{axis}_{axis}")
    for name in ("CRVAL1", "CDELT1", "CRPIX1", "CTYPE1", "CUNIT1", "CD1_1", "PC1_1"):
        if header[name] is None:
            del header[name]
    return data.ravel()


def _real(row: Row) -> Row:
    """Pixels that have a wavelength."""
    wavelength = np.asarray(row["wavelength"])
    real = np.isfinite(wavelength) & (wavelength > 0)
    keys = ("wavelength", "flux", "flux_error", "mask")
    return row | {key: np.asarray(row[key])[real] for key in keys if row.get(key) is not None}


def _array(hdu: Any) -> np.ndarray:
    data = hdu.data
    return data.astype(data.dtype.newbyteorder("=")) if data.dtype.kind == "f" else np.asarray(data, np.float64)


def _one(
    file: OpenFile,
    flux: np.ndarray,
    hdu: Any,
    images: Sequence[Any],
    header: fits.Header,
    stated: Row,
    options: Options,
) -> Row:
    found = _lookup(file, header, flux.size) or dispersion(header, flux.size)
    if found is None and options.grid is not None and options.grid.size == flux.size:
        found = options.grid, None
    if found is None:
        raise ValueError(
            f"wavelength: expected CRVAL1 and CDELT1, or wavelengths with the flux, in {file.path}, got none; give "
            "them with grid=WAVELENGTHS"
        )
    wavelength, unit = found
    row: Row = {**stated, "wavelength": wavelength, "wavelength_unit": unit or options.wavelength_unit, "flux": flux}
    return {**row, **_companions(images, hdu, flux.shape)}


def _lookup(file: OpenFile, header: fits.Header, pixels: int) -> tuple[np.ndarray, Any] | None:
    """Wavelengths in a table that the axis names (FITS 4.0, section 8.4.2); None for another axis."""
    if str(header.get("CTYPE1", ""))[4:8] != "-TAB":
        return None
    table = next((hdu for hdu in file.hdus if hdu.name == header.get("PS1_0")), None)
    name = str(header.get("PS1_1", ""))
    if table is None or name not in getattr(getattr(table, "columns", None), "names", ()):
        raise ValueError(f"wavelength: expected the table {header.get('PS1_0')} with {name} in {file.path}, got none")
    values = np.ravel(table.data[name]).astype(np.float64)
    place = float(header.get("CRVAL1", 1)) + float(header.get("CDELT1", 1)) * (
        np.arange(1, pixels + 1) - float(header.get("CRPIX1", 1))
    )
    wavelength = np.interp(place, np.arange(1, values.size + 1), values, np.nan, np.nan)
    return wavelength, length_unit(header.get("CUNIT1") or table.columns[name].unit, "wavelength")


def _companions(images: Sequence[Any], flux: Any, shape: tuple[int, ...]) -> Row:
    """Error and mask in extensions of the same shape."""
    row: Row = {}
    for hdu in images:
        name = plain(hdu.name)
        if hdu is flux or int(np.prod(shape)) != int(np.prod(hdu.shape)):
            continue
        if name in _ERROR and "flux_error" not in row:
            row |= {"flux_error": _array(hdu).reshape(shape), "error_kind": _ERROR[name]}
            row["error_unit"] = unit_of(hdu.header.get("BUNIT"))
        elif name in _MASK and "mask" not in row:
            row["mask"] = np.asarray(hdu.data).reshape(shape)
    return row


def _makee(header: fits.Header, order: int, pixels: int) -> np.ndarray:
    """Wavelengths of an order of HIRES by MAKEE: a polynomial of the pixel, from 1, in fields of 17 letters."""
    text = "".join(str(header.get(f"WV_{first}_{order:02d}", "")).ljust(68) for first in (0, 4))
    fields = [text[i : i + 17] for i in range(0, len(text), 17)]
    coefficients = [float(field) for field in fields if field.strip()]
    return np.polynomial.polynomial.polyval(np.arange(1, pixels + 1, dtype=np.float64), coefficients)


def _grid_beside(images: Sequence[Any], stated: Row, options: Options) -> tuple[np.ndarray, Any] | None:
    """Wavelengths in an extension of their own, and their unit."""
    for hdu in images:
        if plain(hdu.name) in _WAVELENGTH | _LOG_WAVELENGTH:
            log = logarithm(hdu.header.get("BUNIT"))
            unit = length_unit(hdu.header.get("BUNIT") if log is None else log[1], "wavelength")
            unit = unit or options.wavelength_unit
            values = np.asarray(hdu.data, np.float64)
            if log is not None:
                return from_logarithm(values, log[0]), unit
            if "air" in plain(hdu.name) or "vac" in plain(hdu.name):
                stated["medium"] = "air" if "air" in plain(hdu.name) else "vacuum"
            return (from_logarithm(values) if plain(hdu.name) in _LOG_WAVELENGTH else values), unit
    return None


def _beside(
    file: OpenFile, data: np.ndarray, flux: Any, images: Sequence[Any], stated: Row, wavelength: np.ndarray, unit: Any
) -> Iterator[Row]:
    """Spectra whose wavelengths, errors and masks stand in extensions; of several rows each is one."""
    if data.shape[-1] != wavelength.shape[-1] or data.ndim > 2:
        raise ValueError(
            f"wavelength: expected the pixels of flux, {data.shape}, in {file.path}, got {wavelength.shape}"
        )
    others = _companions(images, flux, data.shape)
    for i in range(len(data) if data.ndim == 2 else 1):
        row: Row = {**stated, "wavelength_unit": unit}
        for key, values in {"flux": data, "wavelength": wavelength, **others}.items():
            row[key] = values[i] if getattr(values, "ndim", 0) == 2 else values
        yield row


def _triplets(data: np.ndarray) -> list[np.ndarray] | None:
    """Parts of shape (2 to 4, pixels) whose first row is a wavelength, whichever way the image lies."""
    cube = data if data.ndim == 3 else data[None]
    for part in (cube, np.swapaxes(cube, 1, 2)):
        if part.shape[1] in _ROWS and part.shape[2] > _ROWS[-1]:
            first = [row[0][np.isfinite(row[0]) & (row[0] > 0)] for row in part]
            if all(row.size > 1 and (np.all(np.diff(row) > 0) or np.all(np.diff(row) < 0)) for row in first):
                return list(part)
    return None


# --------------------------------------------------------------------------------------------------------- dispersions


def dispersion(header: fits.Header, pixels: int) -> tuple[np.ndarray, Any] | None:
    """Wavelengths of the pixels by the header, and their unit where it says one; None without any."""
    i = np.arange(pixels, dtype=np.float64)
    if "COEFF0" in header and "COEFF1" in header:
        return 10 ** (float(header["COEFF0"]) + float(header["COEFF1"]) * i), length_unit("Angstrom")
    step = header.get("CDELT1", header.get("CD1_1"))
    if header.get("CDELT1") == 1 and header.get("CD1_1", 1) != 1:  # astronomers' programs fill in both
        step = header["CD1_1"]
    if "CD1_1" not in header and step:
        step *= header.get("PC1_1", 1)
    if "CRVAL1" not in header or not step:
        return None
    start, step = float(header["CRVAL1"]), float(step)
    offset = i + 1 - float(header.get("CRPIX1", 1))
    axis = str(header.get("CTYPE1", "")).upper()
    about_axis = _wat(header, 1)
    written = header.get("CUNIT1") or about_axis.get("units") or header.get("XUNITS")
    log = logarithm(written)
    unit = length_unit(written if log is None else log[1], "wavelength")
    if re.fullmatch("(WAVE|AWAV|FREQ|ENER|WAVN|VOPT)-([FWVA]2[FWVA]|GRI|GRA)", axis):
        return _nonlinear(header, pixels)
    if axis.startswith(("WAVE-LOG", "AWAV-LOG")):  # FITS 4.0, section 8.4
        return start * np.exp(offset * step / start), unit
    logarithmic = header.get("DC-FLAG") == 1 or "LOG" in axis or "LOG" in str(header.get("WFITTYPE", "")).upper()
    values = start + step * offset
    if logarithmic or log is not None:
        return from_logarithm(values, None if log is None else log[0]), unit
    return values, unit


def _nonlinear(header: fits.Header, pixels: int) -> tuple[np.ndarray, Any]:
    """An axis that is linear in another quantity than in its own (FITS 4.0, section 8.4)."""
    from astropy.wcs import WCS  # it takes an eighth of a second, for few files

    own = ("CTYPE1", "CUNIT1", "CRVAL1", "CDELT1", "CD1_1", "PC1_1", "CRPIX1", "RESTFRQ", "RESTWAV")
    axis = fits.Header([(name, header[name]) for name in (*own, *(f"PV1_{i}" for i in range(7))) if name in header])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on units and dates that are put right
        wcs = WCS(axis, naxis=1)
        return wcs.wcs_pix2world(np.arange(1, pixels + 1)[:, None], 1)[:, 0], length_unit(str(wcs.wcs.cunit[0]))


def _wat(header: fits.Header, axis: int) -> dict[str, str]:
    """Attributes of an axis in IRAF's cards, which cut one text into pieces of 68 letters."""
    cards = sorted(name for name in header if re.fullmatch(rf"WAT{axis}_\d\d\d", name))
    # Blanks at the end of a card are lost, but for those in its middle: pieces are as long as a card takes.
    text = "".join(str(header[name]).ljust(68) for name in cards[:-1]) + "".join(
        str(header[name]) for name in cards[-1:]
    )
    found = re.findall(r"(\w+)\s*=\s*(\"[^\"]*\"|\S+)", text)
    return {name: value.strip('"') for name, value in found}


def _apertures(file: OpenFile, data: np.ndarray, header: fits.Header, stated: Row) -> Iterator[Row]:
    """Each aperture of an IRAF multispec image: band 1 is the spectrum, one may hold its errors."""
    bands = data if data.ndim == 3 else np.atleast_2d(data)[None]
    attributes = _wat(header, 2)
    unit = length_unit(_wat(header, 1).get("units"), "wavelength")
    names = [str(header.get(f"BANDID{number + 1}", "")).lower() for number in range(len(bands))]
    error = next((number for number, name in enumerate(names) if name.startswith("sigma")), None)
    for number in range(bands.shape[1]):
        text = attributes.get(f"spec{number + 1}")
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

    NaN beyond the pixels that the dispersion is given for. Of several functions the weighted sum counts.
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
        # What the functions give is not what is stated beside them: such an aperture has no wavelengths.
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


FORMATS = (
    SpectrumFormat(
        name="fits-image",
        survey="",
        wavelength_medium=AS_GIVEN,
        rest_frame=AS_GIVEN,
        flux_unit="as given",
        resolving_power="as given",
        normalisation="as given",
        note="linear, logarithmic and IRAF dispersions; rows of wavelength, flux, error; or an extension for each. "
        "Apertures that cover different wavelengths are orders of one star",
        identify=is_image,
        read=read_image,
    ),
)
