# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""`spectrafm explain`: which pixels and lines determine the labels."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import DEFAULT_MODEL, DELAY, add_model, positive, reading, reading_options
from .loading import count, labels_of, load, say_device
from .report import nothing_done, print_table, report


if TYPE_CHECKING:
    from spectrafm_hf.data.readers import Failure


def add(verbs: Any) -> None:
    explain = verbs.add_parser(
        "explain",
        parents=[reading()],
        help="sensitivity of labels to the flux, and the lines behind it",
        description="Mean sensitivity of each label over the spectra of INPUT: the response to a line that is 1 "
        "percent deeper, the share of information in each interval, and known lines at the peaks. These are exact "
        "derivatives of the predictions. Writes a plot for each label, curves.csv, intervals.csv and peaks.csv to DIR.",
    )
    add_model(explain)
    explain.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write to")
    explain.add_argument("--labels", nargs="+", metavar="LABEL", help="default: all that the model predicts")
    explain.add_argument(
        "--line-width", type=float, metavar="ANGSTROM", help="full width at half depth of a line (default: 3 pixels)"
    )
    explain.add_argument(
        "--by-type", action="store_true", help="also separately for giants, dwarfs, cool and hot stars"
    )
    explain.add_argument("--batch-size", type=positive, default=32, metavar="N", help="batch size (default: 32)")
    explain.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from tqdm.auto import tqdm

    from spectrafm_hf.data.readers import Failure, batched, find_files, read_spectra
    from spectrafm_hf.inference.explain import Explainer, match_lines, write_curves, write_intervals, write_peaks
    from spectrafm_hf.inference.velocities import settled
    from spectrafm_hf.show.explained import plot_explanation

    failures: list[Failure] = []
    files = find_files(arguments.input, arguments.split, failures)
    name = arguments.model or DEFAULT_MODEL
    model, tokenizer = load(name, arguments.revision, arguments.device)
    _, units = labels_of(model, tokenizer)
    explainer = Explainer(
        model, tokenizer, arguments.labels, line_width=arguments.line_width, by_type=arguments.by_type
    )
    rows = settled(read_spectra(files, failures=failures, **reading_options(arguments)), model, tokenizer)
    with tqdm(total=count(files), desc="explaining", unit=" stars", delay=DELAY) as progress:
        for batch in batched(rows, arguments.batch_size):
            bad = explainer.add(batch)
            failures += [Failure(batch[i]["file"], f"{batch[i]['object_id']}: {why}") for i, why in bad.items()]
            progress.update(len(batch))
    explanations = explainer.explanations()
    if not explanations:
        raise ValueError(nothing_done(failures, len(files), arguments.output))

    folder = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    matches = {kind: match_lines(explanation) for kind, explanation in explanations.items()}
    write_curves(folder / "curves.csv", explanations)
    write_intervals(folder / "intervals.csv", explanations)
    write_peaks(folder / "peaks.csv", matches)
    table = []
    for kind, explanation in explanations.items():
        for match in matches[kind]:
            picture = folder / (f"{match.label}.png" if kind == "all" else f"{match.label}-{kind}.png")
            stars = {"all": "stars", "cool": "cool stars", "hot": "hot stars"}.get(kind, kind)
            number = "one star" if explanation.n_stars == 1 else f"mean of {explanation.n_stars:,} {stars}"
            title = f"what {Path(name).name} looks at, {number}"
            plot_explanation(picture, explanation, match.label, match.peaks, units, title)
            best = int(explanation.information[explanation.labels.index(match.label)].argmax())
            low, high = explanation.intervals[best]
            share = explanation.information[explanation.labels.index(match.label), best]
            table.append(
                [kind, f"{explanation.n_stars:,}", match.label, f"{low:,.0f}-{high:,.0f} Å: {share:.0%}"]
                + [str(len(match.peaks)), *(_recovered(found) for found in (match.known, match.paper))]
            )
    header = ["stars", "number", "label", "most information", "peaks", "known lines at peaks", "the paper's"]
    print_table(header, table, left=True)
    print(
        "(lines in range; random: mean ± spread for the same lines, moved at random; p: how often those find as many)"
    )
    say_device(model)
    print(f"written in {folder}: a picture for each label, curves.csv, intervals.csv and peaks.csv")
    return report(failures, folder / "curves.csv")


def _recovered(found: Any) -> str:
    if not found.n_lines:
        return "none in range"
    return (
        f"{found.n_found} of {found.n_lines}; random {found.random:.1f} ± {found.random_spread:.1f}, "
        f"p {max(found.p_value, 1e-4):.2g}"
    )
