import pytest

from spectrafm_hf.synthesis.turbospectrum import build


@pytest.mark.parametrize(("present", "missing"), [((), "gfortran, make, patch"), (("make", "patch"), "gfortran")])
def test_a_missing_tool_is_named_with_the_way_to_get_it(present, missing, tmp_path, monkeypatch):
    for name in present:
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SPECTRAFM_CACHE", str(tmp_path / "cache"))
    with pytest.raises(RuntimeError, match=rf"Turbospectrum: expected {missing} to build .*apt-get install gfortran"):
        build()
    assert not (tmp_path / "cache").exists()
