# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Train the rung of a base model for high resolution around the triplet of Ca II, such as Gaia RVS.

    python scripts/pretrain_window.py scripts/recipes/base-window.yaml

Only synthetic stars, with errors of their lines. The rung is added to a model that has none, and replaces that of one
that has; all other weights stay as they are. A run is resumed with `--resume`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from calibrate_survey import fitted
from pretrain import TEMPERATURES, UNKNOWN_KNOTS, Collator, Run, calibrate, main
from pretrain_survey import OF_RUNG, basis_with_rung, placed, with_rung, with_tokens
from safetensors.numpy import load_file, save_file
from transformers import TrainingArguments

from spectrafm_hf.checkpoints import load_checkpoint
from spectrafm_hf.data.mixture import Columns, Mixture
from spectrafm_hf.files import complete_file, only_writer
from spectrafm_hf.models.basis_spectrafm import SpectrumBasis
from spectrafm_hf.models.rungs_spectrafm import Rung
from spectrafm_hf.synthesis.bases import fill_completion, window_grid, window_rung
from spectrafm_hf.synthesis.survey_grid import SurveyGrid
from spectrafm_hf.synthesis.survey_observed import BEYOND, BEYOND_ERROR
from spectrafm_hf.synthesis.survey_stars import strange_spectra
from spectrafm_hf.synthesis.window_stars import WindowStars
from spectrafm_hf.training.draws import Columns as Split
from spectrafm_hf.training.draws import Draws
from spectrafm_hf.training.recipe import Recipe, last_checkpoint
from spectrafm_hf.training.trainer import SpectraFMTrainer, write_curves


N_STRANGE, GOOD_STARS, GOOD_SNR = 4_000, 4_000, 300.0
#: Lines of hydrogen of hot stars, Paschen 12 to 17 (Angstrom, vacuum).
PASCHEN = np.array([8_752.9, 8_667.4, 8_600.8, 8_547.7, 8_504.8, 8_469.6])
HELD_OUT = 0.1  # of the stars, for the errors
CALIBRATION_BATCHES, BATCH, TYPICAL_SNR = 40, 250, 100.0
WARM = 4_000.0  # K: cooler stars have such errors of their lines that hardly anything would be unlike them


def basis_with(old: SpectrumBasis, path: Path) -> tuple[SpectrumBasis, Rung]:
    """`basis_with_rung` for the rung of the window."""
    return basis_with_rung(old, path, lambda rung: bool(rung.least_inside), window_rung)


def stars_of(grid: SurveyGrid, path: Path, n_stars: int, seed: int) -> tuple[np.ndarray, Columns]:
    """Spectra and labels of synthetic stars, computed the first time and kept in a file."""
    if not path.is_file():
        labels = grid.labels(n_stars, np.random.default_rng([seed, 1]))
        with complete_file(path) as temporary:
            save_file({"flux": grid.spectra(labels).astype(np.float16), **labels}, temporary)
    labels = load_file(path)
    return labels.pop("flux"), grid.known(labels)


def sources(
    rung: Rung, folder: Path, n_stars: int, names: list[str], seed: int
) -> tuple[WindowStars, WindowStars, WindowStars]:
    """Stars to learn from, spectra unlike those, and stars held out."""
    grid = window_grid()
    grid.resolving_power = np.inf
    flux, known = stars_of(grid, folder / "stars.safetensors", n_stars, seed)
    generator = np.random.default_rng([seed, 2])
    others = strange_spectra(grid.wavelength, N_STRANGE, generator, PASCHEN)
    targets = {"teff": BEYOND, "teff_err": BEYOND_ERROR}
    columns = [*names, *(f"{name}_err" for name in names)]
    strange = {name: np.full(N_STRANGE, targets.get(name, np.nan), np.float32) for name in columns}
    first = int(HELD_OUT * len(flux))
    parts = [{name: values[own] for name, values in known.items()} for own in (slice(first, None), slice(first))]
    return (
        WindowStars(rung, grid, flux[first:], parts[0], seed),
        WindowStars(rung, grid, others, strange, seed),
        WindowStars(rung, grid, flux[:first], parts[1], seed + 1),
    )


def warm_of(stars: Columns) -> Columns:
    """Those above `WARM`."""
    warm = stars["teff"] > WARM
    return {name: values[warm] if np.shape(values)[:1] == warm.shape else values for name, values in stars.items()}


def errors_of(model: Any, collator: Collator, number: int, stars: WindowStars, seed: int) -> None:
    """Set `rung_error_knots` and `rung_error_curves` of the rung from stars held out."""
    names, generator, parts = list(model.config.network_labels), np.random.default_rng([seed, 3]), []
    for _ in range(CALIBRATION_BATCHES):
        inputs = collator(stars.draw(BATCH, generator))
        labels = inputs.pop("labels")
        inputs.pop("label_errors")
        with torch.no_grad():
            outputs = model.eval()(**inputs)
        found = outputs.predictions, outputs.prediction_errors, labels, outputs.unknown[:, number]
        parts.append([part.double().numpy() for part in found])
    value, sigma, truth, unknown = (np.concatenate(part) for part in zip(*parts, strict=True))
    teff = value[:, names.index("teff")]
    low, high = model.config.label_ranges[number]["teff"]
    kept = np.isfinite(sigma).all(axis=1) & (teff > low) & (teff < high)
    columns = {
        "residual": (value - truth)[kept],
        "sigma": sigma[kept],
        "label_error": np.zeros(sigma[kept].shape),
        "teff": teff[kept],
        "unknown": unknown[kept],
        "star": np.arange(kept.sum()),
        "group": np.ones(kept.sum(), int),
    }
    knots = [TEMPERATURES, np.percentile(columns["unknown"], UNKNOWN_KNOTS).round(4).tolist()]
    curves = dict(zip(names, fitted(columns, knots), strict=True))
    model.config.rung_error_knots = placed(model.config.rung_error_knots, number, knots)
    model.config.rung_error_curves = placed(model.config.rung_error_curves, number, curves)


def pretrain(settings: dict[str, Any], resume: bool, max_steps: int | None) -> None:
    start, n_stars, components, ffn_dim = (settings.pop(name) for name in ("start", "stars", "components", "ffn_dim"))
    shares, recipe_settings = settings.pop("mixture"), settings.pop("recipe")
    settings.pop("sources")  # for the card
    if max_steps:
        settings["max_steps"] = max_steps
    args = TrainingArguments(**settings)
    args.remove_unused_columns, args.label_names = False, ["labels", "label_errors"]
    folder = Path(args.output_dir or "runs/base-window")
    args.resume_from_checkpoint = last_checkpoint(folder) if resume else None
    folder.mkdir(parents=True, exist_ok=True)
    base, tokenizer = load_checkpoint(start)
    if tokenizer.basis is None:
        raise ValueError(f"start: expected a model on evidence, got {start}")
    basis, rung = basis_with(tokenizer.basis, folder / "basis.safetensors")
    names = list(base.config.network_labels)
    stars, strange, held_out = sources(rung, folder, n_stars, names, args.seed)
    torch.manual_seed(args.seed)
    model, number = with_rung(base, rung, components, ffn_dim)
    good = stars.draw(GOOD_STARS, np.random.default_rng([args.seed, 5]), snr=GOOD_SNR, number=0)
    tokens = with_tokens(basis, good)
    fill_completion(model.model.rungs[number].completion, tokens["coefficients"], tokens["reliability"])
    collator = Collator(basis, model.config, with_star_labels=False)
    train_stars = Mixture([stars, strange], [shares["synthetic"], shares["strange"]], 1_000_000_000, args.seed)
    seen = held_out.draw(2_000, np.random.default_rng([args.seed, 2]), snr=TYPICAL_SNR, number=1)
    units = [base.config.label_units[list(base.config.label_names).index(name)] for name in names]
    recipe = Recipe(labels=names, units=units, **recipe_settings)
    draws = Draws(len(train_stars), args.per_device_train_batch_size)
    validation = {"rvs": Split(with_tokens(basis, seen))}
    task = Run(model, None, None, train_stars, validation, draws, collator, collator)  # type: ignore[arg-type]
    with only_writer(folder):
        trainer = SpectraFMTrainer(recipe, task, args)
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.log(trainer.throughput.report())
        old, config = base.config, model.config
        ranges = {name: [float(np.min(stars.known[name])), float(np.max(stars.known[name]))] for name in names}
        calibrate(model, collator, [warm_of(seen)], with_curves=False)
        config.label_ranges = placed(old.label_ranges, number, ranges)
        for name in OF_RUNG:
            found = getattr(config, name) or [[] if name == "rung_error_knots" else {}]
            setattr(config, name, placed(getattr(old, name), number, found[0]) if getattr(old, name) else [])
        errors_of(model, collator, number, held_out, args.seed)
        task.save(folder / "final")
        write_curves(folder / "curves.csv", trainer.state.log_history)


if __name__ == "__main__":
    sys.exit(main(run=pretrain, description=__doc__))
