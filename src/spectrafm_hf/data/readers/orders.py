# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Several spectra in one file: orders or arms of one star, or stars side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from .base import Row


#: Neighbouring echelle orders overlap by at most about half; spectra of two stars or exposures nearly completely.
SHARED = 0.7


def are_orders(wavelengths: Sequence[np.ndarray]) -> bool:
    """Whether neighbouring spectra cover different wavelengths, as orders and arms do."""
    real = [wavelength[np.isfinite(wavelength) & (wavelength > 0)] for wavelength in wavelengths]
    if len(real) < 2 or any(part.size < 2 for part in real):
        return False
    spans = sorted((float(part.min()), float(part.max())) for part in real)
    beside = [
        min(high, end) - start <= SHARED * min(high - low, end - start)
        for (low, high), (start, end) in zip(spans, spans[1:], strict=False)
    ]
    # Tolerates an order that was extracted twice.
    return sum(beside) >= 0.8 * len(beside)


def as_one_or_each(rows: Sequence[Row], stem: str) -> Iterator[Row]:
    """
    Rows of a file without identifiers: joined if they are orders of one star, else one star each. The identifier is
    `stem`, with the number of the row if there are several stars.
    """
    if len(rows) < 2:
        yield from ({**row, "object_id": stem} for row in rows)
        return
    if not are_orders([np.asarray(row["wavelength"], np.float64) for row in rows]):
        for i, row in enumerate(rows):
            yield {**row, "object_id": f"{stem}:{i}"}
        return
    keys = [
        key for key in ("wavelength", "flux", "flux_error", "mask") if any(row.get(key) is not None for row in rows)
    ]
    parts = {key: [_pixels(row, key) for row in rows] for key in keys}
    # Overlaps are kept: the tokenizer splits the spectrum there.
    yield {**rows[0], **{key: np.concatenate(values) for key, values in parts.items()}, "object_id": stem}


def _pixels(row: Row, key: str) -> np.ndarray:
    if row.get(key) is not None:
        return np.asarray(row[key])
    size = np.shape(row["flux"])
    return np.zeros(size, bool) if key == "mask" else np.full(size, np.nan)
