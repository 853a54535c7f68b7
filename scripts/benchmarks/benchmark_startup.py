#!/usr/bin/env python
# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
Start-up times of commands, compared with the bare imports of torch and transformers.

    python scripts/benchmarks/benchmark_startup.py [--rounds 5]

Each runs in a new process, in turn; the table has the medians of CPU seconds, which other programs affect least, and of
wall seconds.
"""

import resource
import statistics
import subprocess
import sys
import tempfile
import time

from spectrafm_cli.arguments import Parser
from spectrafm_hf.files import DEMO_STARS


STARS = str(DEMO_STARS)
PROGRAMS = {
    "import torch": ["-c", "import torch"],
    "import torch, PreTrainedModel": ["-c", "import torch; from transformers import PreTrainedModel"],
    "import spectrafm_hf": ["-c", "import spectrafm_hf"],
    "spectrafm formats": ["-m", "spectrafm_cli", "formats"],
    "spectrafm data --help": ["-m", "spectrafm_cli", "data", "--help"],
    "spectrafm predict --bad": ["-m", "spectrafm_cli", "predict", STARS, "--bad"],
    "spectrafm plot FILE": ["-m", "spectrafm_cli", "plot", STARS],
    "spectrafm predict FILE": ["-m", "spectrafm_cli", "predict", STARS],
    "spectrafm demo": ["-m", "spectrafm_cli", "demo"],
}


def seconds(program: list[str], folder: str) -> tuple[float, float]:
    """CPU seconds and wall seconds of one process."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *program], cwd=folder, check=False, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return used, time.perf_counter() - start


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[1])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        runs = [{name: seconds(program, folder) for name, program in PROGRAMS.items()} for _ in range(rounds)]
    print("| program | CPU seconds | wall seconds |")
    print("|---|---|---|")
    for name in PROGRAMS:
        used, clock = (statistics.median(run[name][i] for run in runs) for i in (0, 1))
        print(f"| `{name}` | {used:.2f} | {clock:.2f} |")


if __name__ == "__main__":
    main()
