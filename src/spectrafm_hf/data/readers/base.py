# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""What all formats share: how one states what its spectra are, an opened file, and the way from a file to the schema.

A format yields spectra as its files hold them, and states what the files state: units, medium, frame, mask. `finish`
passes them through the gate (`models.gate_spectrafm`), where all of that is treated, the same for every format.
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

VACUUM, AIR, AS_GIVEN = "vacuum", "air", "as given"
AT_REST = "at rest"
BY_VELOCITY = "shifted by the velocity in the file"
NOT_AT_REST = "not at rest, needs a velocity"
TOO_COARSE = "not shifted, too coarse for it to matter"
SDSS_FLUX = "1e-17 erg s-1 cm-2 Angstrom-1"

#: What is wrong with a pixel of APOGEE, by bit (APOGEE_PIXMASK, Holtzman et al. 2015, AJ 150, 148, table 12, and
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
#: Those that mask a pixel unless others are named: it holds no measurement of the star, or is dominated by the sky.
#: Persistence is left out: where it strikes, it marks up to two fifths of a spectrum.
BAD_BITS = (
    *("BADPIX", "CRPIX", "SATPIX", "UNFIXABLE", "BADDARK", "BADFLAT", "BADERR", "NOSKY"),
    *("SIG_SKYLINE", "SIG_TELLURIC"),
)


#: DO_NOT_USE of the data quality of JWST (jwst-pipeline.readthedocs.io, "data quality flags").
JWST_DO_NOT_USE = 1
#: Spectra of a table that are held at once: of 8,000 pixels they are 30 MB.
CHUNK_ROWS = 256


class Failure(NamedTuple):
    """A file that could not be read, why, in one line, and whether the file itself may be all right."""

    file: Path
    cause: str
    may_pass: bool = False


@dataclass(frozen=True)
class Options:
    """What a caller may ask of the formats; each looks at what concerns it."""

    visits: bool = False
    bad_bits: Sequence[str] = BAD_BITS
    angstrom: float = 1.0
    """Angstrom per unit of wavelengths that bring none."""
    grid: NDArray[np.float64] | None = None
    """Wavelengths of arrays that bring none."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Which column is what, by role, where the names do not tell."""
    wavelength_medium: str | None = None
    radial_velocity: float | None = None
    radial_velocity_column: str | None = None
    at_rest: bool = False
    resolving_power: float | None = None
    """What settles medium and frame where a file does not state them; the resolving power counts in any case."""
    keep_refused: bool = False
    """Hand on what is no spectrum of a star, with the reason."""
    scalars: Sequence[str] = ()
    """Further columns of numbers, one for each star, that are wanted."""

    @property
    def wavelength_unit(self) -> units.UnitBase | None:
        """Unit of wavelengths that bring none, where somebody has named it."""
        return None if self.angstrom == 1 else units.Unit(self.angstrom * units.AA)

    def bad(self, pixel_flags: ArrayLike) -> NDArray[np.bool_]:
        """Which pixels have one of the bad bits of APOGEE set, or flags that are no whole number, as NaN."""
        bits = sum(1 << APOGEE_PIXEL_BITS[name] for name in self.bad_bits)
        flags = np.asarray(pixel_flags)
        with np.errstate(invalid="ignore"):
            whole = flags.astype(np.int64)
        return ((whole & bits) != 0) | (whole != flags)


@dataclass(frozen=True)
class SpectrumFormat:
    """What the spectra of a kind of file are, and how they are told and read.

    Attributes
    ----------
    name : str
        As in `read_spectra(format=...)`.
    survey : str
        The `survey` of its rows, if they bring none.
    wavelength_medium : {"vacuum", "air", "as given"}
        What the wavelengths of the files are measured in; as given: by the file, else by the caller, else vacuum.
    rest_frame : str
        Whether the files hold wavelengths at rest, and if not, how they get there.
    flux_unit, resolving_power, normalisation : str
        For people. The flux is handed on as it is in the file.
    note : str
        What is left out, masked or changed.
    identify : callable
        `OpenFile -> bool`. Formats are asked in order; the first that says yes reads the file.
    read : callable
        `(OpenFile, Options) -> iterator of rows` as the file holds them: any number type and byte order, Angstrom, in
        the medium and frame of the format. `flux_error` and `mask` may be left out.
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
    """The encoding of a text of programs on Windows, by its mark, or by every other byte being 0."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    even, odd = head[:256:2], head[1:256:2]
    if len(odd) > 8 and (even.count(0), odd.count(0)) in ((0, len(odd)), (len(even), 0)):
        return "utf-16-le" if odd.count(0) else "utf-16-be"
    return None


LARGEST = 2**62  # bytes, up to which a file can be looked for its end


class OpenFile(contextlib.ExitStack):
    """A file that formats look at, opened once, and of the kind that its first bytes say, whatever its name."""

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
        # Bytes that are in no text of any encoding.
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
                # Scaled images cannot be left on disk; astropy reads what is asked for.
                memmap = self.path.suffix != ".gz" and not scaled
                hdus = self.enter_context(fits.open(self.path, memmap=memmap))
                len(hdus)  # it opens the first one only
        except (OSError, EOFError, zlib.error, fits.VerifyError) as error:
            raise ValueError(f"{self.path}: expected a FITS file, got {error}") from error
        # To astropy a file that ends too early is worth a warning.
        if (cut := [str(warning.message) for warning in caught if "truncated" in str(warning.message)]) and self._cut:
            raise ValueError(f"{self.path}: expected a FITS file, got one that ends too early: {cut[0]}")
        return hdus

    def _check_sizes(self) -> bool:
        """Refuse sizes that astropy would follow without end, forwards or back; whether an image is scaled."""
        scaled = False
        self._cut = False
        with self.path.open("rb") as raw, gzip.open(raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw as stream:
            for number in itertools.count():
                try:
                    header = fits.Header.fromfile(stream)
                except (EOFError, OSError):  # the end, or what astropy says more about
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
                # Seeking goes past the end of a plain file, not of a compressed one.
                size = os.fstat(raw.fileno()).st_size if stream is raw else stream.seek(min(padded, LARGEST))
                if size < needed:  # before memory is asked for
                    what = f"HDU {number} is to end at byte {needed:,}, the file does at {size:,}"
                    raise ValueError(
                        f"{self.path}: expected a FITS file, got one that ends too early (truncated): {what}"
                    )
                stream.seek(padded)
                # Some programs do not fill up the last block. Where a part of the filling is missing, bytes were lost
                # on the way, as from a file that is taken for text, and all numbers behind them are others.
                self._cut |= size < padded and size != needed
        return scaled

    @property
    def header(self) -> fits.Header:
        """The first header; empty for what is no FITS file."""
        return self.hdus[0].header if len(self.hdus) else fits.Header()

    @property
    def hdu_names(self) -> list[str]:
        return [hdu.name for hdu in self.hdus]

    @cached_property
    def parquet(self) -> pq.ParquetFile:
        try:
            # Neither what may be asked for next nor all of a group of rows is kept: both would grow with the file.
            return self.enter_context(pq.ParquetFile(self.path, pre_buffer=False, buffer_size=1 << 20))
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{self.path}: expected a Parquet file, got {error}") from error

    @cached_property
    def encoding(self) -> str:
        """That of a text: UTF-8, UTF-16, or the Latin-1 of older programs."""
        head = self.head
        if "encoding" in self.__dict__:  # which looking at it has told
            return str(self.__dict__["encoding"])
        try:
            # The last letter may be cut.
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
        """Some lines of a text file, none for another kind."""
        return self.head.decode("utf-8-sig", errors="ignore").splitlines() if self.kind == "text" else []


def angstrom_per(unit: Any, field: str = "wavelength_unit") -> float:
    """Angstrom per unit."""
    length = length_unit(unit, field)
    if length is None or not length.is_equivalent(units.AA):
        raise ValueError(f"{field}: expected a unit of length, got {str(unit)!r}")
    return float(length.to(units.AA))


def sigma(ivar: ArrayLike) -> NDArray[np.float64]:
    """One-sigma errors of inverse variances; infinite for what was not measured."""
    array = np.asarray(ivar, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(array > 0, array**-0.5, np.inf)


def column_of(hdu: fits.BinTableHDU, rows: Any, name: str) -> NDArray[Any]:
    """A column of some rows of a FITS table; NaN where whole numbers hold the null value, scaled or not."""
    values, null = rows[name], hdu.columns[name].null
    if isinstance(hdu, fits.TableHDU) and values.dtype.kind in "fi":
        # Of numbers as text, astropy makes zeros of those that are blank or stand for none.
        written = np.char.strip(rows.view(np.ndarray)[name])
        return np.where(np.isin(written, [b"", str(null or "").strip().encode()]), np.nan, values)
    if null is None or values.dtype == object:
        return values
    # astropy's Table masks them in columns without a scale only, a FITS_rec in none.
    missing = rows.view(np.ndarray)[name] == null
    return np.where(missing, np.nan, values) if missing.any() else values


#: What a row may state to the gate beside its pixels.
STATEMENTS = [each.name for each in fields(Stated) if each.name not in PIXEL_COLUMNS]
_FRAMES = {AT_REST: "rest", TOO_COARSE: "rest", BY_VELOCITY: "observed", NOT_AT_REST: "observed", AS_GIVEN: None}


def finish(row: Row, format: SpectrumFormat, options: Options, *, stored: bool = True) -> Row:
    """
    A spectrum as a file holds it -> a row of the schema: vacuum, at rest, the types and the masks of the schema.
    Numbers are as the schema stores them, so that a file and a data set made of it give the same tokens; those of an
    object in memory (`stored` is False) are as they are, so that it gives the tokens of its arrays.
    """
    rounded = _float32 if stored else np.asarray
    stated = {name: row.pop(name) for name in STATEMENTS if row.get(name) is not None}
    if format.wavelength_medium != AS_GIVEN:
        stated.setdefault("medium", format.wavelength_medium)
    frame = stated.pop("frame", format.rest_frame)
    if options.resolving_power is not None:
        stated["resolving_power"] = options.resolving_power
    resolving_power = stated.setdefault("resolving_power", _number(format.resolving_power))
    if format.normalisation != AS_GIVEN:
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
    if np.shape(flux) == np.shape(mask):  # others are told of later
        mask = mask | ~np.isfinite(flux)  # also what is too large for the type of the schema
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
    """The resolving power of a format that has one."""
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def _float32(values: Any) -> NDArray[np.float32]:
    # What becomes infinite is masked; NaN of every kind may be converted.
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(values).astype(np.float32, copy=False)


def usable(row: Row) -> bool:
    """Whether a row has a pixel that counts."""
    same = len({np.shape(row[name]) for name in PIXEL_COLUMNS}) == 1
    return not same or bool((~row["mask"]).any())
