"""A damaged file in the cache of package files: its hash is checked, and it is downloaded again."""

import pytest
from fault_table import tried
from test_sources import NAME, VERSION, checksum, index  # noqa: F401  (a fixture)

from spectrafm_hf.data.sources import fetch_package_file


@pytest.mark.parametrize("damage", ["truncated", "changed"])
def test_a_damaged_package_file_in_the_cache_is_fetched_again(index, damage):  # noqa: F811
    sha256 = checksum(index)
    path = fetch_package_file(NAME, VERSION, sha256)
    whole = path.read_bytes()
    fault = f"a package file in the cache {damage}", "nothing: its hash is checked, it is fetched again"
    with tried(*fault, 1):
        path.write_bytes(whole[:50] if damage == "truncated" else whole[:50] + bytes(1) + whole[51:])
        assert path.read_bytes() != whole
        assert fetch_package_file(NAME, VERSION, sha256) == path
        assert path.read_bytes() == whole
