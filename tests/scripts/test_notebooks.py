"""The notebook of fine-tuning runs from its first cell to its last, in a kernel, on few stars and steps."""

import json
from pathlib import Path

import pytest


NOTEBOOKS = sorted((Path(__file__).parents[2] / "scripts" / "notebooks").glob("*.ipynb"))


def test_there_is_a_notebook_and_it_is_stored_without_outputs():
    assert NOTEBOOKS
    for notebook in NOTEBOOKS:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


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
    outputs = [output for cell in run.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    printed = "".join(output["text"] for output in outputs if output.output_type == "stream")
    for words in ("dropped 6 spectra", "new to the checkpoint: log_lm", "new to the checkpoint: mg_h", "PCA + MLP"):
        assert words in printed
    for folder in ("log-lm", "mg-h"):
        assert (tmp_path / "finetune-notebook" / folder / "README.md").is_file()
