# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""The command line: `spectrafm demo`, `spectrafm predict`, `spectrafm data`.

It stands beside the package, whose import takes seconds, and imports it inside the verbs: `--help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn


if TYPE_CHECKING:
    from spectrafm_hf.data.readers import Row
    from spectrafm_hf.models import SpectraFMForPrediction, SpectraFMTokenizer


DEFAULT_MODEL = "spectrafm-gaia-xp-small"
DEMO_STARS = Path(__file__).parent / "spectrafm_hf" / "resources" / "gaia_xp_demo.parquet"
PRINTED_STARS = 20
PLOTTED_STARS = 20
#: The overview picture holds no more, so that the memory does not grow with the number of stars.
OVERVIEW_STARS = 100_000
DELAY = 2  # seconds before a progress bar shows


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of the usage and a line."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code: 0, 2 for bad input (one line on stderr), 130 after Ctrl-C."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"spectrafm {arguments.verb}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"spectrafm {arguments.verb}: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="spectrafm", description="Stellar labels with errors, from spectra.")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    demo = verbs.add_parser("demo", help="predict 64 real stars that come with the package, and draw the result")
    demo.add_argument("--output", type=Path, default=Path(), metavar="DIR", help="where spectrafm-demo.png goes")
    demo.add_argument("--model", default=DEFAULT_MODEL, metavar="NAME_OR_PATH", help=_MODEL_HELP)
    demo.set_defaults(run=_demo)

    predict = verbs.add_parser(
        "predict",
        help="predict the labels of stars from their spectra",
        description="Predict the labels of stars from their spectra. INPUT: FITS (tables with columns wavelength, flux "
        "and perhaps flux_error, mask, object_id; or what specutils reads), CSV (one line a pixel, columns as before), "
        "Parquet, or a data set folder.",
    )
    predict.add_argument("input", nargs="+", type=Path, metavar="INPUT")
    predict.add_argument("--model", default=DEFAULT_MODEL, metavar="NAME_OR_PATH", help=_MODEL_HELP)
    predict.add_argument(
        "--output", type=Path, metavar="FILE", help="table to write, one row a star: .csv, .parquet or .fits"
    )
    predict.add_argument(
        "--plot", type=Path, metavar="DIR", help=f"draw the first {PLOTTED_STARS} spectra and an overview"
    )
    predict.add_argument("--split", help="of a data set folder: train, validation or test (default: all)")
    predict.add_argument(
        "--wavelength-unit", default="Angstrom", metavar="UNIT", help="of bare wavelengths (default: Angstrom)"
    )
    predict.add_argument("--air", action="store_true", help="the wavelengths are in air (default: in vacuum)")
    predict.add_argument("--batch-size", type=_positive, default=128, metavar="N", help="stars at once (default: 128)")
    predict.set_defaults(run=_predict)

    data = verbs.add_parser("data", help="build a data set of spectra with labels")
    sets = data.add_subparsers(dest="name", metavar="NAME", required=True)
    gaia_xp = sets.add_parser("gaia-xp", help="39,851 Gaia DR3 XP spectra with APOGEE DR17 labels (downloads 104 MB)")
    gaia_xp.add_argument("--out", type=Path, default=Path("gaia-xp"), metavar="DIR", help="default: gaia-xp")
    gaia_xp.add_argument("--limit", type=_positive, metavar="N", help="use the first N rows of the source only")
    gaia_xp.add_argument("--overwrite", action="store_true", help="replace an earlier build")
    gaia_xp.add_argument("--source", type=Path, metavar="WHEEL", help="a copy of the source, instead of the download")
    gaia_xp.set_defaults(run=_data_gaia_xp)
    synthetic = sets.add_parser("synthetic", help="synthetic stars, as an instrument would have recorded them")
    synthetic.add_argument("--n", type=_positive, required=True, metavar="N", help="number of stars")
    synthetic.add_argument(
        "--instrument", required=True, metavar="NAME_OR_FILE", help="apogee, gaia-xp, miles, or a YAML file like theirs"
    )
    synthetic.add_argument("--out", type=Path, metavar="DIR", help="default: synthetic-INSTRUMENT")
    synthetic.add_argument("--seed", type=int, default=0, help="default: 0")
    synthetic.add_argument(
        "--splits",
        type=float,
        nargs=3,
        default=(90, 5, 5),
        metavar=("TRAIN", "VALIDATION", "TEST"),
        help="their shares (default: 90 5 5)",
    )
    synthetic.add_argument(
        "--range",
        action="append",
        nargs=3,
        default=[],
        metavar=("LABEL", "LOW", "HIGH"),
        help="keep to this range of a label; may be given for several",
    )
    synthetic.add_argument("--emulator", metavar="NAME_OR_PATH", help="default: the one that the instrument names")
    synthetic.add_argument(
        "--shard-rows", type=_positive, default=2000, metavar="N", help="stars in a file (default: 2000)"
    )
    synthetic.add_argument("--workers", type=_positive, metavar="N", help="processes (default: as many as processors)")
    synthetic.add_argument("--overwrite", action="store_true", help="replace an earlier build")
    synthetic.set_defaults(run=_data_synthetic)
    return parser


_MODEL_HELP = f"a bundled checkpoint, a folder, or a name on the Hugging Face hub (default: {DEFAULT_MODEL})"


def _positive(text: str) -> int:
    with contextlib.suppress(ValueError):
        if int(text) >= 1:
            return int(text)
    raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")


# --------------------------------------------------------------------------------------------------------------- verbs


def _predict(arguments: argparse.Namespace) -> None:
    import numpy as np
    from tqdm.auto import tqdm

    from spectrafm_hf.data.readers import batched, count_spectra, find_files, read_spectra
    from spectrafm_hf.prediction import FLAG_SEPARATOR, PredictionWriter, TrainingRange, predict_batches

    files = find_files(arguments.input, arguments.split)
    model, tokenizer = _load(arguments.model)
    names, units = _labels(model, tokenizer)
    training_range = TrainingRange.load(str(model.name_or_path))
    rows = read_spectra(
        files,
        wavelength_unit=arguments.wavelength_unit,
        wavelength_medium="air" if arguments.air else "vacuum",
    )
    printed: list[list[str]] = []
    plotted: list[tuple[Row, dict[str, Any]]] = []
    overview: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    n_stars = n_flagged = n_failed = 0
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(PredictionWriter(arguments.output, names, units)) if arguments.output else None
        progress = stack.enter_context(tqdm(total=count_spectra(files), desc="predicting", unit=" stars", delay=DELAY))
        for batch in batched(rows, arguments.batch_size):
            (prediction,) = predict_batches(model, tokenizer, [batch], names, training_range)
            n_failed += int(np.isnan(prediction[names[0]]).sum())
            if writer:
                writer.write(prediction)
            for i in range(min(len(batch), PRINTED_STARS - len(printed))):
                printed.append(_table_row(prediction, i, names, units))
            if arguments.plot:
                for i in range(min(len(batch), PLOTTED_STARS - len(plotted))):
                    plotted.append((batch[i], {name: column[i] for name, column in prediction.items()}))
                if n_stars < OVERVIEW_STARS:
                    overview.append({name: prediction[name] for name in names})
            for flags in filter(None, prediction["flags"]):
                n_flagged += 1
                # Reasons of failure quote numbers: only their first words are counted.
                counts.update(flag.partition(":")[0] for flag in flags.split(FLAG_SEPARATOR))
            n_stars += len(batch)
            progress.update(len(batch))
        if not n_stars:
            raise ValueError(f"INPUT: expected at least one spectrum, got none in {len(files)} files")
        if n_failed == n_stars:
            reason = printed[0][-1]
            raise ValueError(
                f"INPUT: expected a spectrum that can be used, got {n_failed} that cannot; the first: {reason}"
            )

    _print_table(["object_id", *(_heading(name, units) for name in names), "flags"], printed)
    if n_stars > len(printed):
        where = f"see {arguments.output}" if arguments.output else "--output FILE keeps them"
        print(f"... {n_stars - len(printed):,} more, {where}")
    elif arguments.output:
        print(f"written: {arguments.output}")
    if n_flagged:
        most = ", ".join(f"{flag} ({count:,})" for flag, count in counts.most_common(8))
        print(f"{n_flagged:,} of {n_stars:,} stars flagged: {most}")
    if training_range is None:
        print(f"{arguments.model} says nothing of its training range: what lies outside is not flagged")
    if arguments.plot:
        _draw(arguments.plot, plotted, overview, n_stars, names, units)


def _demo(arguments: argparse.Namespace) -> None:
    import numpy as np
    import pyarrow.parquet as pq

    from spectrafm_hf.data.readers import read_spectra
    from spectrafm_hf.metrics import label_metrics
    from spectrafm_hf.plots import digits, plot_comparison
    from spectrafm_hf.prediction import predict_batches

    model, tokenizer = _load(arguments.model)
    names, units = _labels(model, tokenizer)
    table = pq.read_table(DEMO_STARS)
    unknown = [name for name in names if name not in table.column_names]
    if unknown:
        raise ValueError(f"model: expected one that predicts labels of the demo stars, got one that predicts {unknown}")
    rows = list(read_spectra([DEMO_STARS]))
    (prediction,) = predict_batches(model, tokenizer, [rows], names)
    catalogue = {name: table[name].to_numpy() for label in names for name in (label, f"{label}_err")}

    print(f"{len(rows)} stars that {arguments.model} was not trained on: Gaia DR3 XP spectra, APOGEE DR17 labels")
    header = ["object_id", *(text for name in names for text in (_heading(name, units), "APOGEE"))]
    lines = [
        [
            prediction["object_id"][i],
            *(
                text
                for name in names
                for text in (
                    _measured(prediction, i, name, units),
                    f"{catalogue[name][i]:.{digits(units[name])}f}",
                )
            ),
        ]
        for i in range(PRINTED_STARS)
    ]
    _print_table(header, lines)
    print(f"... {len(rows) - len(lines)} more in the picture")
    print()
    print(f"predicted - APOGEE, all {len(rows)} stars:")
    summary = []
    for name in names:
        figures = label_metrics(prediction[name], prediction[f"{name}_err"], catalogue[name], catalogue[f"{name}_err"])
        number = digits(units[name]) + (units[name] != "K")
        scatter, bias = f"{figures['robust_scatter']:.{number}f}", f"{figures['bias']:+.{number}f}"
        summary.append([_heading(name, units), scatter, bias, f"{figures['robust_z']:.2f}"])
    _print_table(["label", "scatter (1.4826 MAD)", "bias (median)", "scatter / sigma"], summary)
    print("(half of them were picked to cover [Fe/H] evenly; the model card has the figures of a whole split)")

    arguments.output.mkdir(parents=True, exist_ok=True)
    picture = arguments.output / "spectrafm-demo.png"
    # The star in the middle of the temperatures stands for all.
    example = rows[int(np.argsort(catalogue["teff"])[len(rows) // 2])] if "teff" in catalogue else rows[0]
    inputs = tokenizer(example, return_tensors="np")
    middle, half = inputs["wavelength"][0], inputs["wavelength_step"][0] * tokenizer.patch_size / 2
    tokens = list(zip((middle - half).tolist(), (middle + half).tolist(), strict=True))
    plot_comparison(picture, prediction, catalogue, units, example, tokens)
    print(f"written: {picture}")


def _data_gaia_xp(arguments: argparse.Namespace) -> None:
    from spectrafm_hf.data import build_gaia_xp
    from spectrafm_hf.data.readers import count_spectra, find_files

    folder = build_gaia_xp(arguments.out, source=arguments.source, limit=arguments.limit, overwrite=arguments.overwrite)
    sizes = {split: count_spectra(find_files([folder], split)) for split in ("train", "validation", "test")}
    print(f"{folder}: " + ", ".join(f"{size:,} {split}" for split, size in sizes.items()))


def _data_synthetic(arguments: argparse.Namespace) -> None:
    import os

    from spectrafm_hf.data.synthetic import build_synthetic
    from spectrafm_hf.plots import plot_label_distribution, plot_observed

    def pictures(folder: Path, labels: dict[str, Any], stars: dict[str, Any]) -> None:
        plot_label_distribution(folder / "labels.png", labels)
        plot_observed(folder / "spectra.png", stars)

    ranges = {}
    for label, *limits in arguments.range:
        try:
            ranges[label] = (float(limits[0]), float(limits[1]))
        except ValueError:
            raise ValueError(f"--range: expected a label and two numbers, got {label} {' '.join(limits)}") from None
    # Of the processors of the machine, those that this process may use.
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    folder = build_synthetic(
        arguments.out or Path(f"synthetic-{Path(arguments.instrument).stem}"),
        arguments.n,
        arguments.instrument,
        emulator=arguments.emulator,
        seed=arguments.seed,
        splits=tuple(arguments.splits),
        label_ranges=ranges,
        shard_rows=arguments.shard_rows,
        workers=arguments.workers or processors,
        overwrite=arguments.overwrite,
        pictures=pictures,
    )
    print(
        f"{folder}: {arguments.n:,} stars as {Path(arguments.instrument).stem} would have recorded them; see README.md"
    )


# ------------------------------------------------------------------------------------------------------------- helpers


def _load(name_or_path: str) -> tuple[SpectraFMForPrediction, SpectraFMTokenizer]:
    """Model, on a GPU if there is one, and tokenizer."""
    import torch

    from spectrafm_hf.checkpoints import load_checkpoint

    model, tokenizer = load_checkpoint(name_or_path)
    if torch.cuda.is_available():
        model.cuda()  # type: ignore[call-arg]  # transformers wraps it without its types
    return model, tokenizer


def _labels(model: SpectraFMForPrediction, tokenizer: SpectraFMTokenizer) -> tuple[list[str], dict[str, str]]:
    """What the checkpoint predicts, and the units."""
    names = list(tokenizer.requests or tokenizer.label_names)
    units = dict(zip(model.config.label_names, model.config.label_units, strict=True))
    return names, {name: units[name] for name in names}


def _heading(name: str, units: Mapping[str, str]) -> str:
    return f"{name} [{units[name]}]" if units[name] else name


def _measured(prediction: Mapping[str, Any], i: int, name: str, units: Mapping[str, str]) -> str:
    from spectrafm_hf.plots import digits

    number = digits(units[name])
    return f"{prediction[name][i]:.{number}f} ± {prediction[f'{name}_err'][i]:.{number}f}"


def _table_row(prediction: Mapping[str, Any], i: int, names: Sequence[str], units: Mapping[str, str]) -> list[str]:
    return [
        prediction["object_id"][i],
        *(_measured(prediction, i, name, units) for name in names),
        prediction["flags"][i],
    ]


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns of texts, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        cells = [
            text.ljust(width) if i == 0 or header[i] == "flags" else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def _draw(
    folder: Path,
    plotted: Sequence[tuple[Row, Mapping[str, Any]]],
    overview: Sequence[Mapping[str, Any]],
    n_stars: int,
    names: Sequence[str],
    units: Mapping[str, str],
) -> None:
    import numpy as np
    from tqdm.auto import tqdm

    from spectrafm_hf.plots import plot_overview, plot_star

    folder.mkdir(parents=True, exist_ok=True)
    for number, (row, star) in enumerate(tqdm(plotted, desc="drawing", unit=" stars", delay=DELAY), start=1):
        safe = re.sub(r"[^\w.+-]+", "_", str(row["object_id"]))[:100]
        values, errors = ({name: float(star[name + suffix]) for name in names} for suffix in ("", "_err"))
        plot_star(folder / f"{number:02d}-{safe}.png", row, values, errors, units, star["flags"])
    pictures = f"{len(plotted)} spectra"
    if {"teff", "logg"} <= set(names):
        columns = {name: np.concatenate([part[name] for part in overview])[:OVERVIEW_STARS] for name in names}
        plot_overview(folder / "overview.png", columns, n_stars)
        pictures += " and overview.png"
    print(f"drawn in {folder}: {pictures}")


if __name__ == "__main__":
    sys.exit(main())
