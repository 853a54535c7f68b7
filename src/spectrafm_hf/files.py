# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Files and folders that are whole or not there, folders that one process writes, and a hub that is asked twice."""

import contextlib
import errno
import json
import math
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar


try:
    import fcntl
except ImportError:  # a system without it, where nobody is kept out
    fcntl = None  # type: ignore[assignment]

Fetched = TypeVar("Fetched")
#: Files that come with the package, and 64 real stars among them.
RESOURCES = Path(__file__).parent / "resources"
DEMO_STARS = RESOURCES / "gaia_xp_demo.parquet"
#: Files in a folder with one of these endings, or with `.gz` after it, are spectra.
SPECTRUM_SUFFIXES = (
    *(".fits", ".fit", ".fts", ".fits.fz", ".parquet", ".csv", ".ecsv", ".tsv", ".tbl", ".xml", ".vot", ".votable"),
    *(".txt", ".dat", ".ascii", ".asc", ".s", ".spec", ".npy", ".npz", ".h5", ".hdf5"),
)


def ask_twice(fetch: Callable[[], Fetched]) -> Fetched:
    """
    What is fetched from the hub, once more where the answer is that of a server in trouble (500 and above).

    The hub's client asks again by itself after all else that may pass, and after such an answer to what it asks about a
    file; to what it asks for the content, it does not.
    """
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return fetch()
    except OSError as error:
        answer = next((each for each in (error, error.__cause__) if isinstance(each, HfHubHTTPError)), None)
        if answer is None or answer.response.status_code < 500:
            raise
    time.sleep(1)
    return fetch()


@contextlib.contextmanager
def only_writer(folder: str | os.PathLike) -> Iterator[None]:
    """
    Make a folder, and keep other processes out of blocks like this one, until it ends or the process does.

    Where a file system has no locks, nobody is kept out.

    Raises
    ------
    ValueError
        If another one is writing there.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = not path.exists() or not os.path.samestat(path.stat(), os.fstat(descriptor))
        except OSError as error:
            taken = error.errno == errno.EWOULDBLOCK
        if taken:
            raise ValueError(f"output: expected a folder that no other process writes at this time, got {path}")
        yield
    finally:
        # A process that was started meanwhile has a copy of the descriptor, which would keep the lock.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def temporary_name(path: str | os.PathLike) -> Path:
    """A hidden name beside `path` that nobody else has: containers that share a disk have the same process numbers."""
    path = Path(path)
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}")


def spectrum_stem(file: str | os.PathLike[str]) -> str:
    """Name of a file without folder and known suffix: `star.01` and `star.02` are two stars."""
    name = Path(os.fspath(file).strip()).name
    plain = name[:-3] if name.lower().endswith(".gz") else name
    return next((plain[: -len(suffix)] for suffix in SPECTRUM_SUFFIXES if plain.lower().endswith(suffix)), plain)


@contextlib.contextmanager
def complete_file(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name beside `path`, which becomes `path` once all is written; after an error it is gone."""
    temporary = temporary_name(path)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, content: Mapping[str, Any]) -> None:
    """Write figures, atomically. JSON knows no NaN (the figures of a table without stars): it becomes null."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    with complete_file(path) as temporary:
        temporary.write_text(json.dumps(plain(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def replace_folder(folder: Path, new: Path) -> None:
    """
    `new` becomes `folder`, and what was there is deleted last: after an error, or an interruption, it is there again.

    A run that is killed between the two renames leaves it to [`restore_folder`].
    """
    old = _moved_aside(folder)
    shutil.rmtree(old, ignore_errors=True)
    try:
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    finally:
        restore_folder(folder)
        shutil.rmtree(old, ignore_errors=True)


def restore_folder(folder: Path) -> None:
    """Give a folder back its name, where a [`replace_folder`] that was killed had moved it aside."""
    if not folder.exists() and _moved_aside(folder).is_dir():
        _moved_aside(folder).rename(folder)


def _moved_aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


#: Of a message, in characters: it may quote names and settings of any length.
LONGEST_CAUSE = 1000


def one_line(error: BaseException) -> str:
    """What an error says, in one line that is not too long."""
    cause = " ".join(str(error).split())
    return cause if len(cause) <= LONGEST_CAUSE else f"{cause[:LONGEST_CAUSE]} ..."
