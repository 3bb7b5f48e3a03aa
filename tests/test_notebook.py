"""The committed notebook, executed."""

import os
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def executed(folder: Path) -> list[dict[str, Any]]:
    """The outputs of the notebook's cells, which run in a directory of their own."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(ROOT / "docs" / "tutorials" / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "commit it without outputs"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "IPYTHONDIR": str(folder / "ipython")}
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}}).execute(
        env=environment
    )
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def test_the_notebook_runs_and_shows_its_progress_and_its_figure_inline(tmp_path: Path) -> None:
    outputs = executed(tmp_path)
    kinds = [kind for output in outputs for kind in output.get("data", {})]
    assert kinds.count("image/png") == 1
    said = "".join(str(output.get("data", {}).get("text/plain", output.get("text", ""))) for output in outputs)
    assert "Run('" in said and "20,480 steps" in said
    try:
        import ipywidgets  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        assert "s left" in said  # progress as lines
    else:
        assert "application/vnd.jupyter.widget-view+json" in kinds
    assert not any("Warning" in output.get("text", "") for output in outputs)
