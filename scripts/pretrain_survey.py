# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Train the optical rung of a base model: spectra of surveys at medium resolution.

    spectrafm data miles --out miles
    python scripts/pretrain_survey.py scripts/recipes/base-survey.yaml

Only this rung is trained: it is added to the model, or replaces an existing one as in the bundled `spectrafm-base`; all
other weights are unchanged. A run is resumed with `--resume`; directions of the intervals and coefficients of the
synthetic stars are computed once and saved in the folder of the run.
Then `calibrate_survey.py` calibrates the errors of this rung.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pretrain import Collator, Run, calibrate, main
from safetensors.numpy import load_file, save_file
from transformers import TrainingArguments

from spectrafm_hf.checkpoints import load_checkpoint
from spectrafm_hf.data.mixture import Columns, Mixture
from spectrafm_hf.files import complete_file, only_writer
from spectrafm_hf.models import SpectraFMConfig, SpectraFMForPrediction
from spectrafm_hf.models.basis_spectrafm import SpectrumBasis
from spectrafm_hf.models.rungs_spectrafm import PIXELS, Design, Rung
from spectrafm_hf.synthesis.bases import fill_completion, survey_grid, survey_rung
from spectrafm_hf.synthesis.survey_grid import coefficients_of, coefficients_of_spectra
from spectrafm_hf.synthesis.survey_observed import BEYOND, BEYOND_ERROR, LABELS, SNR, Measured, observed_stars
from spectrafm_hf.synthesis.survey_spectra import RANGES
from spectrafm_hf.synthesis.survey_stars import Faults, SurveyStars, strange_spectra
from spectrafm_hf.training.draws import Columns as Split
from spectrafm_hf.training.draws import Draws
from spectrafm_hf.training.recipe import Recipe, last_checkpoint
from spectrafm_hf.training.trainer import SpectraFMTrainer, write_curves


N_STRANGE = 8000
GOOD_STARS, GOOD_SNR = 6000, 300.0  # for the principal components of stars
#: Classes of resolving powers: lowest, the one that synthetic stars are fitted at, highest, share of the stars.
CLASSES = ((400.0, 800.0, 1150.0, 0.2), (1150.0, 1800.0, 2700.0, 0.5), (2700.0, 3700.0, 5000.0, 0.3))
N_DESIGNS = 48
#: Shares of the grids that have no gaps, and of those that have gaps; the others have windows.
WHOLE_GRIDS, GRIDS_WITH_GAPS = 0.6, 0.2
#: Settings with an entry for each rung that follow from calibrations of it.
OF_RUNG = ("evidence_limits", "rung_error_factors", "rung_error_floors", "rung_error_knots", "rung_error_curves")
LEAST_INTERVALS = 2  # with information in each grid
#: First and last wavelength (Angstrom, vacuum) of the windows of spectrographs of higher resolving powers: GALAH, RVS.
WINDOWS = RANGES["galah"], RANGES["rvs"]


def what_there_is(wavelength: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """(pixels,), bool, of a grid: all pixels, all but some gaps, or those of a few windows."""
    position = np.log(wavelength)
    kind = generator.random()
    if kind < WHOLE_GRIDS:
        return np.ones(len(wavelength), bool)
    gaps = kind < WHOLE_GRIDS + GRIDS_WITH_GAPS
    n = generator.integers(4, 13) if gaps else generator.integers(2, 6)
    least, most = np.log((0.003, 0.03) if gaps else (0.03, 0.2))
    width = np.exp(generator.uniform(least, most, n))
    first = generator.uniform(position[0], position[-1] - width)
    inside = ((position[:, None] > first) & (position[:, None] < first + width)).any(axis=1)
    return inside != gaps


def random_designs(
    rung: Rung, n: int, limits: tuple[float, float], generator: np.random.Generator
) -> tuple[list[Design], list[float]]:
    """
    Designs of grids that are even in wavelength or in its logarithm, some with gaps or in windows so that intervals are
    seen in part, and their resolving powers. With those of the rung itself, the windows of `WINDOWS` are among them.
    """
    low, high = np.array(rung.range) * (1.001, 0.999)
    basis = SpectrumBasis([rung])
    designs: list[Design] = []
    powers: list[float] = []
    while len(designs) < n:
        power = float(np.exp(generator.uniform(*np.log(limits))))
        pixels = generator.uniform(2.0, 4.0)  # in a FWHM
        if generator.random() < 0.5:
            wavelength = np.exp(np.arange(np.log(low), np.log(high), 1.0 / power / pixels))
        else:
            wavelength = np.arange(low, high, 5_500.0 / power / pixels)
        design = basis.design(wavelength[what_there_is(wavelength, generator)], power)
        # In other intervals all pixels are in ignored bands.
        if sum(bool(rows.any()) for rows in design.rows) >= LEAST_INTERVALS:
            designs.append(design)
            powers.append(power)
    for windows in WINDOWS if limits[1] >= rung.resolving_power else ():
        step = 1.0 / rung.resolving_power / PIXELS
        parts = [np.exp(np.arange(np.log(first), np.log(last), step)) for first, last in windows]
        designs.append(basis.design(np.concatenate(parts), rung.resolving_power))
        powers.append(rung.resolving_power)
    return designs, powers


class Sources:
    """
    Synthetic stars with the residuals of observed ones, and observed stars, as tokens: one source of each for each
    class of resolving powers.
    """

    def __init__(
        self,
        basis: SpectrumBasis,
        rung: Rung,
        observed: Columns,
        folder: Path,
        n_stars: int,
        seed: int,
        mixed: float = 0.0,
    ):
        grid = survey_grid()
        self.rung = rung
        self.synthetic: list[SurveyStars] = []
        self.observed: list[SurveyStars] = []
        self.strange: list[SurveyStars] = []
        measured = Measured(basis, rung, grid, observed)
        names = [*LABELS, *(f"{name}_err" for name in LABELS)]
        for number, (low, power, high, share) in enumerate(CLASSES):
            path = folder / f"stars-{power:.0f}.safetensors"
            if not path.is_file():
                labels = grid.labels(int(n_stars * share), np.random.default_rng([seed + 1, number]))
                with complete_file(path) as temporary:
                    save_file({"coefficients": coefficients_of(grid, rung, labels, power), **labels}, temporary)
            labels = load_file(path)
            coefficients = labels.pop("coefficients")
            mismatch, found, reliability = measured.at(power)
            limits = max(low, 1.2 * rung.lowest_resolving_power), min(high, rung.resolving_power)
            generator = np.random.default_rng([seed, 4, number])
            designs = random_designs(rung, max(int(N_DESIGNS * share), 3), limits, generator)
            faults = Faults(rung, grid.wavelength, power)
            shifted = mismatch.added_to(coefficients, labels)
            self.synthetic.append(
                SurveyStars(rung, shifted, grid.known(labels), *designs, mismatch=mismatch, faults=faults)
            )
            # How observed stars would change with velocity and resolution, as synthetic ones do.
            own = np.zeros((len(found), 3, *found.shape[1:]), np.float32)
            own[measured.covered] = coefficients_of(grid, rung, measured.labels, power)
            own /= np.where(own[:, :1, :, :1] > 0.02, own[:, :1, :, :1], np.inf)
            own[:, 0], own[:, 0, :, 0] = found, 1.0
            seen = np.any(reliability[..., 2:] > 0.02, axis=2)
            known_of = {name: observed[name] for name in names}
            self.observed.append(SurveyStars(rung, own, known_of, *designs, seen=seen, faults=faults, mixed=mixed))
            n_strange = int(N_STRANGE * share)
            spectra = (strange_spectra(grid.wavelength, 250, generator) for _ in range(0, n_strange, 250))
            others = coefficients_of_spectra(spectra, grid.wavelength, rung, power)
            targets = {"teff": BEYOND, "teff_err": BEYOND_ERROR}
            known_of = {name: np.full(len(others), targets.get(name, np.nan), np.float32) for name in names}
            self.strange.append(SurveyStars(rung, others, known_of, *designs, faults=faults))

    def good(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Coefficients and their reliability of complete synthetic stars with little noise."""
        low, high = np.log(self.rung.range)
        parts = []
        for source, (_, _, power, share) in zip(self.synthetic, CLASSES, strict=True):
            power = min(power, self.rung.resolving_power)
            wavelength = np.exp(np.arange(low, high, 1.0 / power / 2.5))[3:-3]
            design = SpectrumBasis([self.rung]).design(wavelength, power)
            stars = SurveyStars(
                self.rung, source.coefficients, source.labels, [design], [power], None, source.mismatch, source.faults
            )
            n = int(GOOD_STARS * share)
            drawn = stars.draw(n, generator, snr=GOOD_SNR, whole=True)
            own = drawn["interval_ids"][0] - self.rung.first_interval
            tokens = np.zeros((2, n, self.rung.n_intervals, drawn["coefficients"].shape[2]), np.float32)
            tokens[:, :, own] = drawn["coefficients"], drawn["reliability"]
            parts.append(tokens)
        return tuple(np.concatenate(parts, axis=1))  # type: ignore[return-value]


def with_rung(
    model: SpectraFMForPrediction, rung: Rung, components: int | None = None, ffn_dim: Sequence[int] = ()
) -> tuple[SpectraFMForPrediction, int]:
    """
    The model with one more rung, or with a new network of this number of components for an existing one; without a
    number, training of the existing network continues. Also returns the number of this rung. Only its weights are
    trained. `ffn_dim`: widths of its blocks, if they differ from those of the other rungs.
    """
    settings = model.config.to_dict()
    own = [rung.first_interval, rung.first_interval + rung.n_intervals]
    before = [list(intervals) for intervals in model.config.rung_intervals]
    number = before.index(own) if own in before else len(before)
    goes_on = components is None
    if goes_on:
        if number == len(before):
            raise ValueError("components: expected their number, as the model has no rung of the optical, got none")
        components = model.config.rung_components[number]
    settings["num_intervals"] = max(model.config.num_intervals, own[1])
    for name, value in {"intervals": own, "components": components, "pixels": 0, "features": 0}.items():
        old = settings[f"rung_{name}"]
        settings[f"rung_{name}"] = placed(old, number, value) if old else []
    if ffn_dim:
        widths = [model.config.ffn_dim_of(i) for i in range(len(before))]
        settings["rung_ffn_dim"] = placed(widths, number, list(ffn_dim))
    for name in (*OF_RUNG, "label_ranges"):
        settings[name] = []
    larger = SpectraFMForPrediction(SpectraFMConfig.from_dict(settings))
    new = tuple(f"{part}.{number}." for part in ("model.rungs", "means", "log_variances"))
    kept = {name: values for name, values in model.state_dict().items() if goes_on or not name.startswith(new)}
    left = larger.load_state_dict(kept, strict=False)
    if left.unexpected_keys or not all(name.startswith(new) for name in left.missing_keys):
        raise ValueError(f"start: expected a base model, got other weights: {left}")
    for name, parameter in larger.named_parameters():
        parameter.requires_grad_(name.startswith(new))
    return larger, number


def placed(values: Sequence[Any], number: int, value: Any) -> list[Any]:
    """A list in which `value` has this place, or the next one after the last."""
    return [*values[:number], value, *values[number + 1 :]]


def basis_with_rung(
    old: SpectrumBasis, path: Path, is_wanted: Callable[[Rung], bool], make: Callable[[int], Rung]
) -> tuple[SpectrumBasis, Rung]:
    """The basis of a model with a certain rung, which is computed and saved if the model and `path` lack it."""
    for rung in old.rungs:
        if is_wanted(rung):
            return old, rung
    if not path.is_file():
        with complete_file(path) as temporary:
            save_file(SpectrumBasis([*old.rungs, make(old.n_intervals)]).arrays(), temporary)
    basis = SpectrumBasis.from_arrays(load_file(path))
    return basis, basis.rungs[-1]


def basis_with(old: SpectrumBasis, path: Path) -> tuple[SpectrumBasis, Rung]:
    """`basis_with_rung` for the optical rung."""
    return basis_with_rung(old, path, lambda rung: rung.guesses_power, survey_rung)


def with_tokens(basis: SpectrumBasis, stars: Columns) -> Columns:
    """Columns of stars whose spectra share wavelengths and resolving powers, with tokens in place of these."""
    weight = np.where(stars["mask"], 0.0, stars["flux_error"].astype(float) ** -2.0)
    found = basis.evidence(stars["wavelength"], stars["flux"], weight, stars["resolving_power"])
    own = {name: values for name, values in stars.items() if name in LABELS or name.endswith("_err")}
    return own | {
        "coefficients": found.coefficients,
        "reliability": found.reliability,
        "interval_ids": np.tile(found.intervals, (len(weight), 1)),
        "seen": found.seen,
    }


def pretrain(settings: dict[str, Any], resume: bool, max_steps: int | None) -> None:
    start, data, n_stars, components = (settings.pop(name) for name in ("start", "observed", "stars", "components"))
    shares, recipe_settings = settings.pop("mixture"), settings.pop("recipe")
    mixed = settings.pop("mixed", 0.0)
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
    basis, rung = basis_with(tokenizer.basis, folder / "basis.safetensors")
    observed = {
        "train": observed_stars(Path(data), "train", np.inf),
        "validation": observed_stars(Path(data), "validation"),
    }
    sources = Sources(basis, rung, observed["train"], folder, n_stars, args.seed, mixed)
    torch.manual_seed(args.seed)
    model, number = with_rung(base, rung, components)
    if components is not None:
        fill_completion(model.model.rungs[number].completion, *sources.good(np.random.default_rng([args.seed, 5])))
    collator = Collator(basis, model.config, with_star_labels=False)
    pool = [source for name in shares for source in getattr(sources, name)]
    of_pool = [share * part[-1] for share in shares.values() for part in CLASSES]
    train_stars = Mixture(pool, of_pool, 1_000_000_000, args.seed)
    validation = {
        "synthetic": Split(sources.synthetic[1].draw(2000, np.random.default_rng([args.seed, 2]))),
        "miles": Split(with_tokens(basis, observed["validation"])),
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
        # Errors are those of spectra of which one resolving power is stated.
        stated = {
            "snr": np.full(1, SNR),
            "resolving_power": float(np.median(observed["validation"]["resolving_power"])),
        }
        calibrate(model, collator, [observed["validation"] | stated], with_curves=False)
        config = model.config
        drawn = sources.synthetic[0].labels
        ranges = {name: [float(np.nanmin(drawn[name])), float(np.nanmax(drawn[name]))] for name in names}
        config.label_ranges = placed(old.label_ranges, number, ranges)
        for name in OF_RUNG:
            found = getattr(config, name) or [[] if name == "rung_error_knots" else {}]
            if before := getattr(old, name):
                setattr(config, name, placed(before, number, found[0]))
        task.save(folder / "final")
        write_curves(folder / "curves.csv", trainer.state.log_history)


if __name__ == "__main__":
    sys.exit(main(run=pretrain, description=__doc__))
