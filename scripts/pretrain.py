"""Pre-train SpectraFM on evidence: the H band on random instruments, and observed Gaia XP stars.

    python scripts/pretrain.py scripts/recipes/base.yaml

A run is resumed with `--resume`. The directions of the intervals are computed once and saved in the folder of the run,
in `basis.safetensors`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import yaml
from safetensors.numpy import load_file, save_file
from transformers import TrainingArguments

from spectrafm_hf.checkpoints import save_checkpoint
from spectrafm_hf.data.mixture import Mixture
from spectrafm_hf.data.schema import LABEL_UNITS
from spectrafm_hf.files import complete_file, only_writer
from spectrafm_hf.inference.training_range import TrainingRange
from spectrafm_hf.models import SpectraFMConfig, SpectraFMForPrediction, SpectraFMTokenizer
from spectrafm_hf.models.basis_spectrafm import SpectrumBasis
from spectrafm_hf.statistics import MAD_TO_SIGMA, robust_scatter
from spectrafm_hf.synthesis.bases import fill_completion, fill_pixels, fill_star_model, make_basis
from spectrafm_hf.synthesis.random_instruments import (
    EvenNoiseStars,
    HighResolutionStars,
    MixedStars,
    SpoiltStars,
    evidence_inputs,
)
from spectrafm_hf.synthesis.synthetic import ALPHA_ELEMENTS, SyntheticStars
from spectrafm_hf.training.draws import Columns, Draws
from spectrafm_hf.training.recipe import Recipe, last_checkpoint
from spectrafm_hf.training.recipe import _load as load_data
from spectrafm_hf.training.trainer import SpectraFMTrainer, Task, write_curves


STRANGEST = 99.5  # percent of validation stars look more like stars
EVALUATED_AT_ONCE = 500
TEMPERATURES = [3250.0, 3750.0, 4250.0, 4750.0, 5250.0, 5750.0, 6250.0, 7000.0, 9000.0, 13000.0]  # K
UNKNOWN_KNOTS = [3, 15, 35, 65, 85, 97]  # percent of validation stars
CALIBRATION_ROUNDS, MEDIAN_ROUNDS = 6, 60
PRIOR_STARS = 5.0  # whose errors are right, at each knot
MEASURED_STARS = 8000  # observed ones, for the directions of the intervals


class Collator:
    """Columns of stars that share their wavelengths -> inputs, with requests of the labels of the network."""

    def __init__(self, basis: SpectrumBasis, config: SpectraFMConfig, with_star_labels: bool = True):
        self.basis, self.config = basis, config
        self.star_labels = list(config.star_labels) if with_star_labels else []

    def __call__(self, columns: Any) -> dict[str, torch.Tensor]:
        names = list(self.config.network_labels)
        return evidence_inputs(self.basis, columns, names, self.config.label_ids(names), self.star_labels)


class Run(Task):
    """A [`Task`] that saves the whole checkpoint."""

    def save(self, folder: Path) -> SpectraFMForPrediction:
        basis = cast(Any, self.train_collator).basis
        save_checkpoint(self.model, SpectraFMTokenizer(self.model.config.label_names, basis=basis), folder)
        config, stars = self.model.config, self.model.refinement.star_model
        found = zip(stars.low.tolist(), stars.high.tolist(), strict=True)
        pairs = list(zip(config.star_labels, found, strict=True))
        pairs += [pair for ranges in config.label_ranges for pair in ranges.items()]
        limits: dict[str, tuple[float, float]] = {}
        for name, (low, high) in pairs:
            least, greatest = limits.get(name, (low, high))
            limits[name] = (min(float(low), least), max(float(high), greatest))
        TrainingRange(limits, [rung.range for rung in basis.rungs]).save(folder)
        return self.model


def load_basis(path: Path, observed: Any) -> SpectrumBasis:
    """The basis of a run, computed if it is missing."""
    if not path.is_file():
        stars = observed.with_format("numpy")[:MEASURED_STARS]
        whole = ~stars["mask"].any(axis=1) & np.isfinite(stars["flux"]).all(axis=1)
        basis = make_basis({name: stars[name][whole] for name in ("wavelength", "flux")})
        path.parent.mkdir(parents=True, exist_ok=True)
        with complete_file(path) as temporary:
            save_file(basis.arrays(), temporary)
    return SpectrumBasis.from_arrays(load_file(path))


def interpolation(x: np.ndarray, knots: Sequence[float]) -> np.ndarray:
    """(stars, knots): weights of values at the knots."""
    return np.stack([np.interp(x, knots, column) for column in np.eye(len(knots))], axis=1)


def weighted_median(values: np.ndarray, weight: np.ndarray) -> float:
    order = np.argsort(values)
    total = np.cumsum(weight[order])
    return float(np.mean(values[order][np.searchsorted(total, total[-1] * np.array([0.5 - 1e-9, 0.5 + 1e-9]))]))


def error_curves(
    residual: np.ndarray,
    sigma: np.ndarray,
    label_error: np.ndarray,
    design: Sequence[np.ndarray],
    counts: np.ndarray | None = None,
) -> tuple[float, list[list[float]]]:
    """
    A factor, and ln of further ones at the knots of each part of the design, by which `sigma` (stars,) is multiplied so
    that the median of |residual| over all errors is that of a Gaussian, for all stars.

    Each part of the design is (stars, knots). Near a knot with few stars the factor is drawn to one. `counts` (stars,)
    is how much each spectrum counts, 1 by default: less where there are several of one star.
    """
    known = np.isfinite(residual)
    table = np.concatenate(design, axis=1)[known]
    size, sigma, label_error = np.abs(residual[known]) + 1e-9, sigma[known], label_error[known]
    counts = np.ones(len(size)) if counts is None else counts[known]
    total, values = 0.0, np.zeros(table.shape[1])
    for _ in range(CALIBRATION_ROUNDS):  # the errors of the labels count as well
        found = total + table @ values
        wanted = found + np.log(size * MAD_TO_SIGMA / np.hypot(np.exp(found) * sigma, label_error))
        total = weighted_median(wanted, counts)
        weight = np.ones(len(table))
        for _ in range(MEDIAN_ROUNDS):  # least absolute deviations
            root = np.sqrt(weight * counts)
            prior = PRIOR_STARS**0.5 * np.eye(len(values))
            rows = np.concatenate([table * root[:, None], prior])
            values = np.linalg.lstsq(rows, np.append((wanted - total) * root, np.zeros(len(values))))[0]
            weight = 1.0 / np.maximum(np.abs(wanted - total - table @ values), 1e-3)
    edges = np.cumsum([part.shape[1] for part in design])[:-1]
    return float(np.exp(total)), [part.round(4).tolist() for part in np.split(values, edges)]


def error_floor(residual: np.ndarray, sigma: np.ndarray) -> float:
    """The term to add to `sigma` (stars,) in quadrature so that the median of |residual| is that of a Gaussian."""
    known = np.isfinite(residual)
    size, sigma = np.abs(residual[known]), sigma[known]
    low, high = 0.0, 10.0 * float(np.median(size)) + 1e-9
    for _ in range(50):
        middle = 0.5 * (low + high)
        too_small = MAD_TO_SIGMA * np.median(size / np.hypot(sigma, middle)) > 1.0
        low, high = (middle, high) if too_small else (low, middle)
    return round(high, 6) if low > 0 else 0.0


def calibrate(
    model: SpectraFMForPrediction, collator: Collator, stars: Sequence[Any], with_curves: bool = True
) -> None:
    """
    Calibrate with complete validation stars of each rung: factors of the predicted errors, as a function of T_eff and
    of the missing information, and limits for spectra unlike the training stars.
    """
    config = model.config
    names = list(config.network_labels)
    config.rung_error_factors, config.rung_error_floors = [], []
    config.rung_error_knots, config.rung_error_curves = [], []
    limits = []
    factors: list[dict[str, float]] = []
    floors: list[dict[str, float]] = []
    all_knots: list[list[list[float]]] = []
    curves: list[dict[str, list[list[float]]]] = []
    for columns in stars:
        costs, misfits, answers = [], [], []
        for start in range(0, len(columns["teff"]), EVALUATED_AT_ONCE):
            some = slice(start, start + EVALUATED_AT_ONCE)
            part = {name: value[some] if np.ndim(value) else value for name, value in columns.items()}
            shared = {name: columns[name] for name in ("wavelength", "resolving_power") if name in columns}
            inputs = collator(part | shared)
            labels, errors = inputs.pop("labels"), inputs.pop("label_errors")
            inputs.pop("star_targets", None)
            with torch.no_grad():
                outputs = model.eval()(**inputs)
            own = outputs.rung_seen.any(dim=0)
            costs.append(outputs.cost[:, own][:, 0])
            wavelength = np.asarray(columns["wavelength"], float)
            weight = np.where(part["mask"], 0.0, np.asarray(part["flux_error"], float) ** -2.0)
            grid = wavelength if wavelength.ndim == 1 else wavelength[0]
            power, normalised = columns.get("resolving_power"), part.get("normalised")
            found = collator.basis.evidence(grid, np.asarray(part["flux"]), weight, power, normalised)
            misfits.append(np.nanmedian(found.misfit, axis=1))
            arrays = (
                outputs.predictions - labels,
                outputs.prediction_errors,
                errors.nan_to_num(nan=0.0),
                outputs.unknown[:, :1],
            )
            answers.append([array.double().numpy() for array in arrays] + [outputs.predictions.double().numpy()])
        limits.append([float(np.percentile(np.concatenate(values), STRANGEST)) for values in (costs, misfits)])
        factors.append({})
        floors.append({})
        all_knots.append([])
        curves.append({})
        if "snr" in columns:  # observed stars; others are refined
            residual, sigma, label_error, unknown, values = (
                np.concatenate(part) for part in zip(*answers, strict=True)
            )
            knots = [TEMPERATURES, np.percentile(unknown, UNKNOWN_KNOTS).tolist()]
            design = [interpolation(values[:, names.index("teff")], knots[0]), interpolation(unknown[:, 0], knots[1])]
            for i, name in enumerate(names):
                if not np.isfinite(residual[:, i]).any():
                    continue
                if with_curves:
                    all_knots[-1] = knots
                    factors[-1][name], curves[-1][name] = error_curves(
                        residual[:, i], sigma[:, i], label_error[:, i], design
                    )
                else:
                    floors[-1][name] = error_floor(residual[:, i], np.hypot(sigma[:, i], label_error[:, i]))
        if floors[-1]:  # labels without observed stars get the floor of the others
            scale = dict(zip(config.label_names, config.label_scales, strict=True))
            worst = max(floor / scale[name] for name, floor in floors[-1].items())
            floors[-1] = {name: floors[-1].get(name, round(worst * scale[name], 6)) for name in names}
    config.evidence_limits, config.rung_error_factors, config.rung_error_floors = limits, factors, floors
    if with_curves:
        config.rung_error_knots, config.rung_error_curves = all_knots, curves


def pretrain(settings: dict[str, Any], resume: bool, max_steps: int | None) -> None:
    shares, model_settings, network_labels = (settings.pop(name) for name in ("mixture", "model", "labels"))
    settings.pop("sources")  # for the card
    recipe_settings, data, mixed, clean = (settings.pop(name) for name in ("recipe", "data", "mixed", "clean"))
    stars_per_epoch = settings.pop("stars_per_epoch")
    if max_steps:
        settings["max_steps"] = max_steps
    args = TrainingArguments(**settings)
    args.remove_unused_columns, args.label_names = False, ["labels", "label_errors"]
    folder = Path(args.output_dir or "runs/base")
    args.resume_from_checkpoint = last_checkpoint(folder) if resume else None  # where the running mean is, too
    observed = load_data(data)
    basis = load_basis(folder / "basis.safetensors", observed["train"])
    high = HighResolutionStars(basis, seed=args.seed)
    sources: dict[str, Any] = {
        "even": EvenNoiseStars(high, basis),
        "high": high,
        "xp": SpoiltStars(MixedStars(observed["train"].with_format("numpy")[:], network_labels, mixed), basis, clean),
    }
    train_stars = Mixture([sources[name] for name in shares], list(shares.values()), stars_per_epoch, args.seed)
    torch.manual_seed(args.seed)
    generator = np.random.default_rng([args.seed, 1])
    sample = [sources["even"].draw(4000, generator), observed["train"].with_format("numpy")[:4000]]
    stars = SyntheticStars("apogee-apstar")
    emulator, rung = stars._stars.emulator.config, high.rung
    labels = list(dict.fromkeys([*network_labels, *emulator.label_names]))
    units = [LABEL_UNITS[name].partition(" (")[0] for name in labels]
    values = {name: np.concatenate([part[name] for part in sample if name in part]) for name in labels}
    center = {name: float(np.nanmedian(column)) for name, column in values.items()}
    config = SpectraFMConfig(
        token_embedding="basis",
        num_intervals=basis.n_intervals,
        num_coefficients=basis.n_coefficients,
        network_labels=network_labels,
        label_ranges=[
            {name: [float(np.nanmin(part[name])), float(np.nanmax(part[name]))] for name in network_labels}
            for part in (observed["train"].with_format("numpy")[:], sample[0])
        ],
        rung_intervals=[[r.first_interval, r.first_interval + r.n_intervals] for r in basis.rungs],
        star_labels=list(emulator.label_names),
        star_combinations={"alpha_m": list(ALPHA_ELEMENTS)},
        star_components=list(emulator.component_groups),
        star_intervals=[rung.first_interval, rung.first_interval + rung.n_intervals],
        num_stars=emulator.num_stars,
        label_names=labels,
        label_units=units,
        label_centers=list(center.values()),
        label_scales=[float(robust_scatter(column[np.isfinite(column)])) for column in values.values()],
        **model_settings,
    )
    model = SpectraFMForPrediction(config)
    fill_star_model(model.refinement.star_model, rung, stars)
    collator = Collator(basis, config)
    for part, own in zip(model.model.rungs, basis.rungs, strict=True):
        measured = high.whole(MEASURED_STARS, generator) if own is rung else observed["train"].with_format("numpy")[:]
        evidence = collator(measured)
        at = evidence["interval_ids"][0].numpy() - own.first_interval
        shape = (len(evidence["labels"]), own.n_intervals, basis.n_coefficients)
        tokens = [np.zeros(shape, np.float32) for _ in range(2)]
        for array, name in zip(tokens, ("coefficients", "reliability"), strict=True):
            array[:, at] = evidence[name].numpy()
        if part.completion.num_pixels:
            fill_pixels(part.completion, basis, measured["wavelength"][0])
        fill_completion(part.completion, *tokens)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{trained / 1e6:.2f} million parameters are trained", flush=True)
    validation = {
        "hband": Columns(sources["even"].draw(2000, np.random.default_rng([args.seed, 2]))),
        "xp": Columns(observed["validation"].with_format("numpy")[:]),
    }
    recipe = Recipe(labels=network_labels, units=units[: len(network_labels)], **recipe_settings)
    draws = Draws(len(train_stars), args.per_device_train_batch_size)
    task = Run(model, None, None, train_stars, validation, draws, collator, collator)  # type: ignore[arg-type]
    with only_writer(folder):
        trainer = SpectraFMTrainer(recipe, task, args)
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.log(trainer.throughput.report())
        whole = [high.whole(2000, generator) if own is rung else validation["xp"].data for own in basis.rungs]
        calibrate(model, collator, whole)
        task.save(folder / "final")
        write_curves(folder / "curves.csv", trainer.state.log_history)


def main(
    argv: Sequence[str] | None = None,
    run: Callable[[dict[str, Any], bool, int | None], None] = pretrain,
    description: str | None = __doc__,
) -> int:
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--resume", action="store_true", help="resume from the last checkpoint of the run")
    parser.add_argument("--max-steps", type=int, metavar="N", help="instead of those in the recipe")
    parser.add_argument("--output-dir", metavar="DIR", help="instead of that in the recipe")
    arguments = parser.parse_args(argv)
    settings = yaml.safe_load(arguments.recipe.read_text(encoding="utf-8"))
    if arguments.output_dir:
        settings["output_dir"] = arguments.output_dir
    run(settings, arguments.resume, arguments.max_steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
