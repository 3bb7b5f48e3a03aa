"""The notebooks, executed.  ``python tests/test_notebook.py`` executes them and writes their outputs into them."""

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "tutorials"
NAMES = ["quickstart", "own-environment", "own-method"]
WIDGET = "application/vnd.jupyter.widget-view+json"


def executed(name: str, folder: Path) -> Any:
    """A notebook after its cells ran in a directory of their own."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "IPYTHONDIR": str(folder / "ipython")}
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}}).execute(
        env=environment
    )
    return notebook


def outputs(notebook: Any) -> list[dict[str, Any]]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def text(found: list[dict[str, Any]]) -> str:
    return "".join(str(output.get("data", {}).get("text/plain", output.get("text", ""))) for output in found)


@pytest.mark.long
def test_the_notebook_runs_and_shows_its_progress_and_its_figure_inline(tmp_path: Path) -> None:
    found = outputs(executed("quickstart", tmp_path))
    kinds = [kind for output in found for kind in output.get("data", {})]
    assert kinds.count("image/png") == 1
    said = text(found)
    assert "Run('" in said and "20,480 steps" in said
    try:
        import ipywidgets  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        assert "s left" in said  # progress as lines
    else:
        assert WIDGET in kinds
    assert not any("Warning" in output.get("text", "") for output in found)


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES[1:])
def test_the_other_notebooks_run(tmp_path: Path, name: str) -> None:
    found = outputs(executed(name, tmp_path))
    assert not any("Warning" in output.get("text", "") for output in found)


@pytest.mark.parametrize("name", NAMES)
def test_the_notebooks_are_committed_with_their_outputs(name: str) -> None:
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    assert outputs(notebook) and all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    assert "/tmp" not in text(outputs(notebook))


def tidy(notebook: Any, folder: str) -> None:
    """Leave what a reader needs of the outputs: text and figures, without paths of this machine."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        kept = []
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if WIDGET in data or data.get("text/plain") == "":  # a widget is shown only while its kernel lives
                continue
            data.pop("text/html", None)
            for holder, key in ((output, "text"), (data, "text/plain")):
                if key in holder:
                    holder[key] = holder[key].replace(f"{folder}/", "")
            kept.append(output)
        if "outputs" in cell:
            cell.outputs = kept
    notebook.metadata.pop("widgets", None)


def write() -> None:
    import nbformat  # pyright: ignore[reportMissingImports]

    for name in NAMES:
        with tempfile.TemporaryDirectory() as folder:
            notebook = executed(name, Path(folder))
            tidy(notebook, folder)
        nbformat.write(notebook, FOLDER / f"{name}.ipynb")


if __name__ == "__main__":
    write()
