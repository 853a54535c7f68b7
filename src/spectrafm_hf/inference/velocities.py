# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Shift spectra to the rest frame by velocities measured from their lines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from ..models import SpectraFMForPrediction, SpectraFMTokenizer
from ..models.basis_spectrafm import SpectrumBasis
from ..models.gate_spectrafm import FRAME_UNSTATED
from ..models.velocity_spectrafm import VelocityMeter, measured, moved_to_rest, settled_row


#: Columns of measured velocities.
VELOCITY, VELOCITY_UNIT = "radial_velocity", "km/s"


#: Velocity meter of each model: it caches templates for all files and shards.
_METERS: WeakKeyDictionary[SpectraFMForPrediction, VelocityMeter] = WeakKeyDictionary()


def _meter(basis: SpectrumBasis, model: SpectraFMForPrediction) -> VelocityMeter:
    meter = _METERS.get(model)
    if meter is None or meter.basis is not basis:
        meter = _METERS[model] = VelocityMeter(basis, model)
    return meter


def at_measured_velocities(
    rows: Iterable[dict[str, Any]], model: SpectraFMForPrediction, tokenizer: SpectraFMTokenizer
) -> Iterator[dict[str, Any]]:
    """
    Shift rows whose `rest_frame` is not True to the rest frame, by the velocity measured from their lines.

    Yields
    ------
    dict
        Rows with `radial_velocity` and `radial_velocity_err` (km/s) if it was measured, with the reason in `refused` if
        it is not significant.

    Raises
    ------
    ValueError
        For a model that is not on evidence.
    """
    if tokenizer.basis is None:
        raise ValueError("radial_velocity: expected a model on evidence to measure it with, such as spectrafm-base")
    meter = _meter(tokenizer.basis, model)
    for row in rows:
        if row.get("refused") or row.get("rest_frame") is True:
            yield {**row, VELOCITY: np.nan}  # the velocity of a survey was not measured here
            continue
        found = measured(meter, row)
        if found.cause:
            yield {**row, "refused": found.cause, VELOCITY: np.nan}
            continue
        flags = [flag for flag in row.get("flags", ()) if flag != FRAME_UNSTATED]
        yield moved_to_rest(row, found.value, flags) | {VELOCITY: found.value, f"{VELOCITY}_err": found.error}


def settled(
    rows: Iterable[dict[str, Any]], model: SpectraFMForPrediction, tokenizer: SpectraFMTokenizer
) -> Iterator[dict[str, Any]]:
    """
    Shift rows without a stated frame or medium to the rest frame, by the velocity of their lines, if it is significant.

    Otherwise they would be assumed to be at rest and in vacuum. Wavelengths in air would then be off by 83 km/s, which
    changes temperatures by thousands of kelvin. A shifted row has the flag `medium_measured` or `velocity_measured`;
    one without a significant velocity keeps the flags `medium_unstated` and `frame_unstated`.

    Yields
    ------
    dict
    """
    meter = None if tokenizer.basis is None else _meter(tokenizer.basis, model)
    for row in rows:
        yield row if meter is None else settled_row(meter, row)  # type: ignore[misc]


def velocity_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, NDArray[np.float32]]:
    """Columns of the velocities found by [`at_measured_velocities`], for a table."""
    names = (VELOCITY, f"{VELOCITY}_err")
    return {name: np.array([row.get(name, np.nan) for row in rows], np.float32) for name in names}
