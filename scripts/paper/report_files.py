# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""The option `--output` of the scripts whose result is a text."""

from __future__ import annotations

import argparse
from pathlib import Path

from spectrafm_hf.files import complete_file


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, metavar="FILE.md", help="also write the table here")


def print_and_write(text: str, output: Path | None) -> int:
    """Print a text and write it to a file, if there is one; the exit code 0."""
    print(text)
    if output:
        with complete_file(output) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return 0
