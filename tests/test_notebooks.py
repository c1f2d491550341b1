"""The notebooks of docs/notebooks as they are kept: executed whole, the same code in both languages, nothing of this machine.

That they run is a slow test, and a step of CI of its own: `python docs/notebooks/execute.py --check`.
"""

import functools
import json
import re
import sys
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest

from helpers import ROOT, run_command

FOLDER = ROOT / "docs" / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
ENGLISH = [path for path in PATHS if "." not in path.stem]
LARGEST = 1_500_000  # bytes of a file, most of them figures
# What a translation keeps: headings of the same levels, displayed formulas, numbers of equations, and files that are linked to
HEADING, FORMULA = re.compile(r"^#+ ", re.MULTILINE), re.compile(r"\$\$(.*?)[ .]*\$\$", re.DOTALL)
NUMBER, TARGET = re.compile(r"\(\d\.\d+\)"), re.compile(r"\]\(([^#)\s]+)\)")


@functools.cache
def cells(path: Path, kind: str) -> list[nbformat.NotebookNode]:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return [cell for cell in notebook.cells if cell.cell_type == kind]


@pytest.mark.parametrize("path", ENGLISH, ids=lambda path: path.stem)
def test_the_chinese_notebook_has_the_same_code_and_outputs(path):
    chinese = path.with_suffix(".zh-CN.ipynb")
    assert cells(chinese, "code") == cells(path, "code"), "run docs/notebooks/execute.py"
    for a, b in zip(cells(path, "markdown"), cells(chinese, "markdown"), strict=True):
        assert re.search(r"[\u4e00-\u9fff]", b.source)
        for found in HEADING, FORMULA, NUMBER, TARGET:
            ours, theirs = (
                sorted(re.sub(r"\.zh-CN|zh-CN/", "", each).strip() for each in found.findall(cell.source)) for cell in (a, b)
            )
            assert theirs == ours


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_outputs_are_kept_whole_and_say_nothing_of_the_machine(path):
    assert path.stat().st_size < LARGEST
    code = cells(path, "code")
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "execute it from the top"
    assert sum("image/png" in output.get("data", {}) for cell in code for output in cell.outputs) >= 3
    for cell in code:
        for output in cell.outputs:
            assert output.output_type != "error"
            data = {kind: value for kind, value in output.get("data", {}).items() if not kind.startswith("image/")}
            text = json.dumps([output.get("text"), data])
            assert not re.search(r"Warning|Traceback|(?<![\w.])/(?:home|root|tmp|usr|opt|work|Users|private)\b", text), text


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_links_of_notebooks_lead_somewhere(path):
    sources = [cell.source for cell in cells(path, "markdown")]
    headings = {
        heading.strip().replace(" ", "-") for source in sources for heading in re.findall(r"^#+ (.*)$", source, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)\s]+)\)", "\n".join(sources)):
        if target.startswith("#"):
            assert unquote(target[1:]) in headings
        elif not target.startswith("http"):
            assert (FOLDER / target).is_file(), target


@pytest.mark.slow
def test_the_notebooks_run_from_scratch():
    done = run_command(sys.executable, str(FOLDER / "execute.py"), "--check", timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr
