# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Training range of a model of the published architecture, and flags of stars outside."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HTTPError, LocalEntryNotFoundError

from ..data.schema import valid_pixels
from ..files import ask_twice, complete_file


RANGE_FILE = "training_range.json"


#: A spectrum that covers less of the wavelength range of the training spectra is flagged.
MIN_COVERAGE = 0.95


#: Relative tolerance of the limits (float32 wavelengths, spectra not shifted to the rest frame).
TOLERANCE = 2e-3


Pair = tuple[float, float]


@dataclass(frozen=True)
class TrainingRange:
    """Range of the training spectra; outside of it a prediction is an extrapolation.

    It is saved with the weights in `training_range.json`, for example::

        {"labels": {"teff": [3100.0, 7900.0], "logg": [-0.4, 5.1]},
         "wavelength": [3360.0, 10200.0], "wavelength_step": [20.0, 20.0]}

    or, for a model of several instruments, with a pair for each, such as `[[3360.0, 10200.0], [15152.0, 16960.0]]`.

    Attributes
    ----------
    labels : dict of str to (low, high)
        Least and greatest value of each label among the training stars, in the units of the checkpoint.
    wavelength : (low, high), or one such pair for each instrument
        First and last wavelength of the training spectra, Angstrom, vacuum, rest frame.
    wavelength_step : (low, high), or one such pair for each instrument
        Least and greatest spacing of the pixels of a training spectrum, Angstrom.
    """

    labels: dict[str, Pair] = field(default_factory=dict)
    wavelength: Pair | Sequence[Pair] | None = None
    wavelength_step: Pair | Sequence[Pair] | None = None

    def __post_init__(self) -> None:
        limits = [(f"labels[{name!r}]", pair) for name, pair in self.labels.items()]
        for name in ("wavelength", "wavelength_step"):
            limits += [(name, pair) for pair in _pairs(getattr(self, name))]
        for name, pair in limits:
            if not (len(pair) == 2 and np.all(np.isfinite(pair)) and pair[0] <= pair[1]):
                raise ValueError(f"{name}: expected two numbers, the least first, got {pair}")
        if len({len(_pairs(limits)) for limits in (self.wavelength, self.wavelength_step)} - {0}) > 1:
            raise ValueError(
                "wavelength_step: expected one pair for each of wavelength, got "
                f"{self.wavelength_step} for {self.wavelength}"
            )

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `training_range.json` into the folder of a checkpoint."""
        path = Path(folder, RANGE_FILE)
        with complete_file(path) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, name_or_path: str | os.PathLike[str], revision: str = "main") -> TrainingRange | None:
        """Load the range of a checkpoint (a folder, or a name on the hub at a revision), None if it has none.

        Raises
        ------
        ValueError
            If the file is invalid.
        OSError
            If neither the hub nor its cache knows whether it exists: without it, no star would be flagged.
        """
        path = Path(name_or_path, RANGE_FILE)
        if os.path.isdir(name_or_path):
            if not path.is_file():
                return None
        else:
            found = _on_the_hub(str(name_or_path), revision)
            if found is None:
                return None
            path = Path(found)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            labels = {name: tuple(pair) for name, pair in content.pop("labels").items()}
            return cls(labels, **{name: _as_tuples(limits) for name, limits in content.items()})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            cause = " ".join(str(error).split())
            raise ValueError(f"{path}: expected labels, wavelength and wavelength_step, got {cause}") from error

    def flags(self, row: Mapping[str, Any], values: Mapping[str, float]) -> list[str]:
        """Flags of a star outside the range.

        Parameters
        ----------
        row : mapping
            The spectrum, in the schema of this project.
        values : mapping of str to float
            Predicted labels.

        Returns
        -------
        list of str
            `"teff>6500"` or `"teff<3500"` for a label; `"wavelength"` for a spectrum that has pixels outside the range
            or covers less than 95 percent of it; `"wavelength_step"` for one that is sampled differently. Of several
            instruments, the one that shares most wavelengths with the spectrum is used.
        """
        found = []
        for name, (low, high) in self.labels.items():
            if name in values and values[name] < low:
                found.append(f"{name}<{low:g}")
            elif name in values and values[name] > high:
                found.append(f"{name}>{high:g}")
        wavelength = np.asarray(row["wavelength"], np.float64)[valid_pixels(row)]
        if not wavelength.size:
            return found
        if np.any(wavelength[1:] < wavelength[:-1]):  # checking is faster than sorting
            wavelength = np.sort(wavelength)
        first, last = wavelength[[0, -1]]
        ranges, steps = _pairs(self.wavelength), _pairs(self.wavelength_step)
        shared = [min(last, high) - max(first, low) for low, high in ranges]
        instrument = int(np.argmax(shared)) if shared else 0
        if ranges:
            low, high = ranges[instrument]
            outside = first < low * (1 - TOLERANCE) or last > high * (1 + TOLERANCE)
            if outside or shared[instrument] < MIN_COVERAGE * (high - low):
                found.append("wavelength")
        if wavelength.size > 1 and steps:
            low, high = steps[instrument]
            spacing = np.diff(wavelength)
            # Equivalent to a check of the median, but faster.
            if 2 * max(np.sum(spacing < low * 0.99), np.sum(spacing > high * 1.01)) > spacing.size:
                found.append("wavelength_step")
        return found


def _on_the_hub(name: str, revision: str) -> str | None:
    """Path of the file of a repository, downloaded if it is not cached; None if there is none."""
    try:
        return ask_twice(lambda: hf_hub_download(name, RANGE_FILE, revision=revision))
    except (OSError, HTTPError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        # The hub also caches that a file does not exist.
        if try_to_load_from_cache(name, RANGE_FILE, revision=revision) is _CACHED_NO_EXIST:
            return None
        cause = " ".join(str(error.__cause__ or error).split())[:200]
        raise OSError(
            f"{name}: expected the hub, or its cache, to know whether there is a {RANGE_FILE}, got {cause}"
        ) from error


def _pairs(limits: Pair | Sequence[Pair] | None) -> list[Pair]:
    """One pair, or one for each instrument."""
    if limits is None:
        return []
    return [cast(Pair, limits)] if np.ndim(limits) == 1 else list(cast(Sequence[Pair], limits))


def _as_tuples(values: Any) -> Any:
    return tuple(map(_as_tuples, values)) if isinstance(values, list) else values
