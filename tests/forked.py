"""
Scripts in processes of their own, to be killed or without rights. They are forked from a process that has imported the
package and done nothing else: an interpreter for each would take seconds to get there.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path


CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["spectrafm_hf.data", "spectrafm_hf.inference.prediction"])


def run_forked(script: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run Python code with these `sys.argv[1:]`; it can import what the tests can."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        process = CONTEXT.Process(target=_run, args=(textwrap.dedent(script), list(map(str, arguments)), outputs))
        process.start()
        process.join()
        return subprocess.CompletedProcess(arguments, process.exitcode, *(path.read_text() for path in outputs))


def _run(script: str, arguments: list[str], outputs: list[Path]) -> None:
    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.argv[1:] = arguments
    exec(script, {"__name__": "__main__"})
