#!/usr/bin/env python
# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Labels from some stars of one's own, by `spectrafm finetune` and by what one would do without it: many tasks.

    python scripts/paper/benchmark_transfer.py --output runs/transfer                # validation stars
    python scripts/paper/benchmark_transfer.py --output runs/transfer --split test   # once
    python scripts/paper/benchmark_transfer.py --output runs/transfer --tasks "XP: ak_targ" --stars 100 --again

In each draw some stars of a sample are learnt from, and others, which are the same for all draws, are asked. What the
frozen checkpoint says of a sample is kept in the output folder, and so is each result: a later run goes on from there.
`--again` measures `finetune` again and keeps the results of all others.

The samples: Gaia XP (learnt from: validation stars, which the checkpoint has not learnt from), MILES (learnt from: its
training stars), dwarfs of the SpeX library with optical spectral types, synthetic APOGEE giants whose lines are deeper
than those that the checkpoint knows, and where `--shared` is given, LAMOST and a window of APOGEE DR12. Where a label
takes its error from nowhere, it counts as exact.
"""

import copy
import csv
import functools
import gzip
import hashlib
import io
import sys
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from astropy.io import fits
from datasets import Dataset, concatenate_datasets, load_dataset
from numpy.typing import NDArray
from tqdm.auto import tqdm

from spectrafm_cli.arguments import Parser
from spectrafm_hf.checkpoints import BASE_CHECKPOINT, load_checkpoint
from spectrafm_hf.data import build_gaia_xp, build_miles, cache_dir
from spectrafm_hf.data.sources import fetch_package_file
from spectrafm_hf.hub.cards import checksums
from spectrafm_hf.inference.states import States, frozen_states
from spectrafm_hf.models import SpectraFMConfig
from spectrafm_hf.synthesis.synthetic import SyntheticStars
from spectrafm_hf.training.choices import choose_heads, make_folds
from spectrafm_hf.training.components import Components, fit_pixels
from spectrafm_hf.training.finetuning import FOLDS
from spectrafm_hf.training.metrics import label_metrics
from spectrafm_hf.training.rivals import Sample, ask_rivals, pixels_of


Array = NDArray[Any]
OWN, UNTOUCHED = "fine-tuned", "checkpoint, untouched"
SPLAT = ("splat", "1.14", "398a1ab79c4d25466032c3aad777cc6d1d171dc7ebf17da609296e4dc4ee9d4b")
TYPES = {"M": 10.0, "L": 20.0, "T": 30.0}
SPEX_PIXELS, SPEX_RANGE = 400, (6_600.0, 24_000.0)
BLUE = 15_810.0
XP_LABELS = ("teff", "logg", "fe_h", "alpha_m", "ak_targ", "j", "h", "k", "phot_g_mean_mag", "phot_bp_mean_mag")
MILES_LABELS = LAMOST_LABELS = ("teff", "logg", "fe_h")


# ------------------------------------------------------------------------------------------------------------- samples


@dataclass(frozen=True)
class Stars:
    """Spectra of one kind, which rows of them are learnt from, asked while one develops, or asked for the record."""

    rows: Dataset
    parts: dict[str, Array]
    labels: dict[str, Array]


def _thirds(number: int, learnt: int, seed: int = 3) -> dict[str, Array]:
    """Some stars to learn from, and the rest in halves."""
    order = np.random.default_rng(seed).permutation(number)
    rest = order[learnt:]
    return {"learnt": order[:learnt], "validation": rest[: len(rest) // 2], "test": rest[len(rest) // 2 :]}


def _columns(rows: Dataset, names: Sequence[str]) -> dict[str, Array]:
    found = [*names, *(f"{name}_err" for name in names if f"{name}_err" in rows.column_names)]
    return {name: np.asarray(rows[name][:], np.float64) for name in found}


def _rows(wavelength: Array, flux: Array, error: Array, mask: Array, power: float | None = None) -> Dataset:
    columns = {"wavelength": wavelength, "flux": flux, "flux_error": error, "mask": mask}
    stars = {name: list(column) for name, column in columns.items()} | {"object_id": [str(i) for i in range(len(flux))]}
    return Dataset.from_dict(stars | ({} if power is None else {"resolving_power": [power] * len(flux)}))


def gaia_xp(shared: Path | None) -> Stars:
    """Observed; learnt from and asked are validation stars, which are not in the training of the checkpoint."""
    folder = str(build_gaia_xp(cache_dir() / "gaia-xp"))
    parts = [load_dataset(folder, split=split) for split in ("validation", "test")]
    validation, number = len(parts[0]), 1_500
    rows = concatenate_datasets([parts[0], parts[1].select(range(2_000))])
    order = np.arange(len(rows))
    split = {"learnt": order[:number], "validation": order[number:validation][:2_000], "test": order[validation:]}
    return Stars(rows, split, _columns(rows, XP_LABELS))


def miles(shared: Path | None) -> Stars:
    """Observed, 3,000-10,000 K, with all labels."""
    folder = str(build_miles(cache_dir() / "miles"))
    parts = [load_dataset(folder, split=split) for split in ("train", "validation", "test")]
    rows = concatenate_datasets(parts)
    labels = _columns(rows, MILES_LABELS)
    known = np.isfinite(np.sum([labels[name] for name in MILES_LABELS], axis=0))
    known &= (labels["teff"] > 3_000) & (labels["teff"] < 10_000)
    ends = np.cumsum([len(part) for part in parts])
    of = np.searchsorted(ends, np.arange(len(rows)), side="right")[known]
    split = {name: np.flatnonzero(of == i) for i, name in enumerate(("learnt", "validation", "test"))}
    rows = rows.select(np.flatnonzero(known))
    rows = rows.add_column("resolving_power", [2_200.0] * len(rows))
    return Stars(rows, split, {name: values[known] for name, values in labels.items()})


def lamost(shared: Path | None) -> Stars:
    with np.load(_shared(shared, "lamost_dr1_labelled.npz"), allow_pickle=False) as file:
        wavelength, flux, error, labels = (file[name] for name in ("wavelength", "flux", "flux_error", "labels"))
    own = np.flatnonzero(np.isfinite(labels).all(axis=1))
    rows = _rows(np.tile(wavelength, (len(own), 1)), flux[own], error[own], ~(error[own] > 0), 1_800.0)
    some = np.arange(len(own))
    return Stars(
        rows,
        {"learnt": some, "validation": some, "test": some},
        dict(zip(LAMOST_LABELS, labels[own].T.astype(float), strict=True)),
    )


def apogee_dr12(shared: Path | None) -> Stars:
    """100 pixels of 336 observed giants."""
    with np.load(_shared(shared, "apogee_dr12_window.npz"), allow_pickle=False) as file:
        labels = {name: file[name].astype(float) for name in ("teff", "logg", "fe_h", "mg_h", "alpha_m")}
        flux, error, wavelength = file["flux"], file["flux_err"], file["wavelength_A"]
    rows = _rows(np.tile(wavelength, (len(flux), 1)), flux, error, ~(error > 0) | ~np.isfinite(flux))
    return Stars(rows, _thirds(len(flux), 120), labels)


def _shared(folder: Path | None, name: str) -> Path:
    path = (folder or Path()) / name
    if folder is None or not path.is_file():
        raise ValueError(f"shared: expected a folder with {name}, got {folder}")
    return path


def spex(shared: Path | None) -> Stars:
    """Observed M, L and T dwarfs, one spectrum a source, whose optical type, or that of the literature, is known."""
    wheel = fetch_package_file(*SPLAT)
    spectra, types = [], []
    with zipfile.ZipFile(wheel) as archive:
        tables = {
            name: list(csv.DictReader(io.StringIO(archive.read(f"splat/db/{name}.csv").decode("utf-8-sig", "replace"))))
            for name in ("source_data", "spectral_data")
        }
        known = {row["SOURCE_KEY"]: _type(row["OPT_TYPE"]) or _type(row["LIT_TYPE"]) for row in tables["source_data"]}
        grid = np.geomspace(*SPEX_RANGE, SPEX_PIXELS)
        best = {row["SOURCE_KEY"]: row for row in sorted(tables["spectral_data"], key=_signal)}
        for source, row in sorted(best.items()):
            name = f"splat/resources/Spectra/Public/SPEX-PRISM/{row['DATA_FILE']}.gz"
            if not known.get(source) or name not in archive.namelist():
                continue
            with fits.open(io.BytesIO(gzip.decompress(archive.read(name)))) as file:
                image = np.asarray(file[0].data, np.float64)
            if image.ndim != 2 or image.shape[0] != 3 or image.shape[1] < 300:
                continue
            wavelength, flux, error = image[0] * 1e4, image[1], image[2]
            good = np.isfinite(flux) & np.isfinite(error) & (error > 0)
            if good.sum() < 300 or wavelength[good][0] > grid[0] or wavelength[good][-1] < grid[-1]:
                continue
            spectra.append([np.interp(grid, wavelength[good], values[good]) for values in (flux, error)])
            types.append(known[source])
    flux, error = np.array(spectra).transpose(1, 0, 2)
    unit = np.median(flux, axis=1, keepdims=True)
    kept = (unit > 0)[:, 0] & (np.median(flux / error, axis=1) > 10)
    flux, error = (flux / unit)[kept], (error / unit)[kept]
    rows = _rows(np.tile(grid, (len(flux), 1)), flux, error, np.zeros(flux.shape, bool), 120.0)
    return Stars(rows, _thirds(len(flux), 1_100), {"spt": np.array(types)[kept]})


def _signal(row: Mapping[str, str]) -> float:
    return float(row["MEDIAN_SNR"] or 0.0)


def _type(text: str) -> float | None:
    """L3.5 is 23.5; None for what is no such type."""
    text = text.strip().lstrip("sdeu/")
    digits = text[1:].split(" ")[0].rstrip(":+abgdeVI()?")
    try:
        found = TYPES[text[:1]] + float(digits)
    except (KeyError, ValueError):
        return None
    return found if 0 <= found - TYPES[text[:1]] < 10 else None


def giants(shared: Path | None) -> Stars:
    """
    Synthetic spectra (blue detector) of giants whose lines are a tenth deeper, more so in some of them, and whose
    continuum waves by a percent: what a checkpoint knows, made by something else.
    """
    number, generator = 1_900, np.random.default_rng(12)
    source = SyntheticStars("apogee-apstar", seed=1, label_ranges={"logg": (0.5, 3.3), "teff": (3_800.0, 5_200.0)})
    columns = source.draw(number, generator)
    blue = columns["wavelength"][0] < BLUE  # one of three detectors, so that networks do not take minutes
    columns |= {name: columns[name][:, blue] for name in ("wavelength", "flux", "flux_error", "mask")}
    position = np.linspace(0.0, 1.0, columns["flux"].shape[1])

    def smooth(waves: int, size: float) -> Array:
        phases = generator.uniform(0.0, 2.0 * np.pi, waves)
        return size * np.mean([np.sin(2.0 * np.pi * (i + 1) * position + p) for i, p in enumerate(phases)], axis=0)

    deeper, waves = 1.1 + smooth(40, 0.3), 1.0 + smooth(6, 0.03)
    flux = (1.0 - (1.0 - columns["flux"]) * deeper) * waves
    rows = _rows(columns["wavelength"], flux, columns["flux_error"], columns["mask"])
    c, n, logg, teff = (columns[name].astype(float) for name in ("c_fe", "n_fe", "logg", "teff"))
    labels = {
        "teff": 1.01 * teff + 40.0,
        "logg": logg + 0.2 + 0.08 * (logg - 2.0),
        "mg_h": (columns["mg_fe"] + columns["fe_h"]).astype(float) + 0.1,
        # The mass of a giant shows in its carbon and nitrogen.
        "log_age": 0.7 + 1.2 * np.tanh(c - n + 0.2 * (logg - 2.5)) + 0.1 * generator.standard_normal(number),
        "log_age_err": np.full(number, 0.1),
    }
    return Stars(rows, _thirds(number, 1_100), labels)


SAMPLES: dict[str, Callable[[Path | None], Stars]] = {
    "gaia-xp": gaia_xp, "miles": miles, "lamost": lamost, "apogee-dr12": apogee_dr12, "spex": spex, "giants": giants,
}  # fmt: skip


@dataclass(frozen=True)
class Pool:
    """A sample with what the checkpoint says of it."""

    flux: Array
    flux_error: Array
    states: States
    labels: dict[str, Array]
    parts: dict[str, Array]
    rung: int

    def save(self, path: Path) -> None:
        states = {f"states_{name}": getattr(self.states, name) for name in STATES}
        labels = {f"label_{name}": values for name, values in self.labels.items()}
        parts = {f"part_{name}": rows for name, rows in self.parts.items()}
        about = {"inputs": np.array(self.states.inputs), "rung": np.array(self.rung)}
        arrays: dict[str, Any] = {**states, **labels, **parts, **about}
        np.savez(path, flux=self.flux, flux_error=self.flux_error, **arrays)

    @classmethod
    def load(cls, path: Path) -> "Pool":
        with np.load(path, allow_pickle=False) as file:
            inputs = [str(name) for name in file["inputs"]]
            nowhere = np.zeros(file["flux"].shape[1])
            said = {name: file[f"states_{name}"] for name in STATES}
            states = States(inputs, **said, pixels=file["flux"], wavelength=nowhere)
            labels, parts = (
                {name.removeprefix(key): file[name] for name in file.files if name.startswith(key)}
                for key in ("label_", "part_")
            )
            return cls(file["flux"], file["flux_error"], states, labels, parts, int(file["rung"]))


STATES = ("values", "errors", "coefficients", "reliability")


@functools.cache
def _checkpoint() -> Any:
    return load_checkpoint(BASE_CHECKPOINT)


def load_config() -> tuple[SpectraFMConfig, str]:
    """A config of the checkpoint that may be changed, and what tells its weights from others."""
    model, tokenizer = _checkpoint()
    told = repr(sorted(checksums(model, tokenizer).items()))
    return copy.deepcopy(model.config), hashlib.sha256(told.encode()).hexdigest()[:8]


def pool(name: str, make: Callable[[], Stars], folder: Path) -> Pool:
    """A sample, out of the folder where it is there and was made with this checkpoint."""
    path = folder / f"{name}-{load_config()[1]}.npz"
    if not path.is_file():
        stars = make()
        model, tokenizer = _checkpoint()
        rung, states, used, _ = frozen_states(model, tokenizer, stars.rows.with_format("numpy"))
        place = np.full(len(stars.rows), -1)
        place[used] = np.arange(len(used))
        parts = {part: place[rows][place[rows] >= 0] for part, rows in stars.parts.items()}
        flux, error = pixels_of(stars.rows.select(used).with_format("numpy"))
        folder.mkdir(parents=True, exist_ok=True)
        Pool(flux, error, states, {k: v[used] for k, v in stars.labels.items()}, parts, rung).save(path)
    return Pool.load(path)


# --------------------------------------------------------------------------------------------------------------- tasks


@dataclass(frozen=True)
class Task:
    """A label of a sample, which answers of the checkpoint are held back, and which stars take part."""

    sample: str
    label: str
    make: Callable[[Mapping[str, Array]], Array]
    stars: tuple[int, ...] = (30, 100, 300, 1_000)
    held_back: tuple[str, ...] = ()
    which: Callable[[Mapping[str, Array]], Array] | None = None


def _get(name: str, shift: float = 0.0) -> Callable[[Mapping[str, Array]], Array]:
    return lambda labels: labels[name] + shift


def _difference(first: str, second: str) -> Callable[[Mapping[str, Array]], Array]:
    return lambda labels: labels[first] - labels[second]


def _like_magnesium(labels: Mapping[str, Array]) -> Array:
    """Goes along with [alpha/M], bends with [Fe/H] and Teff, and has an error of its own of 0.05."""
    alpha, iron, teff = (labels[name] for name in ("alpha_m", "fe_h", "teff"))
    bend = 0.04 * np.tanh(2 * (iron + 0.5)) + 0.03 * np.clip((teff - 4800) / 1000, -1, 2) ** 2
    return 1.15 * alpha + bend + 0.05 * np.random.default_rng(len(alpha)).standard_normal(len(alpha))


def _giant(labels: Mapping[str, Array]) -> Array:
    return labels["logg"] < 3.0


FEW = (30, 100, 300)
TASKS = {
    "XP: ak_targ": Task("gaia-xp", "ak_targ", _get("ak_targ")),
    "XP: J - K": Task("gaia-xp", "j_k", _difference("j", "k")),
    "XP: like [Mg/Fe]": Task("gaia-xp", "like_mg", _like_magnesium),
    "XP: [alpha/M], unknown": Task("gaia-xp", "alpha_m", _get("alpha_m"), held_back=("alpha_m",)),
    "XP: log g + 0.85": Task("gaia-xp", "logg", _get("logg", 0.85)),
    "XP giants: [Fe/H], unknown": Task("gaia-xp", "fe_h", _get("fe_h"), held_back=("fe_h", "alpha_m"), which=_giant),
    "XP giants: G - K": Task("gaia-xp", "g_k", _difference("phot_g_mean_mag", "k"), which=_giant),
    "MILES: Teff": Task("miles", "teff", _get("teff"), FEW),
    "MILES: log g": Task("miles", "logg", _get("logg"), FEW),
    "MILES: [Fe/H]": Task("miles", "fe_h", _get("fe_h"), FEW),
    "LAMOST: Teff": Task("lamost", "teff", _get("teff"), (30,)),
    "LAMOST: log g": Task("lamost", "logg", _get("logg"), (30,)),
    "LAMOST: [Fe/H]": Task("lamost", "fe_h", _get("fe_h"), (30,)),
    "APOGEE DR12: [Fe/H]": Task("apogee-dr12", "fe_h", _get("fe_h"), (30, 100)),
    "APOGEE DR12: [Mg/H]": Task("apogee-dr12", "mg_h", _get("mg_h"), (30, 100)),
    "SpeX: spectral type": Task("spex", "spt", _get("spt")),
    "giants: Teff": Task("giants", "teff", _get("teff")),
    "giants: log g": Task("giants", "logg", _get("logg")),
    "giants: [Mg/H]": Task("giants", "mg_h", _get("mg_h")),
    "giants: log age": Task("giants", "log_age", _get("log_age")),
}
RUN = ("task", "stars", "split", "draw")


def without(states: States, held_back: tuple[str, ...]) -> States:
    """The states without some answers."""
    kept = [i for i, name in enumerate(states.inputs) if name not in held_back]
    inputs = [states.inputs[i] for i in kept]
    values, errors = states.values[:, kept], states.errors[:, kept]
    return States(inputs, values, errors, states.coefficients, states.reliability, states.pixels, states.wavelength)


@dataclass(frozen=True)
class Learnt:
    """Values and errors (evaluated stars,) of each model, which heads were chosen, and the seconds that it took."""

    answers: dict[str, tuple[Array, Array]]
    heads: str
    seconds: float


def learn(
    stars: Pool, label: str, target: Array, error: Array, rows: Array, asked: Array, draw: int,
    held_back: tuple[str, ...] = (), rivals: bool = True,
) -> Learnt:  # fmt: skip
    """
    What `finetune` and, with `rivals`, all others say of the stars `asked` after learning from `rows`.

    Parameters
    ----------
    stars : Pool
    label : str
    target, error : array of shape (stars,)
        Of all stars of the pool; errors are 0 where unknown.
    rows, asked : array of int
    draw : int
        Seed of the folds and the networks.
    held_back : tuple of str
        Answers of the checkpoint that nobody sees.
    rivals : bool
    """
    states = without(stars.states, held_back)
    config, _ = load_config()
    start = time.process_time()
    folds = make_folds([str(row) for row in rows], FOLDS, draw)
    pixels = fit_pixels(states.pixels[rows])
    config.pixel_sets = [[0, *pixels.directions.shape]]
    choice = choose_heads(config, stars.rung, label, states[rows], target[rows], error[rows], folds, pixels)
    seconds = time.process_time() - start
    components: Components = pixels(torch.from_numpy(states.pixels[asked]))
    answers = {OWN: choice.predict(config, states[asked], components)}
    if rivals and label in states.inputs:
        at = states.inputs.index(label)
        answers[UNTOUCHED] = states.values[asked, at], states.errors[asked, at]
    if rivals:
        both = np.concatenate([rows, asked])
        pixels_of_both = stars.flux[both], stars.flux_error[both]
        sample = Sample(*pixels_of_both, states[both], target[both, None], error[both, None])
        order = np.arange(len(both))
        part = order[: len(rows)], order[len(rows) :]
        for rival, (values, sigmas) in ask_rivals(sample, [part], draw).items():
            answers[rival] = values[part[1], 0], sigmas[part[1], 0]
    return Learnt(answers, str(choice), seconds)


def measure(task: Task, stars: Pool, n_stars: int, split: str, draw: int, rivals: bool) -> list[dict[str, Any]]:
    """Figures of all models, or of `finetune` alone, in one draw, a line each."""
    target = task.make(stars.labels)
    error = np.nan_to_num(stars.labels.get(f"{task.label}_err", np.zeros_like(target)))
    takes_part = np.isfinite(target)
    if task.which is not None:
        takes_part &= task.which(stars.labels)
    learnt, asked = (rows[takes_part[rows]] for rows in (stars.parts["learnt"], stars.parts[split]))
    rows = np.random.default_rng([draw, n_stars, split == "test"]).permutation(learnt)[:n_stars]
    if len(rows) < n_stars:
        return []
    asked = np.setdiff1d(asked, rows)
    found = learn(stars, task.label, target, error, rows, asked, draw, task.held_back, rivals)
    lines = []
    for model, (values, sigmas) in found.answers.items():
        figures = label_metrics(values, sigmas, target[asked], error[asked])
        lines.append(
            {"model": model, "rmse": f"{figures['rmse']:.6g}", "scatter": f"{figures['robust_scatter']:.6g}"}
            | {"error_over_sigma": f"{figures['robust_z']:.3f}", "asked": str(figures["n"])}
            | {"head": found.heads if model == OWN else "", "seconds": f"{found.seconds:.1f}"}
        )
    return lines


# -------------------------------------------------------------------------------------------------------------- tables


def summary(lines: Sequence[Mapping[str, str]]) -> str:
    """
    For each task and number of stars: the RMSE of `finetune`, the best of the others in the mean of the draws, ratio
    and its standard error over the draws, rank among all, error/sigma.
    """
    header = ["task", "stars", "fine-tuned", "best other", "", "ratio", "rank", "error/sigma", ""]
    table, ratios, tied, sigmas = [header, ["---"] * len(header)], [], [], []
    standing: dict[str, list[tuple[float, float]]] = {}  # of each model: rank, and RMSE over that of `finetune`
    keys = dict.fromkeys((line["task"], int(line["stars"])) for line in lines)
    for task, n_stars in sorted(keys, key=lambda key: (list(TASKS).index(key[0]), key[1])):
        own = [line for line in lines if (line["task"], int(line["stars"])) == (task, n_stars)]
        by_model: dict[str, dict[str, float]] = {}
        for line in own:
            by_model.setdefault(line["model"], {})[line["draw"]] = float(line["rmse"])
        draws = sorted(by_model[OWN])
        means = {model: float(np.mean([found[draw] for draw in draws])) for model, found in by_model.items()}
        best = min((model for model in means if model != OWN), key=means.__getitem__)
        difference = np.array([by_model[OWN][draw] - by_model[best][draw] for draw in draws])
        error = difference.std(ddof=1) / np.sqrt(len(draws)) if len(draws) > 1 else 0.0
        ratio, rank = means[OWN] / means[best], 1 + sum(mean < means[OWN] for mean in means.values())
        sigma = float(np.median([float(line["error_over_sigma"]) for line in own if line["model"] == OWN]))
        for model, mean in means.items():
            place = 1.0 + sum(other < mean for other in means.values())
            standing.setdefault(model, []).append((place, mean / means[OWN]))
        ratios.append(ratio)
        tied.append(difference.mean() <= error)
        sigmas.append(0.85 <= sigma <= 1.2)
        marks = ["" if tied[-1] else "behind", "" if sigmas[-1] else "outside"]
        table.append(
            [
                task,
                str(n_stars),
                f"{means[OWN]:.4g}",
                f"{means[best]:.4g}",
                best,
                f"{ratio:.2f} ± {error / means[best]:.2f}" if len(draws) > 1 else f"{ratio:.2f}",
                str(rank),
                f"{sigma:.2f}",
                " ".join(marks).strip(),
            ]  # fmt: skip
        )
    text = "\n".join(f"| {' | '.join(row)} |" for row in table)
    if not ratios:
        return text
    others = "; ".join(
        f"{model} {np.mean([place for place, _ in found]):.2f} ({np.exp(np.mean(np.log([by for _, by in found]))):.2f})"
        for model, found in sorted(standing.items(), key=lambda item: np.mean([place for place, _ in item[1]]))
    )
    rows = len(ratios)
    return (
        f"{text}\n\nMean rank (RMSE over that of {OWN}, geometric mean): {others}.\n\n"
        f"Mean ratio to the best other {np.mean(ratios):.3f} (geometric {np.exp(np.mean(np.log(ratios))):.3f}); best, "
        f"or within a standard error of it, in {sum(tied)} of {rows} rows; error/sigma between 0.85 and 1.2 in "
        f"{sum(sigmas)} of {rows}."
    )


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="benchmark_transfer.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--shared", type=Path, metavar="DIR", help="with the files of LAMOST and APOGEE DR12")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, metavar="TASK", help="default: all that can be had")
    parser.add_argument("--stars", type=int, nargs="+", default=[30, 100, 300, 1_000], metavar="N")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--split", choices=("validation", "test"), default="validation", help="of evaluated stars")
    parser.add_argument("--again", action="store_true", help=f"measure {OWN!r} again")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"{args.split}.csv"
    lines = list(csv.DictReader(path.open())) if path.exists() else []
    runs = [
        (task, n_stars, args.split, draw)
        for task in args.tasks or TASKS
        for n_stars in args.stars
        for draw in range(args.draws)
        if n_stars in TASKS[task].stars
    ]
    chosen = {tuple(map(str, run)) for run in runs}
    if args.again:
        lines = [line for line in lines if line["model"] != OWN or tuple(line[name] for name in RUN) not in chosen]
    done: dict[tuple[str, ...], set[str]] = {}
    for line in lines:
        done.setdefault(tuple(line[name] for name in RUN), set()).add(line["model"])
    pools: dict[str, Pool] = {}
    for run in tqdm(runs, unit="run"):
        models = done.get(tuple(map(str, run)), set())
        if OWN in models:
            continue
        task = TASKS[run[0]]
        if task.sample not in pools:
            try:
                make = functools.partial(SAMPLES[task.sample], args.shared)
                pools = {task.sample: pool(task.sample, make, args.output / "samples")}
            except ValueError as error:
                if args.tasks:
                    raise
                tqdm.write(f"left out: {run[0]}: {error}")
                continue
        found = measure(task, pools[task.sample], run[1], args.split, run[3], rivals=not models)
        lines += [{**dict(zip(RUN, map(str, run), strict=True)), **line} for line in found]
        write(path, lines)
    if lines:
        print(summary([line for line in lines if tuple(line[name] for name in RUN) in chosen]))
    return 0


def write(path: Path, lines: Sequence[Mapping[str, str]]) -> None:
    temporary = path.with_suffix(".part")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
