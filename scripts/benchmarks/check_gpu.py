#!/usr/bin/env python
# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Check the package on a GPU in five minutes: a line for each check, pass or FAIL.

    python scripts/benchmarks/check_gpu.py                  # on cuda:0
    python scripts/benchmarks/check_gpu.py --device cpu     # the same lines, fewer stars, without a compiler

Predictions are compared with those of the CPU in float32, in units of their errors. Checks that need a second GPU or a
missing library are skipped with the reason. The exit code is 1 if a check fails.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compare_dtypes import (
    QUANTISED,
    Batches,
    _quiet,
    answers,
    batches,
    change,
    installed,
    instruments,
    n_integers,
    train_published,
)

import spectrafm_cli
from spectrafm_cli.arguments import Parser
from spectrafm_hf import SpectraFMForPrediction, bundled, load_checkpoint
from spectrafm_hf.checkpoints import BASE_CHECKPOINT
from spectrafm_hf.files import DEMO_STARS
from spectrafm_hf.inference.survey import describe_device, named_device


#: Largest changes of labels in their errors, and of errors in themselves: the same dtype, and half precision.
SAME, HALF = (0.01, 0.005), (0.1, 0.05)


class Skip(Exception):
    """Why a check is skipped."""


@dataclass
class Bench:
    """A device, and the inputs of the checks."""

    device: torch.device
    folder: Path
    n_stars: int
    compiles: bool

    def __post_init__(self) -> None:
        self.model, self.tokenizer = load_checkpoint(BASE_CHECKPOINT)
        self.inputs = self._fewer(batches(self.model, self.tokenizer))
        self.expected = answers(self.model, self.inputs)
        self.published = self.folder / "published"
        published_tokenizer = train_published(self.published, steps=10 if self.device.type == "cpu" else 100)
        self.small = SpectraFMForPrediction.from_pretrained(self.published).eval()
        self.small_inputs = self._fewer(batches(self.small, published_tokenizer))
        self.small_expected = answers(self.small, self.small_inputs)

    def _fewer(self, all_inputs: Batches) -> Batches:
        return {
            name: {key: value[: self.n_stars] for key, value in inputs.items()} for name, inputs in all_inputs.items()
        }

    def here(self, all_inputs: Batches) -> Batches:
        """The inputs on the device."""
        return {
            name: {key: value.to(self.device) for key, value in inputs.items()} for name, inputs in all_inputs.items()
        }

    def base(self, **how: Any) -> Any:
        return SpectraFMForPrediction.from_pretrained(bundled(BASE_CHECKPOINT), **how).eval()

    def compared(self, model: Any, limits: tuple[float, float], published: bool = False) -> str:
        """The largest changes of all instruments; an error where they are too large."""
        inputs, expected = (self.small_inputs, self.small_expected) if published else (self.inputs, self.expected)
        found = answers(model, self.here(inputs))
        changes = [change(found[name], expected[name]) for name in inputs]
        sigma, errors = (max(part) for part in zip(*changes, strict=True))
        text = f"labels change by {sigma:.4f} of their errors at most, errors by {100 * errors:.3f} %"
        if sigma > limits[0] or errors > limits[1]:
            raise AssertionError(f"{text}; expected at most {limits[0]} and {100 * limits[1]:g} %")
        return text


def float32(bench: Bench) -> str:
    return bench.compared(bench.base().to(bench.device), SAME)


def tensor_float32(bench: Bench) -> str:
    if bench.device.type == "cpu":
        raise Skip("TF32 exists only on GPUs")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return bench.compared(bench.base().to(bench.device), HALF)
    finally:
        torch.set_float32_matmul_precision(before)


def half(bench: Bench, dtype: torch.dtype) -> str:
    return bench.compared(bench.base(dtype=dtype).to(bench.device), HALF)


def autocast(bench: Bench, dtype: torch.dtype) -> str:
    with torch.autocast(bench.device.type, dtype=dtype):
        return bench.compared(bench.base().to(bench.device), HALF)


def published(bench: Bench, attention: str) -> str:
    if attention == "flash_attention_2" and not (installed("flash_attn") and bench.device.type == "cuda"):
        raise Skip("needs a GPU and flash_attn")
    if attention == "flex_attention" and not bench.compiles:
        raise Skip("needs a compiler")
    dtype = torch.bfloat16 if attention.startswith("flash") else torch.float32
    model = SpectraFMForPrediction.from_pretrained(bench.published, attn_implementation=attention, dtype=dtype).eval()
    return bench.compared(model.to(bench.device), (0.3, 0.1) if dtype == torch.bfloat16 else SAME, published=True)


def compiled(bench: Bench) -> str:
    if not bench.compiles:
        raise Skip("without a compiler")
    model = torch.compile(SpectraFMForPrediction.from_pretrained(bench.published).eval().to(bench.device))
    return bench.compared(model, SAME, published=True)


def pipelined(bench: Bench) -> str:
    from transformers import pipeline

    rows = [row for own in instruments().values() for row in own[: min(bench.n_stars, 8)]]
    how = {"flags": True, "batch_size": 8}
    make: Any = pipeline
    there, here = (
        make("stellar-labels", model=bench.base(), tokenizer=bench.tokenizer, device=device)(rows, **how)
        for device in ("cpu", bench.device)
    )
    worst = 0.0
    for star, other in zip(here, there, strict=True):
        if list(star) != list(other) or star["flags"] != other["flags"]:
            raise AssertionError(f"{star['object_id']}: {star} and on the CPU {other}")
        names = [name for name in star if f"{name}_err" in star]
        worst = max(worst, *(abs(star[name] - other[name]) / other[f"{name}_err"] for name in names))
    if worst > SAME[0]:
        raise AssertionError(f"labels change by {worst:.4f} of their errors")
    return f"{len(rows)} stars of three instruments: same flags, labels within {worst:.4f} of their errors"


def command(bench: Bench) -> str:
    """`spectrafm predict`, which prints its device."""
    import pyarrow.parquet as pq

    tables: list[Any] = []
    for device in ("cpu", str(bench.device)):
        output = bench.folder / f"{device.partition(':')[0]}-{len(tables)}.parquet"
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            code = spectrafm_cli.main(["predict", str(DEMO_STARS), "--output", str(output), "--device", device])
        if code or f"device: {describe_device(torch.device(device))}" not in printed.getvalue():
            raise AssertionError(f"exit code {code}: {printed.getvalue()[-500:]}")
        tables.append(pq.read_table(output).to_pandas())
    there, here = tables
    worst = max(
        float((abs(here[name] - there[name]) / there[f"{name}_err"]).max()) for name in ("teff", "logg", "fe_h")
    )
    if worst > SAME[0] or list(here["flags"]) != list(there["flags"]):
        raise AssertionError(f"labels change by {worst:.4f} of their errors, or other flags")
    return f"{len(here)} stars: same flags, labels within {worst:.4f} of their errors"


def whole_spectrum(bench: Bench) -> str:
    row = instruments()["H band"][0]
    fluxes = []
    for device in ("cpu", bench.device):
        _, flux, _ = (
            bench.base()
            .to(device)
            .predict_spectrum(bench.tokenizer, row["wavelength"], row["flux"], row["flux_error"], row["mask"])
        )
        fluxes.append(flux)
    worst = float(np.abs(fluxes[1] / fluxes[0] - 1.0).max())
    if not worst < 1e-3:
        raise AssertionError(f"flux changes by {worst:.1e}")
    return f"flux within {worst:.1e}"


def gradients(bench: Bench) -> str:
    """Gradients of the loss with respect to all weights, and a step of AdamW."""
    name = "XP"
    found = []
    for device in ("cpu", bench.device):
        model = bench.base().to(device).train()
        inputs = {key: value.to(device) for key, value in bench.inputs[name].items()}
        inputs["labels"] = torch.from_numpy(bench.expected[name][0]).to(device) + 1.0
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
        model(**inputs).loss.backward()
        found.append(torch.cat([p.grad.flatten().double().cpu() for p in model.parameters() if p.grad is not None]))
        optimizer.step()
        loss = float(model(**inputs).loss)
    cosine = float(torch.nn.functional.cosine_similarity(found[0], found[1], dim=0))
    if not (cosine > 0.9999 and np.isfinite(loss)):
        raise AssertionError(f"cosine of the gradients {cosine:.6f}, loss after a step {loss}")
    return f"cosine of the gradients {cosine:.7f}"


def on_the_disk(bench: Bench) -> str:
    return bench.compared(bench.base(device_map={"": "disk"}, offload_folder=bench.folder / "all"), SAME)


def automatic(bench: Bench) -> str:
    model = bench.base()
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    room = {0: size // 2, "cpu": size // 4} if bench.device.type == "cuda" else {"cpu": size // 2}
    model = bench.base(device_map="auto", max_memory=room, offload_folder=bench.folder / "some")
    places = sorted({str(place) for place in model.hf_device_map.values()})
    return f"on {', '.join(places)}: {bench.compared(model, SAME)}"


def two_gpus(bench: Bench) -> str:
    if bench.device.type != "cuda" or torch.cuda.device_count() < 2:
        raise Skip("needs two GPUs")
    model = bench.base(device_map={"model.rungs.0": 0, "model.rungs.1": 1, "model.rungs.2": 0, "means": 1,
                                   "log_variances": 0, "start": 1, "refinement": 1, "corrections": 0})  # fmt: skip
    return bench.compared(model, SAME)


def quantised(bench: Bench, name: str) -> str:
    """Quantisation of the layers of the published architecture, in a small, briefly trained model."""
    module, make = QUANTISED[name]
    if not installed(module):
        raise Skip(f"{module} is not installed")
    with _quiet():
        model: Any = SpectraFMForPrediction.from_pretrained(
            bench.published, quantization_config=make(), device_map=str(bench.device)
        )
        text = bench.compared(model.eval(), (1.0, 0.5), published=True)
    if not n_integers(model):
        raise AssertionError("no layer has weights of integers")
    return f"{n_integers(model)} layers of integers, {text}"


def fast(bench: Bench) -> str:
    """Gaia XP stars per second from tokens on the device."""
    inputs = bench.inputs["XP"]
    many = {key: value.repeat(16, *[1] * (value.ndim - 1)) for key, value in inputs.items()}
    rates = []
    for device in ("cpu", bench.device):
        model, there = bench.base().to(device), {key: value.to(device) for key, value in many.items()}
        with torch.inference_mode():
            model(**there)
            _wait(device)
            start = time.perf_counter()
            model(**there)
            _wait(device)
        rates.append(len(there["coefficients"]) / (time.perf_counter() - start))
    return f"{rates[1]:,.0f} stars/s from tokens, the CPU {rates[0]:,.0f}"


def _wait(device: Any) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


#: Checks by name.
CHECKS: dict[str, Callable[[Bench], str]] = {
    "float32": float32,
    "products in TF32": tensor_float32,
    "dtype=bfloat16": lambda bench: half(bench, torch.bfloat16),
    "dtype=float16": lambda bench: half(bench, torch.float16),
    "autocast bfloat16": lambda bench: autocast(bench, torch.bfloat16),
    "autocast float16": lambda bench: autocast(bench, torch.float16),
    "pipeline": pipelined,
    "spectrafm predict --device": command,
    "predict_spectrum": whole_spectrum,
    "a step of training": gradients,
    "weights on the disk": on_the_disk,
    'device_map="auto", some on the disk': automatic,
    "rungs on two GPUs": two_gpus,
    "published architecture, eager": lambda bench: published(bench, "eager"),
    "published architecture, sdpa": lambda bench: published(bench, "sdpa"),
    "published architecture, flex_attention": lambda bench: published(bench, "flex_attention"),
    "published architecture, flash_attention_2": lambda bench: published(bench, "flash_attention_2"),
    "published architecture, torch.compile": compiled,
    **{f"published architecture, {name}": partial(quantised, name=name) for name in QUANTISED},
    "speed": fast,
}


def run(bench: Bench, pattern: str = "") -> int:
    """Print a line for each check whose name matches; the number that fail."""
    failed = 0
    for name, check in CHECKS.items():
        if not re.search(pattern, name):
            continue
        try:
            kind, text = "pass", check(bench)
        except Skip as why:
            kind, text = "skip", str(why)
        except Exception as error:  # the other checks have to run too
            kind, text = "FAIL", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            failed += 1
        print(f"{kind}  {name}: {text}", flush=True)
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="check_gpu.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda", metavar="NAME", help="cuda, cuda:N or cpu (default: cuda)")
    parser.add_argument("-k", default="", metavar="PATTERN", help="only checks whose name contains it")
    arguments = parser.parse_args(argv)
    try:
        device = named_device(arguments.device)
    except ValueError as error:
        parser.error(str(error))
    print(f"torch {torch.__version__} on {describe_device(device)}", flush=True)
    start = time.perf_counter()
    gpu = device.type == "cuda"
    with tempfile.TemporaryDirectory(prefix="spectrafm-") as folder, _quiet():
        failed = run(Bench(device, Path(folder), 64 if gpu else 6, gpu), arguments.k)
    print(f"{'FAIL' if failed else 'pass'}: {failed} failed, {time.perf_counter() - start:.0f} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
