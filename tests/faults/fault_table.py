"""Records tested faults as lines of JSON, for `scripts/checks/fault_table.py`."""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass
class Fault:
    fault: str
    lost: str
    tried: int = 0
    survived: int = 0


@contextlib.contextmanager
def tried(fault: str, lost: str, times: int = 0) -> Iterator[Fault]:
    """
    Count a fault, and note it in the file that SPECTRAFM_FAULT_TABLE names.

    `times` times are tried together, and survived where the block ends; without it, the block counts.
    """
    entry = Fault(fault, lost, times)
    try:
        yield entry
        entry.survived = entry.survived or times
    finally:
        if path := os.environ.get("SPECTRAFM_FAULT_TABLE"):
            with Path(path).open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(entry)) + "\n")
