# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""`spectrafm spectrum`: spectra with an error for each pixel."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import (
    DEFAULT_MODEL,
    add_model,
    add_overwrite,
    demand_new_output,
    reading,
    reading_options,
)
from .loading import load, say_device
from .report import nothing_done, report


if TYPE_CHECKING:
    from spectrafm_hf.data.readers import Failure


def add(verbs: Any) -> None:
    spectrum = verbs.add_parser(
        "spectrum",
        parents=[reading(demanded=False, resolving_power="--input-resolving-power")],
        help="predict spectra from labels, or from other spectra",
        description="Predict spectra with an error for each pixel: from labels, or from the spectra in INPUT. Masked "
        "and missing pixels are filled in. Outside the range of the instrument, the spectrum of the predicted labels "
        "is used, including their errors.",
    )
    spectrum.add_argument(
        "--labels",
        metavar="NAME=VALUE,...",
        help="teff, logg, fe_h and others, instead of INPUT: teff=4800,logg=2.5,...",
    )
    spectrum.add_argument(
        "--errors", metavar="NAME=SIGMA,...", help="errors of these labels; other abundances then get an error, too"
    )
    spectrum.add_argument(
        "--wavelength",
        metavar="LOW:HIGH:STEP",
        help="Angstrom, vacuum; or a file of spectra, or an instrument (apogee, gaia-xp, ...) to use its pixels "
        "(default: those of INPUT)",
    )
    spectrum.add_argument(
        "--resolving-power",
        type=float,
        metavar="R",
        help="of the result (default: the highest available)",
    )
    spectrum.add_argument(
        "--surface", action="store_true", help="with --labels: surface flux instead of continuum-normalised flux"
    )
    add_model(spectrum)
    spectrum.add_argument("--output", type=Path, metavar="FILE", help=".parquet, .fits, or, of one star, .csv")
    spectrum.add_argument("--plot", type=Path, metavar="PNG", help="plot the spectra")
    add_overwrite(spectrum)
    spectrum.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from spectrafm_hf.data.readers import Failure, find_files, read_spectra
    from spectrafm_hf.inference.spectrum import AS_GIVEN, SpectrumPredictor
    from spectrafm_hf.inference.spectrum_files import SpectrumWriter
    from spectrafm_hf.inference.velocities import settled
    from spectrafm_hf.show.spectra import FLUX_LABELS, flux_label, plot_predicted

    demand_new_output(arguments)
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
            options = {"wavelength": wavelength, "resolving_power": arguments.resolving_power}
            found = SpectrumPredictor().from_labels(labels, errors, normalised=not arguments.surface, **options)
            shown = found.rows([arguments.labels])
            unit = found.unit
            if writer:
                writer.write(found, [arguments.labels])
        else:
            if arguments.errors or arguments.surface:
                raise ValueError("--errors, --surface: expected with --labels, got INPUT")
            model, tokenizer = load(arguments.model or DEFAULT_MODEL, arguments.revision, arguments.device)
            predictor = SpectrumPredictor(model, tokenizer)
            files = find_files(arguments.input, arguments.split, failures)
            rows = read_spectra(files, failures=failures, **reading_options(arguments))
            rows = settled(rows, model, tokenizer)
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
                raise ValueError(nothing_done(failures, len(files), arguments.output))
            say_device(model)
    if arguments.output:
        print(f"written: {arguments.output}")
    if arguments.plot:
        axis = flux_label(seen["file"], arguments.format) if seen is not None else FLUX_LABELS.get(unit, "Flux")
        plot_predicted(arguments.plot, shown, seen=seen, title=str(shown[0]["object_id"]), flux_label=axis)
        print(f"written: {arguments.plot}")
    return report(failures, arguments.output)


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

    from spectrafm_hf.synthesis.instruments import Instrument, instrument_names

    text = arguments.wavelength
    if text is None:
        return None
    if text in instrument_names() or text.endswith((".yaml", ".yml")):
        return Instrument.load(text)
    if Path(text).exists():
        from spectrafm_hf.data.readers import find_files, read_spectra

        row = next(iter(read_spectra(find_files([Path(text)]), **reading_options(arguments))))
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
