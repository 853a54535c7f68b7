# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""A recipe: model, data and settings of a training run from a YAML file, and its stars."""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from datasets import load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers import HfArgumentParser, TrainingArguments

from ..data.gaia_xp import build_gaia_xp
from ..data.mixture import HostedStars, Mixture
from ..data.sources import cache_dir
from ..data.streaming import count_rows, load_streamed
from ..synthesis.calibrated import CATALOGUE, CalibratedStars
from ..synthesis.synthetic import SyntheticStars
from ..synthesis.synthetic_data_sets import build_synthetic


#: Default for `sources`.
STARS_PER_EPOCH = 1_000_000
#: For `synthetic-<instrument>` as a data set: as many as in the paper.
SYNTHETIC_STARS = 90_000
VALIDATION_STARS = 2000
#: For calibrated stars: rare [Fe/H] is oversampled compared with the catalogue, but common [Fe/H] remains common.
FLATNESS = 0.5


@dataclass
class Recipe:
    """
    Model and data of a training run. The same YAML file has the fields of `TrainingArguments`.

    Parameters
    ----------
    data : str
        A data set folder or hub name in the project's schema. `scripts/train.py` builds `gaia-xp` and
        `synthetic-<instrument>` if they are missing.
    labels : list[str]
        Stellar labels to learn.
    units : list[str]
        Their units.
    scalars : list[str]
        Columns of the data, such as a colour or a parallax, that are additional inputs of a model of the published
        architecture; NaN is unknown, errors are not used. A checkpoint on evidence, such as the bundled one, refuses
        them here: `spectrafm finetune --scalars` learns labels from spectra and scalars, with errors.
    model, tokenizer : dict
        Settings of [`SpectraFMConfig`] and [`SpectraFMTokenizer`]; those that depend on the training set are added.
    checkpoint : str
        A bundled checkpoint, a folder or a hub name to start from, with its tokenizer. Then `model` may only have
        `dropout`, and `tokenizer` only `requests` (the default labels to predict; default: those of the checkpoint and
        the learnt ones). New labels are added. Without a checkpoint, a model of the published architecture is trained
        from scratch; for models on evidence use `scripts/pretrain.py`.
    freeze : list[str]
        Module names of frozen parts. The paper's last stage: `[decoder, encoder.layers.1]`.
    sources : dict[str, float]
        Instead of `data`: several instruments with their frequencies; each batch is from one instrument.
        `synthetic-<instrument>` generates stars without limit. So does `calibrated-<data set>`, with the labels, the
        extinction and the residuals of the training stars of that data set (see [`CalibratedStars`]), such as
        `gaia-xp`. All other names are as in `data`. Each source but calibrated stars has a validation set; `eval_loss`
        is the mean over them.
    streaming : bool
        Stream the training stars of `data` from its Parquet files, local or on the hub, see [`StreamedStars`]: for data
        sets that do not fit into memory or on the disk. The standardisation is measured on the first 40,000 stars, as
        without streaming, but on 30 million pixels at most.
    stars_per_epoch : int
        For `sources` and `streaming`. Default: 1,000,000 for sources, all stars of a stream.
    noise, noise_correlation, pixel_dropout, error_dropout, reddening, tilt, wavelength_cut : float
    snr : [low, high]
    radial_velocity, smoothing, resampling, sky_lines : float
        Augmentation, see [`SpectraFMCollator`].
    muon_learning_rate, muon_weight_decay : float
        For the matrices inside the layers; all other weights are trained with AdamW and the rates of
        `TrainingArguments`. With a rate of 0, AdamW also trains the matrices: for short runs with small batches, where
        steps of Muon are expensive.
    ema_decay : float
        Decay per step of the running mean of the weights, which is evaluated and saved; 0: none.
    early_stopping_patience : int
        Stop after this number of evaluations without improvement; 0: never. Needs `load_best_model_at_end`.
    train_split, validation_split : str
    """

    data: str = field(default="gaia-xp")
    labels: list[str] = field(default_factory=lambda: ["teff", "logg", "fe_h", "alpha_m"])
    units: list[str] = field(default_factory=lambda: ["K", "dex", "dex", "dex"])
    scalars: list[str] = field(default_factory=list)
    model: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    freeze: list[str] = field(default_factory=list)
    sources: dict[str, Any] = field(default_factory=dict)
    streaming: bool = False
    stars_per_epoch: int = 0
    noise: float = 0.0
    noise_correlation: float = 0.0
    pixel_dropout: float = 0.0
    error_dropout: float = 0.0
    reddening: float = 0.0
    tilt: float = 0.0
    wavelength_cut: float = 0.0
    snr: list[float] = field(default_factory=list)
    radial_velocity: float = 0.0
    smoothing: float = 0.0
    resampling: float = 0.0
    sky_lines: float = 0.0
    muon_learning_rate: float = 3e-3
    muon_weight_decay: float = 0.01
    ema_decay: float = 0.0
    early_stopping_patience: int = 0
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
    "snr",
    "radial_velocity",
    "smoothing",
    "resampling",
    "sky_lines",
)


def read_recipe(file: str | Path, options: Sequence[str] = ()) -> tuple[Recipe, TrainingArguments]:
    """
    Read a recipe: a YAML file with the fields of [`Recipe`] and of `transformers.TrainingArguments`.

    Parameters
    ----------
    options : sequence of str
        `--name value`, which override the file. `--resume_from_checkpoint last` is the last complete checkpoint.

    Raises
    ------
    ValueError
        If the file is not YAML with these fields.
    """
    try:
        settings = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: expected YAML, got {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file}: expected names of settings with their values, got {type(settings).__name__}")
    parser = HfArgumentParser([Recipe, TrainingArguments])  # type: ignore[list-item]
    known, unknown = parser.parse_known_args(list(options))
    if unknown:
        raise ValueError(f"options: expected fields of Recipe or of TrainingArguments, got {unknown}")
    changed = {name for name in vars(known) if any(option.split("=")[0].lstrip("-") == name for option in options)}
    try:
        recipe, args = parser.parse_dict({**settings, **{name: getattr(known, name) for name in changed}})
    except Exception as error:  # TrainingArguments raises other errors for some wrong fields
        raise ValueError(
            f"{file}: expected fields of Recipe and of TrainingArguments, got {' '.join(str(error).split())}"
        ) from error
    if args.resume_from_checkpoint in ("last", "True", "true"):
        args.resume_from_checkpoint = last_checkpoint(args.output_dir)
    return recipe, args


def last_checkpoint(folder: str | Path) -> str | None:
    """The last complete `checkpoint-<step>` of a run, or None: a run may be killed while saving."""
    for _, path in sorted(checkpoints_by_step(folder).items(), reverse=True):
        with contextlib.suppress(OSError, ValueError):
            json.loads((path / "trainer_state.json").read_bytes())  # written last
            return str(path)
    return None


def checkpoints_by_step(folder: str | Path) -> dict[int, Path]:
    """The folders `checkpoint-<step>` of a run by step; other names, such as `checkpoint-3-backup`, are ignored."""
    paths = {path.name.removeprefix("checkpoint-"): path for path in Path(folder).glob("checkpoint-*")}
    return {int(step): path for step, path in paths.items() if step.isdecimal()}


def load_stars(recipe: Recipe, seed: int) -> tuple[Any, Any]:
    """
    Training and validation stars for [`train`]; `gaia-xp` and `synthetic-<instrument>` are built if they are missing.
    """
    if recipe.streaming:
        if recipe.sources:
            raise ValueError(f"streaming: expected data without sources, got sources {list(recipe.sources)}")
        name = _hosted(recipe.data)
        return load_streamed(name, recipe.train_split, recipe.validation_split, recipe.stars_per_epoch, seed)
    if not recipe.sources:
        data = _load(recipe.data)
        return data[recipe.train_split], data[recipe.validation_split]
    sources: list[Any] = []
    validation: dict[str, Any] = {}
    for name in recipe.sources:
        if name.startswith("synthetic-"):
            sources.append(SyntheticStars(name.removeprefix("synthetic-")))
            validation[name] = sources[-1].draw(VALIDATION_STARS, np.random.default_rng([seed, 2]))
        elif name.startswith("calibrated-"):
            name = name.removeprefix("calibrated-")
            data = _load(name)[recipe.train_split]
            sources.append(calibrated_stars(name, data))
        else:
            data = _load(name)
            sources.append(HostedStars(data[recipe.train_split]))
            validation[name] = data[recipe.validation_split]
    stars_per_epoch = recipe.stars_per_epoch or STARS_PER_EPOCH
    return Mixture(sources, list(recipe.sources.values()), stars_per_epoch, seed), validation


def calibrated_stars(instrument: str, data: Any) -> CalibratedStars:
    """Synthetic stars of an instrument that resemble those of a data set, which is read into memory."""
    needed = [*CATALOGUE, "wavelength", "flux", "mask"]
    if missing := set(needed) - set(data.column_names):
        raise ValueError(f"sources: expected the columns {needed} to calibrate {instrument} with, got no {missing}")
    observed = data.select_columns(needed).with_format("numpy")[:]
    return CalibratedStars(instrument, observed, observed, flatness=FLATNESS)


def _load(name: str) -> Any:
    """All splits of a data set, from the cache of `datasets`."""
    hosted = _hosted(name)
    try:
        return load_dataset(hosted)
    except (DatasetGenerationError, pa.ArrowInvalid) as error:
        for path in sorted(Path(hosted).rglob("*.parquet")):  # raises an error that names the broken file
            count_rows(str(path))
        cause = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"data: expected a data set that can be read in {hosted}, got {cause}") from error


def _hosted(name: str) -> str:
    """The data set's name or folder for `datasets`, built first if needed."""
    if name == "gaia-xp":
        return str(build_gaia_xp(cache_dir() / "gaia-xp"))
    if name.startswith("synthetic-"):
        return str(build_synthetic(cache_dir() / name, SYNTHETIC_STARS, name.removeprefix("synthetic-")))
    return name
