# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""The networks of the paper's experiment that see synthetic stars first.

SpectraFM goes through the three stages of Koblischke & Bovy 2024:

1. synthetic stars of all wavelengths: the checkpoint `spectrafm-base-synthetic`;
2. observed stars of all kinds in another wavelength range than that of the task, where the task has one, with
   synthetic stars of all wavelengths between them, so that the range of the task is not forgotten;
3. 100 observed stars of one kind in the range of the task. A network that is trained on them beside synthetic stars
   tells the two apart, and takes all that looks observed for their kind. So they are what synthetic stars are
   calibrated on (`spectrafm_hf.data.calibrated`), and the network is trained on those.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import TrainingArguments

from spectrafm_hf.baselines import MLPBaseline, Spectra
from spectrafm_hf.checkpoints import bundled, load_checkpoint, save_checkpoint
from spectrafm_hf.data.calibrated import CalibratedStars, extended_catalogue
from spectrafm_hf.data.mixture import Mixture, Source
from spectrafm_hf.data.synthetic import SyntheticStars
from spectrafm_hf.models import SpectraFMConfig, SpectraFMForPrediction
from spectrafm_hf.models.modeling_spectrafm import prediction_loss
from spectrafm_hf.training import Recipe, train


if TYPE_CHECKING:
    from paper_experiment import Task

Columns = dict[str, NDArray[Any]]
PIXELS = ("wavelength", "flux", "flux_error", "mask")
STAGE_1 = "spectrafm-base-synthetic"
LABELS, UNITS = ["fe_h", "teff", "logg"], ["dex", "K", "dex"]
#: Synthetic stars that are drawn for a fit.
POOL = 40_000
#: Residuals are drawn larger than the 100 show them: stars of another kind have others.
INFLATION = 1.7
#: Of the [Fe/H] of calibrated stars: from 0, as in the catalogue, to 1, all equally often.
FLATNESS = 0.75
#: Below it, in the squares of what the filters of the model see, a component of the spectra is not made larger.
WHITENING_FLOOR = 1e-4


# --------------------------------------------------------------------------------------------------------------- stars


@dataclass(frozen=True)
class Parts:
    """Stars of one draw. None of those that are asked is in another part."""

    hundred: Columns
    #: All observed stars, whatever their kind, of stage 2 and of the ceiling.
    training: Columns
    #: Stars of the kind of the 100, the same in all draws: they choose settings and make the errors right.
    choosing: Columns
    asked: Columns


class Drawn:
    """Stars that are there, drawn at random, for a [`Mixture`]."""

    def __init__(self, stars: Columns):
        self.stars = stars

    def draw(self, n: int, generator: np.random.Generator) -> Columns:
        rows = generator.integers(len(self.stars["fe_h"]), size=n)
        return {name: column[rows] for name, column in self.stars.items()}


def outside(stars: Columns, window: tuple[float, float]) -> NDArray[Any]:
    return (stars["wavelength"][0] < window[0]) | (stars["wavelength"][0] > window[1])


def within(stars: Columns, window: tuple[float, float], patch_size: int) -> Columns:
    """
    The stars with all pixels outside the window masked. Patches that are masked as a whole are taken away: the others
    start where they do in a whole spectrum.
    """
    pixels = np.flatnonzero(~outside(stars, window))
    kept = slice(pixels[0] // patch_size * patch_size, (pixels[-1] // patch_size + 1) * patch_size)
    stars = stars | {"mask": stars["mask"] | outside(stars, window)}
    return stars | {name: stars[name][:, kept] for name in PIXELS}


@functools.lru_cache(maxsize=3)
def calibrated_stars(task: Task, draw: int) -> Columns:
    """
    Synthetic stars that look like the 100 of a draw, with the patches that have pixels of the task. Their labels are
    those of the observed stars of stage 2 or, where there is no such stage, of stars around the 100; [Fe/H] is low more
    often than in the catalogue.
    """
    parts = task.parts("validation", draw)
    catalogue = parts.training if task.stage_2 else extended_catalogue(parts.hundred, POOL, seed=draw)
    seen = parts.hundred | {"mask": parts.hundred["mask"] | outside(parts.hundred, task.window)}
    stars = CalibratedStars(
        task.instrument(), catalogue, seen, flatness=FLATNESS, inflation=INFLATION, by_depth=task.by_depth
    )
    return draw_pool(stars, task, draw)


@functools.lru_cache(maxsize=1)
def synthetic_stars(task: Task) -> Columns:
    return draw_pool(SyntheticStars(task.instrument()), task, 0)


def draw_pool(source: Any, task: Task, seed: int) -> Columns:
    generator = np.random.default_rng([seed, 3])
    patch_size = SpectraFMConfig.from_pretrained(bundled(STAGE_1)).patch_size
    names = (*PIXELS, *LABELS, *(f"{name}_err" for name in LABELS))
    parts = [within(source.draw(500, generator), task.window, patch_size) for _ in range(-(-POOL // 500))]
    return {name: np.concatenate([part[name] for part in parts]) for name in names}


# ----------------------------------------------------------------------------------------------------------- SpectraFM


@dataclass(frozen=True)
class SpectraFM:
    """
    One way through the stages.

    Parameters
    ----------
    title : str
    stage_1 : bool
        Begin with the checkpoint, or with one of the same architecture that has learned nothing.
    stage_2 : bool
        Where the task has one.
    stage_3 : {"calibrated", "alone", "everything"}
        What is learned from: synthetic stars calibrated on the 100; the 100 themselves, with decoder and second layer
        of the encoder frozen, as in the paper; or all observed stars there are, the ceiling.
    tried : mapping of str to list
        Settings that are tried.
    """

    title: str
    stage_1: bool = True
    stage_2: bool = True
    stage_3: str = "calibrated"
    tried: Mapping[str, list[Any]] = field(default_factory=dict)

    def fit_predict(
        self,
        task: Task,
        settings: Mapping[str, Any],
        parts: Parts,
        draw: int,
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """[Fe/H] and its error for the stars that are asked."""
        start = Path(bundled(STAGE_1)) if self.stage_1 else untrained()
        if self.stage_2 and task.stage_2:
            start = second_stage(start, task, self.stage_1)
        patch_size = SpectraFMConfig.from_pretrained(start).patch_size
        given = {"max_steps": 600, "learning_rate": 1e-3, "dropout": 0.2} | dict(settings)
        with tempfile.TemporaryDirectory() as folder:
            choosing, asked = (within(part, task.window, patch_size) for part in (parts.choosing, parts.asked))
            if self.stage_3 == "calibrated":
                stars = calibrated_stars(task, draw)
            else:
                stars = within(parts.hundred if self.stage_3 == "alone" else parts.training, task.window, patch_size)
            whitened(start, stars, Path(folder) / "start")
            trained = fit(
                {
                    "checkpoint": str(Path(folder) / "start"),
                    "labels": LABELS,
                    "units": UNITS,
                    "model": {"dropout": given.pop("dropout")},
                    "freeze": ["decoder", "encoder.layers.1"] if self.stage_3 == "alone" else [],
                    "muon_learning_rate": 0.0,
                    "ema_decay": 0.98,
                    # How large errors are differs between instruments and their models; it is no sign of iron.
                    "error_dropout": 1.0,
                },
                {"per_device_train_batch_size": 256, **given},
                Mixture([Drawn(stars)], [1], 10**9, draw),
                choosing,
                draw,
                Path(folder) / "run",
            )
            return predict(trained, asked)


@functools.cache
def untrained() -> Path:
    """Architecture, tokenizer and whitening of the checkpoint, with the weights that training starts from."""
    folder = Path(tempfile.mkdtemp(prefix="spectrafm-")) / "untrained"
    model, tokenizer = load_checkpoint(bundled(STAGE_1))
    torch.manual_seed(0)
    fresh = SpectraFMForPrediction(model.config)
    fresh.load_state_dict(dict(model.named_buffers()), strict=False)
    save_checkpoint(fresh, tokenizer, folder)
    return folder


@functools.cache
def second_stage(start: Path, task: Task, stage_1: bool) -> Path:
    """The checkpoint trained on the observed stars of stage 2; without stage 1, on nothing else."""
    assert task.stage_2 is not None
    patch_size = SpectraFMConfig.from_pretrained(start).patch_size
    observed = Drawn(within(task.read("train"), task.stage_2, patch_size))
    held_out = within(task.read("validation"), task.stage_2, patch_size)
    sources: list[Source] = [observed, SyntheticStars(task.instrument())] if stage_1 else [observed]
    return fit(
        {
            "checkpoint": str(start),
            "labels": [*LABELS, "alpha_m"],
            "units": [*UNITS, "dex"],
            "model": {"dropout": 0.1},
            "wavelength_cut": 0.4,
            "noise": 1.0,
            "error_dropout": 0.3,
            "muon_learning_rate": 2e-3,
            "muon_weight_decay": 0.05,
            "ema_decay": 0.995,
        },
        {"per_device_train_batch_size": 256, "max_steps": 800, "learning_rate": 1e-3},
        Mixture(sources, [2, 1][: len(sources)], 10**9, 0),
        held_out,
        0,
        Path(tempfile.mkdtemp(prefix="spectrafm-")),
    )


def whitened(checkpoint: Path, stars: Columns, folder: Path) -> None:
    """
    Write the checkpoint with whitening matrices for these stars, at the tokens they have: small differences are made
    large only as far as the residuals of calibrated stars, which tell nothing of the labels, are small as well.
    """
    model, tokenizer = load_checkpoint(str(checkpoint))
    embedding: Any = model.model.embeddings.patch_embedding
    wavelength, flux, error, mask = (stars[name][:4000] for name in PIXELS)
    tokens = tokenizer(wavelength, flux, error, mask, requests=["fe_h"])
    flux = embedding.compress(tokens["flux"]).numpy()
    slope = np.hypot(tokens["flux"].numpy(), embedding.flux_softening or 1.0)
    noise = tokens["flux_error"].numpy() / slope
    nodes = tokens["wavelength"][0].numpy().astype(float)
    matrices = np.tile(np.eye(embedding.patch_size, dtype=np.float32), (len(nodes), 1, 1))
    for i, matrix in enumerate(matrices):
        pixels = np.flatnonzero(tokens["pixel_mask"][:, i].float().mean(0) > 0.5)
        values, vectors = np.linalg.eigh(np.cov(flux[:, i, pixels].T))
        level = float(np.median(noise[:, i, pixels] ** 2)) + WHITENING_FLOOR
        matrix[np.ix_(pixels, pixels)] = (vectors / np.sqrt(values.clip(min=0) + level)) @ vectors.T
    if len(nodes) == 1:  # there are none or at least two
        nodes, matrices = np.array([nodes[0], 2 * nodes[0]]), np.tile(matrices, (2, 1, 1))
    embedding.whitening = torch.from_numpy(matrices)
    embedding.whitening_wavelength = tuple(nodes.tolist())
    model.config.whitening_wavelength = nodes.tolist()
    save_checkpoint(model, tokenizer, folder)


def fit(recipe: dict[str, Any], arguments: dict[str, Any], stars: Mixture, held_out: Columns, seed: int, out: Path):
    """Train as `scripts/train.py` does, and make the errors right on the stars that are held out; the checkpoint."""
    train(
        Recipe(**recipe),
        TrainingArguments(
            output_dir=str(out),
            per_device_eval_batch_size=1024,
            adam_beta2=0.98,
            weight_decay=0.01,
            max_grad_norm=1.0,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            save_strategy="no",
            eval_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            seed=seed,
            **arguments,
        ),
        stars,
        {"held out": held_out},
    )
    return out / "final"


@torch.no_grad()
def predict(checkpoint: Path, stars: Columns) -> tuple[NDArray[Any], NDArray[Any]]:
    """[Fe/H] and its error, from fluxes alone."""
    model, tokenizer = load_checkpoint(str(checkpoint))
    model.eval()
    values, errors = [], []
    for start in range(0, len(stars["flux"]), 1024):
        rows = slice(start, start + 1024)
        wavelength, flux, _, mask = (stars[name][rows] for name in PIXELS)
        output = model(**tokenizer(wavelength, flux, None, mask, requests=["fe_h"]))
        values.append(output.values[:, 0].numpy())
        errors.append(output.errors[:, 0].numpy())
    return np.concatenate(values), np.concatenate(errors)


# ---------------------------------------------------------------------------------------------------------------- MLPs


def spectra(stars: Columns, window: tuple[float, float], labels: Sequence[str]) -> Spectra:
    """The pixels of the window, over their median, as the methods that have no tokenizer take them."""
    pixels = ~outside(stars, window)
    flux, error = stars["flux"][:, pixels], stars["flux_error"][:, pixels]
    level = np.median(flux, axis=1, keepdims=True)
    return Spectra(
        flux / level,
        error / level,
        np.stack([stars[name] for name in labels], axis=1),
        np.stack([stars[f"{name}_err"] for name in labels], axis=1),
        stars["ak_targ"][:, None] if "ak_targ" in stars else np.empty((len(flux), 0)),
    )


@dataclass(frozen=True)
class PretrainedMLP:
    """
    An MLP that sees the synthetic stars that SpectraFM sees.

    Parameters
    ----------
    title : str
    calibrated : bool
        Whether on the 100, as those of stage 3; otherwise those of stage 1, and it is then fitted to the 100.
    tried : mapping of str to list
        `epochs` and `learning_rate` of the fit to the 100; with calibrated stars, `pretraining` alone: the epochs on
        synthetic stars.
    """

    title: str
    calibrated: bool
    tried: Mapping[str, list[Any]] = field(default_factory=dict)

    def fit_predict(
        self,
        task: Task,
        settings: Mapping[str, Any],
        parts: Parts,
        draw: int,
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """[Fe/H] and its error for the stars that are asked."""
        given = dict(settings)
        model = pretrained(task, self.calibrated, given.pop("pretraining", 10), draw)
        if not self.calibrated:
            model = copy.deepcopy(model)
            fine_tune(model, spectra(parts.hundred, task.window, LABELS), **given, seed=draw)
        model.calibrate(spectra(parts.choosing, task.window, LABELS))
        stars = spectra(parts.asked, task.window, LABELS)
        values, errors = model.predict(stars.flux, stars.flux_error)
        return values[:, 0], errors[:, 0]


@functools.lru_cache(maxsize=3)
def pretrained(task: Task, calibrated: bool, epochs: int, draw: int) -> MLPBaseline:
    stars = calibrated_stars(task, draw) if calibrated else synthetic_stars(task)
    model = MLPBaseline(2e-3, 0.05, epochs=epochs, degrees_of_freedom=3.0, n_components=80, seed=draw)
    return model.fit(spectra(stars, task.window, LABELS))


def fine_tune(model: MLPBaseline, stars: Spectra, epochs: int = 30, learning_rate: float = 1e-4, seed: int = 0) -> None:
    """Go on with the first label of the stars alone, all of them in each step."""
    inputs = torch.from_numpy(model.inputs(stars.flux, stars.flux_error)[0].astype(np.float32))
    target = torch.from_numpy((stars.labels[:, 0] - model.labels.center[0]) / model.labels.scale[0]).float()
    target_error = torch.from_numpy(np.nan_to_num(stars.label_errors[:, 0] / model.labels.scale[0])).float()
    torch.manual_seed(seed)
    network = model.network.train()
    optimizer = torch.optim.AdamW(network.parameters(), learning_rate, weight_decay=0.01)
    for _ in range(epochs):
        mean, log_variance = network(inputs)[:, 0].unbind(-1)
        loss = prediction_loss(mean, log_variance.clamp(-12, 8), target, target_error)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()
