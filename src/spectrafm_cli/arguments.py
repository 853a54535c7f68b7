# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Arguments that several verbs have."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any, NoReturn


#: What answers where no `--model` is named; here for `--help`, which imports nothing.
DEFAULT_MODEL = "spectrafm-base"
DELAY = 2  # seconds before a progress bar shows
WHEEL_HELP = "a copy of the source, instead of the download"
MODELS = "a bundled checkpoint, a folder, or a name on the Hugging Face hub"
MODEL_HELP = f"{MODELS} (default: {DEFAULT_MODEL})"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of the usage and a line."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def add_revision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--revision", default="main", metavar="NAME", help="branch, tag or commit of a model on the hub"
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        default="auto",
        metavar="NAME",
        help="cpu, cuda or cuda:N (default: auto, a GPU if available)",
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """Which model answers, and where it runs."""
    parser.add_argument("--model", metavar="NAME_OR_PATH", help=MODEL_HELP)
    add_revision(parser)
    add_device(parser)


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="overwrite existing output")


def demand_new_output(arguments: argparse.Namespace) -> None:
    if arguments.output and arguments.output.is_file() and not arguments.overwrite:
        raise ValueError(
            f"--output: expected a new file, got {arguments.output}, which exists; --overwrite replaces it"
        )


def reading(option: str | None = None, demanded: bool = True, resolving_power: str = "--resolving-power") -> Parser:
    """What to read, in place or by an option, and how: the same for all verbs that read spectra."""
    reading = Parser(add_help=False)
    if option is None:
        reading.add_argument("input", nargs="+" if demanded else "*", type=Path, metavar="INPUT")
    else:
        text = "files, folders of files, or data set folders"
        reading.add_argument(option, dest="input", nargs="+", type=Path, required=True, metavar="INPUT", help=text)
    options = reading.add_argument_group("reading")
    options.add_argument("--format", metavar="NAME", help="file format, see `spectrafm formats` (default: detected)")
    options.add_argument("--visits", action="store_true", help="read the single visits of an apStar file")
    options.add_argument(
        "--bad-bits",
        metavar="NAMES",
        help="APOGEE pixel mask bits to reject (BADPIX,CRPIX,...), or none",
    )
    options.add_argument(
        "--radial-velocity",
        type=_velocity,
        metavar="KM/S",
        help="one velocity for all spectra, replacing that of the files; predict only: measure (from the lines)",
    )
    options.add_argument(
        "--radial-velocity-column", metavar="NAME", help="table column with the velocity of each star in km/s"
    )
    options.add_argument(
        resolving_power,
        dest="stated_power",
        type=float,
        metavar="R",
        help="wavelength / FWHM of the spectra, replacing that of the files",
    )
    options.add_argument("--at-rest", action="store_true", help="assume rest frame if the file does not state it")
    options.add_argument(
        "--columns",
        metavar="ROLE=NAME,...",
        help="column names: wavelength=wave,flux=f,flux_error=err (also ivar, variance, mask, object_id, "
        "radial_velocity); use none to ignore a column",
    )
    options.add_argument("--split", help="split of a data set: train, validation or test (default: all)")
    options.add_argument("--grid", type=Path, metavar="FILE", help="wavelengths for .npy files without a grid")
    options.add_argument(
        "--wavelength-unit",
        default="Angstrom",
        metavar="UNIT",
        help="for wavelengths without a unit (default: Angstrom)",
    )
    medium = options.add_mutually_exclusive_group()
    medium.add_argument("--air", action="store_true", help="assume air if the file does not state the medium")
    medium.add_argument("--vacuum", action="store_true", help="assume vacuum if the file does not state the medium")
    return reading


def reading_options(arguments: argparse.Namespace) -> dict[str, Any]:
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
        "resolving_power": arguments.stated_power,
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


def add_destination(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Where a data set goes: the same for all of them."""
    text = default and f"default: {default}"
    parser.add_argument("--out", type=Path, required=not default, default=default, metavar="DIR", help=text)
    parser.add_argument("--overwrite", action="store_true", help="overwrite an existing data set")
    parser.add_argument("--push-to-hub", metavar="REPO", help="also push to OWNER/NAME on the Hugging Face hub")


def pushing() -> Parser:
    """How to push: the same for models and data sets."""
    pushing = Parser(add_help=False)
    pushing.add_argument("--private", action="store_true", help="create a private repository")
    pushing.add_argument("--revision", metavar="BRANCH", help="branch, created if missing (default: main)")
    pushing.add_argument("--message", metavar="TEXT", help="commit message")
    pushing.add_argument(
        "--free-text",
        choices=("hub", "folder"),
        help="which card text wins if hub and folder differ (default: stop)",
    )
    pushing.add_argument("--dry-run", action="store_true", help="show files and card without uploading")
    return pushing


def positive(text: str) -> int:
    with contextlib.suppress(ValueError):
        if int(text) >= 1:
            return int(text)
    raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
