"""The notebooks run from their first cell to their last, and are kept
without outputs."""

import json

import pytest
from paths import ROOT

NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))


def code_cells(book):
    return [cell for cell in book["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_it_is_kept_without_outputs(path):
    """What a cell prints is what it prints now; the site shows the cells."""
    assert len(NOTEBOOKS) == 2
    cells = code_cells(json.loads(path.read_text()))
    assert len(cells) >= 4
    assert not [cell for cell in cells if cell["outputs"] or cell["execution_count"] is not None]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_it_runs(path, tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    nbclient.NotebookClient(
        book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    said = [[output["output_type"] for output in cell["outputs"]] for cell in code_cells(book)]
    assert all(cell["execution_count"] for cell in code_cells(book)) and sum(map(len, said)) >= 3
    assert not any(kind == "error" for kinds in said for kind in kinds)
