"""Version and metadata of a release."""

import importlib.metadata
import re
from pathlib import Path

import pytest
import yaml

import spectrafm_cli
import spectrafm_hf


ROOT = Path(__file__).parents[1]


def test_the_version_is_the_same_everywhere(capsys):
    version = spectrafm_hf.__version__
    assert importlib.metadata.version("spectrafm_hf") == version
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    newest = re.search(r"^## (\S+) \((\d{4}-\d\d-\d\d)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest and newest[1] == version
    with pytest.raises(SystemExit) as stop:
        spectrafm_cli.main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out.strip() == version
