# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""A page in the browser: the labels of a spectrum, what the model looks at in it, and the known stars most like it.

`spectrafm app` and a Space of the Hugging Face hub show the same page. [`Workbench`] does what is computed, and knows
nothing of pages; below it stands what becomes HTML, and the page itself, which Gradio (the extra `app`) serves. Nothing
is sent anywhere: no telemetry, no fonts from elsewhere.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import html
import io
import os
import shutil
import socket
import sys
import tempfile
import threading
import traceback
import weakref
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .checkpoints import (
    APOGEE_CHECKPOINT,
    DEFAULT_CHECKPOINT,
    demand_pixels,
    load_checkpoint,
    suitable_checkpoint,
)
from .data.readers import Row, formats, read_spectra
from .data.readers.base import OpenFile
from .data.readers.parquet import columns_of
from .data.synthetic import SyntheticStars
from .explain import ALL_LABELS, COARSE_STEP, TOLERANCE, Explainer, Explanation, line_list, peaks_of
from .models import SpectraFMForPrediction, SpectraFMTokenizer
from .plots import digits, flux_label, plot_explained_star, symbol
from .prediction import (
    FLAG_SEPARATOR,
    NOT_AT_REST,
    PredictionWriter,
    TrainingRange,
    predict_batches,
    valid_pixels,
)
from .similar import Embedder, Embeddings, neighbours, read_embeddings


os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before Gradio is imported
try:
    import gradio as gr
except ImportError as error:
    raise ImportError('the page needs Gradio: pip install ".[app]" in a clone of the repository') from error


#: Of an upload: larger files are refused, of more spectra the first are used, longer spectra are refused.
MAX_MEGABYTES, MAX_SPECTRA, MAX_PIXELS = 25, 100, 100_000
#: Of what a compressed file may become.
MAX_UNPACKED_MEGABYTES = 250
#: Uploads, tables and what is remembered of a visit are deleted after so many seconds.
KEPT = 3600
NEIGHBOURS = 5
#: Synthetic stars to be known in the H band, where no observed ones come with the package.
SYNTHETIC_STARS = 250
NAMED_PEAKS = 5

_DEMO_STARS = Path(__file__).parent / "resources" / "gaia_xp_demo.parquet"
#: Stars of `gaia_xp_demo.parquet`, and ranges out of which a synthetic star is drawn.
_OBSERVED = {
    "Sun-like dwarf, Gaia XP": "1036287544515598080",
    "Metal-poor giant, Gaia XP": "4077494242701948160",
    "Metal-rich giant, Gaia XP": "2127823800279925760",
    "M dwarf, Gaia XP": "1535227577395366400",
}
_SYNTHETIC = {
    "Red-clump giant, synthetic APOGEE": {"teff": (4700.0, 4900.0), "logg": (2.3, 2.6), "fe_h": (-0.3, 0.1)},
    "Sun-like dwarf, synthetic APOGEE": {"teff": (5650.0, 5850.0), "logg": (4.3, 4.5), "fe_h": (-0.2, 0.2)},
}
EXAMPLES = (*_OBSERVED, *_SYNTHETIC)


# ----------------------------------------------------------------------------------------------------- what is computed


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint, and stars with known labels.

    Attributes
    ----------
    name : str
    model, tokenizer
    training_range : TrainingRange or None
    known : Embeddings or None
        Stars to find the nearest among.
    known_what : str
        What stars those are, in words.
    """

    name: str
    model: SpectraFMForPrediction
    tokenizer: SpectraFMTokenizer
    training_range: TrainingRange | None
    known: Embeddings | None
    known_what: str

    @property
    def labels(self) -> list[str]:
        return list(self.tokenizer.requests or self.tokenizer.label_names)

    @property
    def units(self) -> dict[str, str]:
        config = self.model.config
        return dict(zip(config.label_names, config.label_units, strict=True))


@dataclass(eq=False)
class Reading:
    """The spectra of a file, and what the model says of them.

    Attributes
    ----------
    rows : list of dict
        In the schema of this project, at most `MAX_SPECTRA`.
    more : bool
        Whether the file holds more.
    loaded : LoadedModel
    prediction : dict of arrays of shape (stars,)
        As [`predict_batches`] yields it.
    table : Path
        The same as CSV; it is deleted with the reading.
    flux_label : str
        For an axis.
    """

    rows: list[Row]
    more: bool
    loaded: LoadedModel
    prediction: dict[str, Any]
    table: Path
    flux_label: str
    _explained: dict[int, Explanation] = field(default_factory=dict, repr=False)

    def flags(self, i: int) -> list[str]:
        return [flag for flag in str(self.prediction["flags"][i]).split(FLAG_SEPARATOR) if flag]

    def why_not(self, i: int) -> str:
        """Why a spectrum has no labels; empty if it has."""
        return "" if np.isfinite(self.prediction[self.loaded.labels[0]][i]) else str(self.prediction["reason"][i])


class Workbench:
    """Reads spectra, predicts and explains, one visitor at a time; models are loaded when they are first needed.

    Parameters
    ----------
    model : str, optional
        A bundled checkpoint, a folder, or a name on the hub, for every spectrum. Default: what
        [`suitable_checkpoint`] chooses for the first spectrum of a file.
    known : path, optional
        What `spectrafm embed` wrote: stars to find the nearest among, for the model that embedded them. Default: the
        stars that come with the package, for H-band spectra synthetic ones.

    Raises
    ------
    ValueError
        For a model that is not there, or a file of another kind, or of another model than the one given.
    """

    def __init__(self, model: str | None = None, known: str | os.PathLike[str] | None = None) -> None:
        self.model, self.known = model, known
        self._known_used = False
        self._loaded: dict[str, LoadedModel] = {}
        self._examples: dict[str, Reading] = {}
        self._lock = threading.RLock()
        if model is not None or known is not None:
            names = [DEFAULT_CHECKPOINT, APOGEE_CHECKPOINT] if model is None else [model]
            for name in names:
                self.load(name)
            if known is not None and not self._known_used:
                raise ValueError(
                    f"known: expected what `spectrafm embed` wrote with {' or '.join(names)}, got {os.fspath(known)}"
                )

    def load(self, name: str) -> LoadedModel:
        """A checkpoint and the stars to be known, from the second time on without loading anything."""
        with self._lock:
            if name not in self._loaded:
                model, tokenizer = load_checkpoint(name)
                demand_pixels(tokenizer, "show in the app")
                if torch.cuda.is_available():
                    model.cuda()  # type: ignore[call-arg]  # transformers wraps it without its types
                training_range = TrainingRange.load(str(model.name_or_path))
                known = self._known_stars(model, tokenizer, training_range)
                self._loaded[name] = LoadedModel(Path(name).name, model, tokenizer, training_range, *known)
            return self._loaded[name]

    def _known_stars(
        self, model: SpectraFMForPrediction, tokenizer: SpectraFMTokenizer, training_range: TrainingRange | None
    ) -> tuple[Embeddings | None, str]:
        if self.known is not None:
            with contextlib.suppress(ValueError):  # of another model
                if found := read_embeddings(self.known, model):
                    self._known_used = True
                    return found, f"the {len(found.object_id):,} stars of {Path(self.known).name}"
        embedder, parts, names = Embedder(model, tokenizer), [], []
        # Stars of an instrument that the model was not trained on would be no neighbours.
        for what, stars in (
            (
                "stars with Gaia XP spectra that no model was trained on, and their APOGEE DR17 labels",
                read_spectra([_DEMO_STARS]),
            ),
            (
                "synthetic APOGEE stars and the labels that they were made with",
                islice(SyntheticStars("apogee"), SYNTHETIC_STARS),
            ),
        ):
            rows = list(stars)
            if training_range is not None and not training_range.flags(rows[0], {}):
                parts += [embedder(rows[i : i + 32])[0] for i in range(0, len(rows), 32)]
                names.append(f"{len(rows)} {what}")
        return Embeddings.join(parts) if parts else None, " and ".join(names)

    def example(self, name: str) -> Reading:
        """One of the `EXAMPLES`; the same from the second time on."""
        with self._lock:
            if name not in self._examples:
                if name in _OBSERVED:
                    rows = [row for row in read_spectra([_DEMO_STARS]) if row["object_id"] == _OBSERVED[name]]
                else:
                    rows = list(islice(SyntheticStars("apogee", seed=1, label_ranges=_SYNTHETIC[name]), 1))
                    rows[0]["object_id"] = name
                self._examples[name] = self._predict(rows, more=False)
            return self._examples[name]

    def read(
        self,
        path: str | os.PathLike[str],
        *,
        wavelength_unit: str = "Angstrom",
        air: bool = False,
        radial_velocity: float | None = None,
    ) -> Reading:
        """Predict the labels of the spectra of a file, of any format that the readers know.

        Raises
        ------
        ValueError
            In words for the person who chose the file: why it, or what it holds, cannot be used.
        """
        path = Path(path)
        try:
            _check_size(path)
            spectra = read_spectra(
                [path],
                wavelength_unit=wavelength_unit,
                wavelength_medium="air" if air else None,
                radial_velocity=radial_velocity,
            )
            rows: list[Row] = []
            for row in islice(spectra, MAX_SPECTRA + 1):
                if np.size(row["flux"]) > MAX_PIXELS:
                    raise ValueError(
                        f"expected spectra of at most {MAX_PIXELS:,} pixels, got one of {np.size(row['flux']):,}"
                    )
                rows.append(row)
            reading = self._predict(rows[:MAX_SPECTRA], more=len(rows) > MAX_SPECTRA)
            if len(rows) == 1 and (why := reading.why_not(0)):
                raise ValueError(why)
        except ValueError as error:
            # Where the server keeps the file is nobody's business.
            raise ValueError(str(error).removeprefix(f"{path}: ").replace(str(path), path.name)) from error
        return reading

    def _predict(self, rows: list[Row], *, more: bool) -> Reading:
        loaded = self.load(self.model or suitable_checkpoint(rows[0]["wavelength"]))
        with self._lock:
            (prediction,) = predict_batches(
                loaded.model, loaded.tokenizer, [rows], loaded.labels, loaded.training_range
            )
        folder = tempfile.mkdtemp(prefix="spectrafm-app-")
        table = Path(folder, "labels.csv")
        with PredictionWriter(table, loaded.labels, loaded.units) as writer:
            writer.write(prediction)
        # What comes from no file is synthetic, over the continuum.
        flux = flux_label(rows[0]["file"]) if "file" in rows[0] else "Flux / continuum"
        reading = Reading(rows, more, loaded, prediction, table, flux)
        weakref.finalize(reading, shutil.rmtree, folder, ignore_errors=True)
        return reading

    def explain(self, reading: Reading, i: int) -> Explanation:
        """What the model looks at in a spectrum that has labels; from the second time on as it was found the first."""
        with self._lock:
            if i not in reading._explained:
                explainer = Explainer(reading.loaded.model, reading.loaded.tokenizer)
                explainer.add([reading.rows[i]])
                reading._explained[i] = explainer.explanations()["all"]
            return reading._explained[i]

    def nearest(self, reading: Reading, i: int) -> list[tuple[str, float, dict[str, float]]]:
        """The most similar of the known stars: name, similarity and labels of each; none if no stars are known."""
        known = reading.loaded.known
        if known is None:
            return []
        with self._lock:
            vector, _ = Embedder(reading.loaded.model, reading.loaded.tokenizer)([reading.rows[i]])
        index, similarity = neighbours(vector, known, NEIGHBOURS)
        names = [name for name in reading.loaded.labels if name in known.labels]
        return [
            (known.object_id[star], float(cosine), {name: float(known.labels[name][star]) for name in names})
            for star, cosine in zip(index[0], similarity[0], strict=True)
            if star >= 0
        ]


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


# -------------------------------------------------------------------------------------------------------- what is shown


def plain_symbol(label: str) -> str:
    """How astronomers write a label, without typesetting."""
    return {"teff": "Teff", "logg": "log g"}.get(label) or symbol(label).replace(r"$\alpha$", "α").replace("$", "")


def html_symbol(label: str) -> str:
    return {"teff": "<i>T</i><sub>eff</sub>", "logg": "log <i>g</i>"}.get(label) or html.escape(plain_symbol(label))


def _number(value: float, unit: str) -> str:
    """With a real minus sign, which is as wide as a plus."""
    if not np.isfinite(value):
        return "unknown"
    # Adding zero makes a plain zero of one with a minus sign.
    return f"{round(float(value), digits(unit)) + 0.0:.{digits(unit)}f}".replace("-", "−")


def _heading(label: str, units: Mapping[str, str]) -> str:
    return html_symbol(label) + (f' <span class="unit">[{html.escape(units[label])}]</span>' if units[label] else "")


def summary_html(reading: Reading, i: int) -> str:
    """What was read, by which model, and what to beware of."""
    row = reading.rows[i]
    text = f"<h2>{html.escape(str(row['object_id']))}</h2>"
    if not reading.why_not(i):
        valid = valid_pixels(row)
        wavelength = np.asarray(row["wavelength"], np.float64)
        facts = [html.escape(str(row["survey"]))] if row.get("survey") else []
        facts.append(f"{np.min(wavelength[valid]):,.0f} to {np.max(wavelength[valid]):,.0f} Å in vacuum")
        facts.append(f"{wavelength.size:,} pixels, {np.count_nonzero(~valid):,} of them masked")
        if np.isfinite(row.get("snr", np.nan)):
            facts.append(f"S/N {row['snr']:.0f} a pixel")
        text += f"<p>{', '.join(facts)}. Read by <code>{html.escape(reading.loaded.name)}</code>.</p>"
    if reading.more:
        text += f"<p>The file holds more spectra: these are the first {MAX_SPECTRA}.</p>"
    warnings = _warnings(reading, i)
    if warnings:
        text += '<div class="alert">' + "".join(f"<p>{words}</p>" for words in warnings) + "</div>"
    return text


def _warnings(reading: Reading, i: int) -> list[str]:
    """The flags of a spectrum in words; those of labels stand beside the labels."""
    row, flags, limits = reading.rows[i], reading.flags(i), reading.loaded.training_range
    if why := reading.why_not(i):
        return [f"<strong>No labels.</strong> This spectrum cannot be used: {html.escape(why)}."]
    found = []
    if limits is None:
        found.append("This model says nothing of its training range: what lies outside is not flagged.")
    elif "wavelength" in flags or "wavelength_step" in flags:
        wavelength = np.sort(np.asarray(row["wavelength"], np.float64)[valid_pixels(row)])
        step = float(np.median(np.diff(wavelength))) if wavelength.size > 1 else 0.0
        trained = " or ".join(
            f"{low:,.0f} to {high:,.0f} Å in steps of {np.mean(steps):.3g} Å"
            for (low, high), steps in zip(
                np.atleast_2d(np.asarray(limits.wavelength)),
                np.atleast_2d(np.asarray(limits.wavelength_step)),
                strict=True,
            )
        )
        found.append(
            "<strong>Do not use these labels.</strong> The model was trained on other spectra than this one: "
            f"{trained}. This one has {wavelength[0]:,.0f} to {wavelength[-1]:,.0f} Å in steps of {step:.3g} Å."
        )
    if NOT_AT_REST in flags:
        found.append(
            "No radial velocity of this star is known, so the wavelengths may not be at rest. "
            "One can be given under “How to read the file”."
        )
    outside = [plain_symbol(name) for name in reading.loaded.labels if _outside(flags, name)]
    if outside:
        found.append(f"Outside the training range: {', '.join(outside)}.")
    return found


def _outside(flags: Sequence[str], label: str) -> bool:
    return any(flag.startswith((f"{label}<", f"{label}>")) for flag in flags)


def labels_html(reading: Reading, i: int) -> str:
    """The labels of a spectrum, each beside the range of the training stars, and those of the file, if it has any."""
    loaded, row, flags = reading.loaded, reading.rows[i], reading.flags(i)
    given = any(np.isfinite(row.get(name, np.nan)) for name in loaded.labels)
    lines = []
    for name in loaded.labels:
        unit = loaded.units[name]
        value, error = (float(reading.prediction[column][i]) for column in (name, f"{name}_err"))
        limits = (loaded.training_range.labels if loaded.training_range else {}).get(name)
        cells = [
            f'<th scope="row">{_heading(name, loaded.units)}</th>',
            f'<td class="value">{_number(value, unit)} <span class="error">± {_number(error, unit)}</span></td>',
            f"<td>{_range_bar(value, error, limits, unit, _outside(flags, name))}</td>",
        ]
        if given:
            cells.append(f"<td>{_number(row.get(name, np.nan), unit)}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    head = ["Label", "Predicted ± 1σ", "Training range", *(["In the file"] if given else [])]
    return (
        '<table class="labels"><thead><tr>'
        + "".join(f'<th scope="col">{text}</th>' for text in head)
        + f"</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    )


def _range_bar(value: float, error: float, limits: tuple[float, float] | None, unit: str, outside: bool) -> str:
    """Where a value lies in a range: a bar with a mark, and the same in words."""
    if limits is None:
        return "not known"
    low, high = limits
    margin = 0.12 * (high - low)
    start, width = low - margin, high - low + 2 * margin

    def share(number: float) -> float:
        return float(np.clip(100 * (number - start) / width, 0, 100))

    left, right = share(value - error), share(value + error)
    words = f"{_number(low, unit)} to {_number(high, unit)}"
    verdict = '<strong class="outside">outside</strong> ' if outside else ""
    return (
        f'<div class="bar" aria-hidden="true">'
        f'<span class="trained" style="left:{share(low):.2f}%;width:{share(high) - share(low):.2f}%"></span>'
        f'<span class="sigma" style="left:{left:.2f}%;width:{right - left:.2f}%"></span>'
        f'<span class="mark{" off" if outside else ""}" style="left:{share(value):.2f}%"></span></div>'
        f'<div class="words" style="padding-left:{share(low):.2f}%">{verdict}{words}</div>'
    )


def neighbours_html(reading: Reading, i: int, found: Sequence[tuple[str, float, Mapping[str, float]]]) -> str:
    """The known stars most like a spectrum, below what is predicted for it."""
    loaded = reading.loaded
    if loaded.known is None:
        return (
            "<p>No stars with known labels come with this model. <code>spectrafm app --known FILE</code> takes those "
            "that <code>spectrafm embed</code> wrote.</p>"
        )
    names = [name for name in loaded.labels if found and name in found[0][2]]
    head = ["Star", "Similarity", *(_heading(name, loaded.units) for name in names)]
    predicted = [_number(float(reading.prediction[name][i]), loaded.units[name]) for name in names]
    lines = ['<tr class="own"><th scope="row">this one, predicted</th><td></td>' + _cells(predicted) + "</tr>"]
    for star, cosine, labels in found:
        numbers = [f"{cosine:.4f}", *(_number(labels[name], loaded.units[name]) for name in names)]
        lines.append(f'<tr><th scope="row">{html.escape(star)}</th>{_cells(numbers)}</tr>')
    return (
        f"<p>Out of {html.escape(loaded.known_what)}. Similarity is the cosine between the model’s vectors.</p>"
        '<div class="scroll" role="region" tabindex="0" aria-label="Table of the nearest known stars">'
        "<table><thead><tr>"
        + "".join(f'<th scope="col">{text}</th>' for text in head)
        + f"</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cells(texts: Sequence[str]) -> str:
    return "".join(f"<td>{text}</td>" for text in texts)


def picture_html(
    reading: Reading, i: int, explanation: Explanation, label: str, wavelength_range: tuple[float, float] | None = None
) -> str:
    """The spectrum and what the model looks at, in a picture for wide and one for narrow screens, and in words."""
    row = reading.rows[i]
    sources = []
    for narrow in (False, True):
        stream = io.BytesIO()
        plot_explained_star(
            stream,
            row,
            explanation,
            label,
            reading.loaded.units,
            wavelength_range=wavelength_range,
            flux_label=reading.flux_label,
            narrow=narrow,
        )
        sources.append(f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}")
    what = "all labels" if label == ALL_LABELS else plain_symbol(label)
    words = f"{_peaks_in_words(explanation, label, wavelength_range)} {_response_in_words(explanation)}"
    alternative = (
        f"Three panels over wavelength: the spectrum of {row['object_id']} with its errors and masked pixels; how much "
        f"each part of it tells of {what}; how much {what} responds to a line there. {words}"
    )
    return (
        f'<picture><source media="(max-width: 640px)" srcset="{sources[1]}">'
        f'<img src="{sources[0]}" alt="{html.escape(alternative)}"></picture><p>{html.escape(words)}</p>'
    )


def _peaks_in_words(explanation: Explanation, label: str, wavelength_range: tuple[float, float] | None) -> str:
    lines = [line for line in line_list() if line.rank < 4 or explanation.step < COARSE_STEP]
    response = explanation.response[explanation.labels.index(label)]
    tolerance = max(TOLERANCE, 0.5 * explanation.line_width)
    low, high = wavelength_range or (-np.inf, np.inf)
    peaks = [
        f"{peak.wavelength:,.0f} Å" + (f" ({peak.line.name})" if peak.line else "")
        for peak in peaks_of(explanation.wavelength, response, lines, tolerance)
        if low <= peak.wavelength <= high
    ]
    return f"Strongest response at {', '.join(peaks[:NAMED_PEAKS])}." if peaks else "No peak of the response here."


def _response_in_words(explanation: Explanation) -> str:
    return f"The response is that to a line {explanation.line_width:.2g} Å wide which gets 1 % deeper."


def formats_html() -> str:
    """What can be read, for people who wonder whether theirs can."""
    lines = "".join(
        f"<li><strong>{html.escape(known.name)}</strong>: wavelengths in {known.wavelength_medium}, "
        f"{html.escape(known.rest_frame)}</li>"
        for known in formats()
    )
    return (
        "<p>A file is known by its content, not by its name. A table of your own needs columns such as "
        "<code>wavelength</code>, <code>flux</code> and, better, <code>flux_error</code>.</p>"
        f"<ul>{lines}</ul>"
    )


def alert_html(words: str) -> str:
    """Why there is nothing to show."""
    return (
        f'<div class="alert" role="alert"><p><strong>This file cannot be used.</strong> {html.escape(words)}</p></div>'
    )


# ------------------------------------------------------------------------------------------------------------- the page


#: Colours come from the theme, so that they change with it to dark. In the head of the page, as Gradio garbles what
#: it gets as `css` where that has lists in brackets; the class twice, to come before the rules of Gradio.
_STYLE = """<style>
.gradio-container.gradio-container {
  max-width: 1320px;
  :is(a, button, input, select, [tabindex="0"]):focus-visible { outline: 3px solid #d9730d; outline-offset: 2px; }
  label:has(input[type="radio"]:focus-visible) { outline: 3px solid #d9730d; }
  .page h1 { font-size: 1.7rem; margin: .2rem 0; }
  .page h2 { font-size: 1.2rem; margin: .6rem 0 .2rem; }
  .page p { margin: .3rem 0; line-height: 1.45; }
  .page ul { padding-left: 1.2rem; }
  .page li { margin: .2rem 0; }
  .page table { border-collapse: collapse; width: 100%; margin: 0; font-variant-numeric: tabular-nums; }
  .page :is(table, thead, tbody, tr) { border: 0; }
  .page :is(th, td) { text-align: left; padding: .4rem .8rem .4rem 0; vertical-align: middle; font-weight: normal;
    border: 0; border-bottom: 1px solid var(--border-color-primary); }
  .page thead th { font-size: .85rem; vertical-align: bottom; }
  .page .labels th[scope="row"] { white-space: nowrap; }
  .page .unit { font-size: .85rem; }
  .page td.value { font-size: 1.1rem; font-weight: 600; white-space: nowrap; }
  .page .error { font-weight: normal; }
  .page .own > :is(th, td) { font-weight: 600; }
  .page .scroll { overflow-x: auto; }
  .page .scroll table { font-size: .9rem; }
  .page .scroll :is(td, th) { white-space: nowrap; }
  .page .alert { border-left: 5px solid #c2410c; background: var(--background-fill-secondary); padding: .4rem .8rem;
    margin: .5rem 0; overflow-wrap: anywhere; }
  .page .bar { position: relative; height: 14px; max-width: 340px; }
  .page .bar span { position: absolute; display: block; }
  .page .bar .trained { top: 3px; height: 8px; background: #9dbbe0; border-radius: 4px; }
  .page .bar .sigma { top: 5px; height: 4px; min-width: 2px; background: var(--body-text-color); }
  .page .bar .mark { top: 0; width: 4px; height: 14px; margin-left: -2px; background: var(--body-text-color);
    outline: 1px solid var(--body-background-fill); }
  .page .bar .off { background: #c2410c; }
  .page .words { font-size: .85rem; max-width: 340px; }
  .page .outside { color: #c2410c; }
  .dark & .page .outside { color: #fdba74; }
  .page img { width: 100%; height: auto; margin: 0; background: white; border-radius: 6px; }
  #upload .or { color: inherit; }
  @media (max-width: 640px) {
    .main { padding: .5rem; }
    .html-container { padding: 10px 2px; }
    .page :is(th, td) { padding-right: .5rem; }
    .page td.value { font-size: 1rem; }
    .page h1 { font-size: 1.4rem; }
  }
}
</style>"""
#: Gradio leaves groups of radio buttons, and the button that opens a file, without names, and gives each radio button a
#: group of its own, in which the arrow keys lead nowhere.
_NAMES = """() => {
  const name = (element, text) => {
    if (element && text && element.getAttribute('aria-label') !== text) element.setAttribute('aria-label', text);
  };
  const all = () => {
    for (const group of document.querySelectorAll('fieldset')) {
      const text = group.querySelector('[data-testid=block-info]')?.textContent.trim();
      name(group, text);
      for (const button of group.querySelectorAll('input[type=radio]')) button.name = text;
    }
    name(document.querySelector('#upload button:not([aria-label=Clear])'), 'Your spectrum file: choose or drop it');
  };
  new MutationObserver(all).observe(document.body, {childList: true, subtree: true});
  all();
}"""
#: On a narrow screen the answer stands below what was pressed: go there.
_SCROLL = "() => { if (innerWidth < 768) document.getElementById('answer').scrollIntoView({behavior: 'smooth'}); }"
#: What is said in a live region, a screen reader reads out.
_LIVE = "element.setAttribute('role', 'status'); element.setAttribute('aria-live', 'polite');"
_LIMITS = (
    f"At most {MAX_MEGABYTES} MB. Of more than {MAX_SPECTRA} spectra in a file the first {MAX_SPECTRA} are used, each "
    f"of at most {MAX_PIXELS:,} pixels."
)


def build(workbench: Workbench) -> gr.Blocks:
    """The page."""
    page = gr.Blocks(title="Stellar labels from a spectrum", analytics_enabled=False, delete_cache=(600, KEPT))
    with page:
        gr.HTML(
            "<h1>Stellar labels from a spectrum</h1><p>Pick a star or upload a spectrum: SpectraFM says its "
            "temperature, gravity and abundances, each with an error, and what it looked at. Uploads are deleted after "
            "an hour.</p>",
            elem_classes="page",
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                example = gr.Radio(list(EXAMPLES), value=EXAMPLES[0], label="Example stars")
                upload = gr.File(label="Your spectrum file", height=170, elem_id="upload")
                gr.HTML(f"<p>{_LIMITS}</p>", elem_classes="page")
                with gr.Accordion("How to read the file", open=False):
                    velocity = gr.Number(
                        None, label="Radial velocity of the star [km/s]", info="Empty: what the file says"
                    )
                    unit = gr.Radio(
                        [("Å", "Angstrom"), ("nm", "nm"), ("µm", "um")],
                        value="Angstrom",
                        label="Unit of the wavelengths",
                        info="Of files that do not say",
                    )
                    air = gr.Checkbox(label="Wavelengths in air", info="Of files that do not say")
                    again = gr.Button("Read the file again")
                with gr.Accordion("Which files can be read", open=False):
                    gr.HTML(formats_html(), elem_classes="page")
            with gr.Column(scale=3, min_width=320, elem_id="answer"):
                summary = gr.HTML(elem_classes="page", js_on_load=_LIVE, elem_id="summary")
                which = gr.Dropdown([], label="Spectrum of the file", visible=False)
                with gr.Column(visible=False) as answer:
                    labels = gr.HTML(elem_classes="page")
                    table = gr.DownloadButton("Download the labels of all spectra (CSV)", size="md")
                    gr.HTML("<h2>The spectrum, and what the model looks at</h2>", elem_classes="page")
                    label = gr.Radio([], label="For the label")
                    with gr.Row():
                        low = gr.Number(None, label="Show from [Å]", min_width=120)
                        high = gr.Number(None, label="to [Å]", min_width=120)
                        part = gr.Button("Show this part", min_width=120)
                    picture = gr.HTML(elem_classes="page", elem_id="picture")
                    gr.HTML("<h2>Nearest known stars</h2>", elem_classes="page")
                    nearest = gr.HTML(elem_classes="page", elem_id="nearest")
        state = gr.State(None, time_to_live=KEPT)

        def show(reading: Reading, i: int, wanted: str | None) -> dict[Any, Any]:
            """One spectrum of a reading; the label that was looked at stays if it is there."""
            if reading.why_not(i):
                return {state: reading, summary: summary_html(reading, i), answer: gr.Column(visible=False)}
            explanation = workbench.explain(reading, i)
            chosen = wanted if wanted in explanation.labels else explanation.labels[0]
            names = [("all labels" if name == ALL_LABELS else plain_symbol(name), name) for name in explanation.labels]
            return {
                state: reading,
                summary: summary_html(reading, i),
                answer: gr.Column(visible=True),
                labels: labels_html(reading, i),
                table: str(reading.table),
                label: gr.Radio(names, value=chosen),
                low: None,
                high: None,
                picture: picture_html(reading, i, explanation, chosen),
                nearest: neighbours_html(reading, i, workbench.nearest(reading, i)),
            }

        def first(reading: Reading, wanted: str | None) -> dict[Any, Any]:
            names = [(f"{i + 1}: {row['object_id']}", i) for i, row in enumerate(reading.rows)]
            return {which: gr.Dropdown(names, value=0, visible=len(names) > 1), **show(reading, 0, wanted)}

        def nothing(words: str) -> dict[Any, Any]:
            hidden = {which: gr.Dropdown([], value=None, visible=False), answer: gr.Column(visible=False)}
            return {state: None, summary: alert_html(words), **hidden}

        def on_example(name: str, wanted: str | None, path: str | None) -> dict[Any, Any]:
            # The button that opens a file would lose the focus where there is nothing to take away.
            return {**({upload: None} if path else {}), **first(workbench.example(name), wanted)}

        def on_file(path: str | None, speed: float | None, unit: str, air: bool, wanted: str | None) -> dict[Any, Any]:
            if path is None:
                return nothing("There is none: choose one under “Your spectrum file”.")
            try:
                reading = workbench.read(path, wavelength_unit=unit, air=air, radial_velocity=speed)
            except ValueError as error:
                return {example: None, **nothing(f"{error}.")}
            return {example: None, **first(reading, wanted)}

        def on_spectrum(reading: Reading | None, i: int, wanted: str | None) -> dict[Any, Any]:
            return nothing(_FORGOTTEN) if reading is None else show(reading, i, wanted)

        def on_view(reading: Reading | None, i: int | None, name: str, *limits: float | None) -> dict[Any, Any]:
            if reading is None:
                return nothing(_FORGOTTEN)
            explanation = workbench.explain(reading, i or 0)
            try:
                wavelength_range = _part(explanation, *limits)
            except ValueError as error:
                return {picture: f'<div class="alert" role="alert"><p>{html.escape(str(error))}</p></div>'}
            return {picture: picture_html(reading, i or 0, explanation, name, wavelength_range)}

        def guarded(answers: Callable[..., dict[Any, Any]]) -> Callable[..., dict[Any, Any]]:
            """A mistake of this program is for its log; the visitor is told that it is none of the file."""

            def answering(*values: Any) -> dict[Any, Any]:
                try:
                    return answers(*values)
                except Exception:
                    traceback.print_exc(file=sys.stderr)
                    return nothing(_BROKEN)

            return answering

        outputs = [example, upload, summary, which, answer, labels, table, label, low, high, picture, nearest, state]
        how: dict[str, Any] = {
            "outputs": outputs,
            "show_progress_on": [summary],
            "trigger_mode": "always_last",
            "api_visibility": "private",
        }
        reading_file = {"fn": guarded(on_file), "inputs": [upload, velocity, unit, air, label], **how}
        page.load(guarded(on_example), [example, label, upload], **how)
        page.load(None, js=_NAMES)
        example.input(guarded(on_example), [example, label, upload], **how).then(None, js=_SCROLL)
        upload.upload(**reading_file).then(None, js=_SCROLL)
        again.click(**reading_file).then(None, js=_SCROLL)
        which.input(guarded(on_spectrum), [state, which, label], **how)
        how["show_progress_on"] = [picture]
        gr.on(
            [label.input, low.submit, high.submit, part.click],
            guarded(on_view),
            [state, which, label, low, high],
            **how,
        )
    # Other visitors wait for their turn; more than these are told to come back later.
    return page.queue(max_size=50, api_open=False)


_FORGOTTEN = "It was forgotten after an hour: choose a star or a file again."
_BROKEN = "Something went wrong in this program; that is no fault of the file, and what it was is in the program's log."


def _part(explanation: Explanation, low: float | None, high: float | None) -> tuple[float, float] | None:
    """The part of a spectrum that is asked for, None for all of it."""
    if low is None and high is None:
        return None
    first, last = explanation.wavelength[[0, -1]]
    low, high = first if low is None else low, last if high is None else high
    if np.count_nonzero((explanation.wavelength >= low) & (explanation.wavelength <= high)) < 2:
        raise ValueError(
            f"Expected a range with pixels between {first:,.0f} and {last:,.0f} Å, got {low:,.0f} to {high:,.0f} Å."
        )
    return low, high


def launch(
    model: str | None = None,
    known: str | os.PathLike[str] | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    *,
    block: bool = True,
) -> gr.Blocks:
    """Serve the page until Ctrl-C, or in the background.

    Parameters
    ----------
    model, known
        See [`Workbench`].
    host : str
        127.0.0.1 is for this machine only, 0.0.0.0 for all that can reach it.
    port : int
    block : bool
        Return after Ctrl-C. Otherwise at once, and `close()` of what is returned ends it.

    Raises
    ------
    OSError
        If the port is taken, or the host is not this machine.
    """
    try:
        socket.create_server((host, port)).close()
    except (OSError, OverflowError) as error:
        raise OSError(f"host, port: expected a free port of this machine, got {host}, {port}: {error}") from error
    page = build(Workbench(model, known))
    font = ["system-ui", "sans-serif"]  # those of the machine: none are fetched
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        ssr_mode=False,
        run_history=False,
        quiet=True,
        footer_links=[],
        max_file_size=f"{MAX_MEGABYTES}mb",
        theme=gr.themes.Default(primary_hue="blue", font=font, font_mono=["ui-monospace", "monospace"]),
        head=_STYLE,
        prevent_thread_lock=True,
    )
    print(f"The page is at {page.local_url} (Ctrl-C ends it)", flush=True)
    if block:
        page.block_thread()
    return page
