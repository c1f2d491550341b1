"""The layout rules of docs/architecture.md, as far as a machine can keep them. Sizes of arguments and branches are ruff's."""

import ast
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

from helpers import ROOT, imported, run_command

PACKAGE = ROOT / "src" / "ddpm_pipeline"


def parsed(folder: Path) -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text("utf-8")) for path in sorted(folder.rglob("*.py"))}


SOURCES, SCRIPTS = parsed(PACKAGE), parsed(ROOT / "training")
OTHERS = parsed(ROOT / "tests") | parsed(ROOT / "benchmarks")
PYTHON_FILES = SOURCES | SCRIPTS | OTHERS

LONGEST_FUNCTION, LONGEST_FILE, LONGEST_SCRIPT = 60, 550, 80  # lines
MOST_PARAMETERS = 8
LONGEST_COPY = 6  # lines that two places of the code may share

# Their arguments are not ours to choose: diffusers' convention of a call, and the configuration keys of its DDPMScheduler.
WIDE = {
    ("pipeline_alpha_ddpm.py", "__call__"),
    ("pipeline_alpha_ddpm_text.py", "__call__"),
    ("scheduling_alpha_ddpm.py", "__init__"),
}
# What the root files, which travel inside model repositories, may import besides each other and the standard library.
TRAVELLING = {"diffusers", "torch", "numpy", "PIL", "transformers"}
# Imports by name: public names on first use (as in each __init__.py), and MODULE:FUNCTION of the user.
IMPORTERS = {"support/extras.py", "evaluation/features.py"}


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_rooms_import_downwards_only():
    """The contracts stand in pyproject.toml."""
    done = run_command("lint-imports", "--no-cache")
    assert done.returncode == 0, done.stdout + done.stderr


def test_root_files_import_only_what_a_model_repository_can_rely_on():
    for path in PACKAGE.glob("*.py"):
        assert imported(SOURCES[path]) <= TRAVELLING | set(sys.stdlib_module_names), path


def test_benchmarks_and_scripts_import_the_package_and_not_each_other():
    files = [path for path in PYTHON_FILES if path.parent.name in ("benchmarks", "training") and path not in SOURCES]
    for path in files:
        assert not imported(PYTHON_FILES[path]) & {other.stem for other in files}, path


def test_nothing_is_imported_behind_the_contracts():
    """Neither by a search path nor by name: import-linter sees only statements."""
    for path, tree in PYTHON_FILES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                assert (getattr(node.value, "id", None), node.attr) != ("sys", "path"), f"{path}:{node.lineno}"
    for path, tree in SOURCES.items():
        names = {getattr(node, "id", "") or getattr(node, "attr", "") for node in ast.walk(tree)}
        if names & {"import_module", "__import__"} and path.name != "__init__.py":
            assert path.relative_to(PACKAGE).as_posix() in IMPORTERS


def test_files_and_functions_are_short():
    """Of functions, the whole package; ruff counts arguments as well, where a file is not excepted."""
    too_long = []
    for path, tree in PYTHON_FILES.items():
        if len(path.read_text("utf-8").splitlines()) > (LONGEST_SCRIPT if path in SCRIPTS else LONGEST_FILE):
            too_long.append(f"{path} has too many lines")
        for function in [] if path in OTHERS else functions(tree):
            where = f"{path}:{function.lineno} {function.name}"
            if function.name != "__call__" and function.end_lineno - function.lineno >= LONGEST_FUNCTION:
                too_long.append(f"{where} has too many lines")
            of = function.args
            names = {argument.arg for argument in (*of.posonlyargs, *of.args, *of.kwonlyargs)} - {"self", "cls"}
            if (path.name, function.name) not in WIDE and len(names) > MOST_PARAMETERS:
                too_long.append(f"{where} has {len(names)} parameters")
    assert not too_long, "\n".join(too_long)


def test_no_code_is_written_twice():
    """Imports, blank lines and comments aside; the signatures of the pipelines' `__call__` may agree."""
    seen: dict[tuple[str, ...], tuple[Path, int]] = {}
    copies = []
    for path, tree in {**SOURCES, **SCRIPTS}.items():
        apart = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                apart |= set(range(node.lineno, node.end_lineno + 1))
            if isinstance(node, ast.FunctionDef) and node.name == "__call__":
                apart |= set(range(node.lineno, node.body[1 if ast.get_docstring(node) else 0].lineno))
        numbered = enumerate(path.read_text("utf-8").splitlines(), start=1)
        lines = [(number, line.strip()) for number, line in numbered if number not in apart]
        lines = [(number, line) for number, line in lines if line and not line.startswith("#")]
        for window in zip(*(itertools.islice(lines, start, None) for start in range(LONGEST_COPY + 1)), strict=False):
            text = tuple(line for _, line in window)
            first = seen.setdefault(text, (path, window[0][0]))
            if first != (path, window[0][0]):
                copies.append(f"{first[0]}:{first[1]} and {path}:{window[0][0]}")
    assert not copies, "\n".join(copies)


def test_the_tests_mirror_the_rooms():
    for room in sorted(path.parent for path in PACKAGE.glob("*/__init__.py")):
        assert any((ROOT / "tests" / room.name).glob("test_*.py")), f"tests/{room.name} is missing"
