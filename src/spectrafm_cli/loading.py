# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints and the first spectra, for verbs that need them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import reading_options


if TYPE_CHECKING:
    from spectrafm_hf.data.readers import Row
    from spectrafm_hf.models import SpectraFMForPrediction, SpectraFMTokenizer


def first_row(arguments: argparse.Namespace) -> Row | None:
    """The first spectrum that can be read."""
    from spectrafm_hf.data.readers import find_files, read_spectra

    files = find_files(arguments.input, arguments.split, [])
    return next(iter(read_spectra(files, failures=[], **reading_options(arguments))), None)


def load(
    name_or_path: str, revision: str = "main", device: str = "auto"
) -> tuple[SpectraFMForPrediction, SpectraFMTokenizer]:
    """Model, on the GPU of this process if there is one or on the device that is named, and tokenizer."""
    if sys.stderr.isatty():  # torch and transformers take seconds
        print(f"loading {name_or_path} ...", file=sys.stderr)
    from spectrafm_hf.checkpoints import load_checkpoint
    from spectrafm_hf.inference.survey import named_device

    place = named_device(device)
    model, tokenizer = load_checkpoint(name_or_path, revision)
    model.to(place)  # type: ignore[arg-type]  # transformers wraps it without its types
    return model, tokenizer


def say_device(model: SpectraFMForPrediction) -> None:
    """Print where it ran."""
    from spectrafm_hf.inference.survey import describe_device

    print(f"device: {describe_device(model.device)}")


def load_with_range(
    name: str, revision: str, device: str = "auto"
) -> tuple[SpectraFMForPrediction, SpectraFMTokenizer, Any]:
    from spectrafm_hf.inference.training_range import TrainingRange

    model, tokenizer = load(name, revision, device)
    return model, tokenizer, TrainingRange.load(str(model.name_or_path), revision)


def labels_of(model: SpectraFMForPrediction, tokenizer: SpectraFMTokenizer) -> tuple[list[str], dict[str, str]]:
    """What the checkpoint predicts, and the units."""
    names = list(tokenizer.requests or tokenizer.label_names)
    units = dict(zip(model.config.label_names, model.config.label_units, strict=True))
    return names, {name: units[name] for name in names}


def scalar_options(table: Path | None, tokenizer: SpectraFMTokenizer) -> dict[str, Any]:
    """Arguments of `read_spectra` for the scalars of a checkpoint."""
    names = list(tokenizer.scalar_names or ())
    if table is not None and not names:
        raise ValueError(f"--scalar-table: expected none, as the checkpoint needs no scalars, got {table}")
    if table is not None and not table.is_file():
        raise ValueError(f"--scalar-table: expected a file, got {table}")
    return {"scalars": names, "scalar_table": table and str(table)} if names else {}


def count(files: Sequence[Path]) -> int | None:
    """Number of spectra for the progress bar, if it is known quickly."""
    from spectrafm_hf.data.readers import count_spectra

    try:
        return count_spectra(files)
    except (ValueError, OSError):  # reported when the file is read
        return None
