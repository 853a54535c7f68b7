"""The notebook of fine-tuning runs from its first cell to its last, on few stars and steps."""

import json
from pathlib import Path

import pytest


NOTEBOOKS = sorted((Path(__file__).parents[2] / "scripts" / "notebooks").glob("*.ipynb"))


def code_of(notebook: Path) -> list[str]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_there_is_a_notebook_and_it_is_stored_without_outputs():
    assert NOTEBOOKS
    for notebook in NOTEBOOKS:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_its_first_cell_to_its_last(notebook, tmp_path, monkeypatch):
    pytest.importorskip("IPython")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPECTRAFM_TINY", "1")
    names: dict = {}
    for number, code in enumerate(code_of(notebook)):
        exec(compile(code, f"{notebook.name}[{number}]", "exec"), names)
    for folder in ("log-lm", "mg-h"):
        assert (tmp_path / "finetune-notebook" / folder / "README.md").is_file()
        assert (tmp_path / "finetune-notebook" / folder / "predicted.png").is_file()
