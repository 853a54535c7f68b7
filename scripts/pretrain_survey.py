# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Add a rung of the optical to a base model: spectra of surveys at medium resolution.

    spectrafm data miles --out miles
    python scripts/pretrain_survey.py scripts/recipes/base-survey.yaml

Only what belongs to the new rung is trained. A run is resumed with `--resume`; directions of the intervals and the
coefficients of the synthetic stars are computed the first time and lie beside the run.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from pretrain import Collator, Run, calibrate, main
from safetensors.numpy import load_file, save_file
from scipy.ndimage import median_filter
from transformers import TrainingArguments

from spectrafm_hf.bases import fill_completion, survey_grid, survey_rung
from spectrafm_hf.checkpoints import load_checkpoint
from spectrafm_hf.data.mixture import Columns, Mixture
from spectrafm_hf.data.survey_stars import Mismatch, SurveyStars, coefficients_of, likely_labels, shrunk
from spectrafm_hf.files import complete_file, only_writer
from spectrafm_hf.models import SpectraFMConfig, SpectraFMForPrediction
from spectrafm_hf.models.basis_spectrafm import Design, Rung, SpectrumBasis
from spectrafm_hf.training import Columns as Split
from spectrafm_hf.training import Draws, Recipe, SpectraFMTrainer, last_checkpoint, write_curves


LABELS = ("teff", "logg", "fe_h")
#: Of MILES: likely errors of its labels, FWHM in Angstrom, and likely signal-to-noise ratio, as it states no errors.
LABEL_ERRORS, FWHM, SNR = (80.0, 0.15, 0.08), 2.5, 100.0
LEVEL_PIXELS = 101  # that the level of the flux is taken from
HOTTEST = 8_000.0  # K: the synthetic stars go no further
GOOD_STARS, GOOD_SNR = 6000, 150.0  # for the principal components of stars


def observed_stars(folder: Path, split: str) -> Columns:
    """Columns of the stars of MILES whose labels are known."""
    rows = datasets.load_dataset(str(folder), split=split).with_format("numpy")[:]
    kept = np.isfinite([rows[name] for name in LABELS]).all(axis=0) & (rows["teff"] < HOTTEST)
    wavelength = np.asarray(rows["wavelength"][0], float)
    columns = {name: np.stack(list(rows[name][kept])) for name in ("flux", "mask", *LABELS)}
    columns["mask"] |= ~np.isfinite(columns["flux"])
    flux = np.where(columns["mask"], 0.0, columns["flux"])
    level = median_filter(np.abs(flux), (1, LEVEL_PIXELS))
    error = np.maximum(level, 0.01 * np.median(level, axis=1, keepdims=True)) / SNR
    columns |= {f"{name}_err": np.full(kept.sum(), e, np.float32) for name, e in zip(LABELS, LABEL_ERRORS, strict=True)}
    return columns | {
        "flux": flux.astype(np.float32),
        "flux_error": error.astype(np.float32),
        "wavelength": wavelength,
        "resolving_power": wavelength / FWHM,
    }


def tokens_of(basis: SpectrumBasis, rung: Rung, stars: Columns) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients and reliability of observed stars in all intervals of a rung."""
    weight = np.where(stars["mask"], 0.0, stars["flux_error"].astype(float) ** -2.0)
    found = basis.evidence(stars["wavelength"], stars["flux"], weight, stars["resolving_power"])
    tokens = [np.zeros((len(weight), rung.n_intervals, basis.n_coefficients), np.float32) for _ in range(2)]
    for table, values in zip(tokens, (found.coefficients, found.reliability), strict=True):
        table[:, found.intervals - rung.first_interval] = values
    return tokens[0], tokens[1]


def random_designs(basis: SpectrumBasis, rung: Rung, n: int, generator: np.random.Generator) -> tuple[list, list]:
    """Designs of grids that are even in wavelength or in its logarithm, and their resolving powers."""
    low, high = np.array(rung.range) * (1.001, 0.999)
    designs: list[Design] = []
    powers: list[float] = []
    for number in range(n):
        # Every third is as surveys have it.
        limits = (1500.0, 2400.0) if number % 3 == 0 else (1.2 * rung.lowest_resolving_power, rung.resolving_power)
        power = float(np.exp(generator.uniform(*np.log(limits))))
        pixels = generator.uniform(2.0, 4.0)  # in a FWHM
        if generator.random() < 0.5:
            wavelength = np.exp(np.arange(np.log(low), np.log(high), 1.0 / power / pixels))
        else:
            wavelength = np.arange(low, high, 5_500.0 / power / pixels)
        designs.append(SpectrumBasis([rung]).design(wavelength, power))
        powers.append(power)
    return designs, powers


class Sources:
    """Synthetic stars that are shifted to how observed ones look, and observed stars, as tokens."""

    def __init__(self, basis: SpectrumBasis, rung: Rung, observed: Columns, folder: Path, n_stars: int, seed: int):
        grid = survey_grid()
        path = folder / "stars.safetensors"
        if not path.is_file():
            labels = grid.labels(n_stars, np.random.default_rng(seed + 1))
            with complete_file(path) as temporary:
                save_file({"coefficients": coefficients_of(grid, rung, labels), **labels}, temporary)
        labels = load_file(path)
        coefficients = labels.pop("coefficients")
        found, reliability = tokens_of(basis, rung, observed)
        table, covered = likely_labels(grid, observed)
        raw = coefficients_of(grid, rung, table)[:, 0].astype(np.float32)
        raw[..., 1:] /= np.maximum(raw[..., :1], 0.02)
        design = SpectrumBasis([rung]).design(observed["wavelength"], observed["resolving_power"])
        own = design.intervals - rung.first_interval
        known = (reliability > 0.02)[covered]
        difference = np.zeros_like(raw)
        difference[:, own] = found[covered][:, own] - shrunk(design, raw[:, own], SNR**-2)
        difference = np.where(known, difference, 0.0).reshape(len(raw), -1)
        mismatch = Mismatch(table, difference, known.reshape(len(raw), -1))
        designs, powers = random_designs(basis, rung, 48, np.random.default_rng([seed, 4]))
        shifted = mismatch.added_to(coefficients, labels)
        self.rung, self.mismatch = rung, mismatch
        self.synthetic = SurveyStars(rung, shifted, grid.known(labels), designs, powers, spread=mismatch.spread)
        seen = np.any(reliability[..., 2:] > 0.02, axis=2)
        names = [*LABELS, *(f"{name}_err" for name in LABELS)]
        known_of = {name: observed[name] for name in names}
        self.observed = SurveyStars(rung, found[:, None], known_of, designs, powers, seen, observed=True)

    def good(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Coefficients and their reliability of synthetic stars that are seen as a whole, with little noise."""
        low, high = np.log(self.rung.range)
        wavelength = np.exp(np.arange(low, high, 1.0 / self.rung.resolving_power / 2.5))[3:-3]
        design = SpectrumBasis([self.rung]).design(wavelength, self.rung.resolving_power)
        source = self.synthetic
        stars = SurveyStars(
            self.rung, source.coefficients, source.labels, [design], [self.rung.resolving_power], spread=source.spread
        )
        drawn = stars.draw(GOOD_STARS, generator, snr=GOOD_SNR, whole=True)
        tokens = [
            np.zeros((GOOD_STARS, self.rung.n_intervals, drawn["coefficients"].shape[2]), np.float32) for _ in "ab"
        ]
        for table, name in zip(tokens, ("coefficients", "reliability"), strict=True):
            table[:, drawn["interval_ids"][0] - self.rung.first_interval] = drawn[name]
        return tokens[0], tokens[1]


def with_rung(model: SpectraFMForPrediction, rung: Rung, components: int) -> SpectraFMForPrediction:
    """The same model with one more rung, of which alone the weights are trained."""
    settings = model.config.to_dict()
    settings["num_intervals"] = rung.first_interval + rung.n_intervals
    settings["rung_intervals"] = [*settings["rung_intervals"], [rung.first_interval, settings["num_intervals"]]]
    settings["rung_components"] = [*settings["rung_components"], components]
    for name in ("rung_pixels", "rung_features"):
        settings[name] = [*settings[name], 0] if settings[name] else []
    for name in ("label_ranges", "rung_error_factors", "rung_error_floors", "evidence_limits"):
        settings[name] = []
    larger = SpectraFMForPrediction(SpectraFMConfig.from_dict(settings))
    left = larger.load_state_dict(model.state_dict(), strict=False)
    new = {f"{part}.{len(model.config.rung_intervals)}." for part in ("model.rungs", "means", "log_variances")}
    if left.unexpected_keys or not all(any(key.startswith(name) for name in new) for key in left.missing_keys):
        raise ValueError(f"start: expected a base model, got other weights: {left}")
    for name, parameter in larger.named_parameters():
        parameter.requires_grad_(any(name.startswith(prefix) for prefix in new))
    return larger


def pretrain(settings: dict[str, Any], resume: bool, max_steps: int | None) -> None:
    start, data, n_stars, components = (settings.pop(name) for name in ("start", "observed", "stars", "components"))
    shares, recipe_settings = settings.pop("mixture"), settings.pop("recipe")
    settings.pop("sources")  # for the card
    if max_steps:
        settings["max_steps"] = max_steps
    args = TrainingArguments(**settings)
    args.remove_unused_columns, args.label_names = False, ["labels", "label_errors"]
    folder = Path(args.output_dir or "runs/base-survey")
    args.resume_from_checkpoint = last_checkpoint(folder) if resume else None  # where the running mean is, too
    folder.mkdir(parents=True, exist_ok=True)
    base, tokenizer = load_checkpoint(start)
    if tokenizer.basis is None:
        raise ValueError(f"start: expected a model on evidence, got {start}")
    path = folder / "basis.safetensors"
    if not path.is_file():
        rung = survey_rung(tokenizer.basis.n_intervals)
        with complete_file(path) as temporary:
            save_file(SpectrumBasis([*tokenizer.basis.rungs, rung]).arrays(), temporary)
    basis = SpectrumBasis.from_arrays(load_file(path))
    rung = basis.rungs[-1]
    observed = {split: observed_stars(Path(data), split) for split in ("train", "validation")}
    sources = Sources(basis, rung, observed["train"], folder, n_stars, args.seed)
    torch.manual_seed(args.seed)
    model = with_rung(base, rung, components)
    fill_completion(model.model.rungs[-1].completion, *sources.good(np.random.default_rng([args.seed, 5])))
    collator = Collator(basis, model.config, with_star_labels=False)
    pool = [getattr(sources, name) for name in shares]
    train_stars = Mixture(pool, list(shares.values()), 1_000_000_000, args.seed)
    validation = {
        "synthetic": Split(sources.synthetic.draw(2000, np.random.default_rng([args.seed, 2]))),
        "miles": Split(observed["validation"]),
    }
    names = list(model.config.network_labels)
    units = [model.config.label_units[list(model.config.label_names).index(name)] for name in names]
    draws = Draws(len(train_stars), args.per_device_train_batch_size)
    recipe = Recipe(labels=names, units=units, **recipe_settings)
    task = Run(model, None, None, train_stars, validation, draws, collator, collator)  # type: ignore[arg-type]
    with only_writer(folder):
        trainer = SpectraFMTrainer(recipe, task, args)
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.log(trainer.throughput.report())
        old = base.config
        calibrate(model, collator, [observed["validation"] | {"snr": np.full(1, SNR)}], with_curves=False)
        config = model.config
        drawn = sources.synthetic.labels
        ranges = {name: [float(np.nanmin(drawn[name])), float(np.nanmax(drawn[name]))] for name in names}
        config.label_ranges = [*old.label_ranges, ranges]
        config.evidence_limits = [*old.evidence_limits, *config.evidence_limits]
        config.rung_error_factors = [*old.rung_error_factors, *config.rung_error_factors]
        config.rung_error_floors = [*old.rung_error_floors, *config.rung_error_floors]
        task.save(folder / "final")
        write_curves(folder / "curves.csv", trainer.state.log_history)


if __name__ == "__main__":
    sys.exit(main(run=pretrain, description=__doc__))
