# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""What is trained: a new model, measured on training stars, or a checkpoint, extended and in part frozen."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from .checkpoints import demand_pixels, load_checkpoint
from .metrics import MAD_TO_SIGMA
from .models import SpectraFMConfig, SpectraFMForPrediction, SpectraFMTokenizer
from .prediction import TrainingRange


if TYPE_CHECKING:
    from .training import Recipe

#: A pixel counts as covered by a standardisation table if the next of its wavelengths is this close, as a fraction of
#: wavelength: half of the widest pixels in use, and more than a gap between detectors.
COVERED = 0.005
#: Noise of spectra whose errors nobody knows, for the whitening, as the filters of the model see the flux. With less,
#: what is noise comes out as large as lines, and few stars are learnt by heart: scripts/recipes/finetune.tried.md.
UNKNOWN_NOISE = 0.1
#: The linear layers of encoder and decoder.
LORA_TARGETS = r".*\.layers\.\d+\.(attention\.\w+_proj|mlp\.fc\d)"


def robust_center_and_scale(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Median and robust standard deviation along the first axis, NaN ignored."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NaN in all rows stays NaN
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
        Of the labels, and of the wavelengths of each sample.

    Raises
    ------
    ValueError
        If a label is in no sample, the spectra of one do not share a wavelength grid, or two samples overlap.
    """
    columns = _label_columns(recipe, samples)
    names = list(columns)
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
    training_range = TrainingRange({name: _limits(column) for name, column in columns.items()}, **_instruments(samples))
    return model, tokenizer, training_range


def prepare_checkpoint(
    recipe: Recipe, samples: Sequence[Mapping[str, Any]]
) -> tuple[SpectraFMForPrediction, SpectraFMTokenizer, TrainingRange | None]:
    """
    The checkpoint of the recipe and its tokenizer, with the labels and instruments of the samples that it lacks.

    A new label gets its centre and scale from the data. A new instrument gets its part of the standardisation table
    and, with whitening, nodes of its own; one whose wavelengths are known already is standardised as the others are.

    Parameters
    ----------
    recipe : Recipe
    samples : sequence of mappings
        As in [`prepare_model`].

    Returns
    -------
    model, tokenizer
    training_range : TrainingRange or None
        Of the checkpoint, if it has one, widened to the labels of the samples; of wavelength, that of the samples: what
        the checkpoint knew of others, training on these may make it forget.

    Raises
    ------
    ValueError
        If there is no such checkpoint, a label is in no sample, an instrument overlaps in part with what is known, or
        the recipe wants the model to be another one.
    """
    model, tokenizer = load_checkpoint(str(recipe.checkpoint))
    demand_pixels(tokenizer, "fine-tune")
    _override(recipe, model, tokenizer, samples)
    training_range = TrainingRange.load(str(model.name_or_path))
    columns = _label_columns(recipe, samples)
    units = dict(zip(recipe.labels, recipe.units, strict=True))
    for name, column in columns.items():
        if name not in tokenizer.label_names:
            center, scale = robust_center_and_scale(column)
            model.add_label(name, units.get(name, ""), float(center), float(scale))
            tokenizer.add_label(name)
    if "requests" not in recipe.tokenizer:
        tokenizer.requests = list(dict.fromkeys([*(tokenizer.requests or tokenizer.label_names), *recipe.labels]))
    for sample in samples:
        add_instrument(model, tokenizer, sample, remeasure=recipe.remeasure)
    if training_range is not None:
        limits = {name: _limits(column) for name, column in columns.items()}
        for name, (low, high) in training_range.labels.items():
            limits[name] = (min(low, limits[name][0]), max(high, limits[name][1])) if name in limits else (low, high)
        training_range = TrainingRange(limits, **_instruments(samples))
    return model, tokenizer, training_range


CONTINUUM = ("continuum", "continuum_percentile", "continuum_window", "continuum_degree")
CHANGEABLE = ("requests", "wavelength_ranges", *CONTINUUM)


def _override(
    recipe: Recipe,
    model: SpectraFMForPrediction,
    tokenizer: SpectraFMTokenizer,
    samples: Sequence[Mapping[str, Any]],
) -> None:
    """What a recipe may change of a checkpoint besides training it, in place."""
    for field, settings, known in (
        ("model", recipe.model, ("dropout",)),
        ("tokenizer", recipe.tokenizer, CHANGEABLE),
    ):
        if set(settings) - set(known):
            raise ValueError(f"{field}: expected nothing but {known} beside a checkpoint, got {list(settings)}")
    if "dropout" in recipe.model:
        model.config.dropout = recipe.model["dropout"]
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = model.config.dropout
    if "requests" in recipe.tokenizer:
        tokenizer.requests = list(recipe.tokenizer["requests"])
    if "wavelength_ranges" in recipe.tokenizer:
        tokenizer.wavelength_ranges = recipe.tokenizer["wavelength_ranges"]
    continuum = {name: value for name, value in recipe.tokenizer.items() if name in CONTINUUM}
    for name, value in continuum.items():
        setattr(tokenizer, name, value)
    if continuum and tokenizer.standardize_wavelength is not None:
        # What is typical over one continuum is not over another.
        standardised = (tokenizer.standardize_center, tokenizer.standardize_scale)
        tokenizer.standardize_center, tokenizer.standardize_scale = _tables(
            tokenizer, standardised, samples, model.config, lambda grid: (grid.center, grid.scale)
        )
        if tokenizer.request_scale is not None:
            tokenizer.request_center, tokenizer.request_scale = _tables(
                tokenizer, (tokenizer.request_center, tokenizer.request_scale), samples, model.config,
                _center_and_scatter,
            )  # fmt: skip


def _tables(
    tokenizer: SpectraFMTokenizer,
    before: tuple[Any, Any],
    samples: Sequence[Mapping[str, Any]],
    config: SpectraFMConfig,
    measure: Callable[[_Grid], tuple[np.ndarray, np.ndarray]],
) -> tuple[list[float], list[float]]:
    """Centre and scale at the wavelengths of the standardisation: measured where there are stars, else as before."""
    known = np.asarray(tokenizer.standardize_wavelength)
    center, scale = (np.array(values) for values in before)
    for sample in samples:
        grid = _measure(sample, tokenizer.to_dict(), config)
        within = (known >= grid.wavelength[0]) & (known <= grid.wavelength[-1])
        for table, values in zip((center, scale), measure(grid), strict=True):
            table[within] = np.interp(known[within], grid.wavelength, values)
    first, second = ([float(f"{value:.4g}") for value in table] for table in (center, scale))
    return first, second


@torch.no_grad()
def add_instrument(
    model: SpectraFMForPrediction, tokenizer: SpectraFMTokenizer, sample: Mapping[str, Any], *, remeasure: bool = False
) -> bool:
    """
    Extend the standardisation table, and the nodes of the whitening, by the wavelengths of an instrument, in place.

    Parameters
    ----------
    model, tokenizer
    sample : mapping
        Columns of stars of the instrument in the project's schema, on one grid if it is new.
    remeasure : bool
        Replace what is known of its wavelengths.

    Returns
    -------
    bool
        False if there was nothing to do: there is no table, or it covers all pixels.

    Raises
    ------
    ValueError
        If the table covers some of the pixels, but not all, and `remeasure` is false.
    """
    if tokenizer.standardize_wavelength is None:
        return False
    known = np.asarray(tokenizer.standardize_wavelength)
    wavelength = np.unique(np.concatenate([np.asarray(grid, dtype=float) for grid in sample["wavelength"][:1000]]))
    right = np.searchsorted(known, wavelength).clip(1, len(known) - 1)
    distance = np.minimum(np.abs(wavelength - known[right]), np.abs(wavelength - known[right - 1]))
    covered = distance < COVERED * wavelength
    if covered.all() and not remeasure:
        return False

    def outside(known: np.ndarray) -> np.ndarray:
        """Of some wavelengths, those that stay as they are."""
        apart = (known < wavelength[0] * (1 - COVERED)) | (known > wavelength[-1] * (1 + COVERED))
        return apart if remeasure else np.ones(len(known), bool)

    overlaps = covered.any() or np.any((wavelength[0] < known) & (known < wavelength[-1]))
    if overlaps and not remeasure:
        raise ValueError(
            "wavelength: expected an instrument wholly within the wavelengths that the checkpoint is standardised at, "
            f"or wholly outside them, got {covered.sum()} of {len(wavelength)} pixels from {wavelength[0]:g} to "
            f"{wavelength[-1]:g} Angstrom within"
        )
    grid = _measure(sample, tokenizer.to_dict(), model.config)
    kept = outside(known)
    order = np.argsort(np.concatenate([known[kept], grid.wavelength]))
    tables = {"wavelength": grid.wavelength, "center": grid.center, "scale": grid.scale}
    tables = {f"standardize_{field}": values for field, values in tables.items()}
    if tokenizer.request_scale is not None:
        tables["request_center"], tables["request_scale"] = _center_and_scatter(grid)
    for field, values in tables.items():
        setattr(tokenizer, field, np.concatenate([np.asarray(getattr(tokenizer, field))[kept], values])[order].tolist())
    if model.config.whitening_wavelength:
        embedding: Any = model.model.embeddings.patch_embedding
        known = np.asarray(embedding.whitening_wavelength)
        kept = outside(known)
        nodes = np.concatenate([known[kept], grid.nodes])
        matrices = torch.from_numpy(_whitening(grid, embedding, tokenizer.clip or np.inf)).to(embedding.whitening)
        order = np.argsort(nodes)
        embedding.whitening = torch.cat([embedding.whitening[torch.from_numpy(kept)], matrices])[
            torch.from_numpy(order)
        ]
        embedding.whitening_wavelength = tuple(nodes[order].tolist())
        model.config.whitening_wavelength = nodes[order].tolist()
    return True


def standardise_requests(
    model: SpectraFMForPrediction, tokenizer: SpectraFMTokenizer, samples: Sequence[Mapping[str, Any]]
) -> None:
    """
    Give the tokenizer tables of centre and scatter of the flux, for flux that is asked for, where it has none and
    standardises its input as a ratio to a typical star (`flux_softening`).

    Parameters
    ----------
    model, tokenizer
    samples : sequence of mappings
        As in [`prepare_model`]. Where there are no stars, the tables are those of the input.
    """
    if (
        not model.config.flux_softening
        or tokenizer.standardize_wavelength is None
        or tokenizer.request_scale is not None
    ):
        return
    standardised = (tokenizer.standardize_center, tokenizer.standardize_scale)
    tokenizer.request_center, tokenizer.request_scale = _tables(
        tokenizer, standardised, samples, model.config, _center_and_scatter
    )


def freeze(model: SpectraFMForPrediction, names: Sequence[str]) -> None:
    """
    Keep parts of a model as they are: `decoder`, `encoder.layers.1`, `embeddings`, `readout` or any other module.

    Raises
    ------
    ValueError
        If there is no such module, or nothing is left to train.
    """
    modules = {name.removeprefix("model."): module for name, module in model.named_modules() if name}
    for name in names:
        if name.removeprefix("model.") not in modules:
            parts = [part for part in modules if part.count(".") == 0 or part.split(".")[-2] == "layers"]
            raise ValueError(f"freeze: expected modules of the model, such as {parts}, got {name!r}")
        modules[name.removeprefix("model.")].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"freeze: expected something to be left to train, got {list(names)}")


def add_lora(model: SpectraFMForPrediction, settings: Mapping[str, Any]) -> nn.Module:
    """
    A `peft.PeftModel`: low-rank adapters on the linear layers of encoder and decoder are trained, and the vocabulary
    (a few numbers, without which a label that is new could not be learnt).

    Parameters
    ----------
    settings : mapping
        Arguments of `peft.LoraConfig`, over these.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError("lora: expected the package peft, which is not installed") from error
    settings = {"target_modules": LORA_TARGETS, "modules_to_save": ["value_embedding"], **settings}
    try:
        return get_peft_model(model, LoraConfig(**settings))  # type: ignore[arg-type]
    except TypeError as error:
        raise ValueError(f"lora: expected arguments of peft.LoraConfig, got {dict(settings)} ({error})") from error


def _instruments(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Range and spacing of the wavelengths of each sample, once where they are the same (of real and of like stars)."""
    found = {}
    for sample in samples:
        spectra = zip(sample["wavelength"][:1000], sample["mask"][:1000], strict=True)
        grids = [np.sort(np.asarray(grid, dtype=np.float64)[~np.asarray(mask)]) for grid, mask in spectra]
        grids = [grid for grid in grids if len(grid) > 1]
        # Without gaps; what is left of a spectrum may be its finest or its widest pixels.
        steps = [step[step < 2 * np.median(step)] for step in map(np.diff, grids)]
        found[_limits(np.concatenate(grids))] = _limits(np.concatenate(steps))
    one = len(found) == 1
    names = {"wavelength": tuple(found), "wavelength_step": tuple(found.values())}
    return {name: limits[0] if one else limits for name, limits in names.items()}


def _limits(values: np.ndarray) -> tuple[float, float]:
    return float(np.nanmin(values)), float(np.nanmax(values))


def _label_columns(recipe: Recipe, samples: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """All values of the labels, then of the scalars, of the recipe."""
    columns = {}
    for name in [*recipe.labels, *recipe.scalars]:
        parts = [np.asarray(sample[name], dtype=np.float64) for sample in samples if name in sample]
        if not parts:
            known = sorted({name for sample in samples for name in sample})
            raise ValueError(f"labels: expected columns of the data ({known}), got {name!r}")
        columns[name] = np.concatenate(parts)
    return columns


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
    raw = {"standardize_wavelength": None, "standardize_center": 0.0, "standardize_scale": 1.0, "max_length": None}
    settings = {**settings, **raw, "clip": None, "request_center": None, "request_scale": None}
    whole = SpectraFMTokenizer(**{**settings, "patch_size": len(wavelength)})
    lengths = whole(wavelength, flat, return_tensors="np")["pixel_mask"][0].sum(axis=-1)
    tokens = whole(spectra[0], spectra[1], spectra[2], spectra[3], return_tensors="np")
    complete = tokens["attention_mask"].sum(axis=1) == len(lengths)
    if not complete.any():
        raise ValueError("mask: expected stars with valid pixels on both sides of every gap, got none")
    flux, flux_error = (
        np.concatenate([values[complete, i, :length] for i, length in enumerate(lengths)], axis=1)
        for values in (np.where(tokens["pixel_mask"], tokens[name], np.nan) for name in ("flux", "flux_error"))
    )
    center, scale = (_filled(wavelength, values) for values in robust_center_and_scale(flux))
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


def _filled(wavelength: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Pixels that are masked in all stars get what lies between their neighbours."""
    known = np.isfinite(values)
    return np.interp(wavelength, wavelength[known], values[known])


def _center_and_scatter(grid: _Grid) -> tuple[np.ndarray, np.ndarray]:
    """Of the flux over the continuum, (pixels,) each; a pixel in which all stars are alike has a little scatter."""
    center, scatter = (_filled(grid.wavelength, values) for values in robust_center_and_scale(grid.flux))
    return center, np.maximum(scatter, 1e-3 * np.nanmax(np.abs(center)))


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
        As the filters of the model see them, NaN where masked. An error of 0 is unknown and counts as `UNKNOWN_NOISE`.
    patch_size : int
    patches : sequence of slices
        The pixels of each patch, at most `patch_size`.

    Returns
    -------
    array of shape (patches, patch_size, patch_size), float32
    """
    flux = np.nan_to_num(flux)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # pixels that are masked in all stars
        noise = np.nan_to_num(np.nanmedian(np.where(flux_error == 0, UNKNOWN_NOISE, flux_error) ** 2, axis=0))
    matrices = np.tile(np.eye(patch_size, dtype=np.float32), (len(patches), 1, 1))
    for matrix, pixels in zip(matrices, patches, strict=True):
        count = pixels.stop - pixels.start
        # Patches differ in noise far more than pixels of a patch: one level keeps the matrix well-behaved.
        level = float(np.mean(noise[pixels])) + 1e-4
        values, vectors = np.linalg.eigh(np.cov(flux[:, pixels].T).reshape(count, count))
        matrix[:count, :count] = (vectors / np.sqrt(values.clip(min=0.0) + level)) @ vectors.T
    return matrices
