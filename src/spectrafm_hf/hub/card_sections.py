# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Sections of a card: evaluations, calibration, failures and data."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import (
    DatasetCard,
)

from ..inference.training_range import TrainingRange


FIGURES = {
    "robust_scatter": "1.4826 MAD",
    "bias": "median of predicted - true",
    "rmse": "RMSE",
    "robust_z": "robust standard deviation of error/sigma",
}


TITLES = {
    "gaia-xp": "Gaia XP x APOGEE DR17",
    "apogee-dr17": "APOGEE DR17",
    "synthetic-apogee": "synthetic APOGEE spectra",
    "synthetic-apogee-apstar": "synthetic apStar spectra",
    "synthetic-gaia-xp": "synthetic Gaia XP spectra",
    "calibrated-gaia-xp": "synthetic Gaia XP spectra with labels and residuals of observed stars",
    "miles": "MILES",
}


#: Modules of `spectrafm_hf.data` with TERMS and CITATIONS, by the beginning of the name of a data set.
BUILDERS = {
    "gaia-xp": ("data.gaia_xp",),
    "calibrated-gaia-xp": ("data.gaia_xp", "synthesis.synthetic_data_sets"),
    "synthetic-": ("synthesis.synthetic_data_sets",),
    "apogee-": ("data.apogee",),
    "miles": ("data.miles",),
}


#: Listed as a failure in the card: scatter this many times that of the main table, ...
WORSE = 1.5


#: ... errors too small or too large by this factor, ...
MISJUDGED = 1.25


#: ... RMSE this many times the scatter.
TAILED = 3.0


class Group(NamedTuple):
    """Evaluations on the same stars."""

    data: str
    split: str
    rule: str
    stars: dict[str, int]
    results: dict[str, dict[str, dict[str, Any]]]
    sources: list[Mapping[str, Any]]

    @property
    def main(self) -> str:
        """The first selection of stars, which the others are compared with."""
        return next(iter(self.results))


def _evaluated(results: Mapping[str, Mapping[str, Any]], name: str) -> list[str]:
    return [label for label, figures in results.get(name, {}).items() if figures["robust_scatter"] is not None]


def _main_figures(group: Group, name: str) -> Iterator[tuple[str, str, float]]:
    results = group.results[group.main]
    for label in _evaluated(results, name):
        for figure in FIGURES:
            yield label, figure, round(results[name][label][figure], 5)


def _label_range(label: str, unit: str, ranges: TrainingRange) -> str:
    low, high = (f"{limit:.5g}" for limit in ranges.labels[label]) if label in ranges.labels else ("?", "?")
    return f"| {label} | {unit} | {low} to {high} |"


def _wavelength_ranges(ranges: TrainingRange) -> Iterator[str]:
    def pairs(limits: Any) -> list[Any]:
        return [] if limits is None else [limits] if isinstance(limits[0], int | float) else list(limits)

    steps = pairs(ranges.wavelength_step)
    for i, (low, high) in enumerate(pairs(ranges.wavelength)):
        step = " to ".join(dict.fromkeys(f"{limit:.3g}" for limit in steps[i])) if steps else "any"
        yield f"| {low:,.0f} to {high:,.0f} | {step} |"


def _number(value: float, unit: str) -> str:
    return f"{value:.1f}" if unit == "K" else f"{value:.3f}"


def _tables(group: Group, name: str, units: Mapping[str, str]) -> str:
    """The tables of one data set, and the commands that made them."""
    title = TITLES.get(group.data, group.data)
    parts = [f"### {title}, {group.split} stars\n\nSplit: {group.rule}."]
    for selection, results in group.results.items():
        labels = _evaluated(results, name)
        if not labels:
            continue
        lines = [
            f"| model | {' | '.join(f'{label} [{units[label]}]' if units[label] else label for label in labels)} |",
            "|---" * (len(labels) + 1) + "|",
        ]
        for model, by_label in results.items():
            cells = [_cell(model, label, results, units[label]) if label in by_label else "" for label in labels]
            lines.append(f"| {model} | {' | '.join(cells)} |")
        parts.append(f"{selection}, {group.stars[selection]:,} stars:\n\n" + "\n".join(lines))
    for evaluation in group.sources:
        versions = ", ".join(f"{key} {value}" for key, value in evaluation.get("versions", {}).items())
        checksum = evaluation["data_sha256"][group.split]
        parts.append(f"`{evaluation['command']}`, with {versions}; SHA-256 of the {group.split} stars {checksum}.")
    return "\n\n".join(parts)


def _cell(model: str, label: str, results: Mapping[str, Mapping[str, Any]], unit: str) -> str:
    figures = results[model][label]
    if figures["robust_scatter"] is None:
        return ""
    others = [row[label]["robust_scatter"] for row in results.values() if label in row]
    scatter, bias, rmse = (_number(figures[figure], unit) for figure in ("robust_scatter", "bias", "rmse"))
    if len(others) > 1 and figures["robust_scatter"] == min(other for other in others if other is not None):
        scatter = f"**{scatter}**"
    return f"{scatter} ({bias}, {rmse}, {figures['robust_z']:.2f})"


def _calibration(groups: Sequence[Group], name: str, factors: Mapping[str, float]) -> str:
    """A line for each label: its factor, and error/sigma in each table."""
    tables = [(group, selection) for group in groups for selection in group.results]
    labels = list(dict.fromkeys(label for group in groups for label in _evaluated(group.results[group.main], name)))
    heads = [f"{TITLES.get(group.data, group.data)}, {selection}" for group, selection in tables]
    lines = [f"| label | factor | {' | '.join(heads)} |", "|---" * (len(heads) + 2) + "|"]
    for label in labels:
        found = [group.results[selection].get(name, {}).get(label, {}).get("robust_z") for group, selection in tables]
        cells = ["" if z is None else f"{z:.2f}" for z in found]
        lines.append(f"| {label} | {factors[label]:.3g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _failures(groups: Sequence[Group], name: str, units: Mapping[str, str]) -> Iterator[str]:
    """Failures that the tables show, a line each."""
    found = False
    for group in groups:
        main = group.results[group.main].get(name, {})
        for selection, results in group.results.items():
            worse, misjudged, tailed = [], [], []
            for label in _evaluated(results, name):
                figures, usual = results[name][label], main.get(label, {}).get("robust_scatter")
                scatter, z, rmse = (figures[figure] for figure in ("robust_scatter", "robust_z", "rmse"))
                if usual and scatter > WORSE * usual:
                    worse.append(f"{label} {scatter / usual:.1f}")
                if not 1 / MISJUDGED <= z <= MISJUDGED:
                    misjudged.append(f"{label} {z:.2f}")
                if rmse > TAILED * scatter:
                    tailed.append(f"{label} {_number(rmse, units[label])} ({_number(scatter, units[label])})")
            said = [
                f"{what}: {', '.join(labels)}"
                for what, labels in (
                    (f"scatter relative to the stars with {group.main}", worse),
                    ("errors too small (error/sigma above 1) or too large", misjudged),
                    ("outliers beyond their errors, RMSE (scatter)", tailed),
                )
                if labels
            ]
            if said:
                found = True
                title = TITLES.get(group.data, group.data)
                yield f"- {title}, {selection} ({group.stars[selection]:,} stars): {'; '.join(said)}."
    if not found:
        yield "None in the tables above."


def _data(datasets: Sequence[str]) -> str:
    """Data sets, their terms and citations, each once."""
    about: list[str] = []
    terms: dict[str, None] = {}
    citations: dict[str, None] = {}
    for dataset in datasets:
        name = Path(dataset).name
        modules = next((found for start, found in BUILDERS.items() if dataset.startswith(start)), ())
        folder_card = Path(dataset) / "README.md"
        if "/" not in dataset and modules:
            about.append(f"`{name}` ({TITLES.get(name, 'see `spectrafm data`')})")
            for builder in (importlib.import_module(f"..{module}", __package__) for module in modules):
                terms |= dict.fromkeys([getattr(builder, "TERMS", "")])
                citations |= dict.fromkeys(builder.CITATIONS)
        elif folder_card.is_file():
            card = DatasetCard.load(folder_card)
            license = card.data.get("license_name") or card.data.get("license")
            about.append(f"`{name}` ({card.data.get('pretty_name') or name}; licence: {license})")
            found = re.search(r"^## Terms and citation\n+(.*?)(?=^## |^<!--|\Z)", card.text, re.MULTILINE | re.DOTALL)
            terms |= dict.fromkeys([found[1].strip() if found else ""])
        elif dataset.count("/") == 1:
            about.append(
                f"[`{dataset}`](https://huggingface.co/datasets/{dataset}), under the terms stated in its card"
            )
        else:
            about.append(f"`{name}` (terms unknown)")
    listed = "\n".join(f"- {citation}" for citation in citations)
    trained_on = ", ".join(about) or "spectra and labels of unstated origin and terms"
    return "\n\n".join(filter(None, [f"Trained on {trained_on}.", *terms, listed]))
