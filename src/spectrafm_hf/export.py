# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint as one ONNX file, for programs without PyTorch, whose answers are checked to be the model's own."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import BatchFeature

from .checkpoints import demand_pixels, load_checkpoint
from .data.readers import read_spectra
from .data.schema import PIXEL_COLUMNS
from .data.synthetic import SyntheticStars
from .files import complete_file
from .models import SpectraFMForPrediction, SpectraFMTokenizer
from .prediction import TrainingRange, schema_tokenizer, valid_pixels


try:
    import onnxruntime
    import onnxscript  # noqa: F401  # which torch's exporter needs
except ImportError as error:
    raise ImportError('ONNX needs its libraries: pip install ".[onnx]" in a clone of the repository') from error


OPSET = 20
#: Inputs of the file, by the names that the tokenizer gives them.
INPUTS = (*SpectraFMTokenizer.model_input_names, "request_ids")
#: What the answers may differ by, in units of the error of each label: a few times the rounding of float32, in which
#: 5,000 K with an error of 25 K are known to 2e-5 of that.
TOLERANCE = 2e-4

_DEMO_STARS = Path(__file__).parent / "resources" / "gaia_xp_demo.parquet"
_CHECKED_STARS = 64
_MASKED_SHARE = 0.3


@dataclass(frozen=True)
class Exported:
    """
    A file and how well it was found to agree.

    Attributes
    ----------
    path : path
    n_spectra : int
        Spectra that were compared, each in several ways.
    deviation : float
        Greatest difference of ONNX Runtime's values and errors from PyTorch's, in units of the error.
    """

    path: Path
    n_spectra: int
    deviation: float


def export_onnx(
    checkpoint: str | os.PathLike[str],
    path: str | os.PathLike[str],
    rows: Sequence[Mapping[str, Any]] | None = None,
    *,
    revision: str = "main",
    tolerance: float = TOLERANCE,
) -> Exported:
    """
    Write a checkpoint as ONNX (opset 20), for any number of stars, tokens and requests.

    The inputs are those that the tokenizer makes of spectra, by its names; the outputs `values` and `errors` are in
    physical units, of shape (stars, requests). What the labels are called, their units and the ids by which they are
    requested stand in the metadata of the file. Scalars as inputs and requests of flux stay with PyTorch.

    The file appears only if ONNX Runtime answers as PyTorch does: for many spectra at once, one alone, with masked
    pixels, with another number of tokens, with padding, and for fewer labels.

    Parameters
    ----------
    checkpoint : str or path
        A bundled checkpoint, a folder, or a repository of the hub (`owner/name`).
    path : path
        Ends in .onnx. A file of this name is replaced.
    rows : sequence of mappings, optional
        Spectra for the comparison, in the schema of this project. Default: stars that come with the package (Gaia XP),
        or synthetic ones (APOGEE, optical), whichever the checkpoint was trained for.
    revision : str
        Branch, tag or commit, for a repository of the hub.
    tolerance : float
        What values and errors may differ by, in units of the error.

    Raises
    ------
    ValueError
        For another ending, a folder that does not exist, a checkpoint that cannot be loaded, or spectra that its
        tokenizer refuses.
    RuntimeError
        If the answers differ by more than `tolerance`; nothing is written then.

    Examples
    --------
    >>> session = onnxruntime.InferenceSession("model.onnx")  # doctest: +SKIP
    >>> inputs = tokenizer(wavelength, flux, flux_error, return_tensors="np")  # doctest: +SKIP
    >>> values, errors = session.run(None, dict(inputs))  # doctest: +SKIP
    """
    path = Path(path)
    if path.suffix.lower() != ".onnx":
        raise ValueError(f"output: expected a name that ends in .onnx, got {path}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"output: expected a folder that exists, got {path.parent}")
    if path.is_dir():
        raise ValueError(f"output: expected the name of a file, got the folder {path}")
    model, tokenizer = load_checkpoint(checkpoint, revision)
    demand_pixels(tokenizer, "export")
    model = model.float()  # type: ignore[no-untyped-call]  # transformers wraps it without its types
    tokenizer = schema_tokenizer(tokenizer)
    if rows is None:
        rows = _suitable_spectra(tokenizer, TrainingRange.load(str(model.name_or_path), revision))
    batches = list(_check_batches(tokenizer, rows))
    with (
        complete_file(path) as temporary,
        tqdm(total=1 + len(batches), desc="exporting", delay=2, disable=None) as progress,
    ):
        _write(model, temporary, Path(checkpoint).name)
        progress.update()
        session = onnxruntime.InferenceSession(os.fspath(temporary), providers=["CPUExecutionProvider"])
        deviation = 0.0
        for inputs in batches:
            deviation = max(deviation, _deviation(model, session, inputs))
            if not deviation <= tolerance:
                raise RuntimeError(
                    f"{path}: not written, as ONNX Runtime differs from PyTorch by {deviation:.1e} of the error, more "
                    f"than {tolerance:.1e}, for flux of shape {tuple(inputs['flux'].shape)}"
                )
            progress.update()
    return Exported(path, len(rows), deviation)


class _Values(torch.nn.Module):
    """The model with named inputs and two outputs, all of them tensors."""

    def __init__(self, model: SpectraFMForPrediction):
        super().__init__()
        self.model = model

    def forward(self, flux, flux_error, pixel_mask, wavelength, wavelength_step, attention_mask, request_ids):
        outputs = self.model(
            flux=flux,
            flux_error=flux_error,
            pixel_mask=pixel_mask,
            wavelength=wavelength,
            wavelength_step=wavelength_step,
            attention_mask=attention_mask,
            request_ids=request_ids,
        )
        return outputs.values, outputs.errors


def _write(model: SpectraFMForPrediction, path: Path, name: str) -> None:
    size = (2, 3)  # sizes of 1 would be taken for fixed
    config = model.config
    inputs = {
        "flux": torch.zeros(*size, config.patch_size),
        "flux_error": torch.ones(*size, config.patch_size),
        "pixel_mask": torch.ones(*size, config.patch_size, dtype=torch.bool),
        "wavelength": torch.full(size, 5000.0),
        "wavelength_step": torch.ones(size),
        "attention_mask": torch.ones(size, dtype=torch.bool),
        "request_ids": torch.tensor([config.label_ids(config.label_names[:1]) * 2] * 2),
    }
    shapes = {key: {0: "stars", 1: "requests" if key == "request_ids" else "tokens"} for key in INPUTS}
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it misses torchvision
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "# The axis name: ", UserWarning)  # each is shared by several inputs
            warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.` is deprecated", FutureWarning)
            program: Any = torch.onnx.export(
                _Values(model).eval(),
                kwargs={key: inputs[key] for key in INPUTS},
                input_names=INPUTS,
                output_names=("values", "errors"),
                dynamic_shapes=shapes,
                opset_version=OPSET,
                verbose=False,
                dynamo=True,
            )
    finally:
        logger.setLevel(level)
    graph = program.model.graph
    for part in (graph, *graph.all_nodes()):
        part.metadata_props.clear()  # paths of this machine among them
    ids = config.label_ids(config.label_names)
    labels = {
        label: {"request_id": request_id, "unit": unit}
        for label, request_id, unit in zip(config.label_names, ids, config.label_units, strict=True)
    }
    program.model.metadata_props.update({"checkpoint": name, "labels": json.dumps(labels)})
    program.save(path, external_data=False)


def _deviation(model: SpectraFMForPrediction, session: Any, inputs: BatchFeature) -> float:
    """Greatest difference in values and errors, in units of the error; NaN if one of them is none."""
    with torch.inference_mode():
        expected = model(**inputs)
    errors = expected.errors.numpy()
    answers = session.run(None, {key: tensor.numpy() for key, tensor in inputs.items()})
    pairs = zip(answers, (expected.values.numpy(), errors), strict=True)
    return float(max(np.max(np.abs(answer - torchs) / errors) for answer, torchs in pairs))


# ------------------------------------------------------------------------------------------------- what is compared


def _candidates() -> Iterator[list[Mapping[str, Any]]]:
    yield list(read_spectra([_DEMO_STARS]))
    for instrument in ("apogee", "miles"):
        yield list(islice(SyntheticStars(instrument), _CHECKED_STARS))


def _suitable_spectra(tokenizer: SpectraFMTokenizer, training_range: TrainingRange | None) -> list[Mapping[str, Any]]:
    """The first that the model was trained for; else the first that its tokenizer takes."""
    readable = []
    for rows in _candidates():
        try:
            _tokenize(tokenizer, rows)
        except ValueError:
            continue
        readable.append(rows)
        if training_range is None or not training_range.flags(rows[0], {}):
            return rows
    if not readable:
        raise ValueError("rows: expected spectra that the checkpoint can read, got None, and the package has no such")
    return readable[0]


def _check_batches(tokenizer: SpectraFMTokenizer, rows: Sequence[Mapping[str, Any]]) -> Iterator[BatchFeature]:
    """The spectra in the ways in which a model might be given some."""
    generator = np.random.default_rng(0)
    masked = [
        {**row, "mask": np.asarray(row["mask"], bool) | (generator.random(len(row["mask"])) < _MASKED_SHARE)}
        for row in rows
    ]
    yield _tokenize(tokenizer, rows)  # which refuses a spectrum without a pixel that counts
    parts = [_middle_half(row) for row in rows]
    yield _tokenize(tokenizer, rows[:1])
    yield _tokenize(tokenizer, masked)
    yield _tokenize(tokenizer, parts)
    yield _tokenize(tokenizer, [*parts[:2], *rows[:3]])
    yield _tokenize(tokenizer, rows, (tokenizer.requests or tokenizer.label_names)[:1])


def _tokenize(
    tokenizer: SpectraFMTokenizer, rows: Sequence[Mapping[str, Any]], requests: Sequence[str] | None = None
) -> BatchFeature:
    return tokenizer({name: [row[name] for row in rows] for name in PIXEL_COLUMNS}, requests=requests)


def _middle_half(row: Mapping[str, Any]) -> dict[str, Any]:
    """Of the pixels that count."""
    good = np.flatnonzero(valid_pixels(row))
    window = slice(good[len(good) // 4], good[3 * len(good) // 4] + 1)
    return {name: np.asarray(row[name])[window] for name in PIXEL_COLUMNS}
