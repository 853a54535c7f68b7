# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
Predict flux and its error at any wavelengths, from labels or from a spectrum of another range.

The bundled emulators make the spectra. The error of a pixel has two parts: the errors of the labels, through the
derivatives of the flux, and the error of the emulator. The latter is estimated by leave-one-out prediction of the stars
of its grid. This needs no synthesis, because leave-one-out predictions of a Gaussian process follow from its weights
(Rasmussen & Williams 2006, section 5.4.2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..checkpoints import demand_evidence
from ..data.schema import PIXEL_COLUMNS
from ..models import SpectraFMForPrediction, SpectraFMTokenizer
from ..models.spectrum_spectrafm import BestFit, best_fits, whole_spectra
from ..synthesis.instruments import Instrument
from ..synthesis.synthetic import ALPHA_ELEMENTS
from .emulated import AS_GIVEN, EmulatedSpectra, Spectra, emulator_for, left_out, with_usual_labels
from .prediction import answered_labels, predict_batches, schema_tokenizer
from .spectrum_files import SpectrumWriter


Array = NDArray[Any]


# ---------------------------------------------------------------------------------------------------------- the way in


class SpectrumPredictor:
    """
    Spectra with errors, from labels or from spectra.

    Parameters
    ----------
    model : SpectraFMForPrediction
        A model on evidence; only needed to predict from spectra.
    tokenizer : SpectraFMTokenizer
    """

    def __init__(self, model: SpectraFMForPrediction | None = None, tokenizer: SpectraFMTokenizer | None = None):
        self.model, self.tokenizer = model, tokenizer
        self._kept: dict[Any, EmulatedSpectra] = {}

    def from_labels(
        self,
        labels: Mapping[str, ArrayLike],
        errors: Mapping[str, ArrayLike] | None = None,
        *,
        wavelength: ArrayLike | Instrument,
        resolving_power: float | None = None,
        normalised: bool = True,
    ) -> Spectra:
        """
        Parameters
        ----------
        labels : mapping of str to float or array of shape (stars,)
            `teff`, `logg`, `fe_h`, and any other of the emulator, or `alpha_m`. Abundances left out are those of the
            Sun over iron; with `errors`, they are those of usual stars.
        errors : mapping of str to float or array of shape (stars,), optional
            One sigma of the labels; labels that are left out then have errors too.
        wavelength, resolving_power, normalised
            See [`EmulatedSpectra`].
        """
        stated = {name: np.atleast_1d(np.asarray(values, np.float64)) for name, values in labels.items()}
        emulated = self._emulated(wavelength, resolving_power, normalised)
        known = [*emulated.emulator.config.label_names, "alpha_m"]
        for field, names in (("labels", stated), ("errors", errors or {})):  # first, as one may be a typo
            if unknown := [name for name in names if name not in known]:
                raise ValueError(f"{field}: expected names out of {', '.join(known)}, got {', '.join(unknown)}")
        if missing := [name for name in ("teff", "logg", "fe_h") if name not in stated]:
            raise ValueError(f"labels: expected at least teff, logg and fe_h, got none for {', '.join(missing)}")
        if errors is None:
            alpha = stated.pop("alpha_m", None)
            if alpha is not None:
                stated = {**dict.fromkeys(ALPHA_ELEMENTS, alpha), **stated}
            return emulated(stated)
        n_stars = max(map(len, stated.values()))
        stated = {name: np.broadcast_to(values, (n_stars,)) for name, values in stated.items()}
        return emulated(*with_usual_labels(emulated.emulator, stated, errors))

    def from_spectra(
        self,
        rows: Sequence[Mapping[str, Any]],
        *,
        wavelength: ArrayLike | Instrument | None = None,
        resolving_power: float | None = None,
    ) -> Spectra:
        """
        The most likely flux of stars from a part of their spectra.

        Within the range of the instrument, unobserved parts are filled in and observed ones are denoised. Elsewhere it
        is the spectrum for the predicted labels, with their errors.

        Parameters
        ----------
        rows : sequence of rows
            Spectra in the schema of this project that share their wavelengths.
        wavelength, resolving_power
            See [`EmulatedSpectra`]; by default those of the rows, the pixels that are masked among them.
        """
        if self.model is None or self.tokenizer is None or self.tokenizer.basis is None:
            raise ValueError("model: expected a checkpoint on evidence to predict from spectra, got none")
        if not isinstance(wavelength, Instrument):
            grids = _grids(self.tokenizer, rows)
            if len(grids) != 1:
                raise ValueError(f"rows: expected spectra that share their wavelengths, got {len(grids)} grids")
            basis = self.tokenizer.basis
            _, rung = grids[0].rung_of(basis)
            low, high = rung.range
            own = np.unique(np.asarray(rows[0]["wavelength"], np.float64))
            wanted = own[(own >= low) & (own <= high)] if wavelength is None else np.asarray(wavelength, np.float64)
            if low <= wanted.min() and wanted.max() <= high:
                (known,) = whole_spectra(self.model, basis, grids)
                power = resolving_power or grids[0].resolving_power
                return Spectra(wanted, *known.at(wanted, power), power, AS_GIVEN)
            wavelength = wanted
        labels, errors = self._labels(rows)
        # Abundances and microturbulences just outside the grid are clipped to its limit.
        emulator = self._emulated(wavelength, resolving_power, True).emulator
        for name, low, high in zip(emulator.config.label_names, *emulator._range(), strict=True):
            if name in labels and name not in ("teff", "logg", "fe_h"):
                labels[name] = np.clip(labels[name], low, high)
        return self.from_labels(labels, errors, wavelength=wavelength, resolving_power=resolving_power)

    def _labels(self, rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Array], dict[str, Array]]:
        assert self.model is not None and self.tokenizer is not None
        names = answered_labels(self.model, self.tokenizer, rows[0])
        (found,) = predict_batches(self.model, self.tokenizer, [list(rows)], names)
        if bad := [str(reason) for reason in found["reason"] if reason]:
            raise ValueError(f"rows: expected spectra whose labels can be predicted, got one with: {bad[0]}")
        values, errors = ({name: found[name + end].astype(float) for name in names} for end in ("", "_err"))
        if set(ALPHA_ELEMENTS) <= set(values):
            values.pop("alpha_m", None)
        return values, errors

    def _emulated(self, wavelength: ArrayLike | Instrument, power: float | None, normalised: bool) -> EmulatedSpectra:
        own = wavelength.name if isinstance(wavelength, Instrument) else np.asarray(wavelength, np.float64).tobytes()
        key = own, power, normalised
        if key not in self._kept:
            name = emulator_for(wavelength)
            self._kept[key] = EmulatedSpectra(name, wavelength, power, normalised=normalised)
        return self._kept[key]


def best_fit(model: SpectraFMForPrediction, tokenizer: SpectraFMTokenizer, row: Mapping[str, Any]) -> BestFit:
    """
    The best fit of the star model to a spectrum, with the residual.

    Parameters
    ----------
    model, tokenizer
        On evidence.
    row : row
        In the schema of this project.
    """
    demand_evidence(tokenizer, "fit a spectrum")
    (fit,) = best_fits(model, tokenizer.basis, _grids(tokenizer, [row]))  # type: ignore[arg-type]  # it has one
    return fit


def _grids(tokenizer: SpectraFMTokenizer, rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Evidence of the rows, by grid."""
    settings: dict[str, Any] = {name: [row.get(name) for row in rows] for name in ("resolving_power", "normalised")}
    pixels = [{name: row[name] for name in PIXEL_COLUMNS} for row in rows]
    return schema_tokenizer(tokenizer)(pixels, **settings, return_grids=True)["grids"]


__all__ = [
    "EmulatedSpectra",
    "Spectra",
    "SpectrumPredictor",
    "SpectrumWriter",
    "best_fit",
    "emulator_for",
    "left_out",
    "with_usual_labels",
]
