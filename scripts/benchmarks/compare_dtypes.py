#!/usr/bin/env python
# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Change of predictions with the dtype, under autocast, with quantised weights and with weights on disk.

    python scripts/benchmarks/compare_dtypes.py                   # the three rungs of spectrafm-base
    python scripts/benchmarks/compare_dtypes.py --published  # the published architecture, small
    python scripts/benchmarks/compare_dtypes.py --model DIR --device cuda

For each instrument of the checkpoint, 64 stars: the Gaia XP stars in the package, and synthetic ones (APOGEE, LAMOST).
The table has the largest change of any label in units of its error, and of any error, both relative to float32; the
number of integer layers; and the size of the weights. Missing quantisation libraries are named: pip install
".[quantization]" in a clone of the repository.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

import spectrafm_hf
from spectrafm_cli.arguments import Parser
from spectrafm_hf import SpectraFMConfig, SpectraFMForPrediction, SpectraFMTokenizer, load_checkpoint, save_checkpoint
from spectrafm_hf.checkpoints import BASE_CHECKPOINT
from spectrafm_hf.data.readers import read_spectra
from spectrafm_hf.inference.prediction import answered_labels
from spectrafm_hf.synthesis.synthetic import SyntheticStars


STARS = 64
STEPS = 300  # of the training of the published architecture
HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
Batches = Mapping[str, Mapping[str, torch.Tensor]]


def _bitsandbytes(bits: int) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**{f"load_in_{bits}bit": True})


def _quanto() -> Any:
    from transformers import QuantoConfig

    return QuantoConfig(weights="int8")


def _torchao(name: str) -> Any:
    import torchao.quantization
    from transformers import TorchAoConfig

    return TorchAoConfig(getattr(torchao.quantization, name)())


#: Quantisations by name: the module that does it, and its configuration.
QUANTISED: dict[str, tuple[str, Callable[[], Any]]] = {
    "bitsandbytes, 8 bit": ("bitsandbytes", lambda: _bitsandbytes(8)),
    "bitsandbytes, 4 bit": ("bitsandbytes", lambda: _bitsandbytes(4)),
    "quanto, int8": ("optimum.quanto", _quanto),
    "torchao, int8 weights": ("torchao", lambda: _torchao("Int8WeightOnlyConfig")),
    "torchao, int8 weights and activations": ("torchao", lambda: _torchao("Int8DynamicActivationInt8WeightConfig")),
}


def installed(module: str) -> bool:
    """Whether a module can be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


def instruments() -> dict[str, list[dict[str, Any]]]:
    """Stars by instrument."""
    demo = Path(spectrafm_hf.__file__).parent / "resources" / "gaia_xp_demo.parquet"
    h_band = {"teff": (4200.0, 5800.0), "fe_h": (-0.8, 0.5)}
    optical = {"teff": (4300.0, 6500.0), "fe_h": (-1.0, 0.5)}
    return {
        "XP": list(islice(read_spectra([demo]), STARS)),
        "H band": list(islice(SyntheticStars("apogee", seed=8, label_ranges=h_band), STARS)),
        "optical": list(islice(SyntheticStars("lamost-lrs", seed=8, label_ranges=optical), STARS)),
    }


def batches(model: SpectraFMForPrediction, tokenizer: SpectraFMTokenizer, device: str = "cpu") -> Batches:
    """Inputs of the stars of each instrument of the checkpoint, with requests for its labels."""
    found = {}
    for name, rows in instruments().items():
        if tokenizer.basis is not None and not tokenizer.basis.rung_for(np.asarray(rows[0]["wavelength"], np.float64)):
            continue
        if tokenizer.basis is None and name != "XP":
            continue
        labels = answered_labels(model, tokenizer, rows[0])
        found[name] = tokenizer(rows, requests=labels).to(device)
    return found


def answers(model: SpectraFMForPrediction, all_inputs: Batches) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Values and errors, (stars, labels) each, by instrument."""
    found = {}
    with torch.no_grad():
        for name, inputs in all_inputs.items():
            outputs = model(**inputs)
            found[name] = tuple(x.float().cpu().numpy() for x in (outputs.predictions, outputs.prediction_errors))
    return found


def change(found: tuple[np.ndarray, np.ndarray], expected: tuple[np.ndarray, np.ndarray]) -> tuple[float, float]:
    """Largest change of a value in units of its error, and of an error in units of itself; infinite for a NaN."""
    (values, errors), (right, sigma) = found, expected
    sizes = np.abs(values - right) / sigma, np.abs(errors / sigma - 1.0)
    return tuple(float(np.where(np.isfinite(size), size, np.inf).max()) for size in sizes)  # type: ignore[return-value]


def parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors of which a quantised one is made, or itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in parts(getattr(tensor, name))]


def n_integers(model: torch.nn.Module) -> int:
    """Layers whose weights are integers."""
    weights = [getattr(layer, "weight", None) for layer in model.modules()]
    kinds = [{part.dtype for part in parts(weight)} for weight in weights if isinstance(weight, torch.Tensor)]
    return sum(bool(kind & {torch.int8, torch.uint8}) for kind in kinds)


def megabytes(model: torch.nn.Module) -> float:
    """Megabytes of all weights and constants."""
    tensors = [part for tensor in (*model.parameters(), *model.buffers()) for part in parts(tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6


def ways(folder: Path, all_inputs: Batches, device: str, offload: Path) -> Iterator[tuple[str, Any]]:
    """
    Name, and model with predictions, for each way to run a checkpoint, or why it is missing; the first is float32.

    Parameters
    ----------
    folder : path
        Folder of the checkpoint.
    all_inputs : mapping of str to inputs
        By instrument.
    device : str
    offload : path
        Folder for weights that are not kept in memory.
    """

    def load(**how: Any) -> Any:
        return SpectraFMForPrediction.from_pretrained(folder, **how).eval()

    whole = load().to(device)
    yield "float32", (whole, answers(whole, all_inputs))
    for name, dtype in HALF.items():
        model = load(dtype=dtype).to(device)
        yield f"dtype={name}", (model, answers(model, all_inputs))
    model = copy.deepcopy(whole).to(torch.bfloat16)
    yield "model.to(bfloat16)", (model, answers(model, all_inputs))
    for name, dtype in HALF.items():
        with torch.autocast(device, dtype=dtype):
            yield f"autocast {name}", (whole, answers(whole, all_inputs))
    model = load(device_map={"": "disk"}, offload_folder=offload / "all")
    yield "all weights on the disk", (model, answers(model, all_inputs))
    # Memory for a part of the weights: the rest is put on disk.
    size = sum(parameter.numel() * parameter.element_size() for parameter in whole.parameters())
    room = {0: size // 2, "cpu": 0} if device == "cuda" else {"cpu": size // 2}
    model = load(device_map="auto", max_memory=room, offload_folder=offload / "some")
    yield 'device_map="auto", half of the room', (model, answers(model, all_inputs))
    for name, (module, make) in QUANTISED.items():
        if not installed(module):
            yield name, f"{module} is not installed"
            continue
        try:
            with _quiet():
                model = load(quantization_config=make(), device_map=device)
                yield name, (model, answers(model, all_inputs))
        except (ImportError, RuntimeError, ValueError, NotImplementedError) as error:
            yield name, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the messages of the libraries about single layers."""
    import logging
    import warnings

    from transformers.utils import logging as of_transformers

    level, verbosity = logging.root.manager.disable, of_transformers.get_verbosity()
    of_transformers.set_verbosity_error()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        of_transformers.set_verbosity(verbosity)


def table(folder: Path, tokenizer: SpectraFMTokenizer, device: str = "cpu") -> list[dict[str, Any]]:
    """
    A row for each way to run the checkpoint in `folder`.

    Returns
    -------
    list of dict
        `way`; `sigma` and `errors`, each the largest change by instrument; `integers`, layers with integer weights;
        `megabytes` of the weights. Or `way` and `why` it is missing.
    """
    reference = SpectraFMForPrediction.from_pretrained(folder).eval().to(device)  # type: ignore[arg-type]
    all_inputs = batches(reference, tokenizer, device)
    expected = answers(reference, all_inputs)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="spectrafm-") as offload:
        for way, result in ways(folder, all_inputs, device, Path(offload)):
            if isinstance(result, str):
                rows.append({"way": way, "why": result})
                continue
            model, found = result
            changes = {name: change(found[name], expected[name]) for name in all_inputs}
            rows.append(
                {
                    "way": way,
                    "sigma": {name: sizes[0] for name, sizes in changes.items()},
                    "errors": {name: sizes[1] for name, sizes in changes.items()},
                    "integers": n_integers(model),
                    "megabytes": megabytes(model),
                }
            )
    return rows


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table."""
    names = next((list(row["sigma"]) for row in rows if "sigma" in row), [])
    heads = ["way", *(f"{name}: labels [sigma]" for name in names), *(f"{name}: errors [%]" for name in names)]
    lines = [" | ".join([*heads, "layers of integers", "MB"]), "|".join(["---"] * (len(heads) + 2))]
    for row in rows:
        if "why" in row:
            lines.append(" | ".join([row["way"], row["why"], *[""] * len(heads)]))
            continue
        sizes = [f"{row['sigma'][name]:.4f}" for name in names] + [f"{100 * row['errors'][name]:.3f}" for name in names]
        lines.append(" | ".join([row["way"], *sizes, str(row["integers"]), f"{row['megabytes']:.1f}"]))
    return "\n".join(f"| {line} |" if "---" not in line else f"|{line}|" for line in lines)


def train_published(folder: Path, steps: int = STEPS) -> SpectraFMTokenizer:
    """Train a small model of the published architecture on the demo stars of Gaia XP, and save it."""
    names = ["teff", "logg", "fe_h", "alpha_m"]
    scales = {"label_centers": [4700.0, 2.5, -0.2, 0.05], "label_scales": [550.0, 1.3, 0.3, 0.1]}
    torch.manual_seed(0)
    config = SpectraFMConfig.original(
        hidden_size=64, encoder_attention_heads=[4, 4], encoder_ffn_dim=[256, 256], decoder_attention_heads=[4, 4],
        decoder_ffn_dim=[256, 256], readout_dims=[256, 128], label_names=names, label_units=["K", "dex", "dex", "dex"],
        **scales,
    )  # fmt: skip
    model, tokenizer = SpectraFMForPrediction(config), SpectraFMTokenizer(names, standardize_scale=0.3, max_length=86)
    rows = [{**row, "flux": row["flux"] / np.median(row["flux"])} for row in instruments()["XP"]]
    inputs = tokenizer(rows, labels=names, requests=names)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    save_checkpoint(model, tokenizer, folder)
    return tokenizer


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="compare_dtypes.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default=BASE_CHECKPOINT, metavar="CHECKPOINT", help="a bundled one, or a folder")
    parser.add_argument("--published", action="store_true", help="a small model of the published architecture instead")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON file for the figures")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected a GPU that this torch can use, got none")
    with tempfile.TemporaryDirectory(prefix="spectrafm-") as folder:
        if arguments.published:
            tokenizer = train_published(Path(folder))
        else:
            try:
                model, tokenizer = load_checkpoint(arguments.model)
            except (OSError, ValueError) as error:
                parser.error(str(error))
            save_checkpoint(model, tokenizer, folder)
        rows = table(Path(folder), tokenizer, arguments.device)
    print(markdown(rows))
    if arguments.output:
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
