"""Execute the notebooks from scratch, each in an empty folder, and keep what their cells print and draw.

    python docs/notebooks/execute.py                     # all of them
    python docs/notebooks/execute.py sample_well         # one
    python docs/notebooks/execute.py --check             # execute, and write nothing: what CI does

NAME.zh-CN.ipynb is NAME.ipynb in Chinese: its code cells and outputs are copied from there, so that each notebook runs once.
Needs the extra `notebook`. Ends with status 1, and the cell's traceback, at the first cell that fails.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).resolve().parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb") if "." not in path.stem)
SECONDS_PER_CELL = 1800  # on a busy machine
FIGURES = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}  # whatever the shell has set
BARS = "application/vnd.jupyter.widget-view+json"  # for a person who waits


def executed(path: Path) -> Any:
    """The notebook with the outputs of a fresh run. Raises CellExecutionError."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=SECONDS_PER_CELL,
            kernel_name="python3",
            coalesce_streams=True,
            record_timing=False,
            resources={"metadata": {"path": folder}},
        )
        client.execute(env=os.environ | FIGURES)
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if BARS not in output.get("data", {})]
    return notebook


def translate(path: Path, source: Any) -> None:
    """Put the code cells of `source` into the translation at `path`, in order. Raises ValueError for another number of them."""
    notebook = nbformat.read(path, as_version=4)
    theirs = [index for index, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    ours = [cell for cell in source.cells if cell.cell_type == "code"]
    if len(theirs) != len(ours):
        raise ValueError(f"{path.name} has {len(theirs)} code cells, and the notebook that it translates {len(ours)}.")
    for index, cell in zip(theirs, ours, strict=True):
        notebook.cells[index] = cell
    nbformat.write(notebook, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"Notebooks, of {', '.join(NAMES)}. By default all.")
    parser.add_argument("--check", action="store_true", help="Execute only, and write nothing.")
    options = parser.parse_args()
    if unknown := sorted({*options.names} - {*NAMES}):
        parser.error(f"{', '.join(unknown)}: there are {', '.join(NAMES)}.")
    for name in options.names or NAMES:
        path, began = FOLDER / f"{name}.ipynb", time.monotonic()
        try:
            notebook = executed(path)
        except CellExecutionError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1
        if not options.check:
            nbformat.write(notebook, path)
            translate(path.with_suffix(".zh-CN.ipynb"), notebook)
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
