# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Cost of a star: SpectraFM, the published model, and other methods, on the same spectra.

    python scripts/benchmarks/benchmark.py --output benchmark             # some minutes: JSON, and a table
    python scripts/benchmarks/benchmark.py --output benchmark --curves    # cost against stars, pixels, batch: pictures
    python scripts/benchmarks/benchmark.py --output benchmark --against CHECKOUT  # two versions in turn

All are measured in turn in several rounds, so that other load on the machine affects all of them. A figure is the
median of the rounds, a ratio the median of the ratios within each round. Shares are relative to the float32 matrix
product of this machine, measured in the same round with the same threads; operations are counted by
`torch.utils.flop_counter`. Batches are those of `spectrafm predict`. A training step is the forward and backward pass
and the update by AdamW on one such batch. The throughput of a complete pre-training is in the last line of
scripts/recipes/base.curves.csv.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.optimize import least_squares
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from spectrafm_cli.arguments import Parser
from spectrafm_hf import (
    SpectraFMConfig,
    SpectraFMForPrediction,
    SpectraFMTokenizer,
    SpectrumEmulator,
    bundled,
    load_checkpoint,
)
from spectrafm_hf.checkpoints import BASE_CHECKPOINT
from spectrafm_hf.data.readers import read_spectra
from spectrafm_hf.data.schema import pixel_column
from spectrafm_hf.files import complete_file
from spectrafm_hf.hub.export import INPUTS as ONNX_INPUTS
from spectrafm_hf.hub.export import export_onnx
from spectrafm_hf.inference.prediction import batches_of, predict_batches
from spectrafm_hf.inference.survey import ShardPredictor, list_shards
from spectrafm_hf.inference.training_range import TrainingRange
from spectrafm_hf.show.style import BLUE, GREY, INK, ORANGE, save_figure
from spectrafm_hf.synthesis.instruments import Instrument
from spectrafm_hf.synthesis.synthetic import SyntheticStars
from spectrafm_hf.training.baseline import Spectra
from spectrafm_hf.training.cannon import CannonBaseline
from spectrafm_hf.training.throughput import CPU_OPERATIONS, measure_peak


LABELS = ("teff", "logg", "fe_h")
PIXELS = ("wavelength", "flux", "flux_error", "mask")
#: Pixels in a window of the published model; a spectrum has 15 windows.
WINDOW = 512
MODEL = BASE_CHECKPOINT
Columns = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Measured:
    """Repeatable work on some stars; operations are counted if it consists of matrix products."""

    title: str
    stars: int
    work: Callable[[], Any]
    operations: float = 0.0


# ----------------------------------------------------------------------------------------------------- what is measured


@functools.cache
def spectra(instrument: str, n: int) -> Columns:
    """Synthetic stars with noise."""
    return SyntheticStars(Instrument.load(instrument)).draw(n, np.random.default_rng(0))


def as_rows(instrument: str, n: int) -> list[dict[str, Any]]:
    """The same stars as rows of the readers."""
    stars = spectra(instrument, n)
    return [{"object_id": str(i), **{name: stars[name][i] for name in PIXELS}} for i in range(n)]


def counted(work: Callable[[], Any]) -> float:
    with FlopCounterMode(display=False, custom_mapping=CPU_OPERATIONS) as counter:
        work()
    return float(counter.get_total_flops())


def of_the_model(instrument: str, n: int) -> list[Measured]:
    """Tokenizing, the forward pass, the complete prediction, and a training step."""
    model, tokenizer = load_checkpoint(MODEL)
    rows = as_rows(instrument, n)
    batches = list(batches_of(rows, tokenizer))
    tokens = [tokenizer(batch) for batch in batches]
    first = tokens[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    requests = torch.tensor(model.config.label_ids(model.config.network_labels))
    asked = {"request_ids": requests.expand(len(batches[0]), -1), "labels": torch.zeros(len(batches[0]), len(requests))}

    @torch.inference_mode()
    def forward() -> None:
        model.eval()
        for inputs in tokens:
            model(**inputs)

    def step() -> None:
        optimizer.zero_grad()
        model.train()(**{**first, **asked}).loss.backward()
        optimizer.step()

    return [
        Measured(f"{instrument}: tokenizer", n, lambda: [tokenizer(batch) for batch in batches]),
        Measured(f"{instrument}: forward pass", n, forward, counted(forward)),
        Measured(f"{instrument}: spectra to labels", n, lambda: list(predict_batches(model, tokenizer, batches))),
        Measured(f"{instrument}: training step", len(batches[0]), step, counted(step)),
    ]


def of_other_runtimes(instrument: str, n: int, folder: Path) -> list[Measured]:
    """The forward pass by `torch.compile` and by ONNX Runtime with as many threads, if available."""
    model, tokenizer = load_checkpoint(MODEL)
    tokens = [tokenizer(batch) for batch in batches_of(as_rows(instrument, n), tokenizer)]
    if len(tokens) > 1:
        tokens = tokens[:-1]  # of one size, because another one would be recompiled
    n = sum(len(inputs["attention_mask"]) for inputs in tokens)
    found = []
    if shutil.which("c++") or shutil.which("g++"):
        compiled = torch.compile(model.eval())

        @torch.inference_mode()
        def forward() -> None:
            for inputs in tokens:
                compiled(**inputs)

        forward()  # which compiles
        found.append(Measured(f"{instrument}: forward pass, torch.compile", n, forward))
    if importlib.util.find_spec("onnxruntime"):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        path = export_onnx(MODEL, folder / "model.onnx").path
        session = onnxruntime.InferenceSession(path, options)
        arrays = [{key: inputs[key].numpy() for key in ONNX_INPUTS} for inputs in tokens]
        found.append(
            Measured(
                f"{instrument}: network, ONNX Runtime", n, lambda: [session.run(None, inputs) for inputs in arrays]
            )
        )
    return found


def of_the_original() -> list[Measured]:
    """The published architecture, untrained: 15 windows of a spectrum one after the other, or as one batch."""
    model = SpectraFMForPrediction(SpectraFMConfig.original()).eval()
    tokenizer = SpectraFMTokenizer(clip=None, label_names=model.config.label_names)
    tokens = tokenizer(as_rows("apogee", 8)[:1])
    order = torch.randperm(tokens["flux"].shape[1], generator=torch.Generator().manual_seed(0))
    order = order[: len(order) // WINDOW * WINDOW]  # the published program repeats pixels to fill the last window
    windows = {name: tokens[name][0, order].unflatten(0, (-1, WINDOW)) for name in tokenizer.model_input_names}
    requests = tokens["request_ids"]

    @torch.inference_mode()
    def one_by_one() -> None:
        for i in range(len(windows["flux"])):
            model(**{name: value[i : i + 1] for name, value in windows.items()}, request_ids=requests)

    @torch.inference_mode()
    def together() -> None:
        model(**windows, request_ids=requests.expand(len(windows["flux"]), -1))

    return [
        Measured("published model: window by window", 1, one_by_one, counted(one_by_one)),
        Measured("published model: a star's windows as a batch", 1, together, counted(together)),
    ]


def of_a_cannon(n: int = 16) -> Measured:
    """A quadratic Cannon of three labels, fitted to each star by least squares."""

    def as_spectra(stars: Columns) -> Spectra:
        labels = np.stack([stars[name] for name in LABELS], axis=1)
        flux, error = (np.where(stars["mask"], np.nan, stars[name]) for name in ("flux", "flux_error"))
        return Spectra(flux, error, labels, np.full_like(labels, 0.01), np.empty((len(labels), 0)))

    model = CannonBaseline().fit(as_spectra(spectra("apogee", 400)))
    asked = as_spectra(spectra("apogee", n))
    return Measured("quadratic Cannon, 3 labels", n, lambda: model.raw_predict(asked.flux, asked.flux_error))


def of_a_payne(n: int = 1) -> Measured:
    """Our emulator, observed by the instrument, fitted to each star with scipy: eight labels, from the Sun."""
    emulator = SpectrumEmulator.from_pretrained(bundled("emulator-hband")).eval()
    instrument, stars = Instrument.load("apogee"), spectra("apogee", 8)
    wavelength = emulator.wavelength.double().numpy()
    matrix = instrument.response(wavelength)
    low, high = np.array(emulator.config.label_minimum), np.array(emulator.config.label_maximum)
    start = np.clip(emulator.label_table({"teff": 5000.0, "logg": 3.0, "fe_h": -0.2})[0], low, high)

    @torch.inference_mode()
    def fit() -> None:
        for i in range(n):
            good = ~stars["mask"][i]
            flux, error = stars["flux"][i][good], stars["flux_error"][i][good]

            def misfit(scaled: NDArray[Any], good=good, flux=flux, error=error) -> NDArray[Any]:
                labels = torch.from_numpy((low + scaled * (high - low))[None])
                made = (matrix @ emulator(labels)[0][0].double().numpy())[good]
                return (made / np.median(made) - flux / np.median(flux)) / error

            least_squares(misfit, (start - low) / (high - low), bounds=(0, 1), diff_step=1e-3)

    return Measured(f"fit with the emulator and scipy, {len(start)} labels", n, fit)


def of_files(instrument: str, folder: Path, n: int) -> list[Measured]:
    """A shard of spectra: read, and Parquet to Parquet, with flags."""
    few = min(n, 512)
    stars = spectra(instrument, few)
    columns: dict[str, Any] = {column: pixel_column(stars[column]) for column in PIXELS}
    table = pa.table({"object_id": [str(i) for i in range(few)], "survey": [instrument] * few, **columns})
    path = folder / f"{instrument}-{n}.parquet"
    with pq.ParquetWriter(path, table.schema) as writer:
        for start in range(0, n, few):
            writer.write_table(table.slice(0, n - start))
    predictor = ShardPredictor(*load_checkpoint(MODEL), folder / "labels", TrainingRange.load(bundled(MODEL)))
    (shard,) = list_shards([path])
    return [
        Measured(f"{instrument}: reading Parquet", n, lambda: [None for _ in read_spectra([path])]),
        Measured(f"{instrument}: Parquet to Parquet", n, lambda: predictor(shard)),
    ]


# ------------------------------------------------------------------------------------------------------------ measuring


def measure(everything: Iterable[Measured], rounds: int) -> dict[str, Any]:
    """Stars a second of each, and shares of the peak, in each round."""
    everything = list(everything)
    found: dict[str, Any] = {part.title: {"stars_per_s": [], "share_of_peak": []} for part in everything}
    peaks = []
    with tqdm(total=rounds * len(everything), desc="measuring", delay=2) as progress:
        for _ in range(rounds):
            peaks.append(measure_peak())
            for part in everything:
                start = time.perf_counter()
                part.work()
                seconds = time.perf_counter() - start
                found[part.title]["stars_per_s"].append(part.stars / seconds)
                if part.operations:
                    found[part.title]["share_of_peak"].append(part.operations / seconds / peaks[-1])
                progress.update()
    return {"peak_gflop_per_s": [peak / 1e9 for peak in peaks], "measured": found}


def machine() -> dict[str, Any]:
    packages = ("spectrafm_hf", "torch", "transformers", "numpy", "scipy")
    return {
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def as_markdown(content: Mapping[str, Any]) -> str:
    measured = content["measured"]
    ours = np.array(measured["apogee: spectra to labels"]["stars_per_s"])
    lines = ["| what | stars a second | share of the peak | apogee / this |", "|---|---|---|---|"]
    for title, figures in measured.items():
        speed = np.array(figures["stars_per_s"])
        share = f"{np.median(figures['share_of_peak']):.2f}" if figures["share_of_peak"] else ""
        ratio = f"{np.median(ours / speed):,.1f}" if title in content["compared"] else ""
        lines.append(f"| {title} | {np.median(speed):,.4g} | {share} | {ratio} |")
    peak = np.median(content["peak_gflop_per_s"])
    threads = content["machine"]["threads"]
    return "\n".join([*lines, "", f"Matrix product in float32: {peak:.0f} GFLOP/s with {threads} threads."])


# --------------------------------------------------------------------------------------------------------------- curves


def curves(folder: Path, most_stars: int) -> dict[str, list[tuple[float, float]]]:
    """Milliseconds per star against several quantities."""
    found: dict[str, list[tuple[float, float]]] = {}

    def seconds(work: Callable[[], Any]) -> float:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return float(np.median(times))

    with tqdm(desc="curves", unit=" points", delay=2) as progress:

        def add(curve: str, x: float, n: int, work: Callable[[], Any], once: bool = False) -> None:
            start = time.perf_counter()
            work()
            taken = time.perf_counter() - start if once else seconds(work)
            found.setdefault(curve, []).append((x, 1000 * taken / n))
            progress.update()

        for n in [n for n in (100, 1000, 10_000, 100_000, 1_000_000) if n <= most_stars]:
            *_, predict = of_files("gaia-xp", folder, n)
            add("stars (Gaia XP, Parquet to Parquet)", n, n, predict.work, once=n > 1000)
        model, tokenizer = load_checkpoint(MODEL)
        for size in (1, 4, 16, 32, 64, 96, 128, 256, 512):

            @torch.inference_mode()
            def one_batch(size=size, model=model, tokenizer=tokenizer) -> None:
                model(**tokenizer(as_rows("apogee", 512)[:size]))

            add("stars in a batch (APOGEE)", size, size, one_batch)
        for pixels in (100, 1000, 10_000, 100_000):
            n = max(1, min(64, 200_000 // pixels))
            wavelength = np.geomspace(3400.0, 10200.0, pixels)
            flux = np.random.default_rng(0).normal(1, 0.1, (n, pixels))

            @torch.inference_mode()
            def read_off(wavelength=wavelength, flux=flux, model=model, tokenizer=tokenizer) -> None:
                model(**tokenizer(wavelength, flux, 0.1 * np.ones_like(flux)))

            add("pixels of a spectrum", pixels, n, read_off)
    return found


def draw_curves(path: Path, found: Mapping[str, list[tuple[float, float]]]) -> None:
    figure = Figure(figsize=(13, 4), layout="constrained")
    for axes, (name, points) in zip(figure.subplots(1, 3).flat, found.items(), strict=True):
        x, y = np.transpose(points)
        axes.loglog(x, y, "o-", color=BLUE)
        above = 8 if y[-1] >= 0.9 * y[-2] else -16  # beside the line
        axes.annotate(
            f"{y[-1]:.3g} ms", (x[-1], y[-1]), (0, above), textcoords="offset points", ha="right", color=ORANGE
        )
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.set_xlabel(name, color=INK)
        axes.set_ylabel("time per star [ms]", color=INK)
        axes.grid(color=GREY, alpha=0.25, lw=0.6)
        axes.set_ylim(y.min() / 3, y.max() * 3)
    figure.suptitle(f"What a star costs, {torch.get_num_threads()} threads", x=0.01, ha="left", color=INK)
    save_figure(figure, path)


def write_json(path: Path, content: Any) -> None:
    with complete_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------ two versions in turn

#: Run in a process with the code of one version: arrays of spectra -> labels, tokens included. Measures CPU time, which
#: other programs affect less than wall time.
DRIVER = """
import json, sys, time
import numpy as np
import torch
from spectrafm_hf.checkpoints import load_checkpoint
try:
    from spectrafm_hf.inference.prediction import batches_of, predict_batches
except ModuleNotFoundError:  # where version 0.1.0 has it
    from spectrafm_hf.prediction import batches_of, predict_batches
found = {}
for instrument, name, file in zip(*[iter(sys.argv[1:])] * 3):
    stars = dict(np.load(file))
    count = len(stars["flux"])
    rows = [{"object_id": str(i), **{key: column[i] for key, column in stars.items()}} for i in range(count)]
    model, tokenizer = load_checkpoint(name)
    labels = [label for label in ("teff", "logg", "fe_h", "alpha_m") if label in tokenizer.label_names]
    for some in (rows[:64], rows):
        start = time.process_time()
        for _ in predict_batches(model, tokenizer, batches_of(some, tokenizer), labels):
            pass
        found[instrument + ", arrays to labels"] = len(some) / (time.process_time() - start)
    batch = next(iter(batches_of(rows, tokenizer)))
    inputs = tokenizer(batch, requests=labels)
    inputs = {key: value for key, value in inputs.items() if key not in ("estimate", "information", "pull", "misfit")}
    inputs["labels"] = torch.zeros(inputs["request_ids"].shape)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    model.train()
    for repeats in (2, 10):
        start = time.process_time()
        for _ in range(repeats):
            optimizer.zero_grad()
            model(**inputs).loss.backward()
            optimizer.step()
        found[instrument + ", training step"] = repeats * len(batch) / (time.process_time() - start)
print(json.dumps(found))
"""
#: The checkpoints of version 0.1.0.
BEFORE = {"apogee": "spectrafm-apogee", "gaia-xp": "spectrafm-gaia-xp-small"}


def against(checkout: Path, n: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Spectra a second of another version and of this one, measured in turn."""
    if not (checkout / "src" / "spectrafm_hf").is_dir():
        raise ValueError(f"against: expected a checkout with src/spectrafm_hf, got {checkout}")
    files = {}
    for instrument, number in (("apogee", n), ("gaia-xp", 10 * n)):
        files[instrument] = folder / f"{instrument}.npz"
        columns: Any = {name: spectra(instrument, number)[name] for name in PIXELS}
        np.savez(files[instrument], **columns)
    here = Path(__file__).resolve().parents[2]
    found: dict[str, dict[str, list[float]]] = {"before": {}, "now": {}}
    for _ in tqdm(range(rounds), desc="measuring", unit="round", delay=2):
        for side, root in (("before", checkout), ("now", here)):
            names = BEFORE if side == "before" else dict.fromkeys(files, MODEL)
            driver_args = [text for name in files for text in (name, names[name], str(files[name]))]
            environment = {**os.environ, "PYTHONPATH": str(root.resolve() / "src")}
            run = subprocess.run(
                [sys.executable, "-c", DRIVER, *driver_args],
                env=environment,
                capture_output=True,
                text=True,
                check=True,
            )
            for name, speed in json.loads(run.stdout.splitlines()[-1]).items():
                found[side].setdefault(name, []).append(speed)
    return {"machine": machine(), "stars": n, "stars_per_s": found}


def against_as_markdown(content: Mapping[str, Any]) -> str:
    before, now = (content["stars_per_s"][side] for side in ("before", "now"))
    lines = ["| what | before, stars per second of the processor | now | ratio |", "|---|---|---|---|"]
    for name in before:
        ratio = np.median(np.array(now[name]) / np.array(before[name]))
        lines.append(f"| {name} | {np.median(before[name]):,.0f} | {np.median(now[name]):,.0f} | {ratio:.2f} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="benchmark.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("benchmark"), metavar="DIR")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument(
        "--stars", type=int, default=376, metavar="N", help="of APOGEE; ten times as many of XP (default: 376)"
    )
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="of version 0.1.0, in place of the table")
    parser.add_argument("--curves", action="store_true", help="cost curves instead of the table")
    parser.add_argument(
        "--most-stars", type=int, default=1_000_000, metavar="N", help="largest number in the curves (default: 1000000)"
    )
    arguments = parser.parse_args(argv)
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="spectrafm-") as folder:
        if arguments.curves:
            found = curves(Path(folder), arguments.most_stars)
            write_json(arguments.output / "curves.json", {"machine": machine(), "milliseconds_per_star": found})
            draw_curves(arguments.output / "curves.png", found)
            return 0
        n = arguments.stars
        if arguments.against:
            content = against(arguments.against, n, arguments.rounds, Path(folder))
            write_json(arguments.output / "against.json", content)
            print(against_as_markdown(content))
            return 0
        others = [*of_the_original(), of_a_cannon(), of_a_payne()]
        everything = [
            *of_the_model("apogee", n),
            *of_other_runtimes("apogee", n, Path(folder)),
            *of_files("apogee", Path(folder), 4 * n),
            *others,
            *of_the_model("gaia-xp", 10 * n),
            *of_files("gaia-xp", Path(folder), 40 * n),
        ]
        content = {
            "machine": machine(),
            "stars": {"apogee": n, "gaia-xp": 10 * n},
            "compared": [part.title for part in others],
            **measure(everything, arguments.rounds),
        }
    write_json(arguments.output / "benchmark.json", content)
    text = as_markdown(content)
    with complete_file(arguments.output / "benchmark.md") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
