# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
Coefficients of Gaia XP spectra -> flux on the grid of the archive's sampled spectra, many stars in one matrix product.

The archive has continuous spectra of 220 million stars: 55 coefficients each of BP and RP, their errors and
correlations. Flux is linear in the coefficients and its variance in their covariance, so that both are matrix products
once the matrices are known. Those are GaiaXPy's own: it is asked once, through `gaiaxpy.calibrate`, for the spectra of
unit vectors, and what it says is kept in the cache, under the number of its version.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import io
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..files import complete_file
from .sources import cache_dir


BANDS = ("bp", "rp")
N_COEFFICIENTS = 55
N_CORRELATIONS = N_COEFFICIENTS * (N_COEFFICIENTS - 1) // 2
#: nm: that of the archive, which `gaiaxpy.calibrate` takes by itself.
SAMPLING = np.arange(336.0, 1021.0, 2.0)
NO_GAIAXPY = "coefficients of XP spectra need GaiaXPy: pip install 'spectrafm_hf[gaia]'"
_NAMES = (*BANDS, *(f"{name} alone" for name in BANDS))

Array = NDArray[np.float64]


@dataclass
class Band:
    """
    Of BP or RP, as many stars as there are. Stars without the band have NaN.

    Attributes
    ----------
    coefficients, errors : array of shape (stars, 55)
    correlations : array of shape (stars, 1485)
        Below the diagonal, row after row, as the archive has them.
    """

    coefficients: Array
    errors: Array
    correlations: Array

    @property
    def known(self) -> NDArray[np.bool_]:
        """(stars,)"""
        return np.asarray(np.isfinite(self.coefficients).all(axis=1))


@dataclass
class _Part:
    """What a band adds to the pixels of a range: flux of coefficients, variance of covariances."""

    pixels: slice
    flux: Array  # (55, pixels)
    variance: Array  # (55 + 1485, pixels)


class XPBasis:
    """
    Flux and error of coefficients, as `gaiaxpy.calibrate` has them to rounding.

    Parameters
    ----------
    matrices : mapping of str to array of shape (55, 343)
        `bp`, `rp`: flux in W m-2 nm-1 of each coefficient, where the other band is there as well, weighted as the two
        are joined; `bp alone`, `rp alone`: without the other, NaN where the band does not reach.
    """

    def __init__(self, matrices: Mapping[str, Array]) -> None:
        self._parts = {name: _part(matrix) for name, matrix in matrices.items()}

    def sample(self, bands: Mapping[str, Band]) -> tuple[Array, Array]:
        """
        Flux and its one-sigma error, (stars, 343) in W m-2 nm-1.

        Parameters
        ----------
        bands : mapping of str to Band
            `bp`, `rp`.

        Returns
        -------
        flux, error
            NaN where the bands that a star has do not reach.
        """
        known = {name: band.known for name, band in bands.items()}
        both = known["bp"] & known["rp"]
        shape = (len(both), SAMPLING.size)
        flux, variance = np.full(shape, np.nan), np.full(shape, np.nan)
        flux[both], variance[both] = 0.0, 0.0
        for name, band in bands.items():
            for stars, part in ((both, self._parts[name]), (known[name] & ~both, self._parts[f"{name} alone"])):
                if not stars.any():
                    continue
                whole = stars.all()
                columns = (band.coefficients, band.errors, band.correlations)
                coefficients, errors, correlations = (values if whole else values[stars] for values in columns)
                rows = slice(None) if whole else np.flatnonzero(stars)
                found = coefficients @ part.flux, _covariances(errors, correlations) @ part.variance
                for target, values in zip((flux, variance), found, strict=True):
                    if part is self._parts[name]:
                        target[rows, part.pixels] += values
                    else:
                        target[rows, part.pixels] = values
        with np.errstate(invalid="ignore"):  # of what was no covariance
            return flux, np.sqrt(variance)


_BELOW = np.tril_indices(N_COEFFICIENTS, k=-1)


def _covariances(errors: Array, correlations: Array) -> Array:
    """(stars, 55), (stars, 1485) -> variances and covariances, (stars, 55 + 1485)."""
    found = np.empty((len(errors), N_COEFFICIENTS + N_CORRELATIONS))
    np.square(errors, out=found[:, :N_COEFFICIENTS])
    pairs = found[:, N_COEFFICIENTS:]
    np.multiply(errors[:, _BELOW[0]], errors[:, _BELOW[1]], out=pairs)
    pairs *= correlations
    return found


def _part(matrix: Array) -> _Part:
    reached = np.flatnonzero(np.isfinite(matrix).all(axis=0) & (matrix != 0).any(axis=0))
    pixels = slice(int(reached[0]), int(reached[-1]) + 1)
    flux = np.ascontiguousarray(matrix[:, pixels])
    variance = np.concatenate([flux**2, 2.0 * flux[_BELOW[0]] * flux[_BELOW[1]]])
    return _Part(pixels, flux, variance)


@functools.lru_cache(maxsize=1)
def xp_basis() -> XPBasis:
    """
    The matrices of the GaiaXPy that is installed.

    Raises
    ------
    ImportError
        Without GaiaXPy.
    ValueError
        If it samples on another grid than that of the archive.
    """
    try:
        version = importlib.metadata.version("gaiaxpy")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(NO_GAIAXPY) from None
    path = cache_dir() / f"gaiaxpy-{version}.npz"
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as kept:
            matrices = {name: kept[name] for name in _NAMES}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        matrices = _ask_gaiaxpy()
        with contextlib.suppress(OSError):  # a cache that cannot be written: it is asked again
            path.parent.mkdir(parents=True, exist_ok=True)
            with complete_file(path) as temporary, temporary.open("wb") as new:
                np.savez(new, allow_pickle=False, **matrices)
    return XPBasis(matrices)


@contextlib.contextmanager
def _undone() -> Iterator[None]:
    """
    Without what GaiaXPy does beside its work: it tells of it, and its import changes how NumPy prints, silences
    warnings of all the program, and has matplotlib set texts with LaTeX.
    """
    import matplotlib as mpl

    with contextlib.redirect_stdout(io.StringIO()), np.printoptions(), warnings.catch_warnings(), mpl.rc_context():
        warnings.simplefilter("ignore")  # of GaiaXPy's own code, as that of an option of pandas which it sets
        yield


def _ask_gaiaxpy() -> dict[str, Array]:
    """Spectra of unit vectors, of each band beside the other and alone."""
    with _undone():
        import pandas as pd
        from gaiaxpy import calibrate

        nothing, rows = np.zeros(N_COEFFICIENTS), []
        for name, other in zip(BANDS, BANDS[::-1], strict=True):
            for vector in np.eye(N_COEFFICIENTS):
                rows.append({**_columns(name, vector), **_columns(other, nothing)})
                rows.append({**_columns(name, vector), **_columns(other, None)})
        table = pd.DataFrame({"source_id": range(len(rows))}).join(pd.DataFrame(rows))
        found, sampling = calibrate(table, save_file=False)
    if not np.array_equal(sampling, SAMPLING):
        raise ValueError(
            f"gaiaxpy: expected a sampling of 336 to 1020 nm in steps of 2 nm, got {np.asarray(sampling)}; "
            "this version of GaiaXPy is not known to this package"
        )
    flux = np.stack(found["flux"].to_list()).reshape(len(BANDS), N_COEFFICIENTS, 2, SAMPLING.size)
    parts = {name: flux[i, :, 0] for i, name in enumerate(BANDS)}
    return parts | {f"{name} alone": flux[i, :, 1] for i, name in enumerate(BANDS)}


def _columns(band: str, coefficients: Array | None) -> dict[str, object]:
    """A band as the archive's table has it; None is a band that is missing."""
    known = coefficients is not None
    return {
        f"{band}_n_parameters": N_COEFFICIENTS if known else np.nan,
        f"{band}_standard_deviation": 1.0 if known else np.nan,
        f"{band}_coefficients": coefficients,
        f"{band}_coefficient_errors": np.ones(N_COEFFICIENTS) if known else None,
        f"{band}_coefficient_correlations": np.zeros(N_CORRELATIONS) if known else None,
    }
