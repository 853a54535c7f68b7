"""Reading in one call."""

import pytest

from spectrafm_hf.data.readers import find_files, read_spectra


@pytest.fixture
def read():
    """All spectra of some paths."""
    return lambda *paths, **options: list(read_spectra(find_files(paths), **options))
