"""
Programs in processes of their own that are there at once, to be killed at random moments: an interpreter with torch
takes seconds to start, so each is forked from one that has imported everything and done nothing.
"""

import contextlib
import ctypes
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


SCRIPTS = Path(__file__).parents[2] / "scripts"
MODULES = ("spectrafm_cli", "spectrafm_hf.training.trainer", "spectrafm_hf.inference.survey",
           "spectrafm_hf.synthesis.synthetic", "spectrafm_hf.data.from_files", "transformers.trainer",
           "datasets.packaged_modules.parquet.parquet",
           "matplotlib.pyplot", "multiprocess")  # fmt: skip


class Warm:
    """`run(folder, program, *arguments)`: exit code, -9 where it was killed; its output is appended to `folder/log`."""

    def __init__(self, process: subprocess.Popen) -> None:
        self.process = process
        self.seconds = 0.0  # that the last one ran

    def start(
        self, folder: Path, program: str, *arguments: object, after: float | None = None, closed: bool = False
    ) -> None:
        """Begin, and kill it with SIGKILL after so many seconds; with `closed`, it may not read all, as root may."""
        command = [program, *map(str, arguments)]
        request = {"folder": str(folder), "command": command, "after": after, "closed": closed}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def wait(self) -> int:
        code, self.seconds = json.loads(self.process.stdout.readline())
        return code

    def run(self, folder: Path, program: str, *arguments: object, **options: Any) -> int:
        self.start(folder, program, *arguments, **options)
        return self.wait()


@contextlib.contextmanager
def warm() -> Iterator[Warm]:
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}
    server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                              env=os.environ | settings)  # fmt: skip
    with server:
        yield Warm(server)
        server.stdin.close()


def serve() -> None:
    for module in MODULES:
        __import__(module)
    import torch

    torch.set_num_threads(1)
    for line in sys.stdin:
        assert threading.active_count() == 1, "a fork takes one thread along"
        request, start = json.loads(line), time.monotonic()
        child = os.fork()
        if not child:
            if request["closed"]:
                close_files()
            run(Path(request["folder"]), *request["command"])
        if request["after"] is None:
            _, status = os.waitpid(child, 0)
        else:
            time.sleep(request["after"])
            os.kill(child, signal.SIGKILL)  # of one that has ended, too: it is waited for below
            _, status = os.waitpid(child, 0)
        print(json.dumps([os.waitstatus_to_exitcode(status), time.monotonic() - start]), flush=True)


def close_files() -> None:
    """Drop the capabilities (DAC_OVERRIDE, DAC_READ_SEARCH) by which no file is closed to root."""
    status = Path("/proc/self/status").read_text()
    permitted, effective = (int(status.split(f"{name}:")[1].split()[0], 16) for name in ("CapPrm", "CapEff"))
    words = [part >> shift & 0xFFFFFFFF for shift in (0, 32) for part in (effective & ~0b110, permitted, 0)]
    version = (ctypes.c_uint32 * 2)(0x20080522, 0)
    assert ctypes.CDLL(None).capset(version, (ctypes.c_uint32 * 6)(*words)) == 0


def run(folder: Path, program: str, *arguments: str) -> None:
    code = 1
    try:
        os.setpgid(0, 0)
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(folder)
        if program == "spectrafm":
            import spectrafm_cli

            code = spectrafm_cli.main(list(arguments))
        else:
            code = runpy.run_path(str(SCRIPTS / program))["main"](list(arguments))
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        os._exit(code or 0)


if __name__ == "__main__":
    serve()
