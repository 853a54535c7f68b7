# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Compare a checkpoint with classical models on stars held out from all of them.

    python scripts/paper/evaluate.py                      # the final table: test stars of Gaia XP x APOGEE
    python scripts/paper/evaluate.py --split validation   # during development
    python scripts/paper/evaluate.py --tune               # search the settings of the baselines again
    python scripts/paper/evaluate.py --data DIR --model NAME --baselines none   # any data set with labels

The baselines, one of them an MLP on the tokens of the checkpoint, are refitted to the training stars with the settings
in scripts/recipes/baselines-gaia-xp.json, which `--tune` chose on validation stars; it holds everything that was tried.
The errors of the baselines are calibrated on validation stars too (`Baseline.calibrate`). Test stars are only read for
the tables. With baselines there is another table, without stars whose T_eff label contradicts their colours
(`contradicts_colour`).
"""

import argparse
import hashlib
import importlib.metadata
import json
import math
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from spectrafm_cli.arguments import DEFAULT_MODEL, Parser
from spectrafm_hf.checkpoints import bundled, bundled_names, load_checkpoint
from spectrafm_hf.data import LABEL_UNITS, build_gaia_xp, cache_dir, flat_pixels, label_names_of
from spectrafm_hf.files import write_json
from spectrafm_hf.hub.cards import checksums
from spectrafm_hf.inference.prediction import predict_batches
from spectrafm_hf.models import SpectraFMTokenizer
from spectrafm_hf.models.basis_spectrafm import SpectrumBasis
from spectrafm_hf.statistics import robust_scatter
from spectrafm_hf.training.baseline import Baseline, Spectra
from spectrafm_hf.training.baselines import BASELINES, MLPBaseline
from spectrafm_hf.training.metrics import format_table, label_metrics, table_metrics


RECIPE = Path(__file__).parents[1] / "recipes" / "baselines-gaia-xp.json"
METHODS: dict[str, type[Baseline]] = {**BASELINES, "tokens": MLPBaseline}
NAMES = {
    "ridge": "ridge",
    "cannon": "Cannon",
    "boosting": "boosted trees",
    "mlp": "PCA + MLP",
    "tokens": "MLP on tokens",
}
SPLIT_RULE = "(gaia_source_id // 128) % 10: 0 test, 1 validation, else train"
MAIN = "3500 K < teff < 6500 K"
AGREEING = f"{MAIN}, label and colours agree"
N_BANDS = 6  # of as many pixels each, for colours
TOKENS = "spectrafm-base"  # source of the tokens for the MLP if the checkpoint has none
CONTRADICTION = 5.0  # sigma of 5040 K / T_eff
# A coordinate search for each baseline: from the first settings, each line in turn tries other values of one of them
# and keeps the best. `train_teff` and `train_min_snr` choose training stars, the rest are arguments of the class.
SEARCH: dict[str, tuple[dict[str, Any], list[tuple[str, list[Any]]]]] = {
    "ridge": (
        {"train_teff": None, "train_min_snr": 0, "transform": "log", "alpha": 1e-5, "errors_as_inputs": False},
        [
            ("train_teff", [[3300, 7000], [3500, 6500]]),
            ("errors_as_inputs", [True]),
            ("transform", ["raw", "asinh"]),
            ("train_min_snr", [40, 75, 110]),
            ("alpha", [1e-7, 1e-6, 1e-4, 1e-3]),
            ("train_teff", [None, [3300, 7000], [3500, 6500]]),
            ("transform", ["raw", "asinh", "log"]),
        ],
    ),
    "cannon": (
        {
            "train_teff": None,
            "train_min_snr": 0,
            "transform": "log",
            "alpha": 0.0,
            "use_nuisance": True,
            "decorrelate": False,
            "use_prior": False,
            "n_starts": 4,
        },
        [
            ("decorrelate", [True]),
            ("use_prior", [True]),
            ("train_teff", [[3300, 7000], [3500, 6500]]),
            ("train_min_snr", [40, 75, 110, 150]),
            ("transform", ["raw", "asinh"]),
            ("use_nuisance", [False]),
            ("alpha", [1e-4, 1e-2]),
            ("n_starts", [8]),
        ],
    ),
    "boosting": (
        {
            "train_teff": None,
            "train_min_snr": 0,
            "transform": "asinh",
            "errors_as_inputs": False,
            "n_components": 60,
            "loss": "squared_error",
            "learning_rate": 0.1,
            "iterations": 200,
            "leaves": 31,
        },
        [
            ("errors_as_inputs", [True]),
            ("n_components", [30, 100]),
            ("iterations", [600]),
            ("loss", ["absolute_error"]),
        ],
    ),
    "mlp": (
        {
            "train_teff": None,
            "train_min_snr": 0,
            "transform": "asinh",
            "errors_as_inputs": False,
            "learning_rate": 1e-3,
            "batch_size": 512,
            "weight_decay": 0.01,
            "dropout": 0.0,
            "noise": 0.0,
            "degrees_of_freedom": 0.0,
            "ema": 0.0,
            "epochs": 25,
        },
        [
            ("transform", ["log"]),
            ("noise", [1.0]),
            ("dropout", [0.1]),
            ("errors_as_inputs", [True]),
            ("epochs", [60]),
            ("learning_rate", [2e-3]),
            ("dropout", [0.1]),
            ("ema", [0.999]),
            ("weight_decay", [0.1]),
            ("batch_size", [256]),
            ("noise", [0.3, 1.0]),
            ("epochs", [120]),
            ("degrees_of_freedom", [3.0]),
            ("noise", [1.0]),
            ("dropout", [0.1]),
        ],
    ),
    "tokens": (
        {
            "train_teff": None,
            "train_min_snr": 0,
            "transform": "raw",
            "errors_as_inputs": True,
            "learning_rate": 2e-3,
            "batch_size": 512,
            "weight_decay": 0.1,
            "dropout": 0.0,
            "noise": 0.3,
            "degrees_of_freedom": 3.0,
            "ema": 0.0,
            "epochs": 25,
        },
        [
            ("errors_as_inputs", [False]),
            ("dropout", [0.1]),
            ("noise", [0.0]),
            ("epochs", [60]),
        ],
    ),
}


@dataclass(frozen=True)
class Stars:
    """One split: spectra on one grid (Angstrom), and the columns that choose among the stars, shape (stars,)."""

    object_id: NDArray[Any]
    wavelength: NDArray[np.float32]
    spectra: Spectra
    label_names: list[str]
    snr: NDArray[np.float32]
    sha256: str
    split_rule: str = SPLIT_RULE

    def label(self, name: str) -> NDArray[Any]:
        return self.spectra.labels[:, self.label_names.index(name)]

    def selections(self) -> dict[str, NDArray[np.bool_]]:
        """Selections of stars, by the title of their table."""
        teff, fe_h = self.label("teff"), self.label("fe_h")
        return {
            MAIN: (teff > 3500) & (teff < 6500),
            "all stars": np.ones(len(teff), dtype=bool),
            "[Fe/H] < -1": fe_h < -1,
        }


def basis_of(model_name: str) -> SpectrumBasis:
    """Basis of the tokenizer of a checkpoint, or of `TOKENS` if it has none or there is no checkpoint."""
    names = [name for name in (model_name, TOKENS) if name != "none"]
    folders = (bundled(name) if name in bundled_names() else name for name in names)
    found = (SpectraFMTokenizer.from_pretrained(folder).basis for folder in folders)
    return next(basis for basis in found if basis is not None)


def as_tokens(stars: Stars, basis: SpectrumBasis) -> Stars:
    """The same stars with coefficients of the intervals as pixels, and their missing information as errors."""
    spectra = stars.spectra
    good = np.isfinite(spectra.flux) & (spectra.flux_error > 0)
    flux, error = np.where(good, spectra.flux, 0.0), np.where(good, spectra.flux_error, 1.0)
    weight = np.where(good, error.astype(float) ** -2.0, 0.0)
    found = [
        basis.evidence(stars.wavelength.astype(float), flux[part], weight[part])
        for part in np.array_split(np.arange(len(flux)), -(-len(flux) // 500))
    ]
    coefficients = np.concatenate([part.coefficients.reshape(len(part.coefficients), -1) for part in found])
    reliability = np.concatenate([part.reliability.reshape(len(part.reliability), -1) for part in found])
    tokens = replace(spectra, flux=coefficients, flux_error=np.sqrt(np.maximum(1.0 - reliability, 1e-6)))
    return replace(stars, spectra=tokens)


def contradicts_colour(stars: Stars, train: Stars) -> NDArray[np.bool_]:
    """
    Stars (stars,) whose label T_eff is far from that of their colours.

    5040 K / T_eff is fitted to training stars of the main table as a quadratic function of the `N_BANDS` - 1 colours
    between neighbouring bands of their own spectra, without those beyond 3 sigma; several colours separate extinction
    from temperature. Far is beyond `CONTRADICTION` times the robust scatter of the training stars.
    """

    def terms(some: Stars) -> NDArray[Any]:
        bands = [np.nanmean(part, axis=1) for part in np.array_split(some.spectra.flux, N_BANDS, axis=1)]
        colours = np.diff(np.log(np.maximum(np.stack(bands, axis=1), 0.01)), axis=1)
        first, second = np.triu_indices(N_BANDS - 1)
        return np.concatenate([np.ones((len(colours), 1)), colours, colours[:, first] * colours[:, second]], axis=1)

    chosen = train.selections()[MAIN]
    design, wanted = terms(train)[chosen], 5040.0 / train.label("teff")[chosen]
    kept = np.ones(len(design), bool)
    for _ in range(10):
        factors = np.linalg.lstsq(design[kept], wanted[kept])[0]
        residual = wanted - design @ factors
        scatter = robust_scatter(residual[kept])
        kept = np.abs(residual) < 3.0 * scatter
    return np.abs(5040.0 / stars.label("teff") - terms(stars) @ factors) > CONTRADICTION * robust_scatter(residual)


def read_stars(folder: Path, split: str) -> Stars:
    """One split of a data set of this project whose spectra share one wavelength grid."""
    files = sorted((folder / "data").glob(f"{split}-*.parquet"))
    if not files:
        raise ValueError(f"data: expected files {folder / 'data' / split}-*.parquet, got none")
    table = pq.read_table(files)
    if not len(table):
        raise ValueError(f"data: expected stars in the split {split}, got none")

    def pixels(name: str) -> NDArray[Any]:
        values, lengths = flat_pixels(table[name])
        if (lengths != lengths[0]).any():
            raise ValueError(f"{name}: expected as many pixels in every row, got {lengths.min()} to {lengths.max()}")
        return values.reshape(len(table), -1)

    def stack(names: Sequence[str]) -> NDArray[Any]:
        return np.stack([table[name].to_numpy() for name in names], axis=1)

    wavelength, flux, flux_error, mask = map(pixels, ("wavelength", "flux", "flux_error", "mask"))
    if (wavelength != wavelength[0]).any():
        raise ValueError("wavelength: expected one grid for all rows, as the baselines need, got different ones")
    label_names = label_names_of(table.column_names)
    missing = {"teff", "fe_h"} - set(label_names)
    if missing:
        raise ValueError(f"data: expected the labels teff and fe_h, by which stars are chosen, got {label_names}")
    spectra = Spectra(
        np.where(mask, np.nan, flux),
        np.where(mask, np.nan, flux_error),
        stack(label_names),
        stack([f"{name}_err" for name in label_names]),
        stack(["ak_targ"]) if "ak_targ" in table.column_names else np.empty((len(table), 0)),
    )
    checksum = hashlib.sha256()
    for file in files:
        checksum.update(file.read_bytes())
    object_id, snr = table["object_id"].to_numpy(), table["snr"].to_numpy()
    rule = SPLIT_RULE if "gaia_source_id" in table.column_names else "as the card of the data set says"
    return Stars(object_id, wavelength[0], spectra, label_names, snr, checksum.hexdigest(), rule)


# ----------------------------------------------------------------------------------------------------------- baselines


def fit_baseline(name: str, settings: Mapping[str, Any], train: Stars, validation: Stars) -> Baseline:
    """Fit to the training stars that the settings choose; calibrate on validation stars of the main table."""
    model_settings = dict(settings)
    teff_range, min_snr = model_settings.pop("train_teff"), model_settings.pop("train_min_snr")
    chosen = ~(train.snr < min_snr)
    if teff_range is not None:
        teff = train.label("teff")
        chosen &= (teff > teff_range[0]) & (teff < teff_range[1])
    baseline = METHODS[name](**model_settings).fit(train.spectra[chosen])
    return baseline.calibrate(validation.spectra[validation.selections()[MAIN]])


def tune(names: Sequence[str], basis: SpectrumBasis | None, train: Stars, validation: Stars, recipe_file: Path) -> None:
    """Search the settings on validation stars. Each fit is saved at once and not repeated."""
    main = validation.selections()[MAIN]
    labels = validation.spectra[main].labels
    spread = [robust_scatter(column[np.isfinite(column)]) for column in labels.T]
    views = {"pixels": (train, validation)}
    if "tokens" in names and basis is not None:
        views["tokens"] = as_tokens(train, basis), as_tokens(validation, basis)
    recipe: dict[str, Any] = {
        "made_by": "python scripts/paper/evaluate.py --tune",
        "measured_on": f"validation stars, {MAIN}",
        "score": "geometric mean over labels of robust scatter of predicted - true / robust scatter of the labels",
        "data_sha256": {"train": train.sha256, "validation": validation.sha256},
        "baselines": {},
    }
    if recipe_file.exists():
        earlier = json.loads(recipe_file.read_text(encoding="utf-8"))
        if earlier["data_sha256"] == recipe["data_sha256"]:
            recipe = earlier

    def trial(name: str, settings: dict[str, Any]) -> float:
        entry = recipe["baselines"].setdefault(name, {"complete": False, "chosen": settings, "tried": []})
        for earlier in entry["tried"]:
            if earlier["settings"] == settings:
                return earlier["score"]
        start = time.perf_counter()
        seen = views["tokens" if name == "tokens" else "pixels"]
        baseline, held_out = fit_baseline(name, settings, *seen), seen[1].spectra[main]
        values, errors = baseline.predict(held_out.flux, held_out.flux_error)
        scatter = [
            float(label_metrics(*columns)["robust_scatter"])
            for columns in zip(values.T, errors.T, held_out.labels.T, held_out.label_errors.T, strict=True)
        ]
        score = round(float(np.exp(np.mean(np.log(np.divide(scatter, spread))))), 5)
        figures: dict[str, Any] = {
            "settings": settings,
            "score": score,
            "robust_scatter": {
                label: float(f"{value:.4g}") for label, value in zip(train.label_names, scatter, strict=True)
            },
            "seconds": round(time.perf_counter() - start, 1),
        }
        entry["tried"].append(figures)
        entry["chosen"] = min(entry["tried"], key=lambda figures: figures["score"])["settings"]
        write_json(recipe_file, recipe)
        print(NAMES[name], json.dumps(figures), flush=True)
        return score

    for name in names:
        settings, search = SEARCH[name]
        best = trial(name, settings)
        for field, options in tqdm(search, desc=f"tuning {NAMES[name]}", unit="setting"):
            for option in options:
                candidate = {**settings, field: option}
                score = trial(name, candidate)
                if score < best:
                    best, settings = score, candidate
        recipe["baselines"][name]["complete"] = True
        write_json(recipe_file, recipe)


# ---------------------------------------------------------------------------------------------------------- evaluation


def predict_checkpoint(model_name: str, stars: Stars) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """Values and errors of the labels that the checkpoint and the data share, and its checksums."""
    model, tokenizer = load_checkpoint(model_name)
    if torch.cuda.is_available():
        model.cuda()  # type: ignore[call-arg]  # transformers wraps it without its types
    labels = [name for name in stars.label_names if name in model.config.label_names]
    if not labels:
        raise ValueError(f"model: expected labels out of {stars.label_names}, got {list(model.config.label_names)}")
    mask = np.isnan(stars.spectra.flux)

    def batches() -> Iterator[list[dict[str, Any]]]:
        for start in tqdm(range(0, len(mask), 256), desc=f"{model_name}, 256 stars a step", delay=2):
            yield [
                {
                    "object_id": stars.object_id[i],
                    "wavelength": stars.wavelength,
                    "flux": stars.spectra.flux[i],
                    "flux_error": stars.spectra.flux_error[i],
                    "mask": mask[i],
                }
                for i in range(start, min(start + 256, len(mask)))
            ]

    answers = list(predict_batches(model, tokenizer, batches(), labels))
    columns = {name: np.concatenate([answer[name] for answer in answers]) for name in answers[0]}
    about = {"name": model_name, **checksums(model, tokenizer), "parameters": str(model.num_parameters())}
    return {name: columns[name] for name in labels}, {name: columns[f"{name}_err"] for name in labels}, about


def evaluate(arguments: argparse.Namespace, folder: Path) -> None:
    """Fit, predict, print and write."""
    stars = read_stars(folder, arguments.split)
    report: dict[str, Any] = {
        "command": shlex.join(["python", "scripts/paper/evaluate.py", *arguments.command_line]),
        "split": arguments.split,
        "data": folder.name,
        "split_rule": stars.split_rule,
        "stars": {name: int(mask.sum()) for name, mask in stars.selections().items()},
        "data_sha256": {arguments.split: stars.sha256},
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("numpy", "torch", "transformers")},
        },
        "threads": torch.get_num_threads(),
        "models": {},
        "seconds": {},
        "results": {},
    }
    predictions: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    selections = stars.selections()
    if arguments.baselines:
        train = read_stars(folder, "train")
        validation = stars if arguments.split == "validation" else read_stars(folder, "validation")
        for other in (train, validation):
            if not np.array_equal(other.wavelength, stars.wavelength) or other.label_names != stars.label_names:
                raise ValueError("data: expected one wavelength grid and the same labels in all splits")
        report["data_sha256"] |= {"train": train.sha256, "validation": validation.sha256}
        selections[AGREEING] = selections[MAIN] & ~contradicts_colour(stars, train)
        report["stars"][AGREEING] = int(selections[AGREEING].sum())
        recipe = json.loads(arguments.recipe.read_text(encoding="utf-8"))["baselines"]
        for name in tqdm(arguments.baselines, desc="fitting baselines", delay=2):
            if name not in recipe:
                raise ValueError(f"recipe: expected settings of {name} in {arguments.recipe}, got {list(recipe)}")
            settings = recipe[name]["chosen"]
            start = time.perf_counter()
            parts = [train, validation, stars]
            if name == "tokens":
                parts = [as_tokens(part, arguments.basis) for part in parts]
            baseline = fit_baseline(name, settings, *parts[:2])
            fitted = time.perf_counter()
            values, errors = baseline.predict(parts[2].spectra.flux, parts[2].spectra.flux_error)
            predicted = time.perf_counter()
            predictions[NAMES[name]] = (
                dict(zip(stars.label_names, values.T, strict=True)),
                dict(zip(stars.label_names, errors.T, strict=True)),
            )
            factors = dict(zip(stars.label_names, np.atleast_1d(baseline.error_factors).tolist(), strict=True))
            seed = getattr(baseline, "seed", None)
            report["models"][NAMES[name]] = {"settings": settings, "seed": seed, "error_factors": factors}
            report["seconds"][NAMES[name]] = {"fit": fitted - start, "predict": predicted - fitted}
    if arguments.model != "none":
        start = time.perf_counter()
        values_of, errors_of, about = predict_checkpoint(arguments.model, stars)
        row = Path(arguments.model).name
        predictions[row] = (values_of, errors_of)
        report["models"][row] = about
        report["seconds"][row] = {"predict": time.perf_counter() - start}

    spectra = stars.spectra
    labels = dict(zip(stars.label_names, spectra.labels.T, strict=True))
    label_errors = dict(zip(stars.label_names, spectra.label_errors.T, strict=True))
    print(f"{arguments.split} stars ({stars.split_rule}) of {folder.name}, SHA-256 {stars.sha256[:12]}")
    print("each cell: 1.4826 MAD of predicted - true (its median, RMSE, 1.4826 MAD of error/sigma)")
    if arguments.baselines:
        print("sigma of the baselines: one factor a label from validation stars", end="")
        print(", here the same stars" if arguments.split == "validation" else "")
    for title, mask in selections.items():
        report["results"][title] = {
            row: table_metrics(values, errors, labels, label_errors, mask)
            for row, (values, errors) in predictions.items()
        }
        units = {name: LABEL_UNITS.get(name, "").split(" ")[0] for name in stars.label_names}
        print(f"\n{title}\n{format_table(report['results'][title], units)}")
    if arguments.plot:
        plot(arguments.plot, row_of_plot := list(predictions)[-1], predictions[row_of_plot], labels, label_errors)
        print(f"\nwritten: {arguments.plot}")
    if arguments.output:
        write_json(arguments.output, report)
        print(f"\nwritten: {arguments.output}")


def plot(path: Path, title: str, prediction: tuple[Mapping, Mapping], labels: Mapping, label_errors: Mapping) -> None:
    """Predicted over true for each label of one model, above the distribution of error/sigma."""
    from matplotlib.figure import Figure

    from spectrafm_hf.show.style import axis_label, save_figure

    values, errors = prediction
    figure = Figure(figsize=(4 * len(values), 7), layout="constrained")
    axes = figure.subplots(2, len(values), squeeze=False)
    grid = np.linspace(-5, 5, 41)
    for above, below, name in zip(*axes, values, strict=True):
        known = np.isfinite(labels[name])
        true, predicted = labels[name][known], values[name][known]
        above.plot(true, predicted, ",")
        above.axline((true[0], true[0]), slope=1, color="k", lw=0.8)
        units = {name: LABEL_UNITS.get(name, "")}
        above.set(xlabel=axis_label(name, units, "True "), ylabel=axis_label(name, units, "Predicted "))
        z = (predicted - true) / np.hypot(errors[name][known], np.nan_to_num(label_errors[name][known]))
        below.hist(z, grid, density=True)
        below.plot(grid, np.exp(-(grid**2) / 2) / math.sqrt(2 * math.pi), "k", lw=0.8)
        below.set(xlabel="error / sigma", yticks=[])
    figure.suptitle(title)
    save_figure(figure, path, dpi=120)


# ------------------------------------------------------------------------------------------------------------- command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 0, or 2 for bad input (one line on stderr)."""
    parser = Parser(prog="evaluate.py", description="Compare a checkpoint with baselines on held-out stars.")
    parser.add_argument("--model", default=DEFAULT_MODEL, metavar="NAME_OR_PATH", help="a checkpoint, or none")
    parser.add_argument("--data", type=Path, metavar="DIR", help="made by `spectrafm data gaia-xp`; default: made now")
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    parser.add_argument("--baselines", nargs="+", choices=(*METHODS, "none"), default=list(METHODS))
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON with all figures and how they were made")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="PNG: predicted over true, and error/sigma")
    parser.add_argument("--recipe", type=Path, default=RECIPE, metavar="FILE", help="settings of the baselines")
    parser.add_argument(
        "--tune", action="store_true", help="search those settings first, on validation stars, and stop"
    )
    arguments = parser.parse_args(argv)
    arguments.command_line = list(sys.argv[1:] if argv is None else argv)
    if "none" in arguments.baselines:
        arguments.baselines = []
    try:
        if arguments.model == "none" and not arguments.baselines:
            raise ValueError("model, baselines: expected at least one of them, got none")
        for path in filter(None, (arguments.output, arguments.plot)):
            if not path.absolute().parent.is_dir():
                raise ValueError(f"output: expected a folder that exists, got {path.parent}")
        folder = arguments.data or build_gaia_xp(cache_dir() / "gaia-xp")
        arguments.basis = basis_of(arguments.model) if "tokens" in arguments.baselines else None
        if arguments.tune:
            tune(
                arguments.baselines,
                arguments.basis,
                read_stars(folder, "train"),
                read_stars(folder, "validation"),
                arguments.recipe,
            )
        else:
            evaluate(arguments, folder)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"evaluate.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
