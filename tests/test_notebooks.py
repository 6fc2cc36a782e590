"""Notebooks and their paired scripts have the same cells, and run at a tiny size."""

import sys
from pathlib import Path

import jupytext
import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
TINY = {
    "conventions": "updates, seeds, episodes = 1, 2, 12",
    "from-jaxmarl": "updates, seeds = 1, 2",
    "kla-layer": "updates, length = 2, 8",
    "own-environment": "updates, seeds = 1, 2",
    "sweeps": "updates, seeds = 1, 2",
}
"""What replaces the cell that is tagged `parameters`."""


@pytest.mark.parametrize("name", sorted(p.stem for p in FOLDER.glob("*.ipynb")))
def test_a_notebook_is_its_script_and_runs(name, tmp_path, monkeypatch, capsys):
    book = nbformat.read(FOLDER / f"{name}.ipynb", 4)
    script = jupytext.read(FOLDER / f"{name}.py")
    assert [(c.cell_type, c.source) for c in book.cells] == [(c.cell_type, c.source) for c in script.cells]
    assert name in TINY
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    # in this process: a kernel would import and compile everything anew
    shell = InteractiveShell()
    shown = []
    for cell in book.cells:
        if cell.cell_type != "code":
            continue
        tiny = "parameters" in cell.metadata.get("tags", ())
        result = shell.run_cell(TINY[name] if tiny else cell.source)
        result.raise_error()
        if result.result is not None:
            shown.append(result.result)
    assert shown
    if name == "sweeps":
        assert shown[0] == ["chunk", "init"]  # one program each for all settings and seeds
        assert len(shown[-1]) == 8
    if name == "kla-layer":
        assert shown[-1] is True
    if name == "own-environment":
        assert "environment 'corridor': step: truncated: found one number of int32" in capsys.readouterr().out
        assert Path("run/policy").is_dir()
    if name == "from-jaxmarl":
        assert len(shown[-1]) == 3
    if name == "conventions":
        found, rows, summary, image = shown
        assert set(found.probe) == {"OAR", "HAR", "PIF", "AA", "DAI"}
        assert len(rows.columns) == 2
        assert {"self-play", "self-play - cross-play", "with tit"} <= set(summary.index)
        assert image.data[:4] == b"\x89PNG"
