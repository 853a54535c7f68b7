# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Synthetic stars: labels drawn, spectra from an emulator, observed with an instrument.

As a data set on disk ([`build_synthetic`]) in the schema of the observed ones, so that a training recipe changes from
synthetic to observed stars by a name, or as an endless stream ([`SyntheticStars`]) for training without a disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Iterator, Mapping
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from ..checkpoints import REPLACED, _quiet, bundled, bundled_names
from ..data.building import SPLITS
from ..data.schema import spectrum_features
from ..models import SpectrumEmulator, SpectrumEmulatorConfig
from .binned import emulator_for
from .instruments import Instrument
from .labels import LABEL_NAMES, draw_labels, draw_optical_labels


#: Elements whose mean [X/Fe] is `alpha_m`: with Fe standing for M, as in the atmospheres.
ALPHA_ELEMENTS = ("o_fe", "mg_fe", "si_fe", "ca_fe", "ti_fe")
LABELS = (*LABEL_NAMES, "alpha_m")
BATCH = 250  # stars made at once: what fits a processor's cache


def load_emulator(emulator: str | os.PathLike[str] | SpectrumEmulator) -> SpectrumEmulator:
    """
    An emulator by the name of a bundled one or by its folder; one that is loaded is returned as it is.

    Raises
    ------
    ValueError
        If there is none of that name.
    """
    if isinstance(emulator, SpectrumEmulator):
        return emulator
    known = bundled_names(SpectrumEmulatorConfig.model_type)
    named = emulator in known or REPLACED.get(str(emulator)) in known
    if not named and not os.path.isdir(emulator):
        raise ValueError(f"emulator: expected one of {known} or a folder, got {os.fspath(emulator)!r}")
    with _quiet():
        return SpectrumEmulator.from_pretrained(bundled(str(emulator)) if named else emulator)


class _Stars:
    """Draws labels and makes the spectra of the stars, as columns of the schema."""

    def __init__(
        self,
        instrument: str | os.PathLike[str] | Instrument,
        emulator: str | os.PathLike[str] | SpectrumEmulator | None = None,
        label_ranges: Mapping[str, tuple[float, float]] | None = None,
    ):
        self.instrument = instrument if isinstance(instrument, Instrument) else Instrument.load(instrument)
        loaded = load_emulator(emulator or self.instrument.emulator)
        self._weights = weights_digest(loaded)
        self.emulator, self.wavelength_range = emulator_for(loaded, self.instrument)
        config = self.emulator.config
        limits = zip(config.label_minimum, config.label_maximum, strict=True)
        self.ranges = dict(zip(config.label_names, limits, strict=True))
        for name, (low, high) in (label_ranges or {}).items():
            if name not in self.ranges:
                raise ValueError(f"label_ranges: expected labels out of {list(self.ranges)}, got {name!r}")
            lowest, highest = self.ranges[name]
            if not lowest <= low < high <= highest:
                raise ValueError(f"{name}: expected a range within {lowest:g} to {highest:g}, got {low:g} to {high:g}")
            self.ranges[name] = (low, high)
        self.resolving_power = config.resolving_power or None
        scalars = ("ak_targ",) if self.instrument.extinction else ()
        self.features = spectrum_features(LABELS, scalars)
        self.survey = f"synthetic-{self.instrument.name}"
        # An instrument that does not fit the emulator is an error here, before anything is written.
        self.native, _ = self._synthesize(self._labels(1, np.random.default_rng(0)))
        self.instrument.response(self.native, self.resolving_power)

    def _labels(self, n: int, generator: np.random.Generator) -> dict[str, NDArray[np.float32]]:
        """Labels that the emulator covers, rounded as they are stored."""
        inner = {}  # rounding must not take them out of the range
        for name, (low, high) in self.ranges.items():
            inner[name] = (low + 1e-6 * (high - low), high - 1e-6 * (high - low))
        names, kept = list(self.emulator.config.label_names), np.empty((0, len(self.ranges)), np.float32)
        low, high = np.array([inner[name] for name in names]).T

        def within(stars: Mapping[str, NDArray[np.float64]]) -> NDArray[np.bool_]:
            table = np.stack([stars[name] for name in names], axis=1).astype(np.float32).astype(np.float64)
            return np.all((table >= low) & (table <= high), axis=1) & self.emulator.covers(table)

        if set(names) > set(LABEL_NAMES):
            return {
                name: values.astype(np.float32) for name, values in draw_optical_labels(n, generator, within).items()
            }
        for _ in range(100):
            drawn = draw_labels(n - len(kept) + 10, generator, inner)
            table = np.stack([drawn[name] for name in names], axis=1).astype(np.float32)
            kept = np.concatenate([kept, table[self.emulator.covers(table.astype(np.float64))]])
            if len(kept) >= n:
                return dict(zip(names, kept[:n].T.copy(), strict=True))
        raise ValueError(f"label_ranges: expected some in which the emulator covers stars, got {self.ranges}")

    def _synthesize(self, labels: Mapping[str, NDArray[np.float32]]) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        normalized = True if self.instrument.normalisation == "continuum" else None
        return self.emulator.synthesize(
            normalized=normalized, wavelength_range=self.wavelength_range, **dict[str, Any](labels)
        )

    def draw(self, n: int, generator: np.random.Generator) -> dict[str, NDArray[Any]]:
        """Columns of `n` stars but for identifiers, and `clean`, the flux without noise."""
        labels = self._labels(n, generator)
        wavelength, flux = self._synthesize(labels)
        while (failed := without_flux(flux)).any():
            again = self._labels(int(failed.sum()), generator)
            for name, values in again.items():
                labels[name][failed] = values
            flux[failed] = self._synthesize(again)[1]
        columns = self.instrument.apply(wavelength, flux, generator, self.resolving_power)
        return self.labelled(columns, labels)

    @staticmethod
    def labelled(columns: dict[str, NDArray[Any]], labels: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The observed columns with the labels of the stars, which are exact."""
        alpha: NDArray[Any] = np.asarray(np.mean([labels[name] for name in ALPHA_ELEMENTS], axis=0, dtype=np.float32))
        errors: dict[str, NDArray[Any]] = {f"{name}_err": np.zeros(len(alpha), np.float32) for name in LABELS}
        wavelength = np.broadcast_to(columns["wavelength"], columns["flux"].shape)
        known = {name: labels[name] for name in LABEL_NAMES}  # an emulator may have more, such as of the optical
        return columns | known | {"alpha_m": alpha} | errors | {"wavelength": wavelength}

    # On the way to another process torch would move the weights into shared memory; doing so for several processes
    # crashes now and then. A copy for each is a few MB.

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "emulator": pickle.dumps(self.emulator)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = {**state, "emulator": pickle.loads(state["emulator"])}

    def fingerprint(self) -> str:
        """Changes with the weights of the emulator, and with anything in the instrument."""
        return hashlib.sha256(f"{json.dumps(self.instrument.settings)}{self._weights}".encode()).hexdigest()


def weights_digest(emulator: SpectrumEmulator) -> str:
    """SHA-256 of the weights of an emulator."""
    digest = hashlib.sha256()
    for name, tensor in sorted(emulator.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def without_flux(flux: NDArray[Any]) -> NDArray[np.bool_]:
    """
    Which spectra (stars, pixels) are not positive in a quarter of their pixels or more. The emulator of the optical
    gives such spectra for one in a hundred stars, all of them giants below 3,400 K; they are drawn again.
    """
    return np.mean(flux > 0, axis=1) < 0.75


# ------------------------------------------------------------------------------------------------------- without a disk


class SyntheticStars(IterableDataset):
    """
    Synthetic stars without end, as rows of the schema, for training without a disk.

    The stars come in blocks, and block k of a seed is always the same: with several workers of a `DataLoader`, and
    several processes of `torch.distributed`, each makes its share of the blocks, so that no star is repeated.

    Parameters
    ----------
    instrument : str, path or Instrument
        See [`Instrument.load`].
    emulator : str, path or SpectrumEmulator, optional
        Default: the one that the instrument names.
    seed : int
    label_ranges : mapping of label to (lowest, highest), optional
        Narrower than the range of the emulator.

    Yields
    ------
    dict
        Wavelength, flux, flux_error, mask: arrays; the other columns of the schema: texts and numbers. Numbers are not
        rounded, as they are in files.

    Notes
    -----
    An iteration continues where the previous one ended. `state_dict` and `load_state_dict` keep that place, to the
    block; in a `DataLoader` with workers, each has a place of its own, which torchdata's `StatefulDataLoader` keeps.
    """

    def __init__(
        self,
        instrument: str | os.PathLike[str] | Instrument,
        emulator: str | os.PathLike[str] | SpectrumEmulator | None = None,
        seed: int = 0,
        label_ranges: Mapping[str, tuple[float, float]] | None = None,
    ):
        check_seed(seed)
        self.seed = seed
        self._stars = _Stars(instrument, emulator, label_ranges)
        self._turn = 0  # blocks that this worker has made

    @property
    def features(self) -> datasets.Features:
        return self._stars.features

    def draw(self, n: int, generator: np.random.Generator) -> dict[str, NDArray[Any]]:
        """Columns of `n` stars, outside the stream, drawn with `generator`."""
        return self._stars.draw(n, generator)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank, ranks = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
        place, places = (worker.id, worker.num_workers) if worker else (0, 1)
        while True:
            block = (self._turn * ranks + rank) * places + place
            self._turn += 1
            columns = self._stars.draw(BATCH, np.random.default_rng([self.seed, len(SPLITS), block]))
            names = [name for name in self.features if name in columns]
            for i in range(BATCH):
                row = {name: columns[name][i] for name in names}
                yield {
                    "object_id": f"{self._stars.survey}-{self.seed}-{block}-{i}",
                    "survey": self._stars.survey,
                    **row,
                }

    def state_dict(self) -> dict[str, int]:
        return {"seed": self.seed, "turn": self._turn}

    def load_state_dict(self, state: Mapping[str, int]):
        """Resume after the block that was begun when `state` was taken."""
        if state["seed"] != self.seed:
            raise ValueError(f"state: expected one of seed {self.seed}, got seed {state['seed']}")
        self._turn = state["turn"]


def check_seed(seed: int) -> None:
    if seed < 0:
        raise ValueError(f"seed: expected at least 0, got {seed}")
