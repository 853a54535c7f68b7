"""Real spectra where this machine has them, and files in the published layouts of the surveys."""

import os
import zipfile
from pathlib import Path

import pytest

from spectrafm_hf.data.readers import find_files, read_spectra
from spectrafm_hf.data.sources import cache_dir


@pytest.fixture(scope="session")
def apogee_fits() -> Path:
    """Folder of observed APOGEE DR13 files."""
    shared = Path(os.environ.get("SPECTRAFM_SHARED") or Path(__file__).parents[4] / "shared")
    folder = shared / "data" / "apogee_fits"
    if not folder.is_dir():
        pytest.skip("needs the observed APOGEE files: SPECTRAFM_SHARED, or ../shared beside the checkout")
    return folder


@pytest.fixture(scope="session")
def package_members(tmp_path_factory):
    """Copies of data files out of a fetched package file: `package_members("name-version.whl", "*.fits")`."""

    def extract(package: str, *members: str) -> list[Path]:
        wheel = cache_dir() / package
        if not wheel.is_file():
            pytest.skip(f"needs {package} in the cache of fetched files")
        folder = tmp_path_factory.mktemp(wheel.stem)
        with zipfile.ZipFile(wheel) as archive:
            for member in members:
                (folder / Path(member).name).write_bytes(archive.read(member))
        return [folder / Path(member).name for member in members]

    return extract


@pytest.fixture
def read():
    """All spectra of some paths."""
    return lambda *paths, **options: list(read_spectra(find_files(paths), **options))
