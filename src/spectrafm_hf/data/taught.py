# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Stars whose labels are what trained models say of them: what several models know together, taught to one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..checkpoints import load_checkpoint
from ..prediction import schema_tokenizer
from .synthetic import SyntheticStars


class TaughtStars:
    """
    Stars of a source, with labels drawn from the answers of several models, the teachers.

    A label is the mean of the teachers' answers plus an error, drawn from Student's t with three degrees of freedom and
    the mean of their sigmas as its scale: a model that learns from such labels learns the mean, and the sigmas too. The
    teachers see the spectra as the source has them, before any augmentation.

    Parameters
    ----------
    source : SyntheticStars
        Stars that no teacher has seen, on one wavelength grid.
    teachers : sequence of str
        Checkpoints that know the labels.
    labels : sequence of str
    """

    def __init__(self, source: SyntheticStars, teachers: Sequence[str], labels: Sequence[str]):
        self.source, self.labels = source, list(labels)
        self.teachers = []
        for name in teachers:
            model, tokenizer = load_checkpoint(name)
            tokenizer.label_ids(self.labels)
            self.teachers.append((model, schema_tokenizer(tokenizer)))
        if not self.teachers:
            raise ValueError("teachers: expected at least one checkpoint, got none")

    def draw(self, n: int, generator: np.random.Generator) -> dict[str, NDArray[Any]]:
        """Columns of `n` stars; the error of a label that is taught is unknown."""
        columns = self.source.draw(n, generator)
        spectra = {name: columns[name] for name in ("wavelength", "flux", "flux_error", "mask")}
        answers = []
        with torch.inference_mode():
            for model, tokenizer in self.teachers:
                output = model(**tokenizer(spectra, requests=self.labels))
                answers.append((output.values.numpy(), output.errors.numpy()))
        value, error = (np.mean(part, axis=0) for part in zip(*answers, strict=True))
        drawn = value + error * generator.standard_t(3, value.shape)
        unknown = np.full(n, np.nan, np.float32)
        for i, name in enumerate(self.labels):
            columns[name], columns[f"{name}_err"] = drawn[:, i].astype(np.float32), unknown
        return columns
