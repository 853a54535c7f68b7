# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""What the page of `spectrafm app` computes: labels of spectra, explanations, best fits and similar stars."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import os
import re
import shutil
import tempfile
import threading
import weakref
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checkpoints import BASE_CHECKPOINT, demand_evidence, load_checkpoint
from ..data.readers import Row, read_spectra
from ..data.readers.base import OpenFile
from ..data.readers.parquet import columns_of
from ..data.schema import valid_pixels
from ..files import DEMO_STARS
from ..inference.explain import Explainer, Explanation
from ..inference.prediction import FLAG_SEPARATOR, answered_labels, batches_of, predict_batches
from ..inference.similar import Embedder, Embeddings, neighbours, read_embeddings
from ..inference.spectrum import best_fit
from ..inference.tables import PredictionWriter
from ..inference.training_range import TrainingRange
from ..inference.velocities import settled
from ..models import SpectraFMForPrediction, SpectraFMTokenizer
from ..models.spectrum_spectrafm import BestFit
from ..synthesis.synthetic import SyntheticStars
from .spectra import flux_label


#: Limits of an upload: larger files and longer spectra are refused; of more spectra the first are used.
MAX_MEGABYTES, MAX_SPECTRA, MAX_PIXELS = 25, 100, 100_000
#: Limit of a file after decompression.
MAX_UNPACKED_MEGABYTES = 250
NEIGHBOURS = 5
#: Number of synthetic comparison stars in the H band, where the package has no observed ones.
SYNTHETIC_STARS = 250

#: Stars of `gaia_xp_demo.parquet`, and label ranges of synthetic stars.
OBSERVED = {
    "Sun-like dwarf, Gaia XP": "1036287544515598080",
    "Metal-poor giant, Gaia XP": "4077494242701948160",
    "Metal-rich giant, Gaia XP": "2127823800279925760",
    "M dwarf, Gaia XP": "1535227577395366400",
}
_SYNTHETIC = {
    "Red-clump giant, synthetic APOGEE": {"teff": (4700.0, 4900.0), "logg": (2.3, 2.6), "fe_h": (-0.3, 0.1)},
    "Sun-like dwarf, synthetic APOGEE": {"teff": (5650.0, 5850.0), "logg": (4.3, 4.5), "fe_h": (-0.2, 0.2)},
}
EXAMPLES = (*OBSERVED, *_SYNTHETIC)
#: Bundled stars with known labels: description and reader.
_KNOWN: dict[str, Callable[[], Iterator[Row]]] = {
    "stars with Gaia XP spectra that no model was trained on, and their APOGEE DR17 labels": lambda: read_spectra(
        [DEMO_STARS]
    ),
    "synthetic APOGEE stars and the labels that they were made with": lambda: islice(
        SyntheticStars("apogee"), SYNTHETIC_STARS
    ),
}


@dataclass(frozen=True)
class KnownStars:
    """Comparison stars and their description."""

    what: str
    embeddings: Embeddings


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint as the page uses it.

    Attributes
    ----------
    name : str
    model, tokenizer
    training_range : TrainingRange or None
    known : KnownStars or None
        Comparison stars of `--known`.
    """

    name: str
    model: SpectraFMForPrediction
    tokenizer: SpectraFMTokenizer
    training_range: TrainingRange | None
    known: KnownStars | None = None

    @property
    def labels(self) -> list[str]:
        """All labels that the model predicts."""
        return list(self.tokenizer.requests or self.tokenizer.label_names)

    @property
    def units(self) -> dict[str, str]:
        config = self.model.config
        return dict(zip(config.label_names, config.label_units, strict=True))

    def answered(self, row: Row | None) -> tuple[str, ...]:
        """The labels that are predicted for a spectrum; for None, those of any spectrum."""
        return tuple(answered_labels(self.model, self.tokenizer, row))


@dataclass(eq=False)
class Reading:
    """The spectra of a file and their predictions.

    Attributes
    ----------
    rows : list of dict
        In the schema of this project, at most `MAX_SPECTRA`.
    more : bool
        Whether the file holds more.
    loaded : LoadedModel
    prediction : dict of arrays of shape (stars,)
        As `spectrafm predict` writes it; labels that are not predicted for a spectrum are NaN.
    table : Path
        The same as CSV, deleted with this object.
    flux_label : str
        Label of the flux axis.
    """

    rows: list[Row]
    more: bool
    loaded: LoadedModel
    prediction: dict[str, Any]
    table: Path
    flux_label: str
    _explained: dict[int, Explanation] = field(default_factory=dict, repr=False)
    _fits: dict[int, BestFit] = field(default_factory=dict, repr=False)

    def labels(self, i: int) -> list[str]:
        """The labels predicted for a spectrum."""
        names = self.loaded.answered(self.rows[i])
        return [name for name in names if np.isfinite(self.prediction[name][i])]

    def flags(self, i: int) -> list[str]:
        return [flag for flag in str(self.prediction["flags"][i]).split(FLAG_SEPARATOR) if flag]

    def why_not(self, i: int) -> str:
        """Why a spectrum has no labels; empty if it has."""
        return "" if self.known(i) else str(self.prediction["reason"][i])

    def known(self, i: int) -> bool:
        return any(np.isfinite(self.prediction[name][i]) for name in self.loaded.labels if name in self.prediction)


class Workbench:
    """Reads spectra, predicts and explains, one visitor at a time; the model is loaded at first use.

    Parameters
    ----------
    model : str, optional
        A bundled checkpoint, a folder, or a name on the hub. Default: `spectrafm-base`.
    known : path, optional
        Comparison stars: a file of `spectrafm embed` with the same model. Default: bundled stars, in the H band
        synthetic ones.

    Raises
    ------
    ValueError
        For a missing model, or a file that `spectrafm embed` did not write with this model.
    """

    def __init__(self, model: str | None = None, known: str | os.PathLike[str] | None = None) -> None:
        self.model, self.known = model or BASE_CHECKPOINT, known
        self._loaded: LoadedModel | None = None
        self._known: dict[str, KnownStars | None] = {}
        self._examples: dict[str, Reading] = {}
        self._lock = threading.RLock()
        if model is not None or known is not None:
            self.load()

    def load(self) -> LoadedModel:
        """The checkpoint, loaded once."""
        with self._lock:
            if self._loaded is None:
                model, tokenizer = load_checkpoint(self.model)
                demand_evidence(tokenizer, "show in the app")
                known = None
                if self.known is not None:
                    found = None
                    with contextlib.suppress(ValueError):  # of another model
                        found = read_embeddings(self.known, model)
                    if found is None:
                        raise ValueError(
                            f"known: expected a file of `spectrafm embed` with {self.model}, got "
                            f"{os.fspath(self.known)}"
                        )
                    known = KnownStars(f"the {len(found.object_id):,} stars of {Path(self.known).name}", found)
                if torch.cuda.is_available():
                    model.cuda()  # type: ignore[call-arg]  # transformers wraps it without its types
                training_range = TrainingRange.load(str(model.name_or_path))
                self._loaded = LoadedModel(Path(self.model).name, model, tokenizer, training_range, known)
            return self._loaded

    def known_stars(self, row: Row) -> KnownStars | None:
        """Comparison stars with the wavelength range of a spectrum; None if there are none."""
        loaded = self.load()
        if loaded.known is not None:
            return loaded.known
        low, high = _limits(row)
        for what, stars in _KNOWN.items():
            with self._lock:
                first, last = _limits(next(iter(stars())))
                if min(high, last) - max(low, first) > 0.5 * max(high - low, last - first):
                    if what not in self._known:
                        self._known[what] = _embedded(loaded, what, stars)
                    return self._known[what]
        return None

    def example(self, name: str) -> Reading:
        """One of the `EXAMPLES`, computed once."""
        with self._lock:
            if name not in self._examples:
                if name in OBSERVED:
                    rows = [row for row in read_spectra([DEMO_STARS]) if row["object_id"] == OBSERVED[name]]
                else:
                    rows = list(islice(SyntheticStars("apogee", seed=1, label_ranges=_SYNTHETIC[name]), 1))
                    rows[0]["object_id"] = name
                self._examples[name] = self.predict(rows, more=False)
            return self._examples[name]

    def rows(self, path: str | os.PathLike[str], **reading: Any) -> tuple[list[Row], bool]:
        """
        The first spectra of a file in any supported format, and whether it holds more.

        Parameters
        ----------
        path : path
        reading
            Arguments of `read_spectra`, such as `wavelength_unit`, `radial_velocity` and `columns`.

        Raises
        ------
        ValueError
            Why the file or its spectra cannot be used, in words for the visitor.
        """
        path = Path(path)
        try:
            _check_size(path)
            rows: list[Row] = []
            for row in islice(read_spectra([path], keep_refused=True, **reading), MAX_SPECTRA + 1):
                if np.size(row["flux"]) > MAX_PIXELS:
                    raise ValueError(
                        f"expected spectra of at most {MAX_PIXELS:,} pixels, got one of {np.size(row['flux']):,}"
                    )
                rows.append(row)
        except ValueError as error:
            raise ValueError(_for_visitors(str(error), path)) from error
        return rows[:MAX_SPECTRA], len(rows) > MAX_SPECTRA

    def read(self, path: str | os.PathLike[str], **reading: Any) -> Reading:
        """Predict the labels of the spectra of a file; see [`Workbench.rows`]."""
        rows, more = self.rows(path, **reading)
        return self.predict(rows, more=more)

    def predict(self, rows: list[Row], *, more: bool) -> Reading:
        """
        Labels of spectra, as `spectrafm predict` writes them.

        Raises
        ------
        ValueError
            Why the spectrum cannot be used, if there is only one.
        """
        loaded = self.load()
        rows = list(settled(rows, loaded.model, loaded.tokenizer))
        wanted = [() if row.get("refused") else loaded.answered(row) for row in rows]
        found = {name for own in wanted for name in own} or set(loaded.answered(None))
        names = [name for name in loaded.labels if name in found]
        parts: list[dict[str, Any]] = []
        with self._lock:
            for own, group in itertools.groupby(zip(wanted, rows, strict=True), key=lambda pair: pair[0]):
                batches = batches_of((row for _, row in group), loaded.tokenizer)
                parts += predict_batches(loaded.model, loaded.tokenizer, batches, own or names, loaded.training_range)
        for part in parts:
            unknown = np.full(len(part["object_id"]), np.nan, np.float32)
            part |= {column: unknown for name in names for column in (name, f"{name}_err") if column not in part}
        prediction = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        folder = tempfile.mkdtemp(prefix="spectrafm-app-")
        # Spectra without a file are synthetic, divided by the continuum.
        flux = flux_label(rows[0]["file"]) if "file" in rows[0] else "Flux / continuum"
        reading = Reading(rows, more, loaded, prediction, Path(folder, "labels.csv"), flux)
        weakref.finalize(reading, shutil.rmtree, folder, ignore_errors=True)
        with PredictionWriter(reading.table, names, loaded.units) as writer:
            writer.write(prediction)
        if len(rows) == 1 and (why := reading.why_not(0)):
            raise ValueError(why)
        return reading

    def explain(self, reading: Reading, i: int) -> Explanation:
        """
        The explanation of the labels of a spectrum, computed once.

        Raises
        ------
        ValueError
            Why the labels cannot be explained.
        """
        with self._lock:
            if i not in reading._explained:
                explainer = Explainer(reading.loaded.model, reading.loaded.tokenizer, reading.labels(i))
                if why := explainer.add([reading.rows[i]]):
                    raise ValueError(why[0])
                reading._explained[i] = explainer.explanations()["all"]
            return reading._explained[i]

    def fit(self, reading: Reading, i: int) -> BestFit:
        """The best-fit star of a spectrum, computed once."""
        with self._lock:
            if i not in reading._fits:
                reading._fits[i] = best_fit(reading.loaded.model, reading.loaded.tokenizer, reading.rows[i])
            return reading._fits[i]

    def nearest(self, reading: Reading, i: int) -> tuple[str, list[tuple[str, float, Mapping[str, float]]]]:
        """
        The most similar of the known stars.

        Returns
        -------
        what : str
            Description of the comparison stars; "" without any.
        stars : list of (name, similarity, labels)
        """
        known = self.known_stars(reading.rows[i])
        if known is None:
            return "", []
        with self._lock:
            vector, why = Embedder(reading.loaded.model, reading.loaded.tokenizer)([reading.rows[i]])
        if why or vector.range != known.embeddings.range:
            return "", []
        index, similarity = neighbours(vector, known.embeddings, NEIGHBOURS)
        stars = known.embeddings
        names = [name for name in reading.labels(i) if name in stars.labels]
        return known.what, [
            (stars.object_id[star], float(cosine), {name: float(stars.labels[name][star]) for name in names})
            for star, cosine in zip(index[0], similarity[0], strict=True)
            if star >= 0
        ]


def _limits(row: Row) -> tuple[float, float]:
    """First and last valid wavelength."""
    wavelength = np.asarray(row["wavelength"], np.float64)[valid_pixels(row)]
    return float(np.min(wavelength)), float(np.max(wavelength))


def _embedded(loaded: LoadedModel, what: str, stars: Callable[[], Iterator[Row]]) -> KnownStars | None:
    """Known stars; None where the model was not trained for such spectra."""
    rows = list(stars())
    trained = loaded.training_range and loaded.training_range.wavelength
    first, last = _limits(rows[0])
    if not trained or not any(
        min(last, high) - max(first, low) > 0.9 * (high - low) for low, high in np.atleast_2d(np.asarray(trained))
    ):
        return None
    embedder = Embedder(loaded.model, loaded.tokenizer)
    parts = [embedder(rows[k : k + 32])[0] for k in range(0, len(rows), 32)]
    return KnownStars(f"{len(rows)} {what}", Embeddings.join(parts))


def _for_visitors(message: str, path: Path) -> str:
    """A message of the package for somebody who sees the page, and not where the server keeps the file."""
    message = message.removeprefix(f"{path}: ").replace(str(path), path.name)

    def pairs(match: re.Match[str]) -> str:
        return ",".join(f"{role}={name}" for role, name in re.findall(r"'(\w+)': '([^']*)'", match[0]))

    message = re.sub(r"columns=\{[^}]*\}", lambda match: f"{pairs(match)} under “Columns”", message)
    return message.replace("; give them with grid=WAVELENGTHS", "; put them into the file")


def _decoded_size(column: Any) -> int:
    """Bytes of a column chunk of Parquet once its values are not encoded: a dictionary makes millions of them small."""
    width = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4}.get(column.physical_type, 8)
    return int(max(column.total_uncompressed_size, column.num_values * width))


def _check_size(path: Path) -> None:
    """Refuse a file that is too large, or would be when unpacked, before anything reads it."""
    limit = MAX_MEGABYTES * 1_000_000
    if path.stat().st_size > limit:
        raise ValueError(f"expected at most {MAX_MEGABYTES} MB, got {path.stat().st_size / 1e6:.0f} MB")
    unpacked, most = 0, MAX_UNPACKED_MEGABYTES * 1_000_000
    with path.open("rb") as stream:
        start = stream.read(4)
    try:
        if start.startswith(b"\x1f\x8b"):
            with gzip.open(path) as content:
                while unpacked <= most and (block := content.read(1_000_000)):
                    unpacked += len(block)
        elif start == b"PK\x03\x04":
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(member.file_size for member in archive.infolist())
        elif start == b"PAR1":
            with OpenFile(path) as file:
                unpacked = sum(map(_decoded_size, columns_of(file.parquet)))
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile):
        return  # the reader says what is wrong with it
    if unpacked > most:
        raise ValueError(f"expected at most {MAX_UNPACKED_MEGABYTES} MB when unpacked, got more")
