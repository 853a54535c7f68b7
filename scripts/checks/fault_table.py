#!/usr/bin/env python
# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Run all tests of faults (tests/faults), including the slow ones, and print a Markdown table of the results.

python scripts/checks/fault_table.py            # some minutes
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from spectrafm_cli.arguments import Parser


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="fault_table.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-k", metavar="EXPRESSION", default="", help="only tests that match, as in pytest")
    arguments = parser.parse_args(argv)
    options = ["-k", arguments.k, "-m", "slow or not slow"]
    root = Path(__file__).parents[2]
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder, "faults.jsonl")
        command = [sys.executable, "-m", "pytest", "tests/faults", *options]
        environment = os.environ | {"SPECTRAFM_FAULT_TABLE": str(lines)}
        code = subprocess.run(command, cwd=root, env=environment, stdout=sys.stderr).returncode
        entries = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    rows: dict[tuple[str, str], list[int]] = {}
    for entry in entries:
        row = rows.setdefault((entry["fault"], entry["lost"]), [0, 0])
        row[0] += entry["tried"]
        row[1] += entry["survived"]
    print("| fault | tried | survived | lost |\n|---|---|---|---|")
    for (fault, lost), (tried, survived) in rows.items():
        print(f"| {fault} | {tried} | {survived} | {lost} |")
    return code


if __name__ == "__main__":
    sys.exit(main())
