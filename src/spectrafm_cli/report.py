# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Tables on the screen, and reports of unusable input."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from spectrafm_hf.data.readers import Failure


PRINTED_STARS = 20
PRINTED_KINDS = 5  # of failures, in one line
TABLE_WIDTH = 100
LAST_WIDTH = 24  # of the flags of a star, where all do not fit
FIRST_WIDTH = 30  # of an identifier, where all do not fit
FAILED = "failed.csv"
#: Arguments of Python that messages name, as they are typed here.
OPTIONS = (
    *("wavelength_unit", "radial_velocity", "radial_velocity_column", "bad_bits", "grid", "columns", "format", "split"),
    *("resolving_power", "output", "id_column", "labels", "split_by", "units", "model", "gaia_ids"),
)


def as_typed(message: str) -> str:
    """A message of the package, with its arguments spelt as options: `columns={'flux': 'f'}` is `--columns flux=f`."""

    def pairs(match: re.Match[str]) -> str:
        return "--columns " + ",".join(f"{role}={name}" for role, name in re.findall(r"'(\w+)': '([^']*)'", match[0]))

    message = re.sub(r"columns=\{[^}]*\}", pairs, message)
    message = message.replace("grid=WAVELENGTHS", "--grid FILE").replace("overwrite=True", "--overwrite")
    message = message.replace("set wavelength_unit", "set --wavelength-unit")
    return re.sub(rf"^({'|'.join(OPTIONS)}): ", lambda match: f"--{match[1].replace('_', '-')}: ", message)


def cause(prediction: Mapping[str, Any], i: int) -> str:
    return f"{prediction['object_id'][i]}: {prediction['reason'][i]}"


def nothing_done(failures: Sequence[Failure], n_files: int, output: Path | None) -> str:
    """Why nothing was done."""
    if not failures:
        return f"INPUT: expected at least one spectrum, got none in {n_files} files"
    first = failure_text(failures[0])
    if len(failures) == 1:
        return first
    where = write_failures(failures, output)
    found = kinds(failures)
    causes = "; ".join(f"{number:,} like {failure_text(one)}" for one, number in found[:PRINTED_KINDS])
    more = f"; {len(found) - PRINTED_KINDS:,} more kinds" if len(found) > PRINTED_KINDS else ""
    return (
        f"INPUT: expected a spectrum that can be used, got {len(failures):,} that cannot, see {where}: {causes}{more}"
    )


def report(failures: Sequence[Failure], output: Path | None, name: str = FAILED) -> int:
    """List what failed; the exit code."""
    if not failures:
        # Remove the report of an earlier run.
        old = failed_csv(output, name)
        if old.is_file() and old.read_bytes().startswith(b"file,cause\r\n"):
            old.unlink()
            print(f"removed: {old} of an earlier run, as nothing failed in this one")
        return 0
    print(f"{len(failures):,} failed, see {write_failures(failures, output, name)}:", file=sys.stderr)
    if len(failures) <= PRINTED_STARS:
        lines = list(map(failure_text, failures))
    else:
        found = kinds(failures)
        lines = [f"{number:,} like {failure_text(one)}" for one, number in found[:PRINTED_STARS]]
        lines += [f"... {len(found) - PRINTED_STARS:,} more kinds"] if len(found) > PRINTED_STARS else []
    for line in lines:
        print(f"  {line}", file=sys.stderr)
    return 1


def kinds(failures: Sequence[Failure]) -> list[tuple[Failure, int]]:
    """The first failure of each kind and how many there are, most first: causes that differ in names and numbers."""
    found: dict[str, tuple[Failure, int]] = {}
    for failure in failures:
        kind = _kind(failure)
        one, number = found.get(kind, (failure, 0))
        found[kind] = one, number + 1
    return sorted(found.values(), key=lambda each: -each[1])


def _kind(failure: Failure) -> str:
    text = failure_text(failure).removeprefix(f"{failure.file}: ")
    star, colon, cause = text.partition(": ")
    if colon and not cause.startswith("expected"):  # the identifier of a star
        text = cause
    return re.sub(r"\d[\d.,]*", "0", text.replace(str(failure.file), "FILE"))


def failure_text(failure: Failure) -> str:
    return f"{failure.file}: {as_typed(' '.join(failure.cause.removeprefix(f'{failure.file}: ').split()))}"


def failed_csv(output: Path | None, name: str = FAILED) -> Path:
    """Where failures go: a file of this name that a person wrote stays."""
    path = (output.parent if output else Path()) / name
    for number in itertools.count(2):
        if not path.exists() or path.read_bytes()[:12] == b"file,cause\r\n":
            return path
        path = path.with_name(f"{Path(name).stem}-{number}.csv")
    return path


def write_failures(failures: Sequence[Failure], output: Path | None, name: str = FAILED) -> str:
    """`failed.csv` beside the output, else in the working folder: its path, and whether another went for it."""
    import csv

    from spectrafm_hf.files import complete_file

    path = failed_csv(output, name)
    replaced = " (in place of that of an earlier run)" if path.exists() else ""
    with complete_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8", errors="replace") as lines:
        table = csv.writer(lines)
        table.writerow(["file", "cause"])
        table.writerows((failure.file, failure_text(failure).removeprefix(f"{failure.file}: ")) for failure in failures)
    return f"{path}{replaced}"


def file_name(object_id: Any) -> str:
    return re.sub(r"[^\w.+-]+", "_", str(object_id))[:100]


def heading(name: str, units: Mapping[str, str]) -> str:
    return f"{name} [{units[name]}]" if units[name] else name


def measured(prediction: Mapping[str, Any], i: int, name: str, units: Mapping[str, str]) -> str:
    from spectrafm_hf.data.schema import digits

    if prediction[name][i] != prediction[name][i]:
        return ""
    number = digits(units[name])
    return f"{prediction[name][i]:.{number}f} ± {prediction[f'{name}_err'][i]:.{number}f}"


def shortened(text: str, width: int, separator: str | None = None) -> str:
    """A text in this width: the first of its parts, and how many more there are; or its beginning and its end."""
    if len(text) <= width:
        return text
    if separator is None or separator not in text:
        return f"{text[: width // 2]}...{text[len(text) - (width - 3 - width // 2) :]}"
    parts = text.split(separator)
    shown = 1
    while len(f"{separator.join(parts[: shown + 1])} +{len(parts) - shown - 1}") <= width:
        shown += 1
    return f"{separator.join(parts[:shown])} +{len(parts) - shown}"


def fitting(
    header: Sequence[str], rows: Sequence[Sequence[str]], separator: str, least: int = 3
) -> tuple[list[list[str]], list[str]]:
    """
    A table of stars in `TABLE_WIDTH`: identifiers and flags are shortened, then the last labels left out, but for the
    first few.

    Parameters
    ----------
    header, rows : sequences of str
        An identifier, labels, and flags or a reason.
    separator : str
        Of flags.
    least : int
        Labels that stay.

    Returns
    -------
    lines : list of list of str
        The header is the first.
    left_out : list of str
        The headings of labels that are not there.
    """

    def width(lines: Sequence[Sequence[str]]) -> int:
        return sum(max(map(len, column)) + 2 for column in zip(*lines, strict=True)) - 2

    lines = [list(row) for row in (header, *rows)]
    if width(lines) > TABLE_WIDTH:
        lines = [
            [shortened(first, FIRST_WIDTH), *values, shortened(last, LAST_WIDTH, separator)]
            for first, *values, last in lines
        ]
    left_out: list[str] = []
    while width(lines) > TABLE_WIDTH and len(lines[0]) > least + 2:
        left_out.insert(0, lines[0][-2])
        lines = [[*line[:-2], line[-1]] for line in lines]
    return lines, left_out


def table_row(prediction: Mapping[str, Any], i: int, names: Sequence[str], units: Mapping[str, str]) -> list[str]:
    return [
        prediction["object_id"][i],
        *(measured(prediction, i, name, units) for name in names),
        prediction["flags"][i] or prediction["reason"][i],
    ]


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: bool = False) -> None:
    """Columns of texts, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        cells = [
            text.ljust(width) if left or i == 0 or header[i].startswith("flags") else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
