# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Tables on the screen, and what is told of input that could not be used."""

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
    path = write_failures(failures, output)
    return f"INPUT: expected a spectrum that can be used, got {len(failures):,} that cannot, see {path}; first: {first}"


def report(failures: Sequence[Failure], output: Path | None, name: str = FAILED) -> int:
    """List what failed; the exit code."""
    if not failures:
        # That of an earlier run would say what is no longer true.
        old = failed_csv(output, name)
        if old.is_file() and old.read_bytes().startswith(b"file,cause\r\n"):
            old.unlink()
        return 0
    print(f"{len(failures):,} failed, see {write_failures(failures, output, name)}:", file=sys.stderr)
    for failure in failures[:PRINTED_STARS]:
        print(f"  {failure_text(failure)}", file=sys.stderr)
    if len(failures) > PRINTED_STARS:
        print(f"  ... {len(failures) - PRINTED_STARS:,} more", file=sys.stderr)
    return 1


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


def write_failures(failures: Sequence[Failure], output: Path | None, name: str = FAILED) -> Path:
    """`failed.csv` beside the output, else in the working folder."""
    import csv

    from spectrafm_hf.files import complete_file

    path = failed_csv(output, name)
    with complete_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8", errors="replace") as lines:
        table = csv.writer(lines)
        table.writerow(["file", "cause"])
        table.writerows((failure.file, failure_text(failure).removeprefix(f"{failure.file}: ")) for failure in failures)
    return path


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


def table_row(prediction: Mapping[str, Any], i: int, names: Sequence[str], units: Mapping[str, str]) -> list[str]:
    return [
        prediction["object_id"][i],
        *(measured(prediction, i, name, units) for name in names),
        prediction["flags"][i],
        prediction["reason"][i],
    ]


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: bool = False) -> None:
    """Columns of texts, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        cells = [
            text.ljust(width) if left or i == 0 or header[i] in ("flags", "reason") else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
