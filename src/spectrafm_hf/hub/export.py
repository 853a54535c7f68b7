# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
A checkpoint as one ONNX file, for programs without PyTorch, whose answers are checked to be the model's own.

The file holds the network, from tokens to labels. ONNX has no solver of linear systems: that of the completion is
written out as a loop. The fit with the star model, which refines the labels of some spectra, has
many more, and stays with PyTorch; the file and the command say so.
"""

from __future__ import annotations

import copy
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
from torch._higher_order_ops import while_loop
from tqdm.auto import tqdm

from ..checkpoints import demand_evidence, load_checkpoint
from ..data.readers import read_spectra
from ..data.schema import PIXEL_COLUMNS, valid_pixels
from ..files import DEMO_STARS, complete_file
from ..inference.prediction import schema_tokenizer
from ..models import SpectraFMForPrediction, SpectraFMTokenizer
from ..models.evidence_spectrafm import MOST_RELIABLE, SpectraFMCompletion
from ..synthesis.synthetic import SyntheticStars


try:
    import onnxruntime
    import onnxscript  # noqa: F401  # which torch's exporter needs
except ImportError as error:
    raise ImportError('ONNX needs its libraries: pip install ".[onnx]" in a clone of the repository') from error


OPSET = 20
#: Inputs of the file, by the names that the tokenizer gives them.
INPUTS = ("coefficients", "reliability", "interval_ids", "attention_mask", "request_ids")
#: What the answers may differ by, in units of the error of each label.
TOLERANCE = 1e-3

#: In the metadata of a file whose model has a star model.
LEFT_OUT = (
    "The fit with the star model, which refines the labels of spectra of the H band and adds abundances, is not in "
    "this file: it answers as the network does alone."
)

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
    labels : list of str
        What the file answers.
    left_out : list of str
        What only the fit with the star model answers, which is not in the file.
    deviation : float
        Greatest difference of ONNX Runtime's values and errors from PyTorch's, in units of the error.
    """

    path: Path
    n_spectra: int
    labels: list[str]
    left_out: list[str]
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
    Write the network of a checkpoint as ONNX (opset 20), for any number of stars, intervals and requests.

    The inputs are `INPUTS`, as the tokenizer makes them of spectra; the outputs `values` and `errors` are in physical
    units, of shape (stars, requests), NaN for no answer. What the labels are called, their units and the ids by which
    they are requested stand in the metadata of the file, and what it does not do: the fit with the star model.

    The file appears only if ONNX Runtime answers as the network does in PyTorch: for many spectra at once, one alone,
    with masked pixels, with fewer intervals, and for fewer labels.

    Parameters
    ----------
    checkpoint : str or path
        A bundled checkpoint, a folder, or a repository of the hub (`owner/name`).
    path : path
        Ends in .onnx. A file of this name is replaced.
    rows : sequence of mappings, optional
        Spectra for the comparison, in the schema of this project. Default: stars that come with the package (Gaia XP)
        and synthetic ones (APOGEE), of which the checkpoint reads those that it can.
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
    >>> values, errors = session.run(None, {name: inputs[name] for name in INPUTS})  # doctest: +SKIP
    """
    path = Path(path)
    if path.suffix.lower() != ".onnx":
        raise ValueError(f"output: expected a name that ends in .onnx, got {path}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"output: expected a folder that exists, got {path.parent}")
    if path.is_dir():
        raise ValueError(f"output: expected the name of a file, got the folder {path}")
    model, tokenizer = load_checkpoint(checkpoint, revision)
    demand_evidence(tokenizer, "export")
    model = model.float()  # type: ignore[no-untyped-call]  # transformers wraps it without its types
    tokenizer = schema_tokenizer(tokenizer)
    parts = _suitable_spectra(tokenizer) if rows is None else [rows]
    names = list(model.config.network_labels or model.config.label_names)
    batches = [batch for part in parts for batch in _check_batches(tokenizer, part, names)]
    with (
        complete_file(path) as temporary,
        tqdm(total=1 + len(batches), desc="exporting", delay=2, disable=None) as progress,
    ):
        _write(model, temporary, Path(checkpoint).name, names)
        progress.update()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # without messages on unused parts of the file
        session = onnxruntime.InferenceSession(os.fspath(temporary), options, providers=["CPUExecutionProvider"])
        deviation = 0.0
        for inputs in batches:
            deviation = max(deviation, _deviation(model, session, inputs))
            if not deviation <= tolerance:
                raise RuntimeError(
                    f"{path}: not written, as ONNX Runtime differs from PyTorch by {deviation:.1e} of the error, more "
                    f"than {tolerance:.1e}, for coefficients of shape {tuple(inputs['coefficients'].shape)}"
                )
            progress.update()
    left_out = [name for name in model.config.label_names if name not in names]
    return Exported(path, sum(map(len, parts)), names, left_out, deviation)


def solved(matrix: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Positive definite (B, n, n), (B, n) -> x of matrix @ x = right, (B, n): an elimination, as a loop of ONNX."""
    size = matrix.shape[2]
    places = torch.arange(size)

    def goes_on(step, rows):
        return step < size

    def eliminate(step, rows):
        unit = (places == step).to(rows.dtype)
        column = (rows[:, :, :size] * unit).sum(dim=2)
        row = (rows * unit[:, None]).sum(dim=1) / (column * unit).sum(dim=1, keepdim=True)
        return step + 1, rows - (column - unit)[..., None] * row[:, None]

    _, rows = while_loop(goes_on, eliminate, (torch.tensor(0), torch.cat((matrix, right[..., None]), dim=2)))
    return rows[:, :, -1].clone()


class _Completion(SpectraFMCompletion):
    """The same in operations that ONNX knows, of all intervals of a rung; in double precision. The cost is left out."""

    def amplitudes(
        self, coefficients: torch.Tensor, reliability: torch.Tensor, intervals: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        directions = (self.components.double() / self.metric.double()[..., None]).flatten(0, 1)
        known = reliability.clamp(0.0, MOST_RELIABLE).double().flatten(1)
        inverse = 1.0 / (1.0 - known)
        weighted = directions * (known * inverse)[..., None]
        gram = directions.T @ weighted + torch.diag(self.spread.double() ** -2.0)
        right = ((coefficients.double().flatten(1) - known * self.center.double().flatten()) * inverse) @ directions
        found = solved(gram, right).float()
        return found, found[:, 0]


class _Network(torch.nn.Module):
    """The network with named inputs and two outputs."""

    def __init__(self, model: SpectraFMForPrediction):
        super().__init__()
        self.model = copy.deepcopy(model)
        for rung in self.model.model.rungs:
            rung.completion.__class__ = _Completion

    def forward(self, coefficients, reliability, interval_ids, attention_mask, request_ids):
        outputs = self.model.model(
            coefficients=coefficients,
            reliability=reliability,
            interval_ids=interval_ids,
            attention_mask=attention_mask,
        )
        return self.model.uncorrected(outputs, None, request_ids)


def _write(model: SpectraFMForPrediction, path: Path, name: str, names: Sequence[str]) -> None:
    size = (2, 3)  # sizes of 1 would be taken for fixed
    config = model.config
    inputs = {
        "coefficients": torch.zeros(*size, config.num_coefficients),
        "reliability": torch.full((*size, config.num_coefficients), 0.5),
        "interval_ids": torch.arange(3).repeat(2, 1),
        "attention_mask": torch.ones(size, dtype=torch.bool),
        "request_ids": torch.tensor([config.label_ids(names[:1]) * 2] * 2),
    }
    shapes = {key: {0: "stars", 1: "requests" if key == "request_ids" else "intervals"} for key in INPUTS}
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it misses torchvision
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "# The axis name: ", UserWarning)  # each is shared by several inputs
            warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.` is deprecated", FutureWarning)
            program: Any = torch.onnx.export(
                _Network(model).eval(),
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
    units = dict(zip(config.label_names, config.label_units, strict=True))
    labels = {
        label: {"request_id": request_id, "unit": units[label]}
        for label, request_id in zip(names, config.label_ids(names), strict=True)
    }
    about = {"checkpoint": name, "labels": json.dumps(labels)}
    if config.star_labels:
        about["left_out"] = LEFT_OUT
    program.model.metadata_props.update(about)
    program.save(path, external_data=False)


def _deviation(model: SpectraFMForPrediction, session: Any, inputs: Mapping[str, torch.Tensor]) -> float:
    """Greatest difference in values and errors, in units of the error; infinite where only one gives an answer."""
    with torch.inference_mode():
        expected = model(**inputs)
    errors = expected.prediction_errors.numpy()
    answers = session.run(None, {key: tensor.numpy() for key, tensor in inputs.items()})
    worst = 0.0
    for answer, torchs in zip(answers, (expected.predictions.numpy(), errors), strict=True):
        known = np.isfinite(torchs)
        if not np.array_equal(known, np.isfinite(answer)):
            return float("inf")
        worst = max(worst, float(np.max(np.abs(answer - torchs)[known] / errors[known], initial=0.0)))
    return worst


# ------------------------------------------------------------------------------------------------------- comparison


def _suitable_spectra(tokenizer: SpectraFMTokenizer) -> list[Sequence[Mapping[str, Any]]]:
    """Of each instrument that its tokenizer takes."""
    assert tokenizer.basis is not None
    candidates = list(read_spectra([DEMO_STARS])), list(islice(SyntheticStars("apogee"), _CHECKED_STARS))
    readable: list[Sequence[Mapping[str, Any]]] = [
        rows for rows in candidates if tokenizer.basis.rung_for(np.asarray(rows[0]["wavelength"], np.float64))
    ]
    if not readable:
        raise ValueError("rows: expected spectra that the checkpoint can read, got None, and the package has no such")
    return readable


def _check_batches(
    tokenizer: SpectraFMTokenizer, rows: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> Iterator[dict[str, torch.Tensor]]:
    """The spectra in the ways in which a model might be given some."""
    generator = np.random.default_rng(0)
    masked = [
        {**row, "mask": np.asarray(row["mask"], bool) | (generator.random(len(row["mask"])) < _MASKED_SHARE)}
        for row in rows
    ]
    yield _tokenize(tokenizer, rows, names)  # which refuses a spectrum without a pixel that counts
    parts = [_middle_half(row) for row in rows]
    yield _tokenize(tokenizer, rows[:1], names)
    yield _tokenize(tokenizer, masked, names)
    yield _tokenize(tokenizer, parts, names)
    yield _tokenize(tokenizer, [*parts[:2], *rows[:3]], names)
    some = _tokenize(tokenizer, parts[:4], names[:1])
    present = some["attention_mask"].any(dim=0)  # only those that any of them has
    yield {name: value if name == "request_ids" else value[:, present] for name, value in some.items()}


def _tokenize(
    tokenizer: SpectraFMTokenizer, rows: Sequence[Mapping[str, Any]], requests: Sequence[str]
) -> dict[str, torch.Tensor]:
    found = tokenizer({name: [row[name] for row in rows] for name in PIXEL_COLUMNS}, requests=requests)
    return {name: found[name] for name in INPUTS}


def _middle_half(row: Mapping[str, Any]) -> dict[str, Any]:
    """Of the pixels that count."""
    good = np.flatnonzero(valid_pixels(row))
    window = slice(good[len(good) // 4], good[3 * len(good) // 4] + 1)
    return {name: np.asarray(row[name])[window] for name in PIXEL_COLUMNS}
