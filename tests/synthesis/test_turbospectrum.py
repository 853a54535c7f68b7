from pathlib import Path

import pytest

from spectrafm_hf.synthesis.turbospectrum import _processor, build


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


def test_processors_with_other_instructions_get_builds_of_their_own(monkeypatch):
    read = Path.read_text
    described = {}
    for flags in ("sse2 avx2", "sse2"):
        text = f"processor\t: 0\nmodel\t\t: 1\nflags\t\t: {flags}\ncpu MHz\t\t: {len(flags)}\n"
        monkeypatch.setattr(Path, "read_text", lambda path, text=text: text if "cpuinfo" in str(path) else read(path))
        described[flags] = _processor()
    assert described["sse2"] != described["sse2 avx2"] and "MHz" not in described["sse2"]


def test_a_system_that_does_not_describe_its_processor_is_named_by_its_machine(monkeypatch):
    def missing(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", missing)
    assert _processor()
