#!/usr/bin/env python
# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
A page for each instrument: formats, accuracy, and a star with its best-fit spectrum.

    python scripts/generate/make_instrument_pages.py --output docs/instruments

The figures come from the evaluations of spectrafm-base; the stars of the pictures are synthetic, except for Gaia XP.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spectrafm_cli.arguments import Parser
from spectrafm_hf import load_checkpoint
from spectrafm_hf.data.readers import formats, read_spectra
from spectrafm_hf.data.schema import digits, with_errors
from spectrafm_hf.files import DEMO_STARS, complete_file
from spectrafm_hf.inference.prediction import answered_labels, predict_batches
from spectrafm_hf.inference.spectrum import best_fit
from spectrafm_hf.show.spectra import plot_fit
from spectrafm_hf.show.style import save_with_palette, symbol
from spectrafm_hf.synthesis.instruments import Instrument
from spectrafm_hf.synthesis.synthetic import SyntheticStars


EVALUATIONS = Path(__file__).parents[2] / "model_cards" / "evaluations"
#: Title, file formats, and evaluations of it, with the beginning of their rows.
PAGES: dict[str, tuple[str, Sequence[str], dict[str, str]]] = {
    "gaia-xp": (
        "Gaia XP",
        ("gaia-xp", "gaiaxpy", "gaia-xp-continuous"),
        {"robustness-xp": "", "instruments": "gaia-xp"},
    ),
    "apogee": (
        "APOGEE",
        ("apogee-apstar", "apogee-apvisit", "apogee-aspcapstar"),
        {"robustness-apogee": "", "instruments": "apogee"},
    ),
    "miles": ("MILES", ("miles",), {"observed": "MILES test", "instruments": "MILES"}),
    "lamost-lrs": ("LAMOST, low resolution", ("lamost-lrs",), {"observed": "LAMOST", "instruments": "lamost"}),
    "sdss-boss": ("SDSS and BOSS", ("sdss-spec", "sdss-mwm"), {"instruments": "sdss|- sdss"}),
    "desi": ("DESI", ("desi",), {"instruments": "desi|- desi"}),
    "galah": ("GALAH", ("galah",), {"instruments": "galah|- galah"}),
    "gaia-rvs": ("Gaia RVS", ("gaia-rvs",), {"instruments": "gaia-rvs|- gaia-rvs"}),
}
#: A giant, for the pictures.
RANGES = {"teff": (4700.0, 4900.0), "logg": (2.3, 2.7), "fe_h": (-0.6, -0.3)}
REMARKS = {
    "galah": "Spectra are smoothed to R = 2,200, that of the observed training stars. Information in finer lines is "
    "lost.",
    "gaia-rvs": "A network of its own, trained on synthetic stars alone, reads spectra within 8,380 to 8,818 Å at "
    "R = 5,200 to 11,500; finer ones are smoothed ([observed stars](../optical.md)).",
    "apogee": "The figures are of synthetic stars from the emulator that the model fits. For observed stars, errors "
    "grow with their difference from it (`other_errors`).",
}


def rows_of(name: str, start: str) -> Iterator[str]:
    """The tables of an evaluation: all of it, or its heads and the rows of an instrument."""
    path = EVALUATIONS / f"spectrafm-base-{name}.md"
    head = False
    for line in path.read_text(encoding="utf-8").splitlines():
        is_row = line.startswith("|")
        rule = head and re.match(r"\|[-|]+\|?$", line)  # below a head that was kept
        head = bool(is_row and re.match(r"\| *(stars|instruments|input) *\|", line))
        of_others = line.startswith("Flags of ") and start not in line
        own = is_row and re.search(start, line.split("|")[1])
        if not start or rule or head or own or not (is_row or of_others):
            yield line.replace("## ", "### ") if not start or is_row else line


def picture(path: Path, name: str, model: Any, tokenizer: Any) -> None:
    if name == "gaia-xp":
        row = next(iter(read_spectra([DEMO_STARS])))
    else:
        row = next(iter(SyntheticStars(name, seed=3, label_ranges=RANGES)))
        row = {**row, "object_id": "a synthetic giant"}
        instrument = Instrument.load(name)
        row["normalised"] = instrument.normalisation == "continuum"
    names = answered_labels(model, tokenizer, row)[:4]
    (found,) = predict_batches(model, tokenizer, [[row]], names)
    units = dict(zip(model.config.label_names, model.config.label_units, strict=True))
    values = []
    for label in names:
        value, error = (f"{found[column][0]:.{digits(units[label])}f}" for column in with_errors([label]))
        values.append(f"{symbol(label)} {value} ± {error}" + (" K" if units[label] == "K" else ""))
    drawn = io.BytesIO()
    plot_fit(drawn, row, best_fit(model, tokenizer, row), title=f"{row['object_id']}: {', '.join(values)}")
    with complete_file(path) as temporary:
        save_with_palette(drawn, temporary, 32)


def page(name: str) -> str:
    title, read_from, evaluations = PAGES[name]
    instrument = Instrument.load(name)
    low, high = min(part[0] for part in instrument.detectors), max(part[-1] for part in instrument.detectors)
    known = [format for format in formats() if format.name in read_from]
    parts = [
        f"# {title}",
        " ".join(instrument.description.split()),
        f"`spectrafm predict FILES` predicts it with `spectrafm-base`, from {low:,.0f} to {high:,.0f} Å in vacuum.",
    ]
    parts += [REMARKS[name]] if name in REMARKS else []
    if known:
        table = ["| format | wavelengths in | rest frame | resolving power | |", "|---|---|---|---|---|"]
        table += [
            f"| `{one.name}` | {one.wavelength_medium} | {one.rest_frame} | {one.resolving_power} | {one.note} |"
            for one in known
        ]
        parts.append("\n".join(table))
    parts += [f"![A star and its best-fit spectrum](../pictures/{name}.png)"]
    parts += [f"Synthetic stars of it: `spectrafm data synthetic --instrument {name} --n 1000`.", "## Accuracy"]
    for evaluation, start in evaluations.items():
        text = "\n".join(rows_of(evaluation, start)).strip()
        parts.append(re.sub(r"\n{3,}", "\n\n", text))
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__.split("\n")[1])
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="pictures go into DIR/../pictures")
    folder = parser.parse_args(argv).output
    model, tokenizer = load_checkpoint("spectrafm-base")
    (folder.parent / "pictures").mkdir(parents=True, exist_ok=True)
    folder.mkdir(exist_ok=True)
    np.seterr(invalid="ignore")
    for name in PAGES:
        picture(folder.parent / "pictures" / f"{name}.png", name, model, tokenizer)
        (folder / f"{name}.md").write_text(page(name), encoding="utf-8")
        print(f"written: {folder / name}.md")
    listed = "\n".join(PAGES)
    head = "# Instruments\n\nOne model predicts all of them, and spectra of other instruments on any grid.\n\n"
    (folder / "index.md").write_text(head + "```{toctree}\n:maxdepth: 1\n\n" + listed + "\n```\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
