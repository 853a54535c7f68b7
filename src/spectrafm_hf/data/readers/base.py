# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""What all formats share: how one states what its spectra are, an opened file, and the way from a file to the schema.

A format yields spectra as its files hold them; `finish` brings them into the schema from what the format states. So a
format is a few lines, and air, rest frame and masks are treated in one place.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from astropy import units
from astropy.io import fits
from numpy.typing import ArrayLike, NDArray

from ...models.tokenization_spectrafm import SPEED_OF_LIGHT, air_to_vacuum
from ..schema import PIXEL_COLUMNS


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


class OpenFile(contextlib.ExitStack):
    """A file that formats look at, opened once, and of the kind that its first bytes say, whatever its name."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.name = path.name.removesuffix(".gz")
        self.stem = Path(self.name).stem

    @cached_property
    def head(self) -> bytes:
        """The first bytes, decompressed."""
        with self.path.open("rb") as stream:
            head = stream.read(4096)
        if head[:2] == b"\x1f\x8b":
            with gzip.open(self.path) as stream:
                head = stream.read(4096)
        return head

    @cached_property
    def kind(self) -> str:
        """`fits`, `parquet`, `npy`, `npz`, `votable`, `text`, `empty` or `unknown`."""
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
                self._check_sizes()
                hdus = self.enter_context(fits.open(self.path, memmap=self.path.suffix != ".gz"))
                len(hdus)  # it opens the first one only
        except (OSError, EOFError, zlib.error, fits.VerifyError) as error:
            raise ValueError(f"{self.path}: expected a FITS file, got {error}") from error
        # To astropy a file that ends too early is worth a warning.
        if cut := [str(warning.message) for warning in caught if "truncated" in str(warning.message)]:
            raise ValueError(f"{self.path}: expected a FITS file, got one that ends too early: {cut[0]}")
        return hdus

    def _check_sizes(self) -> None:
        """Headers with sizes that astropy would follow without end, forwards or back."""
        with self.path.open("rb") as raw, gzip.open(raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw as stream:
            for number in itertools.count():
                try:
                    header = fits.Header.fromfile(stream)
                except (EOFError, OSError):  # the end, or what astropy says more about
                    return
                for name in ("NAXIS", "TFIELDS"):  # FITS 4.0, sections 4.4.1.1 and 7.2.1
                    if not (isinstance(count := header.get(name, 0), int) and 0 <= count <= 999):
                        raise fits.VerifyError(f"HDU {number} with {name} = {count!r}")
                if header.data_size_padded < 0:
                    raise fits.VerifyError(f"HDU {number} with data of a negative size")
                stream.seek(header.data_size_padded, 1)

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
            # Without a buffer for what may be asked for next: it would grow with the file.
            return self.enter_context(pq.ParquetFile(self.path, pre_buffer=False))
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{self.path}: expected a Parquet file, got {error}") from error

    def text(self) -> IO[str]:
        """The content, decompressed."""
        opened = gzip.open if self.path.suffix == ".gz" else open
        return self.enter_context(opened(self.path, "rt", encoding="utf-8-sig", newline=""))

    @cached_property
    def first_lines(self) -> list[str]:
        """Some lines of a text file, none for another kind."""
        return self.head.decode("utf-8-sig", errors="ignore").splitlines() if self.kind == "text" else []


def angstrom_per(unit: Any, field: str = "wavelength_unit") -> float:
    """Angstrom per unit."""
    try:
        return float(units.Unit(unit).to("Angstrom"))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{field}: expected a unit of length, got {str(unit)!r}") from error


def sigma(ivar: ArrayLike) -> NDArray[np.float64]:
    """One-sigma errors of inverse variances; infinite for what was not measured."""
    array = np.asarray(ivar, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(array > 0, array**-0.5, np.inf)


def finish(row: Row, format: SpectrumFormat, medium: str | None, radial_velocity: float | None) -> Row:
    """A spectrum as a file holds it -> a row of the schema: vacuum, at rest, the types and the masks of the schema."""
    wavelength = np.asarray(row["wavelength"])
    flux = _float32(row["flux"])
    given = row.pop("wavelength_medium", format.wavelength_medium)
    if (given if given != AS_GIVEN else medium) == AIR:
        # What is no wavelength stays what it is: the tokenizer judges it.
        real = np.isfinite(wavelength) & (wavelength > 0)
        wavelength = np.where(real, air_to_vacuum(np.where(real, wavelength, 1.0)), wavelength)
    frame, known = row.pop("frame", format.rest_frame), row.pop("radial_velocity", np.nan)
    at_rest = True
    if frame in (BY_VELOCITY, NOT_AT_REST, AS_GIVEN):
        # A table of people's own is at rest unless they say otherwise.
        own = np.nan if frame == AS_GIVEN else known
        beta = (own if radial_velocity is None else radial_velocity) / SPEED_OF_LIGHT
        if abs(beta) < 1:
            wavelength = wavelength.astype(np.float64) * np.sqrt((1 - beta) / (1 + beta))
            known = beta * SPEED_OF_LIGHT
        at_rest = bool(abs(beta) < 1) or frame == AS_GIVEN
    flux_error, mask = row.get("flux_error"), row.get("mask")
    flux_error = np.full(flux.shape, np.nan, np.float32) if flux_error is None else _float32(flux_error)
    mask = np.zeros(flux.shape, bool) if mask is None else np.array(mask, bool)
    if flux.shape == flux_error.shape == mask.shape:
        mask |= ~(np.isfinite(flux) & ~(flux_error <= 0) & (flux_error != np.inf))
    return {
        "survey": format.survey,
        "snr": np.nan,
        **row,
        # As the schema stores them, so that a file and a data set made of it give the same tokens.
        "wavelength": _float32(wavelength),
        "flux": flux,
        "flux_error": flux_error,
        "mask": mask,
        "radial_velocity": float(known),
        "rest_frame": at_rest,
    }


def _float32(values: Any) -> NDArray[np.float32]:
    # What becomes infinite is masked; NaN of every kind may be converted.
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(values).astype(np.float32, copy=False)


def usable(row: Row) -> bool:
    """Whether a row has a pixel that counts."""
    same = len({np.shape(row[name]) for name in PIXEL_COLUMNS}) == 1
    return not same or bool((~row["mask"]).any())
