# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Spectra as FITS images: with a dispersion in the header, as IRAF apertures, as rows of wavelength, flux and error,
with an image extension for each of these, or a row for each fibre.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .base import AS_STATED, OpenFile, Options, Row, SpectrumFormat
from .columns import from_logarithm, length_unit, logarithm, plain, unit_of
from .fibres import beside_fibres, fibres, row_of
from .headers import about
from .iraf import apertures, attributes, errors_among
from .late import fits
from .orders import as_one_or_each
from .tables import are_no_errors


#: Names of extensions, without case and punctuation; the last ones are those of ESPRESSO and NEID.
_FLUX = {"flux", "data", "sci", "spec", "spectrum", "fluxlambda", "normalized", "normalizedflux", "scidata", "sciflux"}
_WAVELENGTH = {
    *("wavelength", "wave", "lambda", "wavelengths", "wl", "lam", "sciwave", "sciwavl"),
    *("wavedatavacbary", "wavedataairbary"),
}
_LOG_WAVELENGTH = {"loglam", "loglambda", "logwave"}
_ERROR = {
    **dict.fromkeys(
        ("err", "errs", "error", "errors", "sigma", "fluxerror", "fluxerr", "noise", "std", "sig", "errdata"), "sigma"
    ),
    **dict.fromkeys(("uncertainty", "unc", "scierror"), "sigma"),
    **dict.fromkeys(("ivar", "invvar", "inversevariance"), "ivar"),
    # The last is that of MUSE.
    **dict.fromkeys(("var", "variance", "scivar", "scivariance", "stat"), "variance"),
}
_MASK = {"mask", "qual", "dq", "quality", "andmask", "qualdata"}
#: Numbers of rows of a spectrum: wavelength, flux, and perhaps error and flags.
_ROWS = (2, 3, 4)


def _images(file: OpenFile) -> list[Any]:
    """Image HDUs with numeric data."""
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
    rows = _spectra(file, flux, data, images, header, stated, options)
    about_each = fibres(file, len(rows)) if len(rows) == len(data) > 1 else None
    if about_each is not None:
        rows = [row | own for row, own in zip(rows, about_each, strict=True)]
    rows = [row for row in map(_real, rows) if np.size(row["flux"])]
    if not rows:
        raise ValueError(f"wavelength: expected positive wavelengths in {file.path}, got none")
    for row in rows:
        # Floats that are exactly 0 mark pixels without data: gaps between detectors, and ends.
        values = np.asarray(row["flux"])
        if values.dtype.kind == "f" and row.get("mask") is None:
            row["mask"] = values == 0
    yield from rows if about_each is not None else as_one_or_each(rows, file.stem)


def _spectra(
    file: OpenFile,
    flux: Any,
    data: np.ndarray,
    images: Sequence[Any],
    header: fits.Header,
    stated: Row,
    options: Options,
) -> list[Row]:
    """Rows of all spectra in an image, in any layout."""
    system = attributes(header, 0).get("system", "")
    if system == "multispec" or str(header.get("CTYPE1", "")).startswith("MULTISPE"):
        return list(apertures(file, data, header, stated))
    if (grid := _grid_beside(images, stated, options)) is not None:
        return list(_beside(file, data, flux, images, stated, *grid))
    if "WV_0_01" in header and data.ndim == 2:
        return [{**stated, "flux": part, "wavelength": _makee(header, i, part.size)} for i, part in enumerate(data, 1)]
    if data.ndim == 1 or (data.ndim <= 3 and data.shape[-1] == data.size):
        return [_one(file, data.ravel(), flux, images, header, stated, options)]
    if (triplets := _triplets(data)) is not None:
        unit = length_unit(header.get("XUNITS") or header.get("CUNIT1"), "wavelength") or options.wavelength_unit
        if any(len(part) > 2 and are_no_errors(part[1], part[2]) for part in triplets):
            raise ValueError(
                f"{file.path}: expected rows of wavelength, flux and error, got a third row as large as the flux; save "
                "wavelength and flux alone, or a table whose columns have names"
            )
        keys = ("wavelength", "flux", "flux_error")
        return [{**stated, **dict(zip(keys, part[:3], strict=False)), "wavelength_unit": unit} for part in triplets]
    if data.ndim == 2 and (labelled := _labelled_rows(header, data)) is not None:
        row = _one(file, data[labelled[0]], flux, (), header, stated, options)
        return [row if labelled[1] is None else {**row, "flux_error": data[labelled[1]]}]
    if data.ndim == 2 and flux.name.upper().startswith("SPECTRUM ") and data.shape[0] in (3, 4):
        # 6dFGS: flux, variance, sky, in V, in R, and last in both.
        last = [hdu for hdu in images if hdu.name.upper().startswith("SPECTRUM ")][-1]
        values = _array(last)
        row = _one(file, values[0], last, (), last.header, stated, options)
        return [{**row, "flux_error": values[1], "error_kind": "variance"}]
    if data.ndim == 2 and "COEFF0" in header and data.shape[0] == 5:
        # SDSS to DR8, spSpec: flux, flux without continuum, error, mask, ...
        row = _one(file, data[0], flux, (), header, stated, options)
        kind = {2: "GALAXY", 3: "QSO", 4: "QSO"}.get(header.get("SPEC_CLN"), "")
        return [{**row, "flux_error": data[2], "redshift": header.get("Z"), "frame": "observed", "object_class": kind}]
    if data.ndim == 2 and data.shape[0] in (12, 24) and str(header.get("INSTRUME", "")).upper() == "ESPADONS":
        # Libre-ESpRIT at the CFHT: nm, flux, error, of intensity alone (12 rows) or with polarisation (24), normalised
        # first, its orders one after the other.
        row = {"wavelength": data[0], "wavelength_unit": length_unit("nm"), "flux": data[1], "normalised": True}
        return [{**stated, **row, "flux_error": data[2 if len(data) == 12 else 5], "frame": "observed"}]
    if data.ndim == 2 and fibres(file, len(data)) is not None:
        parts = beside_fibres(flux, images, data)
        each = [row_of(parts, i) for i in range(len(data))]
        return [{**_one(file, row["flux"], flux, (), header, stated, options), **row} for row in each]
    if data.ndim == 3 and len(data) in (2, 3, 4) and dispersion(header, data.shape[-1]) is not None:
        # Bands of IRAF: of its apertures the first is the spectrum.
        error = errors_among(header, len(data))
        rows = [_one(file, part, flux, (), header, stated, options) for part in data[0]]
        return rows if error is None else [row | {"flux_error": data[error, i]} for i, row in enumerate(rows)]
    if data.ndim == 2 and system == "equispec":
        return [_one(file, part, flux, (), header, stated, options) for part in data]
    size, first = " x ".join(map(str, data.shape)), np.diff(data.reshape(-1, data.shape[-1])[0])
    if first.size and (np.all(first > 0) or np.all(first < 0)):
        raise ValueError(
            f"{file.path}: expected rows of wavelength, flux and error, got an image of {size} pixels without a "
            "description of its rows; save wavelength, flux and error as a table"
        )
    raise ValueError(f"{file.path}: expected a spectrum, got an image of {size} pixels; extract spectra from it first")


def _pair(images: Sequence[Any]) -> list[Any] | None:
    """
    Flux, wavelength and so on, renamed, where extensions are named in pairs such as FluxAB and WaveAB, GREEN_SCI_FLUX1
    and GREEN_SCI_WAVE1. None where the usual names identify the flux.
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
    """Rows of flux and error by the cards ARRAY1, ARRAY2, ... (UVES_popler)."""
    words = [str(header.get(f"ARRAY{number}", "")).lower() for number in range(1, data.shape[0] + 1)]
    flux = next((number for number, word in enumerate(words) if "flux" in word), None)
    error = next((number for number, word in enumerate(words) if "error" in word and "expected" not in word), None)
    return None if flux is None else (flux, error)


def _along_first_axis(data: np.ndarray, header: fits.Header) -> np.ndarray:
    """One spectrum along another axis, as in a cube of 1 x 1 spaxels, with the cards of that axis in `header`."""
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
    """Wavelengths from the table named by the axis (FITS 4.0, section 8.4.2); None for another kind of axis."""
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
    """Spectra with wavelengths, errors and masks in other extensions; each row is a spectrum."""
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
    """Parts of shape (2 to 4, pixels) whose first row is a wavelength, from an image or its transpose."""
    cube = data if data.ndim == 3 else data[None]
    for part in (cube, np.swapaxes(cube, 1, 2)):
        if part.shape[1] in _ROWS and part.shape[2] > _ROWS[-1]:
            first = [row[0][np.isfinite(row[0]) & (row[0] > 0)] for row in part]
            if all(row.size > 1 and (np.all(np.diff(row) > 0) or np.all(np.diff(row) < 0)) for row in first):
                return list(part)
    return None


# --------------------------------------------------------------------------------------------------------- dispersions


def dispersion(header: fits.Header, pixels: int) -> tuple[np.ndarray, Any] | None:
    """Wavelengths of the pixels from the header, and their unit if stated; None if there are none."""
    i = np.arange(pixels, dtype=np.float64)
    if "COEFF0" in header and "COEFF1" in header:
        return 10 ** (float(header["COEFF0"]) + float(header["COEFF1"]) * i), length_unit("Angstrom")
    step = header.get("CDELT1", header.get("CD1_1"))
    if header.get("CDELT1") == 1 and header.get("CD1_1", 1) != 1:  # some programs write a default CDELT1 beside CD1_1
        step = header["CD1_1"]
    if "CD1_1" not in header and step:
        step *= header.get("PC1_1", 1)
    if "CRVAL1" not in header or not step:
        return None
    start, step = float(header["CRVAL1"]), float(step)
    offset = i + 1 - float(header.get("CRPIX1", 1))
    axis = str(header.get("CTYPE1", "")).upper()
    about_axis = attributes(header, 1)
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
    """An axis that is linear in another quantity, such as frequency (FITS 4.0, section 8.4)."""
    from astropy.wcs import WCS  # slow to import, needed by few files

    own = ("CTYPE1", "CUNIT1", "CRVAL1", "CDELT1", "CD1_1", "PC1_1", "CRPIX1", "RESTFRQ", "RESTWAV")
    axis = fits.Header([(name, header[name]) for name in (*own, *(f"PV1_{i}" for i in range(7))) if name in header])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about units and dates that it corrects
        wcs = WCS(axis, naxis=1)
        return wcs.wcs_pix2world(np.arange(1, pixels + 1)[:, None], 1)[:, 0], length_unit(str(wcs.wcs.cunit[0]))


FORMATS = (
    SpectrumFormat(
        name="fits-image",
        survey="",
        wavelength_medium=AS_STATED,
        rest_frame=AS_STATED,
        flux_unit=AS_STATED,
        resolving_power=AS_STATED,
        normalisation=AS_STATED,
        note="linear, logarithmic and IRAF dispersions; rows of wavelength, flux, error; or an extension for each. "
        "Apertures that cover different wavelengths are orders of one star",
        identify=is_image,
        read=read_image,
    ),
)
