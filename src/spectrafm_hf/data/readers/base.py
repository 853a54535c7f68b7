# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Shared by all formats: the description of a format, an opened file, and the conversion of a row to the schema.

A format yields spectra unchanged, with the units, medium, frame and mask that the file states. `finish` passes them
through the gate (`models.gate_spectrafm`), which converts all formats in the same way.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import os
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray

from ...files import spectrum_stem
from ...models.gate_spectrafm import Stated, admit
from ..schema import PIXEL_COLUMNS
from .columns import length_unit
from .late import fits, units


Row = dict[str, Any]

VACUUM, AIR, AS_STATED = "vacuum", "air", "as stated"
AT_REST = "at rest"
BY_VELOCITY = "shifted by the velocity in the file"
NOT_AT_REST = "not at rest, needs a velocity"
TOO_COARSE = "not shifted (low resolution)"
SDSS_FLUX = "1e-17 erg s-1 cm-2 Angstrom-1"

#: Flags of APOGEE pixels, by bit (APOGEE_PIXMASK, Holtzman et al. 2015, AJ 150, 148, table 12, and
#: sdss.org/dr17/irspec/apogee-bitmasks).
APOGEE_PIXEL_BITS = {
    "BADPIX": 0,
    "CRPIX": 1,
    "SATPIX": 2,
    "UNFIXABLE": 3,
    "BADDARK": 4,
    "BADFLAT": 5,
    "BADERR": 6,
    "NOSKY": 7,
    "LITTROW_GHOST": 8,
    "PERSIST_HIGH": 9,
    "PERSIST_MED": 10,
    "PERSIST_LOW": 11,
    "SIG_SKYLINE": 12,
    "SIG_TELLURIC": 13,
    "NOT_ENOUGH_PSF": 14,
}
#: Flags that mask a pixel by default: no measurement of the star, or dominated by the sky. Persistence is left out,
#: because it can flag up to 40 % of a spectrum.
BAD_BITS = (
    *("BADPIX", "CRPIX", "SATPIX", "UNFIXABLE", "BADDARK", "BADFLAT", "BADERR", "NOSKY"),
    *("SIG_SKYLINE", "SIG_TELLURIC"),
)


#: DO_NOT_USE of the data quality of JWST (jwst-pipeline.readthedocs.io, "data quality flags").
JWST_DO_NOT_USE = 1
#: Rows of a table in memory at a time: with 8,000 pixels they are 30 MB.
CHUNK_ROWS = 256


class Failure(NamedTuple):
    """A file that could not be read, the cause in one line, and whether a second try may work."""

    file: Path
    cause: str
    may_pass: bool = False


@dataclass(frozen=True)
class Options:
    """Options of `read_spectra`; a format uses those that apply to it."""

    visits: bool = False
    bad_bits: Sequence[str] = BAD_BITS
    angstrom: float = 1.0
    """Angstrom per unit of wavelength, where the file states no unit."""
    grid: NDArray[np.float64] | None = None
    """Wavelengths of arrays without any."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Names of columns by role, where they are not recognised."""
    wavelength_medium: str | None = None
    radial_velocity: float | None = None
    radial_velocity_column: str | None = None
    at_rest: bool = False
    resolving_power: float | None = None
    """Medium and frame are used where a file does not state them; the resolving power always."""
    keep_refused: bool = False
    """Also return spectra that are not of stars, with the reason."""
    scalars: Sequence[str] = ()
    """Further columns to read, with one number for each star."""

    @property
    def wavelength_unit(self) -> units.UnitBase | None:
        """Unit of wavelengths in files that state none; None if the user named none."""
        return None if self.angstrom == 1 else units.Unit(self.angstrom * units.AA)

    def bad(self, pixel_flags: ArrayLike) -> NDArray[np.bool_]:
        """Pixels with one of the bad bits of APOGEE, or with flags that are not integers, such as NaN."""
        bits = sum(1 << APOGEE_PIXEL_BITS[name] for name in self.bad_bits)
        flags = np.asarray(pixel_flags)
        with np.errstate(invalid="ignore"):
            whole = flags.astype(np.int64)
        return ((whole & bits) != 0) | (whole != flags)


@dataclass(frozen=True)
class SpectrumFormat:
    """Description of a file format, with functions to recognise and read it.

    Attributes
    ----------
    name : str
        As in `read_spectra(format=...)`.
    survey : str
        Default of the `survey` of its rows.
    wavelength_medium : {"vacuum", "air", "as stated"}
        Medium of the wavelengths; as stated: in the file, else by the caller, else vacuum.
    rest_frame : str
        Whether wavelengths are at rest, and if not, how they are shifted.
    flux_unit, resolving_power, normalisation : str
        Shown by `spectrafm formats`. The flux itself is not converted.
    note : str
        What is left out, masked or changed.
    identify : callable
        `OpenFile -> bool`. Formats are tried in order; the first that returns True reads the file.
    read : callable
        `(OpenFile, Options) -> iterator of rows`, unconverted: any number type and byte order, Angstrom, in the medium
        and frame of the format. `flux_error` and `mask` are optional.
    """

    name: str
    survey: str
    wavelength_medium: str
    rest_frame: str
    flux_unit: str
    resolving_power: str
    normalisation: str
    note: str
    identify: Callable[[OpenFile], bool] = field(repr=False)
    read: Callable[[OpenFile, Options], Iterator[Row]] = field(repr=False)


_FIRST_BYTES = {b"SIMPLE  =": "fits", b"PAR1": "parquet", b"\x93NUMPY": "npy", b"PK\x03\x04": "npz"}
_FIRST_BYTES |= {b"\x89HDF\r\n\x1a\n": "hdf5"}


def _utf_16(head: bytes) -> str | None:
    """Variant of UTF-16 (text from Windows), by its mark or by zeros in every other byte; None for other text."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    even, odd = head[:256:2], head[1:256:2]
    if len(odd) > 8 and (even.count(0), odd.count(0)) in ((0, len(odd)), (len(even), 0)):
        return "utf-16-le" if odd.count(0) else "utf-16-be"
    return None


LARGEST = 2**62  # bytes; seeking further overflows


class OpenFile(contextlib.ExitStack):
    """A file that is opened once for all formats; its kind follows from its first bytes, not from its name."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.name = path.name.removesuffix(".gz")
        self.stem = spectrum_stem(path)

    @cached_property
    def head(self) -> bytes:
        """The first bytes, decompressed."""
        with self.path.open("rb") as stream:
            head = stream.read(4096)
        if head[:2] == b"\x1f\x8b":
            with gzip.open(self.path) as stream:
                head = stream.read(4096)
        if (encoding := _utf_16(head)) is not None:
            self.__dict__["encoding"] = encoding
            return head[: len(head) // 2 * 2].decode(encoding, "ignore").encode()
        return head

    @cached_property
    def kind(self) -> str:
        """`fits`, `parquet`, `npy`, `npz`, `hdf5`, `votable`, `text`, `empty` or `unknown`."""
        head = self.head
        if not head:
            return "empty"
        for start, kind in _FIRST_BYTES.items():
            if head.startswith(start):
                return kind
        if b"<VOTABLE" in head:
            return "votable"
        # Text has none of these bytes in any encoding.
        return "unknown" if set(head) & {*range(9), *range(14, 32), 127} else "text"

    @cached_property
    def hdus(self) -> fits.HDUList:
        """All HDUs of a FITS file; empty for another kind."""
        if self.kind != "fits":
            return fits.HDUList()
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                scaled = self._check_sizes()
                # Scaled images cannot be memory-mapped.
                memmap = self.path.suffix != ".gz" and not scaled
                hdus = self.enter_context(fits.open(self.path, memmap=memmap))
                len(hdus)  # otherwise only the first one is opened
        except (OSError, EOFError, zlib.error, fits.VerifyError) as error:
            raise ValueError(f"{self.path}: expected a FITS file, got {error}") from error
        # For a truncated file astropy only warns.
        if (cut := [str(warning.message) for warning in caught if "truncated" in str(warning.message)]) and self._cut:
            raise ValueError(f"{self.path}: expected a FITS file, got one that ends too early: {cut[0]}")
        return hdus

    def _check_sizes(self) -> bool:
        """Raise for impossible sizes, on which astropy would loop forever; return whether an image is scaled."""
        scaled = False
        self._cut = False
        with self.path.open("rb") as raw, gzip.open(raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw as stream:
            for number in itertools.count():
                try:
                    header = fits.Header.fromfile(stream)
                except (EOFError, OSError):  # the end, or an error that astropy reports later
                    break
                for name in ("NAXIS", "TFIELDS"):  # FITS 4.0, sections 4.4.1.1 and 7.2.1
                    if not (isinstance(count := header.get(name, 0), int) and 0 <= count <= 999):
                        raise fits.VerifyError(f"HDU {number} with {name} = {count!r}")
                if header.data_size_padded < 0:
                    raise fits.VerifyError(f"HDU {number} with data of a negative size")
                if not str(header.get("XTENSION", "IMAGE")).startswith("BINTABLE"):
                    plain = header.get("BZERO", 0) == 0 and header.get("BSCALE", 1) == 1
                    scaled |= not (plain and "BLANK" not in header)
                needed = stream.tell() + header.data_size
                padded = needed - header.data_size + header.data_size_padded
                # One can seek past the end of a plain file, not of a compressed one.
                size = os.fstat(raw.fileno()).st_size if stream is raw else stream.seek(min(padded, LARGEST))
                if size < needed:  # before memory is allocated
                    what = f"HDU {number} should end at byte {needed:,}, but the file ends at {size:,}"
                    raise ValueError(
                        f"{self.path}: expected a FITS file, got one that ends too early (truncated): {what}"
                    )
                stream.seek(padded)
                # Some programs do not pad the last block. If a part of the padding is missing, bytes were lost (as by
                # a transfer as text), and all numbers after them are wrong.
                self._cut |= size < padded and size != needed
        return scaled

    @property
    def header(self) -> fits.Header:
        """The first header; empty if this is not a FITS file."""
        return self.hdus[0].header if len(self.hdus) else fits.Header()

    @property
    def hdu_names(self) -> list[str]:
        return [hdu.name for hdu in self.hdus]

    @cached_property
    def parquet(self) -> pq.ParquetFile:
        try:
            # Neither read ahead nor keep a whole row group in memory: both would grow with the file.
            return self.enter_context(pq.ParquetFile(self.path, pre_buffer=False, buffer_size=1 << 20))
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{self.path}: expected a Parquet file, got {error}") from error

    @cached_property
    def encoding(self) -> str:
        """Encoding of a text: UTF-8, UTF-16, or the Latin-1 of older programs."""
        head = self.head
        if "encoding" in self.__dict__:  # set by `head`
            return str(self.__dict__["encoding"])
        try:
            # The last character may be cut.
            head[:-3].decode("utf-8")
        except UnicodeDecodeError:
            return "latin-1"
        return "utf-8"

    def text(self) -> IO[str]:
        """The content, decompressed."""
        opened = gzip.open if self.path.suffix == ".gz" else open
        encoding = "utf-8-sig" if self.encoding == "utf-8" else self.encoding
        return self.enter_context(opened(self.path, "rt", encoding=encoding, newline=""))

    @cached_property
    def first_lines(self) -> list[str]:
        """The first lines of a text file; empty for another kind."""
        return self.head.decode("utf-8-sig", errors="ignore").splitlines() if self.kind == "text" else []


def angstrom_per(unit: Any, field: str = "wavelength_unit") -> float:
    """Angstrom per unit."""
    length = length_unit(unit, field)
    if length is None or not length.is_equivalent(units.AA):
        raise ValueError(f"{field}: expected a unit of length, got {str(unit)!r}")
    return float(length.to(units.AA))


def sigma(ivar: ArrayLike) -> NDArray[np.float64]:
    """One-sigma errors from inverse variances; infinite where these are not positive."""
    array = np.asarray(ivar, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(array > 0, array**-0.5, np.inf)


def column_of(hdu: fits.BinTableHDU, rows: Any, name: str) -> NDArray[Any]:
    """A column of some rows of a FITS table; NaN where integers have the null value, scaled or not."""
    values, null = rows[name], hdu.columns[name].null
    if isinstance(hdu, fits.TableHDU) and values.dtype.kind in "fi":
        # In ASCII tables, astropy turns blanks and null values into zeros.
        written = np.char.strip(rows.view(np.ndarray)[name])
        return np.where(np.isin(written, [b"", str(null or "").strip().encode()]), np.nan, values)
    if null is None or values.dtype == object:
        return values
    # astropy's Table masks null values only in columns without a scale, a FITS_rec in none.
    missing = rows.view(np.ndarray)[name] == null
    return np.where(missing, np.nan, values) if missing.any() else values


#: Statements that a row may make to the gate besides its pixels.
STATEMENTS = [each.name for each in fields(Stated) if each.name not in PIXEL_COLUMNS]
_FRAMES = {AT_REST: "rest", TOO_COARSE: "rest", BY_VELOCITY: "observed", NOT_AT_REST: "observed", AS_STATED: None}


def finish(row: Row, format: SpectrumFormat, options: Options, *, stored: bool = True) -> Row:
    """
    Convert a row of a format to a row of the schema: vacuum, at rest, with the types and masks of the schema.

    Numbers are rounded as in the schema, so that a file and a data set made from it give the same tokens. Those of an
    object in memory (`stored` is False) are not rounded, so that it gives the tokens of its arrays.
    """
    rounded = _float32 if stored else np.asarray
    stated = {name: row.pop(name) for name in STATEMENTS if row.get(name) is not None}
    if format.wavelength_medium != AS_STATED:
        stated.setdefault("medium", format.wavelength_medium)
    frame = stated.pop("frame", format.rest_frame)
    if options.resolving_power is not None:
        stated["resolving_power"] = options.resolving_power
    resolving_power = stated.setdefault("resolving_power", _number(format.resolving_power))
    if format.normalisation != AS_STATED:
        stated.setdefault("normalised", format.normalisation.startswith("the continuum"))
    velocity = options.radial_velocity
    if options.radial_velocity_column is not None:
        if "radial_velocity" not in stated:
            raise ValueError(
                f"radial_velocity_column: expected a table with {options.radial_velocity_column}, got a file of the "
                f"format {format.name}, which has no such column; give one velocity for all with radial_velocity"
            )
        velocity = stated["radial_velocity"]
    star = admit(
        Stated(
            wavelength=row.pop("wavelength"),
            flux=row.pop("flux"),
            flux_error=row.pop("flux_error", None),
            mask=row.pop("mask", None),
            frame=_FRAMES.get(frame, frame),
            **stated,
        ),
        options.wavelength_medium,
        velocity,
        options.at_rest,
    )
    flux, mask = rounded(star.flux), star.mask
    if np.shape(flux) == np.shape(mask):  # a mismatch is reported later
        mask = mask | ~np.isfinite(flux)  # also values too large for the type of the schema
    return {
        "survey": format.survey,
        "snr": np.nan,
        **row,
        "wavelength": rounded(star.wavelength),
        "flux": flux,
        "flux_error": rounded(star.flux_error),
        "mask": mask,
        "radial_velocity": star.radial_velocity,
        "rest_frame": star.rest_frame,
        "resolving_power": np.nan if resolving_power is None else star.resolving_power,
        "normalised": star.normalised,
        "flags": [*row.get("flags", []), *star.flags],
        "refused": row.get("refused") or star.refused,
    }


def _number(text: str) -> float | None:
    """The resolving power of a format, if it is one number."""
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def _float32(values: Any) -> NDArray[np.float32]:
    # Infinite values are masked later; signalling NaN may be converted.
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(values).astype(np.float32, copy=False)


def usable(row: Row) -> bool:
    """Whether a row has an unmasked pixel."""
    same = len({np.shape(row[name]) for name in PIXEL_COLUMNS}) == 1
    return not same or bool((~row["mask"]).any())
