# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""The experiment of Koblischke & Bovy 2024 on observed stars: [Fe/H] learned from 100 iron-rich ones, asked of all.

    python scripts/paper_experiment.py                     # test stars, ten draws of the 100
    python scripts/paper_experiment.py --split validation  # during development
    python scripts/paper_experiment.py --tune              # search the settings of all methods again
    python scripts/paper_experiment.py --show scripts/recipes/paper-experiment.summary.json    # what came out here

Each method gets the same 100 stars with the same pixels, and its settings were chosen by the same rule: the smallest
RMSE on other stars of the kind that the 100 are, averaged over three draws (scripts/recipes/paper-experiment.json
holds all that was tried). The same stars make the errors right on their kind. No iron-poor star plays a part in any
choice. What has been computed stays in the output folder, and a later run goes on from there.
"""

import functools
import itertools
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow.parquet as pq
from matplotlib.figure import Figure
from numpy.typing import NDArray
from tqdm.auto import tqdm

from paper_methods import Columns, Parts, PretrainedMLP, SpectraFM, spectra
from spectrafm_cli import Parser
from spectrafm_hf.baselines import Baseline, CannonBaseline, MLPBaseline, RidgeBaseline, Spectra, transform_flux
from spectrafm_hf.data import build_gaia_xp, build_miles, cache_dir, flat_pixels
from spectrafm_hf.files import complete_file
from spectrafm_hf.instruments import Instrument
from spectrafm_hf.metrics import label_metrics
from spectrafm_hf.plots import BLUE, GREY, INK, ORANGE


RECIPE = Path(__file__).parent / "recipes" / "paper-experiment.json"
SHARED = Path(os.environ.get("SPECTRAFM_SHARED") or Path(__file__).parents[2] / "shared")
N_STARS = 100
LABELS = ("fe_h", "teff", "logg")
#: Methods that pictures tell from the others.
BEST, CEILING = "spectrafm", "ceiling"
FIGURES = {"rmse": "RMSE", "bias": "bias", "robust_scatter": "MAD", "robust_z": "error/sigma"}


# --------------------------------------------------------------------------------------------------------------- tasks


@dataclass(frozen=True)
class Task:
    """
    Observed stars, the pixels that the 100 are seen in, and what makes a star iron-rich.

    Attributes
    ----------
    name : str
    window : (lowest, highest)
        Angstrom.
    iron_rich, iron_poor : float
        The 100 have a higher [Fe/H] than the one; there are figures for the stars below the other.
    read : callable
        Columns in the project's schema of a split, `"all"` where there are no splits; ValueError if they are not there.
    instrument : callable
        What observes synthetic stars on the pixels of the columns.
    n_choosing : int
    stage_2 : (lowest, highest), optional
        Range in which observed stars of all kinds are seen before the 100.
    by_depth : bool
        Whether observed and synthetic spectra differ by their lines rather than by the calibration of the flux; see
        `CalibratedStars`.
    splits : bool
        Whether the data set has splits of thousands of stars. Otherwise, what is left of all stars beside the 100 and
        those that choose is halved in each draw: one half is asked, the other belongs to `training`.
    """

    name: str
    window: tuple[float, float]
    iron_rich: float
    iron_poor: float
    read: Callable[[str], Columns]
    instrument: Callable[[], Instrument]
    n_choosing: int = 500
    splits: bool = True
    stage_2: tuple[float, float] | None = None
    by_depth: bool = False

    def draw(self, stars: Columns, n: int, seed: int) -> Columns:
        """Iron-rich stars with all labels, drawn at random."""
        return take(stars, np.random.default_rng(seed).choice(self._rich(stars), n, replace=False))

    def parts(self, split: str, draw: int) -> Parts:
        """The stars of a draw. Few stars are asked as `"test"` only; as `"validation"`, those that choose."""
        if self.splits:
            training, validation = self.read("train"), self.read("validation")
            asked = validation if split == "validation" else self.read(split)
            return Parts(self.draw(training, N_STARS, draw), training, self.draw(validation, self.n_choosing, 0), asked)
        stars = self.read("all")
        rich = np.random.default_rng(0).permutation(self._rich(stars))
        generator = np.random.default_rng([1, draw])
        hundred = generator.choice(rich[self.n_choosing :], N_STARS, replace=False)
        rest = np.setdiff1d(np.arange(len(stars["fe_h"])), [*rich[: self.n_choosing], *hundred])
        rest = generator.permutation(rest)
        rows, others = np.split(rest, [len(rest) // 2])
        choosing = take(stars, rich[: self.n_choosing])
        return Parts(
            take(stars, hundred),
            take(stars, np.concatenate([hundred, others])),
            choosing,
            choosing if split == "validation" else take(stars, rows),
        )

    def _rich(self, stars: Columns) -> NDArray[Any]:
        labels = [stars[name] for name in ("teff", "logg", "alpha_m", "ak_targ") if name in stars]
        return np.flatnonzero((stars["fe_h"] > self.iron_rich) & np.isfinite(np.sum(labels, axis=0)))


def take(stars: Columns, rows: NDArray[Any]) -> Columns:
    return {name: column[rows] for name, column in stars.items()}


def read_columns(folder: Path, split: str, names: list[str]) -> Columns:
    """Stars of a data set with a known [Fe/H] and no masked pixel."""
    files = sorted((folder / "data").glob(f"{split}-*.parquet"))
    table = pq.read_table(files, columns=["wavelength", "flux", "flux_error", "mask", *names])
    stars = {name: table[name].to_numpy() for name in names}
    for name in ("wavelength", "flux", "flux_error", "mask"):
        stars[name] = flat_pixels(table[name])[0].reshape(len(table), -1)
    return take(stars, np.isfinite(stars["fe_h"]) & ~stars["mask"].any(axis=1))


@functools.cache
def read_gaia_xp(split: str) -> Columns:
    errors = [f"{name}_err" for name in LABELS]
    return read_columns(build_gaia_xp(cache_dir() / "gaia-xp"), split, [*LABELS, *errors, "alpha_m", "ak_targ"])


@functools.cache
def read_miles(split: str) -> Columns:
    """FGK stars of all splits. The library states no errors: S/N counts as 100."""
    folder = build_miles(cache_dir() / "miles")
    stars = read_columns(folder, "*", [*LABELS, *(f"{name}_err" for name in LABELS)])
    stars["flux_error"] = np.float32(0.01) * stars["flux"]
    return take(stars, np.isfinite(stars["logg"]) & (stars["teff"] > 4000) & (stars["teff"] < 7000))


@functools.cache
def read_apogee_dr12(split: str) -> Columns:
    """336 giants of APOGEE DR12, 100 pixels each."""
    path = SHARED / "data" / "apogee_dr12_window.npz"
    if not path.is_file():
        raise ValueError(f"apogee-dr12: expected the file {path}: set SPECTRAFM_SHARED to the folder that holds data/")
    with np.load(path) as file:
        stars = {name: file[name] for name in (*LABELS, "alpha_m", "flux")}
        stars["flux_error"], wavelength = file["flux_err"], file["wavelength_A"]
    stars |= {f"{name}_err": np.full(len(stars["fe_h"]), np.nan) for name in LABELS}
    stars["wavelength"] = np.broadcast_to(wavelength, stars["flux"].shape)
    return stars | {"mask": np.zeros(stars["flux"].shape, bool)}


def apogee_window() -> Instrument:
    """APOGEE on the pixels of `read_apogee_dr12`, half a pixel beside those of the apStar grid."""
    grid = {"log10_start": 4.179003, "log10_step": 6.0e-6, "first": 322, "last": 421}
    settings = dict(Instrument.load("apogee").settings)
    settings["wavelength"] = {"medium": "vacuum", "detectors": [grid]}
    settings["noise"] = {"snr": settings["noise"]["snr"], "flux_power": 0.5}
    return Instrument.from_settings(settings | {"name": "apogee-dr12"})


def _gaia_xp(name: str, window: tuple[float, float]) -> Task:
    return Task(name, window, -1.0, -1.0, read_gaia_xp, lambda: Instrument.load("gaia-xp"), stage_2=(3360.0, 6399.0))


TASKS = {
    task.name: task
    for task in (
        _gaia_xp("xp-red", (6400.0, 10200.0)),
        _gaia_xp("xp-narrow", (8400.0, 8900.0)),
        # From H beta to Fe 5406: 688 pixels.
        Task(
            "miles", (4840.0, 5460.0), -0.5, -0.5, read_miles, lambda: Instrument.load("miles"), 100, False, None, True
        ),
        # Three of the 336 have [Fe/H] < -1, 36 have [Fe/H] < -0.3.
        Task("apogee-dr12", (15168.0, 15190.0), -0.1, -0.3, read_apogee_dr12, apogee_window, 50, False, None, True),
    )
}


# ------------------------------------------------------------------------------------------------------------- methods


class Method(Protocol):
    """What takes part: its title, what is tried for each of its settings, and how it goes about it."""

    @property
    def title(self) -> str: ...

    @property
    def tried(self) -> Mapping[str, list[Any]]: ...

    def fit_predict(
        self,
        task: Task,
        settings: Mapping[str, Any],
        parts: Parts,
        draw: int,
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """[Fe/H] and its error for the stars that are asked. Only stage 2 and the ceiling look at `parts.training`."""


class GradientBoosting(Baseline):
    """Boosted trees on the principal components of the pixels, one label at a time (scikit-learn)."""

    def __init__(self, n_components: int = 20, learning_rate: float = 0.05, max_iter: int = 200, leaves: int = 4):
        self.n_components, self.learning_rate, self.max_iter, self.leaves = (
            n_components,
            learning_rate,
            max_iter,
            leaves,
        )

    def fit(self, train: Spectra) -> "GradientBoosting":
        from sklearn.ensemble import HistGradientBoostingRegressor

        flux = self._log(train.flux, train.flux_error)
        self.center = flux.mean(axis=0)
        self.components = np.linalg.svd(flux - self.center, full_matrices=False)[2][: self.n_components].T
        self.models = [
            HistGradientBoostingRegressor(
                learning_rate=self.learning_rate,
                max_iter=self.max_iter,
                max_leaf_nodes=self.leaves,
                min_samples_leaf=5,
                random_state=0,
            ).fit((flux - self.center) @ self.components, label)
            for label in train.labels.T
        ]
        return self

    def raw_predict(self, flux: NDArray[Any], flux_error: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        inputs = (self._log(flux, flux_error) - self.center) @ self.components
        values = np.stack([model.predict(inputs) for model in self.models], axis=1)
        return values, np.ones_like(values)

    @staticmethod
    def _log(flux: NDArray[Any], flux_error: NDArray[Any]) -> NDArray[Any]:
        return np.nan_to_num(transform_flux(flux, flux_error, "log")[0])


@dataclass(frozen=True)
class Classical:
    """How one is made, which labels it is fitted to, and what is tried for each of its settings."""

    title: str
    make: Callable[..., Baseline]
    labels: tuple[str, ...]
    tried: Mapping[str, list[Any]]

    def fit_predict(
        self,
        task: Task,
        settings: Mapping[str, Any],
        parts: Parts,
        draw: int,
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Fitted to the 100 stars alone; errors calibrated on the stars of their kind."""
        model = self.make(**settings).fit(spectra(parts.hundred, task.window, self.labels))
        model.calibrate(spectra(parts.choosing, task.window, self.labels))
        given = spectra(parts.asked, task.window, self.labels)
        values, errors = model.predict(given.flux, given.flux_error)
        column = self.labels.index("fe_h")
        return values[:, column], errors[:, column]


METHODS: dict[str, Method] = {
    "ridge": Classical(
        "ridge",
        RidgeBaseline,
        ("fe_h",),
        {"alpha": [1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0], "transform": ["log", "asinh", "raw"]},
    ),
    "cannon": Classical(
        "quadratic Cannon",
        CannonBaseline,
        LABELS,
        {"alpha": [0.0, 0.01, 0.1, 1.0], "decorrelate": [False, True], "use_prior": [False, True]},
    ),
    "boosting": Classical(
        "gradient boosting",
        GradientBoosting,
        ("fe_h",),
        {"n_components": [10, 20, 40], "learning_rate": [0.02, 0.05], "max_iter": [100, 300], "leaves": [3, 6]},
    ),
    "mlp": Classical(
        "MLP of the paper, from scratch",
        lambda **settings: MLPBaseline(widths=(2048, 1280, 1024), batch_size=50, **settings),
        ("fe_h",),
        {
            "epochs": [30, 120],
            "learning_rate": [1e-4, 5e-4],
            "noise": [0.0, 1.0],
            "n_components": [0],
            "degrees_of_freedom": [0.0, 3.0],
        },
    ),
    "mlp-pretrained": PretrainedMLP(
        "MLP, synthetic stars, then the 100", False, {"epochs": [3, 10, 30, 100], "learning_rate": [3e-5, 3e-4]}
    ),
    "mlp-calibrated": PretrainedMLP("MLP, synthetic stars calibrated on the 100", True, {"pretraining": [5, 10, 20]}),
    BEST: SpectraFM("SpectraFM, three stages", tried={"dropout": [0.0, 0.2]}),
    "spectrafm-no-stage-1": SpectraFM("SpectraFM without stage 1", stage_1=False),
    "spectrafm-no-stage-2": SpectraFM("SpectraFM without stage 2", stage_2=False),
    "spectrafm-alone": SpectraFM("SpectraFM, stage 3 as in the paper", stage_3="alone"),
    CEILING: SpectraFM("SpectraFM on all training stars (ceiling)", stage_3="everything"),
}


# ----------------------------------------------------------------------------------------------------------- computing


def tune(task: Task, method: Method) -> dict[str, Any]:
    """The settings with the smallest RMSE on stars of the same kind, and all that were tried."""
    trials = []
    combinations = [
        dict(zip(method.tried, values, strict=True)) for values in itertools.product(*method.tried.values())
    ]
    draws = [task.parts("validation", draw) for draw in range(3)]
    for settings in tqdm(combinations, desc=f"{task.name}, {method.title}", unit="settings", delay=2):
        errors = []
        for draw, parts in enumerate(draws):
            values, _ = method.fit_predict(task, settings, replace(parts, asked=parts.choosing), draw)
            errors.append(float(np.sqrt(np.mean((values - parts.choosing["fe_h"]) ** 2))))
        trials.append({"settings": settings, "rmse": round(float(np.mean(errors)), 4)})
    return {"chosen": min(trials, key=lambda trial: trial["rmse"])["settings"], "trials": trials}


def figures(task: Task, values: NDArray[Any], errors: NDArray[Any], stars: Columns) -> dict[str, dict[str, float]]:
    """Figures of merit for all stars and, where there are any, for the iron-poor ones."""
    groups = {"all": np.ones(len(values), bool), "iron-poor": stars["fe_h"] < task.iron_poor}
    return {
        name: dict(label_metrics(values[rows], errors[rows], stars["fe_h"][rows], stars["fe_h_err"][rows]))
        for name, rows in groups.items()
        if rows.any()
    }


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with complete_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def compute(path: Path, task: Task, method: Method, settings: Mapping[str, Any], split: str, draw: int) -> None:
    """One draw of one method: figures, and the answers they are made from."""
    parts = task.parts(split, draw)
    values, errors = method.fit_predict(task, settings, parts, draw)
    answers = {"fe_h": parts.asked["fe_h"], "value": values, "error": errors}
    lists = {name: np.round(np.asarray(column, float), 4).tolist() for name, column in answers.items()}
    write_json(path, figures(task, values, errors, parts.asked) | {"settings": dict(settings), "answers": lists})


def results_of(output: Path, task: str, name: str, draws: int) -> list[dict[str, Any]]:
    return [json.loads((output / task / f"{name}-{draw}.json").read_text()) for draw in range(draws)]


def taking_part(task: Task, methods: list[str]) -> list[str]:
    """Where a task has no stage 2, the model without it is the model."""
    return [name for name in methods if task.stage_2 or name != "spectrafm-no-stage-2"]


def summary(output: Path, methods: Mapping[str, list[str]], draws: int) -> dict[str, dict[str, Any]]:
    """Mean and standard deviation over the draws, by task, method, group of stars and figure."""
    table: dict[str, dict[str, Any]] = {}
    for task, name in ((task, name) for task, names in methods.items() for name in names):
        results = results_of(output, task, name, draws)
        table.setdefault(task, {})[name] = {
            group: {
                figure: [
                    float(statistic([result[group][figure] for result in results])) for statistic in (np.mean, np.std)
                ]
                for figure in ("n", *FIGURES)
            }
            for group in ("all", "iron-poor")
            if all(group in result for result in results)
        }
    return table


def as_markdown(table: Mapping[str, Mapping[str, Any]]) -> str:
    """A table for each task; iron-poor RMSE of the MLP from scratch over that of the method in the last column."""
    parts = []
    for task, methods in table.items():
        limit = TASKS[task].iron_poor
        header = [f"{group}: {title}" for group in ("all", f"[Fe/H] < {limit:g}") for title in FIGURES.values()]
        rows = [[task, *header, "MLP / this"], ["---"] * (2 + len(header))]
        for name, groups in methods.items():
            row = [METHODS[name].title]
            for group, figure in itertools.product(("all", "iron-poor"), FIGURES):
                row.append("{:.3f} ± {:.3f}".format(*groups[group][figure]) if group in groups else "")
            both = "mlp" in methods and "iron-poor" in groups
            row.append(f"{methods['mlp']['iron-poor']['rmse'][0] / groups['iron-poor']['rmse'][0]:.2f}" if both else "")
            rows.append(row)
        parts.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
    return "\n\n".join(parts)


def draw_summary(path: Path, task: Task, methods: Mapping[str, Any]) -> None:
    """RMSE of all and of iron-poor stars by method, mean and spread of the draws; the ceiling as a line."""
    groups = [group for group in ("all", "iron-poor") if all(group in figures for figures in methods.values())]
    shown = [name for name in methods if name != CEILING] or list(methods)
    figure = Figure(figsize=(5 + 4 * len(groups), 1.6 + 0.42 * len(shown)), layout="constrained")
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for axes, group in zip(panels, groups, strict=True):
        for place, name in enumerate(shown):
            rmse, spread = methods[name][group]["rmse"]
            axes.errorbar(rmse, place, xerr=spread, fmt="o", ms=8, lw=2, color=ORANGE if name == BEST else BLUE)
            axes.annotate(f"{rmse:.3f}", (rmse, place), (0, 8), textcoords="offset points",
                          ha="center", fontsize=9, color=INK)  # fmt: skip
        if CEILING in methods:
            ceiling = methods[CEILING][group]["rmse"][0]
            axes.axvline(ceiling, color=GREY, lw=1.2, ls="--")
            axes.annotate("all training stars", (ceiling, 0), (4, 3), xycoords=axes.get_xaxis_transform(),
                          textcoords="offset points", fontsize=9, color=GREY)  # fmt: skip
        number = methods[shown[0]][group]["n"][0]
        what = f"all {number:,.0f} stars" if group == "all" else f"{number:,.0f} stars with [Fe/H] < {task.iron_poor:g}"
        axes.set_title(what, loc="left", fontsize=11, color=INK)
        axes.set_xlabel("RMSE of [Fe/H] [dex]")
        axes.set_xlim(left=0)
        axes.set_ylim(len(shown) - 0.4, -0.7)
        axes.set_yticks(range(len(shown)), [METHODS[name].title for name in shown])
        axes.grid(axis="x", color=GREY, alpha=0.25, lw=0.6)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
    figure.suptitle(
        f"{task.name}, {task.window[0]:,.0f}-{task.window[1]:,.0f} Angstrom, learned from {N_STARS} stars with "
        f"[Fe/H] > {task.iron_rich:g}",
        x=0.01, ha="left", fontsize=12, color=INK,
    )  # fmt: skip
    save_figure(figure, path)


def draw_stars(path: Path, task: Task, results: Mapping[str, dict[str, Any]]) -> None:
    """Predicted over true [Fe/H] of one draw."""
    figure = Figure(figsize=(1 + 4.2 * len(results), 4.6), layout="constrained")
    panels = figure.subplots(1, len(results), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (name, result) in zip(panels, results.items(), strict=True):
        truth, value = (np.array(result["answers"][column]) for column in ("fe_h", "value"))
        size = 3 if len(truth) > 1000 else 12
        axes.axvspan(truth.min() - 0.15, task.iron_poor, color=GREY, alpha=0.12, lw=0)
        axes.scatter(truth, value, s=size, color=ORANGE if name == BEST else BLUE, alpha=0.5, lw=0, rasterized=True)
        limits = truth.min() - 0.15, truth.max() + 0.15
        axes.plot(limits, limits, color=INK, lw=1)
        axes.set(xlim=limits, ylim=(limits[0] - 0.3, limits[1] + 0.3), xlabel="true [Fe/H]")
        rmse = ", ".join(f"{result[group]['rmse']:.2f} {group}" for group in ("all", "iron-poor") if group in result)
        axes.set_title(f"{METHODS[name].title}\nRMSE {rmse}", loc="left", fontsize=10, color=INK)
        axes.tick_params(direction="in", top=True, right=True)
    panels[0].set_ylabel("predicted [Fe/H]")
    save_figure(figure, path)


def show(output: Path, table: Mapping[str, Mapping[str, Any]]) -> None:
    """Print a summary, and write it as a table and as pictures."""
    text = as_markdown(table)
    with complete_file(output / "summary.md") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    for task, methods in table.items():
        draw_summary(output / f"{task}.png", TASKS[task], methods)
    print(text)


def save_figure(figure: Figure, path: Path) -> None:
    with complete_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="paper_experiment.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/paper-experiment"), metavar="DIR")
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="whose stars are asked")
    parser.add_argument("--draws", type=int, default=10, metavar="N", help="of the 100 stars (default: 10)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--tune", action="store_true", help="search the settings again, and write them to the recipe")
    parser.add_argument("--show", type=Path, metavar="JSON", help="only table and pictures of a summary.json")
    arguments = parser.parse_args(argv)
    if arguments.show:
        arguments.output.mkdir(parents=True, exist_ok=True)
        show(arguments.output, json.loads(arguments.show.read_text()))
        return 0

    tasks = []
    for name in arguments.tasks:
        try:
            TASKS[name].parts("validation", 0)
        except ValueError as error:
            print(f"left out: {error}", file=sys.stderr)
        else:
            tasks.append(name)
    recipe = json.loads(RECIPE.read_text()) if RECIPE.exists() else {}
    if arguments.tune:
        for task, name in itertools.product(tasks, arguments.methods):
            if METHODS[name].tried:
                recipe.setdefault(task, {})[name] = tune(TASKS[task], METHODS[name])
                write_json(RECIPE, recipe)
        return 0
    output = arguments.output / arguments.split
    # Methods that are trained on the same synthetic stars come one after the other.
    methods = {task: taking_part(TASKS[task], arguments.methods) for task in tasks}
    jobs = [(task, draw, name) for task in tasks for draw in range(arguments.draws) for name in methods[task]]
    for task, draw, name in tqdm(jobs, desc="experiment", unit="fits", delay=2):
        path = output / task / f"{name}-{draw}.json"
        if not path.exists():
            # What leaves a stage out has the settings of the whole.
            searched = recipe.get(task, {}).get(name if METHODS[name].tried else BEST, {"chosen": {}})
            settings = searched["chosen"]
            compute(path, TASKS[task], METHODS[name], settings, arguments.split, draw)
    table = summary(output, methods, arguments.draws)
    write_json(output / "summary.json", table)
    for task in tasks:
        few = [name for name in ("mlp", BEST, CEILING) if name in methods[task]] or methods[task][:3]
        first = {name: results_of(output, task, name, 1)[0] for name in few}
        draw_stars(output / f"{task}-stars.png", TASKS[task], first)
    show(output, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
