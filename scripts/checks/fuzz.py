#!/usr/bin/env python
# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Nightly fuzzing: each input must give a clear error or a result, and no NaN without a flag.

    python scripts/checks/fuzz.py --inputs 10000 --output fuzz                     # all: JSON, a table, the faults
    python scripts/checks/fuzz.py --output fuzz --targets readers --engines hypothesis --inputs 100
    python scripts/checks/fuzz.py --output fuzz --replay fuzz/faults/readers-1-a.fits  # one that failed

Targets: `tokenizer` (calls with arrays, lists, tensors and quantities, then a tiny model), `readers` (changed files of
every format in the tests of the readers, then predictions), `statements` (a known star in files with random units,
medium and frame, stated or not: it must be read right, flagged or refused), `config` (all files of settings: model,
tokenizer, training range, index of shards, emulator, recipe, instrument), `safetensors` (weights). Two engines make
inputs: hypothesis from the structure of the data, atheris (`pip install atheris`) from the code coverage of changed
bytes. Each runs in its own process, so that a crash or a hang is counted and the run continues.

A clear error is a ValueError (or, for files, an OSError) of one line that names field or file. Faults are other
exceptions, running out of memory (even if the reader names the file), crashes and hangs, arithmetic warnings of the
package or a flood of others, and results of NaN without a flag. The exit code is 1 if there is a fault.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import importlib
import importlib.util
import io
import itertools
import json
import logging
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import fuzz_statements
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from astropy import units
from astropy.io import fits
from huggingface_hub.errors import StrictDataclassError
from tqdm.auto import tqdm
from transformers import pipeline

from spectrafm_cli.arguments import Parser


WATCHED = "--worker" in sys.argv and "atheris" in sys.argv
with importlib.import_module("atheris").instrument_imports(["spectrafm_hf"]) if WATCHED else contextlib.nullcontext():
    from spectrafm_hf import (
        SpectraFMConfig,
        SpectraFMForPrediction,
        SpectraFMTokenizer,
        SpectrumEmulatorConfig,
        bundled,
        load_checkpoint,
        save_checkpoint,
    )
    from spectrafm_hf.data.readers import formats, read_spectra
    from spectrafm_hf.files import SPECTRUM_SUFFIXES, complete_file
    from spectrafm_hf.inference.prediction import predict_batches
    from spectrafm_hf.inference.training_range import TrainingRange
    from spectrafm_hf.synthesis.instruments import Instrument
    from spectrafm_hf.training.recipe import read_recipe

ROOT = Path(__file__).parents[2]
PACKAGE = str(ROOT / "src" / "spectrafm_hf")
TARGETS = ("tokenizer", "readers", "statements", "config", "safetensors")
ENGINES = ("hypothesis", "atheris")
#: Seconds after which an input counts as hanging.
HANG = 20.0
#: Memory that a process may use in addition to that at its start; inputs have only some kB.
MEMORY = 4 * 2**30
#: Number of warnings of an input that counts as a flood.
FLOOD = 20
#: Longest acceptable message.
MESSAGE = 2000
#: Larger seeds are left out, because most changes would only affect pixels.
SEED_BYTES = 150_000
STARS = 20
NAN, INF = float("nan"), float("inf")


class Case(NamedTuple):
    """One input: a file whose name states its kind, for replay."""

    name: str
    content: bytes


class Fault(Exception):
    """An invalid result."""


# ---------------------------------------------------------------------------------------------- what is tried on them


@functools.cache
def tiny() -> tuple[Any, Any]:
    """A model of random weights, and its tokenizer."""

    torch.manual_seed(0)
    torch.set_num_threads(1)
    sizes = {"hidden_size": 16, "readout_dims": [8]}
    layers = {f"{stack}_attention_heads": [2] for stack in ("encoder", "decoder")}
    layers |= {f"{stack}_ffn_dim": [16] for stack in ("encoder", "decoder")}
    model = SpectraFMForPrediction(SpectraFMConfig(**cast(Any, {**sizes, **layers}), initializer_range=0.5)).eval()
    return model, SpectraFMTokenizer(standardize_scale=0.1)


def decoded(value: Any) -> Any:
    """Values that JSON cannot express: arrays, tensors, quantities, masked arrays."""

    if isinstance(value, list):
        return [decoded(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "dtype" not in value:
        return {name: decoded(item) for name, item in value.items()}
    array = np.frombuffer(bytes.fromhex(value["bytes"]), value["dtype"]).reshape(value["shape"])
    kind, _, unit = value.get("as", "array").partition(":")
    if kind == "list":
        return array.tolist()
    if kind == "tensor":
        return torch.from_numpy(array.copy())
    if kind == "quantity":
        return array * units.Unit(unit)
    return np.ma.array(array, mask=np.arange(array.size).reshape(array.shape) % 3 == 1) if kind == "masked" else array


@functools.cache
def bundled_basis() -> Any:
    return SpectraFMTokenizer.from_pretrained(bundled("spectrafm-base")).basis


def try_tokenizer(case: Case, folder: Path) -> None:

    content = json.loads(case.content)
    model, _ = tiny()
    settings, call = decoded(content["settings"]), decoded(content["call"])
    inputs = SpectraFMTokenizer(**settings)(**call)
    with torch.inference_mode():
        outputs = model(**inputs)
    requested = inputs["request_ids"] > 0
    for name in ("predictions", "prediction_errors"):
        if not (good := np.isfinite(getattr(outputs, name)[requested])).all():
            raise Fault(f"{name}: {int((~good).sum())} of {requested.sum()} answers are not finite")
    if outputs.loss is not None and not torch.isfinite(outputs.loss):
        raise Fault(f"loss: {outputs.loss}")
    evidence = SpectraFMTokenizer(**settings, basis=bundled_basis())(**call)
    for name in ("coefficients", "reliability", "estimate", "information", "pull"):
        if not (good := np.isfinite(evidence[name])).all():
            raise Fault(f"{name}: {int((~good).sum())} of {good.numel()} numbers are not finite")


def try_readers(case: Case, folder: Path) -> None:

    path = folder / case.name
    path.write_bytes(case.content)
    choice = zlib.crc32(case.content)
    kind = formats()[choice // 16 % len(formats())].name if choice % 16 == 0 else None
    grid = np.arange(5000.0, 5040.0)
    rows = list(itertools.islice(read_spectra([path], format=kind, visits=choice % 2 == 1, grid=grid), STARS))
    for row in rows:
        kinds = {name: row[name].dtype.kind for name in ("wavelength", "flux", "flux_error", "mask")}
        if kinds != {"wavelength": "f", "flux": "f", "flux_error": "f", "mask": "b"}:
            raise Fault(f"types of a row: {kinds}")
        if not isinstance(row["object_id"], str):
            raise Fault(f"object_id: {row['object_id']!r}")
        same = row["flux"].shape == row["flux_error"].shape == row["mask"].shape
        if same and not (np.isfinite(row["flux"]) | row["mask"]).all():
            raise Fault("flux: not finite and not masked")
    answer(rows)


def try_statements(case: Case, folder: Path) -> None:

    try:
        fuzz_statements.check(json.loads(case.content), folder)
    except fuzz_statements.Wrong as error:
        raise Fault(str(error)) from error


def answer(rows: Sequence[Mapping[str, Any]], model: Any = None, tokenizer: Any = None) -> None:
    """Labels of some stars; each must be finite, or the star must have a flag or a reason."""

    if model is None:
        model, tokenizer = tiny()
    for batch in predict_batches(model, tokenizer, [rows]):
        silent = (batch["flags"] == "") & (batch["reason"] == "")
        for name, column in batch.items():
            if column.dtype.kind == "f" and np.any(wrong := ~np.isfinite(column) & silent):
                raise Fault(f"{name}: {wrong.sum()} that are not finite, without a flag or a reason")


def star() -> dict[str, Any]:

    flux = np.linspace(0.8, 1.2, 40)
    columns = {"wavelength": np.arange(5000.0, 5040), "flux": flux, "flux_error": 0.02 * flux, "mask": flux > 2}
    return {"object_id": "star", **columns}


@functools.cache
def checkpoints() -> Path:
    """A folder with a checkpoint, one in shards and an emulator: files of them are changed and put back."""

    folder = Path(tempfile.mkdtemp(prefix="spectrafm-fuzz-"))
    save_checkpoint(*tiny(), folder / "model")
    TrainingRange({"teff": (3000, 8000)}, (5000, 5040), (1, 1)).save(folder / "model")
    shutil.copytree(folder / "model", folder / "shards")
    (folder / "shards" / "model.safetensors").rename(folder / "shards" / "a.safetensors")
    weights = {name: "a.safetensors" for name in tiny()[0].state_dict()}
    index = {"metadata": {"total_size": 1}, "weight_map": weights}
    (folder / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))
    SpectrumEmulatorConfig().save_pretrained(folder / "emulator")
    return folder


@contextlib.contextmanager
def changed(path: Path, content: bytes) -> Iterator[Path]:
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield path.parent
    finally:
        path.write_bytes(before)


def try_config(case: Case, folder: Path) -> None:

    part, _, name = case.name.partition("-")
    if part in ("recipe.yaml", "instrument.yaml"):
        (folder / part).write_bytes(case.content)
        if part == "recipe.yaml":
            read_recipe(folder / part, ["--output_dir", str(folder / "run")])
        else:
            Instrument.load(folder / part)
        return
    with changed(checkpoints() / part / name, case.content) as checkpoint:
        if part == "emulator":
            if not isinstance(settings := json.loads(case.content), dict):
                raise ValueError(f"config.json: expected names of settings with their values, got {settings!r:.100}")
            try:
                SpectrumEmulatorConfig(**settings)
            except StrictDataclassError as error:  # as documented; its second line is the cause
                raise ValueError(" ".join(str(error).split())) from None
        elif name == "training_range.json":
            if (limits := TrainingRange.load(checkpoint)) is not None:
                limits.flags(star(), {"teff": 5000.0})
        else:
            load_and_answer(checkpoint)


def load_and_answer(checkpoint: Path) -> None:

    model, tokenizer = load_checkpoint(checkpoint)
    answer([star()], model, tokenizer)
    labels = cast(Any, pipeline)("stellar-labels", model=model, tokenizer=tokenizer, device="cpu")(star())
    if wrong := [name for name, value in labels.items() if value != value]:
        raise Fault(f"{wrong[0]}: NaN out of the pipeline")


def try_safetensors(case: Case, folder: Path) -> None:
    with changed(checkpoints() / "model" / "model.safetensors", case.content) as checkpoint:
        load_and_answer(checkpoint)


TRY: dict[str, Callable[[Case, Path], None]] = {
    "tokenizer": try_tokenizer,
    "readers": try_readers,
    "statements": try_statements,
    "config": try_config,
    "safetensors": try_safetensors,
}


def own_frame(error: BaseException) -> str:
    """The last line of the package in a traceback."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(PACKAGE)]
    return f"{Path(frames[-1].filename).name}:{frames[-1].name}:{frames[-1].lineno}" if frames else ""


def unclear(error: BaseException) -> str:
    """Why an error is not clear; "" if it is."""
    if not isinstance(error, ValueError | OSError):
        return type(error).__name__
    text = str(error)
    if "\n" in text.strip() or ": " not in text or len(text) > MESSAGE:
        return f"{type(error).__name__} that is not one line with a name"
    cause = error.__cause__ or error
    frames = traceback.extract_tb(cause.__traceback__)
    ours = bool(frames) and frames[-1].filename.startswith(PACKAGE)
    if isinstance(cause, MemoryError | RecursionError) or (ours and isinstance(cause, NameError | AssertionError)):
        return f"{type(cause).__name__}, wrapped"
    return ""


class Outcome(NamedTuple):
    kind: str
    """`answered`, `refused` or `fault`."""
    what: str = ""
    trace: str = ""


def outcome(target: str, case: Case, folder: Path) -> Outcome:
    """Try one input."""
    kind, error = "answered", None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            TRY[target](case, folder)
        except Exception as raised:
            error = raised
    if error is not None:
        kind = "refused"
        if what := str(error) if isinstance(error, Fault) else unclear(error):
            where = own_frame(error.__cause__ or error)
            trace = "".join(traceback.format_exception(error))
            return Outcome("fault", f"{what} at {where}" if where else what, trace)
    arithmetic = [w for w in caught if issubclass(w.category, RuntimeWarning) and w.filename.startswith(PACKAGE)]
    # What Python shows by default: each once.
    if arithmetic or len({(str(w.message), w.lineno) for w in caught}) > FLOOD:
        first = (arithmetic or caught)[0]
        where = f"{Path(first.filename).name}:{first.lineno}"
        return Outcome("fault", f"{len(arithmetic or caught)} warnings, {first.message} at {where}"[:200])
    return Outcome(kind)


# ----------------------------------------------------------------------------------------------- hypothesis: structure


def strategies(target: str, seeds: Sequence[Case]) -> Any:
    """Inputs of a target by their structure."""
    from hypothesis import assume
    from hypothesis import strategies as st

    numbers = st.sampled_from(
        [NAN, INF, -INF, 0.0, -0.0, -1.0, 1.0, 0.5, 5000.0, 1e-320, 1e-40, 1e-30, 1e29, 9e29, 1e31, 1e39, 1e300, -1e300]
    ) | st.floats(width=32)
    scalars = st.one_of(
        st.none(), st.booleans(), st.integers(-2, 9), st.sampled_from([2**31, -(2**63), 10**30, 10**400]), numbers,
        st.text(max_size=5), st.sampled_from(["teff", "flux", "none", "gelu", "../x", "nan"]),
    )  # fmt: skip
    junk = st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
        max_leaves=4,
    )

    dice = st.integers(0, 11)
    few, small, places = st.integers(0, 3), st.integers(0, 9), st.integers(0, 40)
    ways, shapes = st.sampled_from([0, 0, 0, 3, 4, 5, 9]), st.sampled_from([6, 7, 8])

    def rarely(strange: Any, usual: Any) -> Any:
        return dice.flatmap(lambda n: strange if n == 7 else usual)

    def pixels(draw: Any, usual: Any, units: Sequence[str] = ("",), types: str = "f4 f8 >f4 i4 f2 u1 i8") -> Any:
        """An array like `usual`, in some type and container, with unexpected values and shape."""
        if draw(dice) == 7:
            return draw(junk)
        array = np.array(usual)
        for _ in range(draw(few)):
            if not array.size:
                break
            with np.errstate(all="ignore"):
                match draw(shapes if draw(dice) == 7 else ways):
                    case 0:
                        array.flat[draw(places) % array.size] = draw(numbers)
                    case 3:
                        array = array * draw(numbers)
                    case 4:
                        array = array[..., ::-1]
                    case 5:
                        array = np.random.default_rng(draw(small)).permutation(array, axis=-1)
                    case 6:
                        array = np.sort(array)[..., np.arange(array.shape[-1]) // 2]
                    case 7:
                        array = array[..., : draw(few)]
                    case 8:
                        array = np.repeat(array[None], draw(few), axis=0)
                    case 9:
                        array[..., draw(places) :] = draw(numbers)
        kind = draw(st.sampled_from(types.split())) if draw(dice) == 7 else np.asarray(usual).dtype.str
        with np.errstate(all="ignore"):
            array = np.ascontiguousarray(array.astype(kind))
        containers = ["array", "list", "masked", *(["tensor"] if array.dtype.isnative else [])]
        containers += [f"quantity:{unit}" for unit in units]
        container = draw(st.sampled_from(containers)) if draw(dice) == 7 else "array"
        about = {"dtype": array.dtype.str, "shape": list(array.shape)}
        return {**about, "bytes": array.tobytes().hex(), "as": container}

    labels = st.sampled_from(["teff", "logg", "fe_h", "alpha_m"])
    values = rarely(junk, rarely(numbers, st.floats(-1, 1)))
    columns = st.dictionaries(rarely(st.sampled_from(["nope", "flux", ""]), labels), values, max_size=3)
    standards = [[None, 1.0, 0.1], [None, 0.0, 1.0], [[5000.0, 5020.0], [1.0, 1.2], [0.1, 0.2]]]
    known: dict[str, Any] = {
        "wavelength_unit": st.sampled_from(["Angstrom", "Angstrom", "nm", "um", "m"]),
        "wavelength_medium": st.sampled_from(["vacuum", "air"]),
        "error_type": st.sampled_from(["sigma", "ivar"]),
        "valid_flux": st.sampled_from([[0.5, 1.1], [-1e300, 1e300]]),
        "clip": st.sampled_from([None, 10.0, 1e-9, 1e300]),
        "max_length": st.integers(1, 5),
        "sampling": st.sampled_from(["even", "random"]),
        "seed": st.integers(0, 5),
        "requests": st.lists(labels, min_size=1, max_size=3, unique=True),
        "standardize": st.sampled_from(standards),
    }
    settings = st.lists(st.sampled_from(sorted(known)), max_size=3, unique=True).flatmap(
        lambda names: st.fixed_dictionaries({name: rarely(junk | numbers, known[name]) for name in names})
    )

    @st.composite
    def calls(draw: Any) -> Case:
        chosen = draw(settings)
        if isinstance(three := chosen.pop("standardize", None), list):
            parts = ("standardize_wavelength", "standardize_center", "standardize_scale")
            chosen |= {name: draw(rarely(numbers, st.just(part))) for name, part in zip(parts, three, strict=False)}
        n_pixels, n_stars = draw(st.integers(1, 40)), draw(st.integers(1, 3))
        first = draw(st.sampled_from([5000.0, 3360.0, 15150.0, 1000.0, 299_900.0, 1999.0]))
        wavelength = first + np.arange(n_pixels) * draw(st.sampled_from([1.0, 0.2, 20.0]))
        flux = 1 + 0.1 * np.sin(np.arange(n_stars * n_pixels)).reshape(n_stars, n_pixels)
        flux = flux[0] if n_stars == 1 and draw(st.booleans()) else flux
        call: dict[str, Any] = {
            "wavelength": pixels(draw, wavelength, ["Angstrom", "nm", "m", "K", "1/cm"]),
            "flux": pixels(draw, flux, ["Jy", "K", ""]),
        }
        if draw(st.booleans()):
            call["flux_error"] = pixels(draw, 0.02 * flux, ["Jy", "mJy", "m"])
        if draw(st.booleans()):
            call["mask"] = pixels(draw, flux > 1.05, types="? u1 f8")
        spectrum = {name: call[name] for name in ("wavelength", "flux", "flux_error", "mask") if name in call}
        match draw(st.integers(0, 11)):
            case 5:
                call = {"wavelength": {**spectrum, "teff": draw(numbers), "teff_err": 1.0}}
            case 6:
                call = {"wavelength": [spectrum] * n_stars}
            case 7:
                call = {"scalars": draw(columns)}
        flux_at = st.floats(4990, 5100) | numbers
        optional = {
            "scalars": columns,
            "labels": columns,
            "requests": st.lists(rarely(junk, labels | flux_at), min_size=1, max_size=4),
            "radial_velocity": st.floats(-1000, 1000) | st.lists(st.floats(-9, 9), min_size=n_stars, max_size=n_stars),
            "max_length": st.integers(1, 9),
            "generator": st.integers(0, 9),
        }
        for name in draw(st.lists(st.sampled_from(sorted(optional)), max_size=2, unique=True)):
            call[name] = draw(rarely(junk | numbers, optional[name]))
        if isinstance(call.get("labels"), dict):
            call["label_errors"] = {name: draw(values) for name in call["labels"]}
        return Case("call.json", json.dumps({"settings": chosen, "call": call}).encode())

    @st.composite
    def damaged(draw: Any) -> Case:
        """A real file with some bytes changed, cut out, doubled, or put from another file."""
        name, content = draw(st.sampled_from(seeds))
        data = bytearray(content)
        # Headers are at the start, except in Parquet and npz, where they are at the end.
        reach = draw(st.sampled_from([64, 512, 4096, len(data)]))
        for _ in range(draw(st.integers(1, 4))):
            if not data:
                break
            at = draw(st.integers(0, min(reach, len(data)) - 1))
            at = len(data) - 1 - at if name.endswith(("parquet", "npz")) and draw(st.booleans()) else at
            size = draw(st.sampled_from([1, 1, 2, 4, 8, 80, 2880]))
            match draw(st.integers(0, 6)):
                case 0:
                    data[at] ^= 1 << draw(st.integers(0, 7))
                case 1:
                    data[at : at + size] = draw(st.binary(min_size=1, max_size=8))
                case 2:
                    del data[at : at + size]
                case 3:
                    data[at:at] = data[at : at + size]
                case 4:
                    del data[at:]
                case 5:
                    value = draw(st.sampled_from([b"\0", b"\xff", b"9", b" ", b"-", b"T", b"nan", b"1e999"]))
                    data[at : at + size * len(value)] = value * size
                case 6:
                    other = draw(st.sampled_from(seeds)).content
                    data[at : at + size] = other[at : at + size]
        return Case(name, bytes(data))

    @st.composite
    def cards(draw: Any) -> Case:
        """A FITS file with values of its headers changed, or names of its columns and their types."""
        files = [seed for seed in seeds if seed.content.startswith(b"SIMPLE")]
        name, content = draw(st.sampled_from(files))
        data = bytearray(content)
        lines = [i for i in range(0, len(data) - 80, 80) if data[i + 8 : i + 10] == b"= "]
        for _ in range(draw(st.integers(1, 3))):
            at = draw(st.sampled_from(lines))
            if draw(st.integers(0, 3)) == 0:
                data[at : at + 8] = draw(st.sampled_from(lines)).to_bytes(4, "big").hex().upper().encode()
            else:
                value = draw(st.sampled_from(
                    ["0", "1", "-1", "3", "999999999999", "1e400", "T", "'AWAV'", "'1E'", "'40E'", "'0D'", "'PE(3)'",
                     "'flux'", "'wavelength'", "'furlong'", "''", "'nan'", "NaN", "-32", "16", "", "1.5", "'20A'"]
                ))  # fmt: skip
                data[at + 10 : at + 80] = f"{value:>20}".ljust(70).encode()
        return Case(name, bytes(data))

    @st.composite
    def tables(draw: Any) -> Case:
        """Files with the right columns, but unusual numbers and shapes."""

        usual = {
            "wavelength": 5000.0 + np.arange(40),
            "flux": np.linspace(0.8, 1.2, 40),
            "flux_error": np.full(40, 0.1),
        }
        names = draw(rarely(st.just(["flux"]), st.sampled_from([["wavelength", "flux"], [*usual], [*usual, "mask"]])))
        spectrum: dict[str, Any] = {}
        for name in names:
            if name == "mask":
                spectrum[name] = np.arange(40) % draw(st.integers(1, 9)) == 0
            else:
                drawn = pixels(draw, usual[name])
                known_kind = isinstance(drawn, dict) and "dtype" in drawn
                spectrum[name] = decoded({**drawn, "as": "array"}) if known_kind else usual[name]
        stream = io.BytesIO()
        match draw(st.sampled_from(["npz", "npy", "parquet", "fits", "csv", "txt"])):
            case "npz":
                ids = {"object_id": np.array(["a", "b"])} if draw(st.integers(0, 3)) == 0 else {}
                np.savez(stream, **spectrum, **cast(Any, ids))
                return Case("a.npz", stream.getvalue())
            case "npy":
                np.save(stream, spectrum["flux"])
                return Case("a.npy", stream.getvalue())
            case "parquet":
                stars = draw(st.integers(0, 3))
                lists = {
                    name: pa.array([draw(rarely(st.none(), st.just(np.ravel(array).tolist()))) for _ in range(stars)])
                    for name, array in spectrum.items()
                }
                if draw(st.booleans()):
                    others = {"object_id": st.text(max_size=3) | st.none(), "teff": numbers, "parallax": numbers}
                    lists |= {name: pa.array([draw(s) for _ in range(stars)]) for name, s in others.items()}
                pq.write_table(pa.table(lists), stream)
                return Case("a.parquet", stream.getvalue())
            case "fits":
                one_row = draw(st.booleans())
                made = []
                for name, array in spectrum.items():
                    array = np.atleast_1d(np.asarray(array, np.float64 if name != "mask" else bool))
                    letter = "L" if name == "mask" else "D"
                    size = f"{array.size}{letter}" if one_row else letter
                    values = array.reshape(1, -1) if one_row else array.ravel()
                    unit = draw(st.sampled_from([None, None, "nm", "K", "furlong"])) if name == "wavelength" else None
                    made.append(fits.Column(name, size, array=values, unit=unit))
                assume(all(array.size for array in spectrum.values()))  # such tables astropy cannot write
                fits.BinTableHDU.from_columns(made).writeto(stream)
                return Case("a.fits", stream.getvalue())
            case kind:
                between = draw(st.sampled_from([",", ";", "\t"])) if kind == "csv" else " "
                flat = [np.ravel(array) for array in spectrum.values()]
                lines = [between.join(map(str, line)) for line in itertools.zip_longest(*flat, fillvalue="")]
                header = rarely(st.text(max_size=8), st.just(between.join(names)))
                lines[:0] = [draw(st.sampled_from(["", "# "])) + draw(header)]
                return Case(f"a.{kind}", "\n".join(lines).encode("utf-8", "replace"))

    @st.composite
    def documents(draw: Any) -> Case:
        """A file of settings with some of them changed, removed or added."""

        name, content = draw(st.sampled_from(seeds))
        if draw(st.integers(0, 9)) == 0:
            return draw(damaged())
        load, dump = (yaml.safe_load, yaml.safe_dump) if ".yaml" in name else (json.loads, json.dumps)
        settings = load(content)
        for _ in range(draw(st.integers(1, 3))):
            inside, key = settings, draw(st.sampled_from([*settings] or ["x"]))
            while isinstance(inside.get(key), dict) and inside[key] and draw(st.booleans()):
                inside = inside[key]
                key = draw(st.sampled_from([*inside]))
            match draw(st.integers(0, 5)):
                case 0:
                    inside.pop(key, None)
                case 1:
                    inside[draw(st.text(max_size=6))] = draw(junk)
                case 2 if isinstance(inside.get(key), list) and inside[key]:
                    inside[key] = inside[key][:-1] + [draw(junk)] * draw(st.integers(0, 2))
                case 3 if isinstance(inside.get(key), int | float):
                    inside[key] = draw(numbers | st.integers(-5, 300) | st.sampled_from([10**6, 10**9, 2**40, 10**30]))
                case _:
                    inside[key] = draw(junk)
        text = dump(draw(rarely(junk, st.just(settings))))
        return Case(name, text.encode("utf-8", "replace"))

    @st.composite
    def weights(draw: Any) -> Case:
        """A safetensors file with another header, or with other numbers."""
        name, content = seeds[0]
        (length,) = struct.unpack("<Q", content[:8])
        header, data = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
        places = {tensor: about["data_offsets"] for tensor, about in header.items() if tensor != "__metadata__"}
        for _ in range(draw(st.integers(1, 3))):
            tensor = draw(st.sampled_from(sorted(places)))
            match draw(st.integers(0, 7)):
                case 0 | 1 | 2:
                    start, end = places[tensor]
                    at = start + 4 * draw(st.integers(0, max((end - start) // 4 - 1, 0)))
                    with np.errstate(over="ignore"):
                        data[at : at + 4] = np.float32(draw(numbers)).tobytes()
                case 3:
                    header.pop(tensor, None)
                case 4:
                    header[draw(st.text(max_size=5))] = draw(junk) if draw(st.booleans()) else header.get(tensor)
                case 5:
                    parts = {"dtype": st.sampled_from(["F64", "F16", "BF16", "I8", "BOOL", "X"]),
                             "shape": st.lists(st.sampled_from([0, 1, 4, 16, 2**40, 2**63, -1]), max_size=3),
                             "data_offsets": st.lists(st.sampled_from([0, 4, 64, 2**62, -4]), max_size=3)}  # fmt: skip
                    part = draw(st.sampled_from(sorted(parts)))
                    header[tensor] = {**(header.get(tensor) or {}), part: draw(rarely(junk, parts[part]))}
                case 6:
                    header["__metadata__"] = draw(junk)
                case 7:
                    del data[draw(st.integers(0, len(data))) :]
        text = json.dumps(header).encode("utf-8", "replace")
        length = draw(rarely(st.sampled_from([0, 1, 2**31, 2**63]), st.just(len(text))))
        return Case(name, struct.pack("<Q", length) + text + bytes(data))

    made: dict[str, Callable[[], Any]] = {
        "tokenizer": calls,
        "readers": lambda: tables() | damaged() | cards(),
        "statements": lambda: fuzz_statements.statements(st).map(
            lambda statement: Case("said.json", json.dumps(statement).encode())
        ),
        "config": documents,
        "safetensors": lambda: weights() | weights() | damaged(),
    }
    return made[target]()


# ---------------------------------------------------------------------------------------------------------- the seeds


def seed_files(target: str, folder: Path) -> list[Case]:
    """What inputs are made from; for the readers the files that their tests write are in `folder`."""
    if target == "readers":
        files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        small = {path.read_bytes(): path for path in files if 0 < path.stat().st_size <= SEED_BYTES}

        kept = [(path, content) for content, path in small.items()]
        return [
            Case(p.name, content)
            for p, content in kept
            if p.name.lower().removesuffix(".gz").endswith(SPECTRUM_SUFFIXES)
        ]
    if target in ("tokenizer", "statements"):
        return []
    model = checkpoints() / "model"
    if target == "safetensors":
        return [Case("model.safetensors", (model / "model.safetensors").read_bytes())]
    names = ["model-config.json", "model-preprocessor_config.json", "model-training_range.json", "emulator-config.json",
             "shards-model.safetensors.index.json"]  # fmt: skip
    found = [Case(name, checkpoints().joinpath(*name.split("-", 1)).read_bytes()) for name in names]
    recipes = [ROOT / "scripts" / "recipes" / f"{name}.yaml" for name in ("gaia-xp-ak", "original-synthetic")]
    found += [Case("recipe.yaml", path.read_bytes()) for path in recipes]
    return found + [
        Case("instrument.yaml", path.read_bytes()) for path in Path(PACKAGE).glob("resources/instruments/gaia-xp.yaml")
    ]


def written_by_tests(folder: Path) -> None:
    """Files of every format, as the tests of the readers write them."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/data/readers",
        "-p",
        "no:cacheprovider",
        "--basetemp",
        str(folder),
    ]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        raise ValueError(f"seeds: expected the tests of the readers to pass, got {run.stdout[-500:]}")


# ------------------------------------------------------------------------------------------------------------- worker


class Worker:
    """Tries inputs one after the other, and keeps what is needed to go on when it dies."""

    def __init__(self, target: str, engine: str, n: int, output: Path, folder: Path) -> None:
        self.target, self.n, self.folder = target, n, folder
        self.counts = {"inputs": 0, "refused": 0, "answered": 0, "fault": 0}
        self.seen: set[str] = set()
        self.current = output / f".{target}-{engine}.current"
        self.log = output / f".{target}-{engine}.faults"
        self.state = os.open(output / f".{target}-{engine}.counts", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        self.save()

    def save(self, trying: int = 0) -> None:
        os.pwrite(self.state, json.dumps({**self.counts, "trying": trying}).ljust(120).encode(), 0)

    def __call__(self, case: Case) -> None:
        if self.counts["inputs"] >= self.n:
            return
        self.current.write_bytes(case.name.encode() + b"\n" + case.content)
        self.save(trying=1)
        found = outcome(self.target, case, self.folder)
        self.counts["inputs"] += 1
        self.counts[found.kind] += 1
        if found.kind == "fault":
            first = found.what not in self.seen
            self.seen.add(found.what)
            with self.log.open("a", encoding="utf-8", errors="replace") as log:
                parts = {"name": case.name, "content": case.content.hex(), "trace": found.trace} if first else {}
                log.write(json.dumps({"what": found.what, **parts}) + "\n")
        self.save()


def by_hypothesis(worker: Worker, seeds: Sequence[Case], seed: int) -> None:
    import hypothesis

    made = strategies(worker.target, seeds)
    while worker.counts["inputs"] < worker.n:

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=worker.n - worker.counts["inputs"],
            database=None,
            deadline=None,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(made)
        def attempt(case: Case) -> None:
            worker(case)

        attempt()
        seed += 1


def by_atheris(worker: Worker, seeds: Sequence[Case], seed: int) -> None:
    import atheris

    if worker.target in ("tokenizer", "statements"):
        import hypothesis

        @hypothesis.settings(database=None, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
        @hypothesis.given(strategies(worker.target, seeds))
        def decide(case: Case) -> None:
            worker(case)

        def attempt(data: bytes) -> None:
            decide.hypothesis.fuzz_one_input(data)  # type: ignore[attr-defined]

    else:
        names = sorted({seed.name for seed in seeds})

        def attempt(data: bytes) -> None:
            # The last byte says what the rest is.
            if len(data) > 1:
                worker(Case(names[data[-1] % len(names)], data[:-1]))

    def one(data: bytes) -> None:
        attempt(data)
        if worker.counts["inputs"] >= worker.n:
            os._exit(0)  # libFuzzer would go on

    corpus = worker.folder / "corpus"
    corpus.mkdir()
    for i, case in enumerate(seeds):
        (corpus / str(i)).write_bytes(case.content + bytes([names.index(case.name) % 256]))
    if not seeds:
        generator = random.Random(seed)
        for i in range(50):
            (corpus / str(i)).write_bytes(generator.randbytes(2000))
    options = {"seed": seed + 1, "max_len": SEED_BYTES, "rss_limit_mb": 0, "timeout": 10 * int(HANG), "verbosity": 0}
    options |= {"len_control": 0, "handle_abrt": 0, "handle_segv": 0}
    atheris.Setup(
        [
            "fuzz",
            *(f"-{name}={value}" for name, value in options.items()),
            f"-artifact_prefix={worker.folder}/",
            str(corpus),
        ],
        one,
    )
    atheris.Fuzz()


def work(target: str, engine: str, n: int, seed: int, output: Path, seed_folder: Path) -> int:
    faulthandler.enable()
    # Of what transformers and hypothesis say by the ten thousand, nothing is read.
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="spectrafm-fuzz-") as folder:
        worker = Worker(target, engine, n, output, Path(folder))
        tiny()
        seeds = seed_files(target, seed_folder)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        {"hypothesis": by_hypothesis, "atheris": by_atheris}[engine](worker, seeds, seed)
    return 0


# ------------------------------------------------------------------------------------------------------------- parent


def fuzz(target: str, engine: str, n: int, seed: int, output: Path, seed_folder: Path) -> dict[str, Any]:
    """So many inputs, in as many processes as die of them."""
    total = dict.fromkeys(("inputs", "refused", "answered", "fault"), 0)
    names = {part: output / f".{target}-{engine}.{part}" for part in ("counts", "current", "faults", "log")}
    names["faults"].unlink(missing_ok=True)
    deaths: list[dict[str, Any]] = []
    start, cpu, attempt = time.perf_counter(), children(), 0
    with tqdm(total=n, desc=f"{target}, {engine}", unit=" inputs") as bar:
        while total["inputs"] < n:
            left = n - total["inputs"]
            options = {"inputs": left, "seed": seed + 1000 * attempt, "output": output, "seeds": seed_folder}
            command = [sys.executable, sys.argv[0], "--worker", "--targets", target, "--engines", engine]
            command += [str(part) for name, value in options.items() for part in (f"--{name}", value)]
            names["counts"].unlink(missing_ok=True)
            with names["log"].open("wb") as log, subprocess.Popen(
                command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}
            ) as process:  # fmt: skip
                before = total["inputs"]
                watch(process, names["counts"], lambda done, before=before: bar.update(before + done - bar.n))  # type: ignore[misc]
            counts = read_counts(names["counts"])
            total = {name: total[name] + counts[name] for name in total}
            if counts["inputs"] < left:
                log_text = names["log"].read_text(errors="replace")
                if not counts.get("trying"):
                    raise ValueError(
                        f"{target}, {engine}: expected a process that tries inputs, got {log_text[-1000:]}"
                    )
                what = (
                    "hangs" if process.returncode == -signal.SIGABRT else f"the process ends with {process.returncode}"
                )
                name, _, content = names["current"].read_bytes().partition(b"\n")
                deaths.append(
                    {"what": what, "name": name.decode(), "content": content.hex(), "trace": log_text[-4000:]}
                )
                total["inputs"] += 1
                total["fault"] += 1
            attempt += 1
            bar.update(total["inputs"] - bar.n)
    found = [json.loads(line) for line in names["faults"].read_text().splitlines()] if names["faults"].exists() else []
    for path in names.values():
        path.unlink(missing_ok=True)
    kinds: dict[str, dict[str, Any]] = {}
    for entry in found + deaths:
        kind = kinds.setdefault(entry["what"], {**entry, "inputs": 0})
        kind["inputs"] += 1
    distinct = []
    for number, kind in enumerate(kinds.values(), start=1):
        suffix = Path(kind["name"]).name
        path = output / "faults" / f"{target}-{engine}-{number}-{suffix}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes.fromhex(kind["content"]))
        distinct.append({"what": kind["what"], "inputs": kind["inputs"], "file": path.name, "trace": kind["trace"]})
    taken = {"seconds": round(time.perf_counter() - start, 1), "cpu_seconds": round(children() - cpu, 1)}
    return {"target": target, "engine": engine, **total, **taken, "faults": distinct}


def children() -> float:
    """CPU seconds of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def watch(process: subprocess.Popen[bytes], counts: Path, show: Callable[[int], Any]) -> None:
    """Until it ends; it is made to where an input takes too long."""
    last, since = (0, 0), time.monotonic()
    while process.poll() is None:
        time.sleep(0.2)
        now = read_counts(counts)
        show(now["inputs"])
        if (now["inputs"], now.get("trying", 0)) != last or not now.get("trying"):
            last, since = (now["inputs"], now.get("trying", 0)), time.monotonic()
        elif time.monotonic() - since > HANG:
            process.send_signal(signal.SIGABRT)  # faulthandler then says where it was
            process.wait()


def read_counts(path: Path) -> dict[str, int]:
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text())
    return {"inputs": 0, "refused": 0, "answered": 0, "fault": 0}


def as_markdown(runs: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| target | engine | inputs | refused with a clear error | answered | faults | CPU minutes |"]
    lines.append("|" + "---|" * 7)
    for run in runs:
        numbers = [f"{run[name]:,}" for name in ("inputs", "refused", "answered", "fault")]
        lines.append(f"| {run['target']} | {run['engine']} | {' | '.join(numbers)} | {run['cpu_seconds'] / 60:.1f} |")
    for run in runs:
        for fault in run["faults"]:
            lines.append(f"{fault['file']}: {fault['inputs']} times {fault['what']}")
    return "\n".join(lines)


def replay(path: Path) -> int:
    """What an input that was kept does."""
    target, _, _, name = path.name.split("-", 3)
    with tempfile.TemporaryDirectory(prefix="spectrafm-fuzz-") as folder:
        found = outcome(target, Case(name, path.read_bytes()), Path(folder))
    print(f"{found.trace}{found.kind}: {found.what}" if found.what else found.kind)
    return int(found.kind == "fault")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="fuzz.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("fuzz"), metavar="DIR")
    parser.add_argument("--inputs", type=int, default=10_000, metavar="N", help="of each target and engine")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=Path, metavar="DIR", help="files of spectra (default: those of the tests)")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="an input that was kept in DIR/faults")
    parser.add_argument("--worker", action="store_true", help="what this program starts for itself")
    arguments = parser.parse_args(argv)
    for engine in arguments.engines:
        if importlib.util.find_spec(engine) is None:
            parser.error(
                f"--engines: expected {engine} to be installed (pip install {engine}), or --engines of the others"
            )
    if arguments.inputs < 1:
        parser.error(f"--inputs: expected at least 1, got {arguments.inputs}")
    if arguments.replay:
        return replay(arguments.replay)
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.worker:
        (target,), (engine,) = arguments.targets, arguments.engines
        return work(target, engine, arguments.inputs, arguments.seed, arguments.output, arguments.seeds)
    with tempfile.TemporaryDirectory(prefix="spectrafm-fuzz-") as folder:
        seeds = arguments.seeds or Path(folder, "seeds")
        if arguments.seeds is None and "readers" in arguments.targets:
            written_by_tests(seeds)
        runs = [
            fuzz(target, engine, arguments.inputs, arguments.seed, arguments.output, seeds)
            for target in arguments.targets
            for engine in arguments.engines
        ]
    with complete_file(arguments.output / "fuzz.json") as temporary:
        temporary.write_text(json.dumps({"seed": arguments.seed, "runs": runs}, indent=1) + "\n", encoding="utf-8")
    text = as_markdown(runs)
    with complete_file(arguments.output / "fuzz.md") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    print(text)
    return int(any(run["fault"] for run in runs))


if __name__ == "__main__":
    sys.exit(main())
