#!/usr/bin/env python
# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Measure what a checkpoint does besides predicting labels from spectra, in one command.

    python scripts/evaluate_generation.py NAME_OR_PATH --output FOLDER

Labels -> spectrum and spectrum -> spectrum in another range, on new synthetic stars and on observed Gaia XP spectra,
as the root mean square of (answer - flux) over the median flux of what is asked for; labels -> labels, as the RMS of
the error; neighbours by embedding, as their distance in label space. Beside the model stand the median of synthetic
stars and a quadratic fit to them (`Quadratic`). The folder gets generation.json, generation.md and two pictures.
"""

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.sparse.linalg import eigsh
from tqdm.auto import tqdm

from spectrafm_cli import Parser
from spectrafm_hf.cards import checksums
from spectrafm_hf.checkpoints import load_checkpoint
from spectrafm_hf.data import build_gaia_xp, cache_dir
from spectrafm_hf.data.synthetic import SyntheticStars
from spectrafm_hf.files import complete_file
from spectrafm_hf.instruments import Instrument
from spectrafm_hf.models import SpectraFMForPrediction, SpectraFMTokenizer
from spectrafm_hf.plots import BLUE, GREY, INK, ORANGE
from spectrafm_hf.similar import Embedder, Embeddings, label_distance, neighbours


Columns = Mapping[str, NDArray[Any]]
Window = tuple[float, float]
#: Of the synthetic stars.
SEED = 20_000
#: Synthetic stars that the simple models are fitted to.
FITTED = 4000
REQUESTS, BATCH = 2000, 16
#: Angstrom; blue and red half of XP, first and third detector of APOGEE.
XP_HALVES, APOGEE_DETECTORS = ((3360.0, 6400.0), (6400.0, 10_210.0)), ((15_100.0, 15_820.0), (16_470.0, 17_000.0))
# What is asked of other labels. `alpha_m` is the mean of elements that are among them: it is not given.
FROM_LABELS = {
    "mg_fe": ("teff", "logg", "fe_h", "o_fe", "c_fe", "n_fe"),
    "o_fe": ("teff", "logg", "fe_h", "mg_fe", "c_fe", "n_fe"),
    "alpha_m": ("teff", "logg", "fe_h", "mg_fe", "o_fe"),
    "c_fe": ("teff", "logg", "fe_h", "mg_fe", "o_fe", "n_fe"),
    "n_fe": ("teff", "logg", "fe_h", "mg_fe", "o_fe", "c_fe"),
    "logg": ("teff", "fe_h", "c_fe", "n_fe"),
}


@dataclasses.dataclass
class Model:
    """A checkpoint, and what it can be asked."""

    model: SpectraFMForPrediction
    tokenizer: SpectraFMTokenizer

    def scalars(self, stars: Columns, names: Sequence[str] | None = None) -> dict[str, NDArray[np.float64]]:
        """Those of the stars that the model knows: its labels, and the extinction where there is one."""
        names = self.tokenizer.label_names if names is None else names
        return {name: np.asarray(stars[name], float) for name in names if name in stars}

    def answers(self, inputs: Any) -> NDArray[np.float32]:
        with torch.inference_mode():
            return self.model(**inputs).values.numpy()

    def flux(
        self, wavelength: NDArray[Any], spectra: Columns | None = None, scalars: Columns | None = None
    ) -> NDArray[np.float32]:
        """
        Flux at `wavelength` (pixels,) of each star, from a spectrum, scalars or both: (stars, pixels), in the unit of
        the spectrum, or over the median of the star.
        """
        n_stars = len(next(iter((spectra or scalars or {}).values())))

        def part(columns: Columns | None, stars: slice) -> dict[str, Any]:
            return {name: values[stars] for name, values in (columns or {}).items()}

        stars = [slice(first, first + BATCH) for first in range(0, n_stars, BATCH)]
        pixels = [wavelength[first : first + REQUESTS] for first in range(0, len(wavelength), REQUESTS)]
        return np.concatenate(
            [
                np.concatenate(
                    [
                        self.answers(
                            self.tokenizer(
                                **part(spectra, some), scalars=part(scalars, some) or None, requests=list(where)
                            )
                        )
                        for where in pixels
                    ],
                    axis=1,
                )
                for some in tqdm(stars, desc="stars", delay=5, leave=False)
            ]
        )


class Quadratic:
    """
    Least squares on all products of up to two inputs: labels, or 20 principal components of a spectrum.

    Parameters
    ----------
    inputs : array of shape (stars, columns)
    outputs : array of shape (stars, pixels)
    n_components : int, optional
    """

    def __init__(self, inputs: NDArray[Any], outputs: NDArray[Any], n_components: int | None = None) -> None:
        self.center, self.basis = inputs.mean(axis=0), np.diag(1.0 / inputs.std(axis=0))
        if n_components:
            values, vectors = eigsh(np.cov(inputs.T), n_components, v0=np.ones(inputs.shape[1]))
            self.basis = vectors / np.sqrt(values)
        self.median = np.median(outputs, axis=0)
        self.coefficients = np.linalg.lstsq(self._products(inputs), outputs, rcond=None)[0]

    def _products(self, inputs: NDArray[Any]) -> NDArray[np.float64]:
        x = (inputs - self.center) @ self.basis
        first, second = np.triu_indices(x.shape[1])
        return np.concatenate([np.ones((len(x), 1)), x, x[:, first] * x[:, second]], axis=1)

    def __call__(self, inputs: NDArray[Any]) -> NDArray[np.float64]:
        return self._products(inputs) @ self.coefficients


# ----------------------------------------------------------------------------------------------------------- the stars


def without_tilt(name: str) -> SyntheticStars:
    """Stars of an instrument whose flux calibration is right: an error of it is nothing that could be foretold."""
    return SyntheticStars(dataclasses.replace(Instrument.load(name), tilt=None))


def draw(stars: SyntheticStars, n: int, seed: int) -> dict[str, NDArray[Any]]:
    return {name: np.asarray(column) for name, column in stars.draw(n, np.random.default_rng([SEED, seed])).items()}


def read_observed(folder: Path, split: str, n_stars: int) -> dict[str, NDArray[Any]]:
    """The first stars of a split of Gaia XP."""
    data = load_dataset(str(folder), split=split).with_format("numpy")
    columns = data[: min(n_stars, len(data))]
    columns["object_id"] = np.array(columns["object_id"])
    return columns


def within(stars: Columns, window: Window, flux: str = "flux") -> dict[str, NDArray[Any]]:
    """Pixels of the window, upper end excluded."""
    wavelength = stars["wavelength"][0]
    kept = (wavelength >= window[0]) & (wavelength < window[1])
    names = {"wavelength": "wavelength", "flux": flux, "flux_error": "flux_error", "mask": "mask"}
    return {name: stars[column][:, kept] for name, column in names.items()}


def level(spectra: Columns) -> NDArray[np.float64]:
    """(stars, 1): the median flux of good pixels."""
    return np.nanmedian(np.where(spectra["mask"], np.nan, spectra["flux"]), axis=1, keepdims=True)


def errors(answer: NDArray[Any], truth: Columns) -> dict[str, float]:
    """Over the median flux of what is asked for: RMS over all pixels, and the median star's RMS."""
    relative = np.where(truth["mask"], np.nan, (answer - truth["flux"]) / level(truth))
    by_star = np.sqrt(np.nanmean(relative**2, axis=1))
    return {"rms": float(np.sqrt(np.nanmean(relative**2))), "median_star_rms": float(np.median(by_star))}


# ------------------------------------------------------------------------------------------------------- what is asked


def labels_to_spectrum(model: Model, instrument: str, n_stars: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures, and what a picture shows."""
    source = without_tilt(instrument)
    stars, fitted = draw(source, n_stars, 0), draw(source, FITTED, 1)
    everything = (0.0, np.inf)
    truth, sample = within(stars, everything, "clean"), within(fitted, everything, "clean")
    relative = sample["flux"] / level(sample)
    scalars = model.scalars(stars)

    def table(columns: Columns) -> NDArray[Any]:
        return np.stack([columns[name] for name in scalars], axis=1)

    quadratic = Quadratic(table(fitted), relative)
    answers = {
        "model": model.flux(truth["wavelength"][0], scalars=scalars),
        "median spectrum": np.broadcast_to(quadratic.median, truth["flux"].shape),
        "quadratic fit": quadratic(table(stars)),
    }
    figures = {name: errors(answer * level(truth), truth) for name, answer in answers.items()}
    about = {"stars": n_stars, "given": list(scalars), "figures": figures}
    return about, {"truth": {**truth, "flux": truth["flux"] / level(truth)}, "answer": answers["model"], "stars": stars}


def spectrum_to_spectrum(
    model: Model, stars: Columns, fitted: Columns, seen: Window, asked: Window
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same; for the stars' clean flux where they have one, else for the observed one."""
    given, truth = within(stars, seen), within(stars, asked, "clean" if "clean" in stars else "flux")
    sample, target = within(fitted, seen), within(fitted, asked, "clean")

    def relative(spectra: Columns) -> NDArray[Any]:
        return np.nan_to_num(np.where(spectra["mask"], np.nan, spectra["flux"] / level(spectra)), nan=1.0)

    quadratic = Quadratic(relative(sample), target["flux"] / level(sample), n_components=20)
    answers = {
        "model": model.flux(truth["wavelength"][0], spectra=given),
        "median spectrum": quadratic.median * level(given),
        "quadratic fit": quadratic(relative(given)) * level(given),
    }
    about: dict[str, Any] = {"stars": len(truth["flux"]), "seen": list(seen), "asked": list(asked)}
    if "clean" not in stars:
        noise = {**truth, "flux": truth["flux"] + truth["flux_error"]}
        answers["errors of the observed flux"] = noise["flux"]
    about["figures"] = {name: errors(answer, truth) for name, answer in answers.items()}
    return about, {"truth": truth, "given": given, "answer": answers["model"], "stars": stars}


def labels_to_labels(model: Model, n_stars: int) -> dict[str, Any]:
    """Each label of FROM_LABELS that the model knows, asked of synthetic stars whose other labels are given."""
    source = SyntheticStars("gaia-xp")  # the spectra play no part, and these are made faster
    stars, fitted = draw(source, n_stars, 2), draw(source, FITTED, 3)
    figures = {}
    for name, given in FROM_LABELS.items():
        if not {name, *given} <= set(model.tokenizer.label_names):
            continue
        truth = stars[name].astype(float)
        answer = model.answers(model.tokenizer(scalars=model.scalars(stars, given), requests=[name]))[:, 0]
        tables = [np.stack([columns[other] for other in given], axis=1) for columns in (fitted, stars)]
        quadratic = Quadratic(tables[0], fitted[name][:, None].astype(float))(tables[1])[:, 0]
        figures[name] = {
            "given": list(given),
            "model": float(np.sqrt(np.mean((answer - truth) ** 2))),
            "quadratic fit": float(np.sqrt(np.mean((quadratic - truth) ** 2))),
            "scatter": float(truth.std()),
        }
    return {"stars": n_stars, "figures": figures}


def embedding_neighbours(model: Model, stars: Columns, n_neighbours: int = 5) -> dict[str, Any]:
    """Mean distance in label space of the nearest stars by embedding and of random ones."""
    embedder = Embedder(model.model, model.tokenizer)
    n_stars = len(stars["flux"])
    names = [name for name in model.tokenizer.label_names if name in stars and f"{name}_err" in stars]
    needed = ["wavelength", "flux", "flux_error", "mask", *names, *(f"{name}_err" for name in names)]
    identifiers = stars.get("object_id", np.arange(n_stars).astype(str))

    def batches() -> Iterator[Embeddings]:
        for first in range(0, n_stars, 64):
            some = range(first, min(first + 64, n_stars))
            yield embedder(
                [{"object_id": str(identifiers[i]), **{name: stars[name][i] for name in needed}} for i in some]
            )[0]

    embeddings = Embeddings.join(list(batches()))
    labels = embedder.requests
    found = label_distance(embeddings, embeddings, neighbours(embeddings, embeddings, n_neighbours)[0], labels)
    if found is None:
        raise ValueError(f"labels: expected stars with known labels out of {labels}, got none")
    shared = [name for name in labels if name in embeddings.labels]
    return {"stars": n_stars, "neighbours": n_neighbours, "labels": shared, "distance": found[0], "random": found[1]}


# ------------------------------------------------------------------------------------------------- report and pictures


def as_markdown(report: Mapping[str, Any]) -> str:
    """Tables of all figures."""
    columns = ("model", "quadratic fit", "median spectrum", "errors of the observed flux")
    lines = [f"| flux | {' | '.join(columns)} |", "|---|---|---|---|---|"]
    for title, part in report["flux"].items():
        cells = []
        for name in columns:
            figures = part["figures"].get(name)
            cells.append(f"{figures['rms']:.4f} ({figures['median_star_rms']:.4f})" if figures else "")
        lines.append(f"| {title}, {part['stars']:,} stars | {' | '.join(cells)} |")
    labels = report["labels"]
    lines += ["", f"| label, {labels['stars']:,} synthetic stars | given | model | quadratic fit | scatter |"]
    lines.append("|---|---|---|---|---|")
    for name, row in labels["figures"].items():
        cells = [f"{row[key]:.3f}" for key in ("model", "quadratic fit", "scatter")]
        lines.append(f"| {name} | {', '.join(row['given'])} | {' | '.join(cells)} |")
    lines += ["", "| neighbours by embedding | labels | distance of 5 neighbours | of random stars | ratio |"]
    lines.append("|---|---|---|---|---|")
    for title, row in report["embeddings"].items():
        ratio = row["distance"] / row["random"]
        cells = [f"{row['distance']:.2f}", f"{row['random']:.2f}", f"{ratio:.2f}"]
        lines.append(f"| {title}, {row['stars']:,} stars | {', '.join(row['labels'])} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(path: Path, parts: Mapping[str, Mapping[str, Any]], windows: Mapping[str, Window]) -> None:
    """Three stars of each part: what they are, and what the model says."""
    figure = Figure(figsize=(11, 2.6 * len(parts)), layout="constrained")
    for row, (title, part) in zip(figure.subplots(len(parts), 3, squeeze=False), parts.items(), strict=True):
        truth, wavelength = part["truth"], part["truth"]["wavelength"][0]
        shown = slice(*np.searchsorted(wavelength, windows.get(title, (0, np.inf))))
        teff = np.asarray(part["stars"]["teff"], float)
        for axes, quantile in zip(row, (0.1, 0.5, 0.9), strict=True):
            star = int(np.nanargmin(np.abs(teff - np.nanquantile(teff, quantile))))
            scale = level(truth)[star]
            given = None if title in windows else part.get("given")  # a close-up does not show it
            for spectra, color, pixels in ((given, GREY, slice(None)), (truth, INK, shown)):
                if spectra is not None:
                    flux = np.where(spectra["mask"][star], np.nan, spectra["flux"][star] / scale)
                    axes.plot(spectra["wavelength"][star][pixels], flux[pixels], color=color, lw=1.0)
            axes.plot(wavelength[shown], part["answer"][star][shown] / scale, color=ORANGE, lw=1.0)
            labels = (f"{part['stars'][name][star]:{form}}" for name, form in (("teff", ".0f"), ("logg", ".1f")))
            axes.set_title("{} K, log g {}, ".format(*labels) + f"[Fe/H] {part['stars']['fe_h'][star]:.1f}", fontsize=9)
            axes.tick_params(labelsize=8)
        row[0].set_ylabel(title, fontsize=8)
        row[1].set_xlabel("Wavelength [Å]", fontsize=8)
    figure.suptitle("black: the star; orange: the model's answer; grey: what it saw", color=BLUE, fontsize=10)
    with complete_file(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Ask, measure, draw; the figures."""
    loaded, tokenizer = load_checkpoint(arguments.model)
    model = Model(loaded.eval(), tokenizer)
    n_stars = arguments.stars
    folder = arguments.data or build_gaia_xp(cache_dir() / "gaia-xp")
    observed = read_observed(folder, arguments.split, 20 * n_stars)
    report: dict[str, Any] = {
        "command": shlex.join(["python", "scripts/evaluate_generation.py", *arguments.given]),
        "model": Path(arguments.model).name,
        **checksums(loaded, tokenizer),
        "split": arguments.split,
        "flux": {},
    }
    pictures: dict[str, Any] = {}
    for instrument, title in (("apogee", "APOGEE from labels"), ("gaia-xp", "XP from labels")):
        report["flux"][title], pictures[title] = labels_to_spectrum(model, instrument, n_stars)
    xp, apogee = SyntheticStars("gaia-xp"), SyntheticStars("apogee")
    fitted = draw(xp, FITTED, 5)
    tasks: list[tuple[str, Columns, Columns, Window, Window]] = [
        ("synthetic XP, red from blue", draw(xp, n_stars, 4), fitted, *XP_HALVES),
        ("observed XP, red from blue", observed, fitted, *XP_HALVES),
        ("synthetic XP, blue from red", draw(xp, n_stars, 4), fitted, *XP_HALVES[::-1]),
        ("observed XP, blue from red", observed, fitted, *XP_HALVES[::-1]),
        ("APOGEE, third detector from first", draw(apogee, n_stars, 6), draw(apogee, FITTED, 7), *APOGEE_DETECTORS),
    ]
    for title, stars, sample, seen, asked in tasks:
        report["flux"][title], pictures[title] = spectrum_to_spectrum(model, stars, sample, seen, asked)
    report["labels"] = labels_to_labels(model, FITTED)
    report["embeddings"] = {
        f"observed XP, {arguments.split}": embedding_neighbours(model, observed),
        "synthetic APOGEE": embedding_neighbours(model, draw(SyntheticStars("apogee"), 5 * n_stars, 8)),
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    for file, content in (("json", json.dumps(report, indent=1) + "\n"), ("md", as_markdown(report))):
        with complete_file(arguments.output / f"generation.{file}") as temporary:
            temporary.write_text(content, encoding="utf-8")
    windows = {"APOGEE from labels": (16_180.0, 16_260.0), "APOGEE, third detector from first": (16_700.0, 16_780.0)}
    from_labels = [title for title in pictures if title.endswith("from labels")]
    from_spectra = [title for title in pictures if "observed" in title or "detector" in title]
    for name, titles in (("labels-to-spectrum", from_labels), ("spectrum-to-spectrum", from_spectra)):
        plot(arguments.output / f"{name}.png", {title: pictures[title] for title in titles}, windows)
    return report


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 0, or 2 for bad input (one line on stderr)."""
    parser = Parser(prog="evaluate_generation.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", metavar="NAME_OR_PATH", help="a checkpoint that was trained with flux_requests")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="for figures and pictures")
    parser.add_argument("--stars", type=int, default=200, help="synthetic stars of each kind [200]; 20 times observed")
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="of the observed stars [test]")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="of `spectrafm data gaia-xp`; default: made now")
    arguments = parser.parse_args(argv)
    arguments.given = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments.stars < 10:
            raise ValueError(f"stars: expected at least 10, got {arguments.stars}")
        print(as_markdown(evaluate(arguments)), end="")
    except (ValueError, OSError) as error:
        print(f"evaluate_generation.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
