# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""The page of `spectrafm app` in HTML: summary, warnings, labels, pictures and similar stars."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ..data.lines import line_list
from ..data.readers import formats
from ..data.schema import digits, valid_pixels
from ..inference.explain import ALL_LABELS, COARSE_STEP, TOLERANCE, Explanation, peaks_of
from ..models.flags_spectrafm import FLAGS
from ..models.gate_spectrafm import FRAME_UNSTATED, MEDIUM_UNSTATED, NOT_AT_REST
from ..models.spectrum_spectrafm import BestFit
from .explained import plot_explained_star
from .spectra import plot_fit
from .style import symbol
from .workbench import MAX_SPECTRA, Reading


NAMED_PEAKS = 5
_WHERE = "under “How to read the file”"
#: Meaning of flags, and what to do on this page.
_ADVICE = {
    NOT_AT_REST: (
        "No radial velocity of this star is known, so the wavelengths may not be at rest.",
        f"Enter it {_WHERE}.",
    ),
    FRAME_UNSTATED: (
        "The file does not say whether the wavelengths are at rest; this is assumed.",
        f"Confirm it, or enter the radial velocity, {_WHERE}.",
    ),
    MEDIUM_UNSTATED: (
        "The file does not say whether the wavelengths are in vacuum or in air; vacuum is assumed.",
        f"Choose it {_WHERE}.",
    ),
    "velocity": (FLAGS["velocity"][0], f"Enter the radial velocity {_WHERE}."),
    "medium": (FLAGS["medium"][0], f"Choose air {_WHERE}."),
}
#: Flags of spectra whose labels are not to be used.
_UNUSABLE = ("unlike_training", "wavelength", "wavelength_step")


#: As `style.SYMBOLS`, which is for matplotlib.
_PLAIN = {"teff": "Teff", "logg": "log g", "vmicro": "v micro", "vsini": "v sin i"}
_HTML = {
    **{"teff": "<i>T</i><sub>eff</sub>", "logg": "log <i>g</i>"},
    **{"vmicro": "<i>v</i><sub>micro</sub>", "vsini": "<i>v</i> sin <i>i</i>"},
}


def plain_symbol(label: str) -> str:
    """The symbol of a label as plain text."""
    return _PLAIN.get(label) or symbol(label).replace(r"$\alpha$", "α").replace("$", "")


def html_symbol(label: str) -> str:
    return _HTML.get(label) or html.escape(plain_symbol(label))


def _number(value: float, unit: str) -> str:
    """Rounded, with a typographic minus sign."""
    if not np.isfinite(value):
        return "unknown"
    # Adding zero turns -0 into 0.
    return f"{round(float(value), digits(unit)) + 0.0:.{digits(unit)}f}".replace("-", "−")


def _heading(label: str, units: Mapping[str, str]) -> str:
    return html_symbol(label) + (f' <span class="unit">[{html.escape(units[label])}]</span>' if units[label] else "")


# -------------------------------------------------------------------------------------------------------- summary


def summary_html(reading: Reading, i: int) -> str:
    """The spectrum, the model and warnings."""
    row = reading.rows[i]
    text = f"<h2>{html.escape(str(row['object_id']))}</h2>"
    if reading.known(i):
        valid = valid_pixels(row)
        wavelength = np.asarray(row["wavelength"], np.float64)
        facts = [html.escape(str(row["survey"]))] if row.get("survey") else []
        facts.append(f"{np.min(wavelength[valid]):,.0f} to {np.max(wavelength[valid]):,.0f} Å in vacuum")
        facts.append(f"{wavelength.size:,} pixels, {np.count_nonzero(~valid):,} of them masked")
        if np.isfinite(row.get("radial_velocity", np.nan)):
            moved = "at rest" if row.get("rest_frame") else "not at rest"
            facts.append(f"{moved}, radial velocity {_number(row['radial_velocity'], 'K')} km/s")
        if np.isfinite(row.get("snr", np.nan)):
            facts.append(f"S/N {row['snr']:.0f} a pixel")
        text += f"<p>{', '.join(facts)}. Read by <code>{html.escape(reading.loaded.name)}</code>.</p>"
    if reading.more:
        text += f"<p>The file holds more spectra; only the first {MAX_SPECTRA} are shown.</p>"
    warnings = _warnings(reading, i)
    if warnings:
        text += '<div class="alert">' + "".join(f"<p>{words}</p>" for words in warnings) + "</div>"
    return text


def _warnings(reading: Reading, i: int) -> list[str]:
    """The flags of a spectrum in words."""
    if why := reading.why_not(i):
        return [f"<strong>No labels.</strong> This spectrum cannot be used: {html.escape(why)}."]
    flags, found = reading.flags(i), []
    if any(flag in _UNUSABLE for flag in flags):
        found.append("<strong>Do not use these labels.</strong>" + _trained(reading, i))
    if reading.loaded.training_range is None:
        found.append("This model has no training range, so values outside of it are not flagged.")
    for flag in flags:
        words = _ADVICE.get(flag) or FLAGS.get(flag)
        if words and flag != "edge":
            found.append(f"{html.escape(' '.join(words))} <code>{flag}</code>")
    if outside := [plain_symbol(name) for name in reading.labels(i) if _at_the_end(reading, i, name)]:
        found.append(
            f"At the end of the training range, or beyond: {', '.join(outside)}. Treat these values as limits."
        )
    if reason := str(reading.prediction["reason"][i]):
        found.append(f"{html.escape(reason)}.")
    return found


def _trained(reading: Reading, i: int) -> str:
    """The wavelengths and pixels of training and spectrum, where they differ."""
    limits = reading.loaded.training_range
    if limits is None or "unlike_training" in reading.flags(i):
        return ""
    row = reading.rows[i]
    wavelength = np.sort(np.asarray(row["wavelength"], np.float64)[valid_pixels(row)])
    step = float(np.median(np.diff(wavelength))) if wavelength.size > 1 else 0.0
    trained = [f"{low:,.0f} to {high:,.0f} Å" for low, high in np.atleast_2d(np.asarray(limits.wavelength))]
    if limits.wavelength_step is not None:
        steps = np.atleast_2d(np.asarray(limits.wavelength_step)).mean(axis=1)
        trained = [f"{words} in steps of {each:.3g} Å" for words, each in zip(trained, steps, strict=True)]
    return (
        f" The model was trained on different spectra: {' or '.join(trained)}. This one has "
        f"{wavelength[0]:,.0f} to {wavelength[-1]:,.0f} Å in steps of {step:.3g} Å."
    )


# --------------------------------------------------------------------------------------------------------- labels


def _limits(reading: Reading, label: str) -> tuple[float, float] | None:
    known = reading.loaded.training_range
    return (known.labels if known else {}).get(label)


def _at_the_end(reading: Reading, i: int, label: str) -> bool:
    """Whether a flagged label lies outside the training range, or within one sigma of its end."""
    limits = _limits(reading, label)
    if limits is None:
        return False
    value, error = (float(reading.prediction[column][i]) for column in (label, f"{label}_err"))
    if "edge" not in reading.flags(i):
        error = 0.0
    return not limits[0] + error <= value <= limits[1] - error


def labels_html(reading: Reading, i: int) -> str:
    """The labels of a spectrum with their training ranges, and the labels in the file if there are any."""
    units, row, names = reading.loaded.units, reading.rows[i], reading.labels(i)
    in_file = any(np.isfinite(row.get(name, np.nan)) for name in names)
    lines = []
    for name in names:
        unit = units[name]
        value, error = (float(reading.prediction[column][i]) for column in (name, f"{name}_err"))
        cells = [
            f'<th scope="row">{_heading(name, units)}</th>',
            f'<td class="value">{_number(value, unit)} <span class="error">± {_number(error, unit)}</span></td>',
            f"<td>{_range_bar(value, error, _limits(reading, name), unit, _at_the_end(reading, i, name))}</td>",
        ]
        if in_file:
            cells.append(f"<td>{_number(row.get(name, np.nan), unit)}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    head = ["Label", "Predicted ± 1σ", "Training range", *(["In the file"] if in_file else [])]
    return (
        '<table class="labels"><thead><tr>'
        + "".join(f'<th scope="col">{text}</th>' for text in head)
        + f"</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    )


def _range_bar(value: float, error: float, limits: tuple[float, float] | None, unit: str, at_the_end: bool) -> str:
    """A value within its training range, as a bar and in words."""
    if limits is None:
        return "not known"
    low, high = limits
    margin = 0.12 * (high - low)
    start, width = low - margin, high - low + 2 * margin

    def share(number: float) -> float:
        return float(np.clip(100 * (number - start) / width, 0, 100))

    left, right = share(value - error), share(value + error)
    words = f"{_number(low, unit)} to {_number(high, unit)}"
    place = "at the end" if low <= value <= high else "outside"
    verdict = f'<strong class="outside">{place}</strong> ' if at_the_end else ""
    return (
        f'<div class="bar" aria-hidden="true">'
        f'<span class="trained" style="left:{share(low):.2f}%;width:{share(high) - share(low):.2f}%"></span>'
        f'<span class="sigma" style="left:{left:.2f}%;width:{right - left:.2f}%"></span>'
        f'<span class="mark{" off" if at_the_end else ""}" style="left:{share(value):.2f}%"></span></div>'
        f'<div class="words" style="padding-left:{share(low):.2f}%">{verdict}{words}</div>'
    )


# -------------------------------------------------------------------------------------------------- nearest stars


def neighbours_html(
    reading: Reading, i: int, what: str, stars: Sequence[tuple[str, float, Mapping[str, float]]]
) -> str:
    """A table of the most similar known stars and the predicted labels."""
    loaded = reading.loaded
    if not what:
        return (
            "<p>There are no comparison stars for this spectrum. "
            "Add your own with <code>spectrafm app --known FILE</code>, a file of <code>spectrafm embed</code>.</p>"
        )
    names = [name for name in reading.labels(i) if stars and name in stars[0][2]]
    head = ["Label", "this one, predicted", *(html.escape(name) for name, _, _ in stars)]
    lines = [["Similarity", "", *(f"{cosine:.4f}" for _, cosine, _ in stars)]]
    for name in names:
        values = [float(reading.prediction[name][i]), *(labels[name] for _, _, labels in stars)]
        lines.append([_heading(name, loaded.units), *(_number(value, loaded.units[name]) for value in values)])
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{text}</td>" for text in rest)}</tr>' for first, *rest in lines
    )
    return (
        f"<p>Out of {html.escape(what)}. Similarity is the cosine between the model’s vectors.</p>"
        '<table class="nearest"><thead><tr>'
        + "".join(f'<th scope="col">{text}</th>' for text in head)
        + f"</tr></thead><tbody>{body}</tbody></table>"
    )


# ---------------------------------------------------------------------------------------------------- the picture


def picture_html(
    reading: Reading, i: int, explanation: Explanation, label: str, wavelength_range: tuple[float, float] | None = None
) -> str:
    """The explanation of a label, as pictures for wide and narrow screens and in words."""
    row = reading.rows[i]

    def draw(stream: io.BytesIO, narrow: bool) -> None:
        options = {"wavelength_range": wavelength_range, "flux_label": reading.flux_label, "narrow": narrow}
        plot_explained_star(stream, row, explanation, label, reading.loaded.units, **options)  # type: ignore[arg-type]

    what = "all labels" if label == ALL_LABELS else plain_symbol(label)
    words = f"{_peaks_in_words(explanation, label, wavelength_range)} {_response_in_words(explanation)}"
    alternative = (
        f"Three panels over wavelength: the spectrum of {row['object_id']} with its errors and masked pixels; the "
        f"information on {what} in each part; the response of {what} to a line there. {words}"
    )
    return _pictures(draw, alternative, words)


def fit_html(reading: Reading, i: int, fit: BestFit, wavelength_range: tuple[float, float] | None = None) -> str:
    """The spectrum, its best-fit star and the residual, in pictures and in words."""
    row = reading.rows[i]

    def draw(stream: io.BytesIO, narrow: bool) -> None:
        plot_fit(stream, row, fit, wavelength_range=wavelength_range, flux_label=reading.flux_label, narrow=narrow)

    words = f"χ² is {fit.chi2:,.0f} for {fit.degrees_of_freedom:,.0f} degrees of freedom."
    if np.isfinite(fit.resolving_power):
        words += f" The model is drawn at a resolving power of {float(f'{fit.resolving_power:.3g}'):,.0f}."
    if fit.no_noise:
        places = ", ".join(
            f"{low:,.0f} Å" if high - low < 1 else f"{low:,.0f} to {high:,.0f} Å"
            for low, high, _ in fit.no_noise[:NAMED_PEAKS]
        )
        number = len(fit.no_noise)
        words += f" The residual is significant in {number} place{'s' * (number > 1)}, strongest at {places}."
    else:
        words += " The residual is noise everywhere."
    alternative = f"Two panels over wavelength: {row['object_id']} with the best-fit star; the residual. {words}"
    return _pictures(draw, alternative, words)


def _pictures(draw: Callable[[io.BytesIO, bool], None], alternative: str, words: str) -> str:
    """Pictures for wide and narrow screens."""
    sources = []
    for narrow in (False, True):
        stream = io.BytesIO()
        draw(stream, narrow)
        sources.append(f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}")
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


# ------------------------------------------------------------------------------------------------ words beside it


def formats_html() -> str:
    """The supported formats."""
    lines = "".join(
        f"<li><strong>{html.escape(known.name)}</strong>: wavelengths in {known.wavelength_medium}, "
        f"{html.escape(known.rest_frame)}</li>"
        for known in formats()
    )
    return (
        "<p>Files are identified by their content, not by their names. Your own table needs columns such as "
        "<code>wavelength</code>, <code>flux</code> and, better, <code>flux_error</code>.</p>"
        f"<ul>{lines}</ul>"
    )


def alert_html(words: str, what: str = "This file cannot be used.") -> str:
    """An error message."""
    strong = f"<strong>{what}</strong> " if what else ""
    return f'<div class="alert" role="alert"><p>{strong}{html.escape(words)}</p></div>'


def waiting_html(words: str) -> str:
    """A progress message."""
    return f'<p class="waiting">{html.escape(words)} …</p>'
