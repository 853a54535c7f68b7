# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""A page in the browser: the labels of a spectrum, what the model looks at in it, and the known stars most like it.

`spectrafm app` and a Space of the Hugging Face hub show the same page. `workbench` does what is computed, `app_html`
makes HTML of it, and here is the page itself, which Gradio (the extra `app`) serves. Nothing is sent anywhere: no
telemetry, no fonts from elsewhere.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..inference.explain import ALL_LABELS, Explanation
from .app_html import (
    alert_html,
    fit_html,
    formats_html,
    labels_html,
    neighbours_html,
    picture_html,
    plain_symbol,
    summary_html,
    waiting_html,
)
from .workbench import EXAMPLES, MAX_MEGABYTES, MAX_PIXELS, MAX_SPECTRA, Reading, Workbench


os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before Gradio is imported
try:
    import gradio as gr
except ImportError as error:
    raise ImportError('the page needs Gradio: pip install ".[app]" in a clone of the repository') from error


#: Uploads, tables and what is remembered of a visit are deleted after so many seconds.
KEPT = 3600

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
  .page .nearest { font-size: .9rem; table-layout: fixed; }
  .page .nearest :is(td, th):nth-child(2) { font-weight: 600; }
  .page .nearest thead th { overflow-wrap: anywhere; }
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
  .page .waiting { min-height: 3rem; }
  &:has(#upload progress, #upload .progress, #upload .uploading) #answer > * { display: none !important; }
  .page img { width: 100%; height: auto; margin: 0; background: white; border-radius: 6px; }
  #upload .or { color: inherit; }
  @media (max-width: 768px) { #answer { min-height: 100vh; } }
  @media (max-width: 640px) {
    .main { padding: .5rem; }
    .html-container { padding: 10px 2px; }
    .page :is(th, td) { padding-right: .5rem; }
    .page td.value { font-size: 1rem; }
    .page h1 { font-size: 1.4rem; }
    .page .nearest :is(td, th):nth-child(n+6) { display: none; }
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
_BROKEN = "A bug in this program, not a fault of the file; details are in the program's log."

Update = dict[Any, Any]


@dataclass(frozen=True)
class Request:
    """What a visitor chose: an example, or a file and the settings of its reading."""

    example: str | None = None
    path: str | None = None
    velocity: str = ""
    unit: str = "Angstrom"
    medium: str = ""
    at_rest: bool = False
    columns: str = ""

    def reading(self) -> dict[str, Any]:
        """Arguments of `read_spectra`."""
        return {
            "radial_velocity": _number(self.velocity, "Radial velocity", "km/s"),
            "wavelength_unit": self.unit,
            "wavelength_medium": self.medium or None,
            "at_rest": self.at_rest,
            "columns": _columns(self.columns),
        }


@dataclass(eq=False)
class Shown:
    """What the page of a visitor shows."""

    request: Request
    reading: Reading | None
    spectrum: int = 0


def _number(text: str, field: str, unit: str) -> float | None:
    """The number of a text box, with or without its unit; None if it is empty."""
    words = (text or "").replace("−", "-").replace(unit, "").strip()
    if not words:
        return None
    try:
        value = float(words)
    except ValueError:
        value = np.nan
    if not np.isfinite(value):
        raise ValueError(f"{field}: expected a number in {unit}, or nothing, got {text!r}")
    return value


def _columns(text: str) -> dict[str, str] | None:
    """ROLE=NAME, ROLE=NAME"""
    if not (text or "").strip():
        return None
    pairs = [part.partition("=") for part in text.split(",")]
    if wrong := [part for part, equals, name in pairs if not (equals and part.strip() and name.strip())]:
        raise ValueError(f"Columns: expected wavelength=NAME, flux=NAME, got {wrong[0].strip()!r}")
    return {role.strip(): name.strip() for role, _, name in pairs}


def _part(explanation: Explanation, low: float | None, high: float | None) -> tuple[float, float] | None:
    """The chosen part of a spectrum, None for all of it."""
    if low is None and high is None:
        return None
    first, last = explanation.wavelength[[0, -1]]
    low, high = first if low is None else low, last if high is None else high
    if np.count_nonzero((explanation.wavelength >= low) & (explanation.wavelength <= high)) < 2:
        raise ValueError(
            f"Expected a range with pixels between {first:,.0f} and {last:,.0f} Å, got {low:,.0f} to {high:,.0f} Å."
        )
    return low, high


class Page:
    """The elements of the page and their updates."""

    def __init__(self, workbench: Workbench) -> None:
        self.workbench = workbench
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                self._inputs()
            with gr.Column(scale=3, min_width=320, elem_id="answer"):
                self._results()
        self.state = gr.State(None, time_to_live=KEPT)

    def _inputs(self) -> None:
        self.example = gr.Radio(list(EXAMPLES), value=EXAMPLES[0], label="Example stars")
        self.upload = gr.File(label="Your spectrum file", height=170, elem_id="upload")
        gr.HTML(f"<p>{_LIMITS}</p>", elem_classes="page")
        with gr.Accordion("How to read the file", open=False):
            # A box for numbers would fill with 0 when it is opened.
            self.velocity = gr.Textbox(
                "", label="Radial velocity of the star [km/s]", info="Empty: as stated in the file", max_lines=1
            )
            self.at_rest = gr.Checkbox(label="Wavelengths are at rest", info="If the file does not state it")
            self.unit = gr.Radio(
                [("Å", "Angstrom"), ("nm", "nm"), ("µm", "um")],
                value="Angstrom",
                label="Unit of the wavelengths",
                info="If the file does not state it",
            )
            self.medium = gr.Radio(
                [("not known", ""), ("vacuum", "vacuum"), ("air", "air")],
                value="",
                label="Wavelengths in",
                info="If the file does not state it",
            )
            self.columns = gr.Textbox(
                "", label="Columns", info="Where they are not found: wavelength=NAME, flux=NAME", max_lines=1
            )
            self.again = gr.Button("Read the file again")
        with gr.Accordion("Which files can be read", open=False):
            gr.HTML(formats_html(), elem_classes="page")

    def _results(self) -> None:
        self.summary = gr.HTML(elem_classes="page", js_on_load=_LIVE, elem_id="summary")
        self.which = gr.Dropdown([], label="Spectrum of the file", visible=False)
        with gr.Column(visible=False) as self.answer:
            self.labels = gr.HTML(elem_classes="page")
            self.table = gr.DownloadButton("Download the labels of all spectra (CSV)", size="md")
            gr.HTML("<h2>Spectrum and explanation</h2>", elem_classes="page")
            self.label = gr.Radio([], label="For the label")
            with gr.Row():
                self.low = gr.Textbox("", label="Show from [Å]", min_width=120, max_lines=1)
                self.high = gr.Textbox("", label="to [Å]", min_width=120, max_lines=1)
                self.part = gr.Button("Show this part", min_width=120)
            self.picture = gr.HTML(elem_classes="page", elem_id="picture")
            gr.HTML("<h2>Best-fit star</h2>", elem_classes="page")
            self.fit = gr.HTML(elem_classes="page", elem_id="fit")
            gr.HTML("<h2>Nearest known stars</h2>", elem_classes="page")
            self.nearest = gr.HTML(elem_classes="page", elem_id="nearest")

    def connect(self, page: gr.Blocks) -> None:
        """
        One function updates everything, so that the page never mixes two stars.
        """
        inputs = [self.example, self.upload, self.velocity, self.unit, self.medium, self.at_rest, self.columns]
        view = [self.which, self.label, self.low, self.high]
        results = [self.summary, self.answer, self.labels, self.table, self.picture, self.fit, self.nearest]
        new = [self.example.input, self.upload.upload, self.again.click]
        others = [self.which.input, self.label.input, self.low.submit, self.high.submit, self.part.click]
        gr.on(
            [page.load, *new, *others],
            self.guarded,
            [self.state, *view, *inputs],
            [self.state, self.example, self.upload, *view, *results],
            show_progress_on=[self.summary, self.picture],
            trigger_mode="always_last",
            api_visibility="private",
        )
        page.load(None, js=_NAMES)
        for event in new:
            event(None, js=_SCROLL)

    def guarded(self, *values: Any) -> Iterator[Update]:
        """A bug of this program goes to the log; the page says that the file is not the cause."""
        try:
            yield from self.reply(*values)
        except Exception:
            traceback.print_exc(file=sys.stderr)
            yield {self.state: None, self.summary: alert_html(_BROKEN), self.answer: gr.Column(visible=False)}

    def reply(
        self, shown: Shown | None, which: int | None, label: str | None, low: str, high: str, *values: Any
    ) -> Iterator[Update]:
        """The updates of the page, step by step."""
        request = Request(*values)
        before = shown.request if shown else Request()
        # The one that changed was chosen last.
        is_file = request.path is not None and (
            request.path != before.path or request.example in (None, before.example)
        )
        if request.example is not None and not is_file:
            if request.path is not None:  # without one, the button that opens a file would lose the focus
                yield {self.upload: None}
            request = Request(request.example)
        else:
            request = replace(request, example=None)
        if shown is None or shown.reading is None or request != shown.request:
            yield from self.star(request, label)
        elif (which or 0) != shown.spectrum:
            yield from self.spectrum(shown.request, shown.reading, which or 0, label)
        else:
            yield from self.view(shown.reading, shown.spectrum, label, low, high)

    def star(self, request: Request, label: str | None) -> Iterator[Update]:
        """An example, or the first spectrum of a file."""
        name = request.example or Path(request.path or "").name
        try:
            if request.example is not None:
                yield self.waiting(request, f"Looking at {name}")
                reading = self.workbench.example(request.example)
            elif request.path is None:
                raise ValueError("There is none: choose one under “Your spectrum file”")
            elif not Path(request.path).is_file():
                raise ValueError("It was forgotten after an hour: choose it again")
            else:
                yield {self.example: None, **self.waiting(request, f"Reading {name}")}
                rows, more = self.workbench.rows(request.path, **request.reading())
                spectra = "the spectrum" if len(rows) == 1 else f"{len(rows)} spectra"
                yield {self.summary: waiting_html(f"Predicting the labels of {spectra} in {name}")}
                reading = self.workbench.predict(rows, more=more)
        except ValueError as error:
            yield {self.example: None, **self.waiting(request, ""), self.summary: alert_html(f"{error}.")}
            return
        names = [(f"{i + 1}: {row['object_id']}", i) for i, row in enumerate(reading.rows)]
        updates = self.spectrum(request, reading, 0, label)
        # Together with the first update: one that was sent just before others has been lost.
        yield {self.which: gr.Dropdown(names, value=0, visible=len(names) > 1), **next(updates)}
        yield from updates

    def spectrum(self, request: Request, reading: Reading, i: int, label: str | None) -> Iterator[Update]:
        """One spectrum of a file; the chosen label stays if the spectrum has it."""
        summary = {self.state: Shown(request, reading, i), self.summary: summary_html(reading, i)}
        if not reading.known(i):
            yield {**summary, self.answer: gr.Column(visible=False)}
            return
        labels = reading.labels(i)
        labels += [ALL_LABELS] if len(labels) > 1 else []
        chosen = label if label in labels else labels[0]
        names = [("all labels" if name == ALL_LABELS else plain_symbol(name), name) for name in labels]
        yield {
            **summary,
            self.answer: gr.Column(visible=True),
            self.labels: labels_html(reading, i),
            self.table: str(reading.table),
            self.label: gr.Radio(names, value=chosen),
            self.low: "",
            self.high: "",
            self.picture: waiting_html("Explaining the labels"),
            self.fit: "",
            self.nearest: "",
        }
        try:
            picture = picture_html(reading, i, self.workbench.explain(reading, i), chosen)
        except ValueError as error:
            picture = alert_html(f"The explanation cannot be shown: {error}.", "")
        yield {self.picture: picture, self.fit: waiting_html("Fitting a star to it")}
        fit = fit_html(reading, i, self.workbench.fit(reading, i))
        yield {self.fit: fit, self.nearest: waiting_html("Comparing it with known stars")}
        yield {self.nearest: neighbours_html(reading, i, *self.workbench.nearest(reading, i))}

    def view(self, reading: Reading, i: int, label: str | None, low: str, high: str) -> Iterator[Update]:
        """The same spectrum, for another label or in another part."""
        if not reading.known(i):
            return
        try:
            explanation = self.workbench.explain(reading, i)
            limits = _part(explanation, _number(low, "Show from", "Å"), _number(high, "to", "Å"))
        except ValueError as error:
            yield {self.picture: alert_html(str(error), "")}
            return
        yield {
            self.picture: picture_html(reading, i, explanation, label or explanation.labels[0], limits),
            self.fit: fit_html(reading, i, self.workbench.fit(reading, i), limits),
        }

    def waiting(self, request: Request, words: str) -> Update:
        """A message, with the results of the last star hidden."""
        hidden = {self.which: gr.Dropdown([], value=None, visible=False), self.answer: gr.Column(visible=False)}
        return {self.state: Shown(request, None), self.summary: waiting_html(words), **hidden}


def build(workbench: Workbench) -> gr.Blocks:
    """The page."""
    page = gr.Blocks(title="Stellar labels from a spectrum", analytics_enabled=False, delete_cache=(600, KEPT))
    with page:
        gr.HTML(
            "<h1>Stellar labels from a spectrum</h1><p>Pick a star or upload a spectrum: SpectraFM predicts its "
            "temperature, gravity and abundances, each with an error, and shows which pixels matter. Uploads are "
            "deleted after an hour.</p>",
            elem_classes="page",
        )
        Page(workbench).connect(page)
    # Other visitors wait in a queue; if it is full, the page says so.
    return page.queue(max_size=50, api_open=False)


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
        Return after Ctrl-C. Otherwise return at once; `close()` of the result stops the server.

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
    font = ["system-ui", "sans-serif"]  # installed fonts; none are downloaded
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        ssr_mode=False,
        run_history=False,
        quiet=True,
        footer_links=[],
        max_file_size=f"{MAX_MEGABYTES}mb",
        theme=gr.themes.Default(primary_hue="blue", font=font, font_mono=["ui-monospace", "monospace"]).set(
            # The default is too pale to read.
            block_info_text_color="*neutral_600",
            block_info_text_color_dark="*neutral_300",
        ),
        head=_STYLE,
        prevent_thread_lock=True,
    )
    print(f"The page is at {page.local_url} (Ctrl-C ends it)", flush=True)
    if block:
        page.block_thread()
    return page
