# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""From a recipe and a data set to a trained checkpoint, with the Trainer of transformers."""

import csv
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments

from .checkpoints import load_checkpoint, save_checkpoint
from .collator import SpectraFMCollator
from .data.mixture import Mixture
from .files import complete_file
from .metrics import MAD_TO_SIGMA, label_metrics
from .models import SpectraFMConfig, SpectraFMForPrediction, SpectraFMTokenizer
from .prediction import TrainingRange


@dataclass
class Recipe:
    """
    What is trained on what; the how is in `TrainingArguments`, in the same YAML file.

    Parameters
    ----------
    data : str
        A data set folder or hub name in the project's schema. `scripts/train.py` builds `gaia-xp` and
        `synthetic-<instrument>` where they are not there.
    labels : list[str]
        Stellar labels to learn.
    units : list[str]
        Their units.
    scalars : list[str]
        Columns given to the model as known scalars.
    model, tokenizer : dict
        Settings of [`SpectraFMConfig`] and [`SpectraFMTokenizer`]; what depends on the training set is filled in.
    whitening : bool
        Decorrelate the pixels of each patch; for spectra on one common wavelength grid.
    checkpoint : str
        A bundled checkpoint, a folder or a hub name to go on from, with its tokenizer; then `model`, `tokenizer` and
        `whitening` play no part. None by default.
    sources : dict[str, float]
        Instead of `data`: several instruments at once, each batch from one of them, and how often.
        `synthetic-<instrument>` draws stars without end; everything else is as in `data`.
    stars_per_epoch : int
        For `sources`: a pass through them.
    noise, noise_correlation, pixel_dropout, error_dropout, reddening, tilt, wavelength_cut : float
        Augmentation, see [`SpectraFMCollator`].
    muon_learning_rate, muon_weight_decay : float
        For the matrices inside the layers; everything else is AdamW's, with the rates of `TrainingArguments`.
    ema_decay : float
        Decay by step of the running mean of the weights that is evaluated and saved; 0 for none.
    train_split, validation_split : str
    """

    data: str = field(default="gaia-xp")
    labels: list[str] = field(default_factory=lambda: ["teff", "logg", "fe_h", "alpha_m"])
    units: list[str] = field(default_factory=lambda: ["K", "dex", "dex", "dex"])
    scalars: list[str] = field(default_factory=list)
    model: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    whitening: bool = False
    checkpoint: str | None = None
    sources: dict[str, Any] = field(default_factory=dict)
    stars_per_epoch: int = 1_000_000
    noise: float = 0.0
    noise_correlation: float = 0.0
    pixel_dropout: float = 0.0
    error_dropout: float = 0.0
    reddening: float = 0.0
    tilt: float = 0.0
    wavelength_cut: float = 0.0
    muon_learning_rate: float = 3e-3
    muon_weight_decay: float = 0.01
    ema_decay: float = 0.0
    train_split: str = "train"
    validation_split: str = "validation"


AUGMENTATIONS = (
    "noise",
    "noise_correlation",
    "pixel_dropout",
    "error_dropout",
    "reddening",
    "tilt",
    "wavelength_cut",
)


def robust_center_and_scale(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Median and robust standard deviation along the first axis, NaN ignored."""
    center = np.nanmedian(values, axis=0)
    return center, MAD_TO_SIGMA * np.nanmedian(np.abs(values - center), axis=0)


def prepare_model(
    recipe: Recipe, samples: Sequence[Mapping[str, Any]]
) -> tuple[SpectraFMForPrediction, SpectraFMTokenizer, TrainingRange]:
    """
    A new model and its tokenizer, with standardisation and whitening measured on training stars.

    Parameters
    ----------
    recipe : Recipe
    samples : sequence of mappings
        Columns of stars in the project's schema, one mapping for each instrument; the stars of a sample share their
        wavelengths, and no two samples overlap in wavelength.

    Returns
    -------
    model, tokenizer
    training_range : TrainingRange
        Of the labels; of wavelength, if there is one sample.

    Raises
    ------
    ValueError
        If a label is in no sample, the spectra of one do not share a wavelength grid, or two samples overlap.
    """
    names = [*recipe.labels, *recipe.scalars]
    columns = {}
    for name in names:
        parts = [np.asarray(sample[name], dtype=np.float64) for sample in samples if name in sample]
        if not parts:
            known = sorted({name for sample in samples for name in sample})
            raise ValueError(f"labels: expected columns of the data ({known}), got {name!r}")
        columns[name] = np.concatenate(parts)
    label_centers, label_scales = zip(*map(robust_center_and_scale, columns.values()), strict=True)
    config = SpectraFMConfig(
        **recipe.model,
        label_names=names,
        label_units=[*recipe.units, *[""] * len(recipe.scalars)],
        label_centers=[float(center) for center in label_centers],
        label_scales=[float(scale) for scale in label_scales],
    )
    settings = {"label_names": names, "requests": recipe.labels, "patch_size": config.patch_size, **recipe.tokenizer}
    grids = sorted((_measure(sample, settings, config) for sample in samples), key=lambda grid: grid.wavelength[0])
    for left, right in itertools.pairwise(grids):
        if left.wavelength[-1] >= right.wavelength[0]:
            raise ValueError(
                "wavelength: expected instruments that do not overlap (the standardisation is one table), "
                f"got {left.wavelength[-1]:g} and {right.wavelength[0]:g} Angstrom"
            )
    tokenizer = SpectraFMTokenizer(
        **settings,
        standardize_wavelength=np.concatenate([grid.wavelength for grid in grids]).tolist(),
        standardize_center=np.concatenate([grid.center for grid in grids]).tolist(),
        standardize_scale=np.concatenate([grid.scale for grid in grids]).tolist(),
    )
    if recipe.whitening:
        config.whitening_wavelength = [node for grid in grids for node in grid.nodes]
    model = SpectraFMForPrediction(config)
    if recipe.whitening:
        embedding = model.model.embeddings.patch_embedding
        matrices = [_whitening(grid, embedding, tokenizer.clip or np.inf) for grid in grids]
        embedding.whitening.copy_(torch.from_numpy(np.concatenate(matrices)))
    wavelength = grids[0].wavelength
    one = len(grids) == 1
    training_range = TrainingRange(
        labels={name: (float(np.nanmin(column)), float(np.nanmax(column))) for name, column in columns.items()},
        wavelength=(float(wavelength[0]), float(wavelength[-1])) if one else None,
        wavelength_step=(float(np.diff(wavelength).min()), float(np.diff(wavelength).max())) if one else None,
    )
    return model, tokenizer, training_range


@dataclass
class _Grid:
    """What is measured on the stars of one instrument. `flux` and its error are over the continuum, NaN if masked."""

    wavelength: np.ndarray  # (pixels,)
    flux: np.ndarray  # (stars, pixels)
    flux_error: np.ndarray
    center: np.ndarray  # (pixels,)
    scale: np.ndarray
    nodes: list[float]  # wavelengths of the patches
    patches: list[slice]  # their pixels


def _measure(sample: Mapping[str, Any], settings: Mapping[str, Any], config: SpectraFMConfig) -> _Grid:
    spectra = [np.asarray(sample[name]) for name in ("wavelength", "flux", "flux_error", "mask")]
    if any(column.dtype == object for column in spectra) or np.any(spectra[0] != spectra[0][0]):
        raise ValueError(
            "wavelength: expected one grid for all stars of an instrument (the standardisation is a table on it)"
        )
    wavelength = spectra[0][0].astype(np.float64)
    flat = np.ones_like(wavelength)
    # Through the tokenizer, so that continuum and masks are those of training, in patches that end at gaps alone.
    whole = SpectraFMTokenizer(**{**settings, "patch_size": len(wavelength), "clip": None, "standardize_center": 0.0})
    lengths = whole(wavelength, flat, return_tensors="np")["pixel_mask"][0].sum(axis=-1)
    tokens = whole(spectra[0], spectra[1], spectra[2], spectra[3], return_tensors="np")
    complete = tokens["attention_mask"].sum(axis=1) == len(lengths)
    if not complete.any():
        raise ValueError("mask: expected stars with valid pixels on both sides of every gap, got none")
    flux, flux_error = (
        np.concatenate([values[complete, i, :length] for i, length in enumerate(lengths)], axis=1)
        for values in (np.where(tokens["pixel_mask"], tokens[name], np.nan) for name in ("flux", "flux_error"))
    )
    center, scale = robust_center_and_scale(flux)
    if config.flux_softening:
        # Where the typical star has next to no flux, a ratio to it would be all noise.
        center, scale = np.zeros_like(center), np.maximum(center, 0.01 * np.nanmax(center))
    patches = SpectraFMTokenizer(**settings)(wavelength, flat, return_tensors="np")
    lengths = patches["pixel_mask"][0].sum(axis=-1)
    ends = np.cumsum(lengths).tolist()
    starts = [0, *ends[:-1]]
    return _Grid(
        wavelength,
        flux,
        flux_error,
        center,
        scale,
        patches["wavelength"][0].astype(float).tolist(),
        [slice(start, end) for start, end in zip(starts, ends, strict=True)],
    )


def _whitening(grid: _Grid, embedding: Any, clip: float) -> np.ndarray:
    standardised = np.clip((grid.flux - grid.center) / grid.scale, -clip, clip)
    noise = grid.flux_error / grid.scale
    if embedding.flux_softening:
        noise = noise / np.hypot(standardised, embedding.flux_softening)
    flux = embedding.compress(torch.from_numpy(standardised)).numpy()
    return whitening_matrices(flux, noise, embedding.patch_size, grid.patches)


def whitening_matrices(
    flux: np.ndarray, flux_error: np.ndarray, patch_size: int, patches: Sequence[slice]
) -> np.ndarray:
    """
    Matrices that decorrelate the pixels of each patch of spectra on one grid.

    The matrix is (C + N)^(-1/2), symmetric, so that neighbouring patches have similar ones: C is the covariance of
    the fluxes of the training set, N the median variance of their noise, below which there is nothing to be had.

    Parameters
    ----------
    flux, flux_error : array of shape (stars, pixels)
        As the filters of the model see them, NaN where masked.
    patch_size : int
    patches : sequence of slices
        The pixels of each patch, at most `patch_size`.

    Returns
    -------
    array of shape (patches, patch_size, patch_size), float32
    """
    flux = np.nan_to_num(flux)
    noise = np.nanmedian(flux_error**2, axis=0)
    matrices = np.tile(np.eye(patch_size, dtype=np.float32), (len(patches), 1, 1))
    for matrix, pixels in zip(matrices, patches, strict=True):
        count = pixels.stop - pixels.start
        # Patches differ in noise far more than pixels of a patch: one level keeps the matrix well-behaved.
        level = float(np.mean(noise[pixels])) + 1e-4
        values, vectors = np.linalg.eigh(np.cov(flux[:, pixels].T).reshape(count, count))
        matrix[:count, :count] = (vectors / np.sqrt(values.clip(min=0.0) + level)) @ vectors.T
    return matrices


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """
    Trainable parameters for Muon (matrices inside the layers), AdamW with and without weight decay.

    Muon makes the update of a matrix orthogonal, which is meant for matrices between hidden states; embeddings, the
    read-out heads, biases and norms stay with AdamW.
    """
    muon, decayed, plain = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        outside = "value_embedding" in name or name.startswith(("readout.mean", "readout.log_variance"))
        if parameter.ndim == 2 and not outside:
            muon.append(parameter)
        elif parameter.ndim >= 2:
            decayed.append(parameter)
        else:
            plain.append(parameter)
    return muon, decayed, plain


class MuonWithAdamW(torch.optim.Optimizer):
    """
    [`torch.optim.Muon`] for hidden matrices and [`torch.optim.AdamW`] for the rest, as one optimizer.

    The Trainer, its schedulers and its checkpoints know one optimizer with parameter groups; the groups are shared
    with the two inner ones, so that a scheduler that sets a learning rate sets theirs.
    """

    def __init__(self, muon_group: dict[str, Any], adamw_groups: Sequence[dict[str, Any]], betas=(0.9, 0.98)):
        self.inner = [
            torch.optim.Muon([muon_group], adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(list(adamw_groups), betas=betas),
        ]
        groups = [group for optimizer in self.inner for group in optimizer.param_groups]
        super().__init__(groups, {})
        self._share_groups()

    def _share_groups(self):
        n_muon = len(self.inner[0].param_groups)
        self.inner[0].param_groups = self.param_groups[:n_muon]
        self.inner[1].param_groups = self.param_groups[n_muon:]
        for optimizer in self.inner:
            optimizer.state = self.state

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else closure()
        for optimizer in self.inner:
            optimizer.step()
        return loss

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self._share_groups()


class Columns(torch.utils.data.Dataset):
    """Stars, as a data set or as columns, that answer a list of indices with columns: no Python object for each."""

    def __init__(self, data: Any):
        self.data = data if isinstance(data, Mapping) else data.with_format("numpy")

    def __len__(self) -> int:
        return len(next(iter(self.data.values()))) if isinstance(self.data, Mapping) else len(self.data)

    def __getitems__(self, indices: list[int]) -> dict[str, np.ndarray]:
        if isinstance(self.data, Mapping):
            return {name: column[indices] for name, column in self.data.items()}
        return self.data[indices]


class EmaCallback(TrainerCallback):
    """Running mean of the weights; it stands in for them in evaluation and in the final model."""

    def __init__(self, decay: float):
        self.decay = decay
        self.mean: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.mean = {name: p.detach().clone() for name, p in model.named_parameters()}
        if args.resume_from_checkpoint and (file := Path(args.resume_from_checkpoint, "ema.safetensors")).exists():
            self.mean = load_file(file)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        # A short memory at first, so that the mean forgets the random start.
        decay = min(self.decay, (state.global_step + 1) / (state.global_step + 10))
        weights = {name: p.detach() for name, p in model.named_parameters()}
        torch._foreach_lerp_([self.mean[name] for name in weights], list(weights.values()), 1.0 - decay)

    def swap(self, model: nn.Module):
        """Exchange the weights of the model with their mean; twice is back."""
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.data, self.mean[name] = self.mean[name], parameter.data

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if folder.is_dir():
            with complete_file(folder / "ema.safetensors") as temporary:
                save_file(self.mean, temporary)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.swap(model)


class SpectraFMTrainer(Trainer):
    """The Trainer with Muon for hidden matrices, and with evaluation on the running mean of the weights."""

    def __init__(self, *args, recipe: Recipe, train_collator: SpectraFMCollator, **kwargs):
        super().__init__(*args, **kwargs)
        self.recipe = recipe
        self.train_collator = train_collator
        self.ema = EmaCallback(recipe.ema_decay) if recipe.ema_decay else None
        if self.ema is not None:
            self.add_callback(self.ema)

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            muon, decayed, plain = split_parameters(self.model if model is None else model)
            rate = self.args.learning_rate
            self.optimizer = MuonWithAdamW(
                {"params": muon, "lr": self.recipe.muon_learning_rate, "weight_decay": self.recipe.muon_weight_decay},
                [
                    {"params": decayed, "lr": rate, "weight_decay": self.args.weight_decay},
                    {"params": plain, "lr": rate, "weight_decay": 0.0},
                ],
                betas=(self.args.adam_beta1, self.args.adam_beta2),
            )
        return self.optimizer

    def get_train_dataloader(self):
        # Augmentation belongs to training alone.
        plain, self.data_collator = self.data_collator, self.train_collator
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = plain

    def evaluate(self, *args, **kwargs):
        if self.ema is None or not self.is_in_train:
            return super().evaluate(*args, **kwargs)
        self.ema.swap(self.model)
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self.ema.swap(self.model)


def make_compute_metrics(config: SpectraFMConfig, label_names: Sequence[str]):
    """
    `compute_metrics` for the Trainer, in physical units: for each label bias, robust scatter (1.4826 MAD), RMSE and
    the robust standard deviation of error over sigma, for stars whose true `teff` lies in 3,500-6,500 K.
    """
    columns = [config.label_names.index(name) for name in label_names]
    center = np.array(config.label_centers)[columns]
    scale = np.array(config.label_scales)[columns]

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        outputs: Any = prediction.predictions
        truth: Any = prediction.label_ids
        mean, log_variance = outputs[:2]
        labels, label_errors = truth
        values, errors = mean * scale + center, np.exp(0.5 * log_variance) * scale
        stars = np.ones(len(labels), dtype=bool)
        if "teff" in label_names:
            teff = labels[:, list(label_names).index("teff")]
            stars = (teff > 3500) & (teff < 6500)
        return {
            f"{name}_{figure}": value
            for i, name in enumerate(label_names)
            for figure, value in label_metrics(
                values[stars, i], errors[stars, i], labels[stars, i], label_errors[stars, i]
            ).items()
            if figure != "n"
        }

    return compute_metrics


def calibrate_errors(trainer: Trainer, label_names: Sequence[str]):
    """
    Set `label_error_factors` of the trained model, so that on the validation set the robust standard deviation of
    error over sigma is one for each label.

    Noise added in training makes the errors too large, learning by heart makes them too small.
    """
    model: Any = trainer.model
    config = model.config
    config.label_error_factors = []
    stars: Any = trainer.eval_dataset
    answers = [
        cast(Any, trainer.predict(part, metric_key_prefix="calibration"))
        for part in (stars.values() if isinstance(stars, dict) else [stars])
    ]
    mean, log_variance = (np.concatenate([answer.predictions[i] for answer in answers]) for i in (0, 1))
    truth: Any = tuple(np.concatenate([answer.label_ids[i] for answer in answers]) for i in (0, 1))
    factors = dict.fromkeys(config.label_names, 1.0)
    # The errors of the labels are part of sigma: where they count, one step does not lead all the way.
    for _ in range(3):
        steps = np.array([factors[name] for name in label_names])
        rescaled = EvalPrediction(cast(Any, (mean, log_variance + 2.0 * np.log(steps))), truth)
        metrics = make_compute_metrics(config, label_names)(rescaled)
        for name in label_names:
            factors[name] *= metrics[f"{name}_robust_z"]
    config.label_error_factors = [round(factors[name], 4) for name in config.label_names]


#: Stars of each instrument that standardisation and whitening are measured on.
MEASURED_STARS = 40_000


def train(recipe: Recipe, args: TrainingArguments, train_set, validation_set) -> SpectraFMTrainer:
    """
    Train a model as the recipe says and save it, with tokenizer and training range, into `args.output_dir`.

    Parameters
    ----------
    train_set : datasets.Dataset or Mixture
        In the project's schema.
    validation_set : datasets.Dataset, or mapping of name to data set or to columns
        The same; several are evaluated one after the other.
    """
    torch.manual_seed(args.seed)
    training_stars = train_set if isinstance(train_set, Mixture) else Columns(train_set)
    if isinstance(validation_set, Mapping):
        validation_stars: Any = {name: Columns(stars) for name, stars in validation_set.items()}
    else:
        validation_stars = Columns(validation_set)
    if recipe.checkpoint:
        model, tokenizer = load_checkpoint(recipe.checkpoint)
        training_range = TrainingRange.load(str(model.name_or_path))
    elif isinstance(train_set, Mixture):
        generator = np.random.default_rng([args.seed, 1])
        samples = [source.draw(MEASURED_STARS // 10, generator) for source in train_set.sources]
        model, tokenizer, training_range = prepare_model(recipe, samples)
    else:
        model, tokenizer, training_range = prepare_model(recipe, [train_set.with_format("numpy")[:MEASURED_STARS]])
    final = Path(args.output_dir or "runs") / "final"
    args.remove_unused_columns = False  # the collator reads columns that `forward` does not name
    args.label_names = ["labels", "label_errors"]
    augmentation = {name: getattr(recipe, name) for name in AUGMENTATIONS}
    trainer = SpectraFMTrainer(
        model=model,
        args=args,
        recipe=recipe,
        train_dataset=training_stars,
        eval_dataset=validation_stars,
        data_collator=SpectraFMCollator(tokenizer, recipe.labels, recipe.scalars),
        train_collator=SpectraFMCollator(tokenizer, recipe.labels, recipe.scalars, **augmentation),
        compute_metrics=make_compute_metrics(model.config, recipe.labels),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    calibrate_errors(trainer, recipe.labels)
    # The Trainer sets it on every config; this model has no cache, and a loaded config would not keep it.
    model.config.__dict__.pop("use_cache", None)
    save_checkpoint(model, tokenizer, final)
    if training_range is not None:
        training_range.save(final)
    write_curves(final.with_name("curves.csv"), trainer.state.log_history)
    return trainer


def write_curves(path: Path, log_history: Sequence[Mapping[str, Any]]):
    """The Trainer's log as CSV: a line for each step that was logged or evaluated, a column for each quantity."""
    lines: dict[int, dict[str, Any]] = {}
    for entry in log_history:
        lines.setdefault(entry["step"], {}).update(entry)
    names = list(dict.fromkeys(name for line in lines.values() for name in line if "runtime" not in name))
    names = ["step", *(name for name in names if name != "step" and not name.endswith("per_second"))]
    with complete_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in line.items()} for line in lines.values()
        )
