# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""The experiment of Koblischke & Bovy 2024 on observed stars: [Fe/H] learned from 100 iron-rich ones, asked of all.

    python scripts/paper_experiment.py                     # test stars, ten draws of the 100
    python scripts/paper_experiment.py --split validation  # during development
    python scripts/paper_experiment.py --tune              # search the settings of all methods again

Each method gets the same 100 stars with the same pixels, and its settings were chosen by the same rule: the smallest
RMSE on 500 other stars of the kind that the 100 are, [Fe/H] > -1, averaged over three draws
(scripts/recipes/paper-experiment.json holds all that was tried). The same 500 make the errors right on their kind. No
iron-poor star plays a part in any choice. What has been computed stays in the output folder, and a later run goes on
from there.
"""

import itertools
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tqdm.auto import tqdm

from spectrafm_cli import Parser
from spectrafm_hf.baselines import Baseline, CannonBaseline, MLPBaseline, RidgeBaseline, Spectra, transform_flux
from spectrafm_hf.data import build_gaia_xp, cache_dir, flat_pixels
from spectrafm_hf.files import complete_file
from spectrafm_hf.metrics import label_metrics


RECIPE = Path(__file__).parent / "recipes" / "paper-experiment.json"
N_STARS, N_CHOOSING, IRON_POOR = 100, 500, -1.0
#: The pixels of the last stage, Angstrom.
TASKS = {"xp-red": (6400.0, 10200.0), "xp-narrow": (8400.0, 8900.0)}
LABELS = ("fe_h", "teff", "logg")
Columns = dict[str, NDArray[Any]]


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
class Method:
    """How one is made, which labels it is fitted to, and what is tried for each of its settings."""

    name: str
    make: Callable[..., Baseline]
    labels: tuple[str, ...]
    tried: Mapping[str, list[Any]]


METHODS: dict[str, Method] = {
    "ridge": Method(
        "ridge", RidgeBaseline, ("fe_h",), {"alpha": [1e-4, 1e-3, 1e-2, 0.1, 1.0], "transform": ["log", "asinh", "raw"]}
    ),
    "cannon": Method(
        "quadratic Cannon",
        CannonBaseline,
        LABELS,
        {"alpha": [0.0, 0.01, 0.1, 1.0], "decorrelate": [False, True], "use_prior": [False, True]},
    ),
    "boosting": Method(
        "gradient boosting",
        GradientBoosting,
        ("fe_h",),
        {"n_components": [10, 20, 40], "learning_rate": [0.02, 0.05], "max_iter": [100, 300], "leaves": [3, 6]},
    ),
    "mlp": Method(
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
}


# ---------------------------------------------------------------------------------------------------------------- data


def read_gaia_xp(split: str) -> Columns:
    """Stars with a known [Fe/H] and no masked pixel."""
    folder = build_gaia_xp(cache_dir() / "gaia-xp")
    names = [*LABELS, *(f"{name}_err" for name in LABELS), "alpha_m", "ak_targ"]
    table = pq.read_table(
        sorted((folder / "data").glob(f"{split}-*.parquet")),
        columns=["wavelength", "flux", "flux_error", "mask", *names],
    )
    stars = {name: table[name].to_numpy() for name in names}
    for name in ("wavelength", "flux", "flux_error", "mask"):
        stars[name] = flat_pixels(table[name])[0].reshape(len(table), -1)
    return take(stars, np.isfinite(stars["fe_h"]) & ~stars["mask"].any(axis=1))


def take(stars: Columns, rows: NDArray[Any]) -> Columns:
    return {name: column[rows] for name, column in stars.items()}


def draw_stars(stars: Columns, n: int, seed: int) -> Columns:
    """Iron-rich stars with all labels, drawn at random."""
    known = np.isfinite(stars["teff"] + stars["logg"] + stars["alpha_m"] + stars["ak_targ"])
    candidates = np.flatnonzero((stars["fe_h"] > IRON_POOR) & known)
    return take(stars, np.random.default_rng(seed).choice(candidates, n, replace=False))


def spectra(stars: Columns, window: tuple[float, float], labels: tuple[str, ...]) -> Spectra:
    """The pixels of the window, over their median."""
    wavelength = stars["wavelength"][0]
    pixels = (wavelength >= window[0]) & (wavelength <= window[1])
    flux, error = stars["flux"][:, pixels], stars["flux_error"][:, pixels]
    level = np.median(flux, axis=1, keepdims=True)
    return Spectra(
        flux / level,
        error / level,
        np.stack([stars[name] for name in labels], axis=1),
        np.stack([stars[f"{name}_err"] for name in labels], axis=1),
        stars["ak_targ"][:, None],
    )


# ----------------------------------------------------------------------------------------------------------- computing


def fit_predict(
    method: Method, settings: Mapping[str, Any], window, training: Columns, choosing: Columns, asked: Columns
):
    """[Fe/H] and its error for the stars that are asked."""
    model = method.make(**settings).fit(spectra(training, window, method.labels))
    model.calibrate(spectra(choosing, window, method.labels))
    given = spectra(asked, window, method.labels)
    values, errors = model.predict(given.flux, given.flux_error)
    column = method.labels.index("fe_h")
    return values[:, column], errors[:, column]


def tune(method: Method, window, training: Columns, choosing: Columns) -> dict[str, Any]:
    """The settings with the smallest RMSE on stars of the same kind, and all that were tried."""
    trials = []
    combinations = [
        dict(zip(method.tried, values, strict=True)) for values in itertools.product(*method.tried.values())
    ]
    for settings in tqdm(combinations, desc=method.name, unit="settings", delay=2):
        errors = []
        for draw in range(3):
            values, _ = fit_predict(method, settings, window, draw_stars(training, N_STARS, draw), choosing, choosing)
            errors.append(float(np.sqrt(np.mean((values - choosing["fe_h"]) ** 2))))
        trials.append({"settings": settings, "rmse": round(float(np.mean(errors)), 4)})
    return {"chosen": min(trials, key=lambda trial: trial["rmse"])["settings"], "trials": trials}


def figures(values: NDArray[Any], errors: NDArray[Any], stars: Columns) -> dict[str, dict[str, float]]:
    """Figures of merit for all stars and for the iron-poor ones."""
    groups = {"all": np.ones(len(values), bool), "iron-poor": stars["fe_h"] < IRON_POOR}
    return {
        name: dict(label_metrics(values[rows], errors[rows], stars["fe_h"][rows], stars["fe_h_err"][rows]))
        for name, rows in groups.items()
    }


def write_json(path: Path, content: Any) -> None:
    with complete_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def summary(output: Path, tasks, methods, draws: int) -> str:
    """Table of mean and scatter over the draws, as Markdown."""
    lines = []
    for task, name in itertools.product(tasks, methods):
        results = [json.loads((output / task / f"{name}-{draw}.json").read_text()) for draw in range(draws)]
        line = [task, METHODS[name].name]
        for group, figure in itertools.product(("all", "iron-poor"), ("rmse", "bias", "robust_scatter", "robust_z")):
            numbers = [result[group][figure] for result in results]
            line.append(f"{np.mean(numbers):.3f} ± {np.std(numbers):.3f}")
        lines.append(line)
    header = [
        f"{group}: {figure}" for group in ("all", "iron-poor") for figure in ("RMSE", "bias", "MAD", "error/sigma")
    ]
    rows = [["task", "method", *header], ["---"] * (2 + len(header)), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="paper_experiment.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/paper-experiment"), metavar="DIR")
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="whose stars are asked")
    parser.add_argument("--draws", type=int, default=10, metavar="N", help="of the 100 stars (default: 10)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--tune", action="store_true", help="search the settings again, and write them to the recipe")
    arguments = parser.parse_args(argv)

    training, validation = read_gaia_xp("train"), read_gaia_xp("validation")
    choosing = draw_stars(validation, N_CHOOSING, 0)
    recipe = json.loads(RECIPE.read_text()) if RECIPE.exists() else {}
    if arguments.tune:
        for task, name in itertools.product(arguments.tasks, arguments.methods):
            recipe.setdefault(task, {})[name] = tune(METHODS[name], TASKS[task], training, choosing)
            write_json(RECIPE, recipe)
        return 0
    asked = validation if arguments.split == "validation" else read_gaia_xp("test")
    output = arguments.output / arguments.split
    jobs = list(itertools.product(arguments.tasks, arguments.methods, range(arguments.draws)))
    for task, name, draw in tqdm(jobs, desc="experiment", unit="fits", delay=2):
        path = output / task / f"{name}-{draw}.json"
        if path.exists():
            continue
        hundred = draw_stars(training, N_STARS, draw)
        settings = recipe[task][name]["chosen"]
        values, errors = fit_predict(METHODS[name], settings, TASKS[task], hundred, choosing, asked)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, figures(values, errors, asked))
    print(summary(output, arguments.tasks, arguments.methods, arguments.draws))
    return 0


if __name__ == "__main__":
    sys.exit(main())
