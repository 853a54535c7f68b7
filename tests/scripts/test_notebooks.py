"""Notebooks run from the first to the last cell; that of fine-tuning with few stars and steps."""

import json
from pathlib import Path

import pytest


NOTEBOOKS = sorted((Path(__file__).parents[2] / "docs" / "notebooks").glob("*.ipynb"))
#: Pictures that each shows.
PICTURES = {"finetune": 2, "quickstart": 1, "spectrum-out": 3, "your-spectra": 1}


def pictures(cells) -> int:
    return sum("image/png" in output.get("data", {}) for cell in cells for output in cell.get("outputs", ()))


def test_notebooks_are_kept_with_their_pictures_and_without_paths_of_a_machine():
    assert {notebook.stem for notebook in NOTEBOOKS} == set(PICTURES)
    for notebook in NOTEBOOKS:
        text = notebook.read_text(encoding="utf-8")
        assert pictures(json.loads(text)["cells"]) == PICTURES[notebook.stem]
        assert "/root/" not in text and "/home/" not in text and "Traceback" not in text


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_its_first_cell_to_its_last(notebook, tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("SPECTRAFM_TINY", "1")
    run = nbformat.read(notebook, as_version=4)
    nbclient.NotebookClient(run, timeout=800, resources={"metadata": {"path": str(tmp_path)}}).execute()
    nbformat.write(run, tmp_path / "run.ipynb")
    assert pictures(run.cells) == PICTURES[notebook.stem]
    if notebook.stem != "finetune":
        return
    outputs = [output for cell in run.cells for output in cell.get("outputs", ())]
    printed = "".join(output["text"] for output in outputs if output.output_type == "stream")
    for words in ("dropped 6 spectra", "new to the checkpoint: log_lm", "new to the checkpoint: mg_h", "PCA + MLP"):
        assert words in printed
    for folder in ("log-lm", "mg-h"):
        assert (tmp_path / "finetune-notebook" / folder / "README.md").is_file()
