"""The package as such: light to import, typed, described truly, and complete with the extra that a command asks for."""

import ast
import importlib.metadata
import sys
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ddpm_pipeline
from helpers import ROOT, imported, run_command, run_python

PACKAGE = Path(ddpm_pipeline.__file__).parent
COMMANDS = {  # by room: the function that the command calls, and the extra that it needs
    "training": ("train", "train"),
    "evaluation": ("evaluate", "eval"),
    "generation": ("generate", "train"),
    "fitting": ("fit", "train"),
}
# of extras of their own; their absence is caught and named
OPTIONAL = {"torch-fidelity", "tifffile", "imagecodecs", "gradio", "matplotlib", "wandb"}
BASE_ROOMS = {"hub", "likelihood"}  # which need no extra, as the root files
HEAVY = {"torch", "diffusers", "numpy", "transformers", "huggingface_hub", "accelerate", "datasets"}


def test_import_loads_nothing_heavy():
    loaded = run_python("import sys, ddpm_pipeline; print(*sorted(sys.modules))").split()
    assert "ddpm_pipeline" in loaded
    assert not HEAVY & set(loaded)


def test_every_public_name_can_be_imported():
    for name in ddpm_pipeline.__all__:
        assert getattr(ddpm_pipeline, name) is not None
    assert set(ddpm_pipeline.__all__) <= set(dir(ddpm_pipeline))


def test_version_is_one():
    assert importlib.metadata.version("ddpm-pipeline") == ddpm_pipeline.__version__
    assert f"## [{ddpm_pipeline.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_type_hints_card_template_and_recipes_are_installed():
    assert (PACKAGE / "py.typed").is_file()
    assert (PACKAGE / "hub/model_card.md").read_text() == (ROOT / "model_card.md").read_text()
    assert (PACKAGE / "recipes/digits.yaml").is_file()


# ---- extras -----------------------------------------------------------------------------------------


@cache
def requirements(extra: str) -> set[str]:
    """The names of all distributions that `pip install ddpm-pipeline[extra]` brings, as far as they are installed here."""
    todo, seen = [("ddpm-pipeline", extra)], set()
    while todo:
        name, wanted = todo.pop()
        for line in importlib.metadata.requires(name) or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": wanted}):
                for further in requirement.extras or {""}:
                    if (requirement.name, further) not in seen:
                        seen.add((requirement.name, further))
                        todo.append((requirement.name, further))
    return {canonicalize_name(name) for name, _ in seen}


@pytest.fixture(scope="module")
def environment_with(tmp_path_factory):
    """Makes the folder of packages that a fresh environment would have with one extra: links to what is installed here."""

    def make(extra: str) -> Path:
        folder = tmp_path_factory.mktemp(f"with-{extra or 'nothing'}")
        (folder / "ddpm_pipeline").symlink_to(PACKAGE)
        for name in requirements(extra):
            distribution = importlib.metadata.distribution(name)
            for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
                link, target = folder / top, Path(distribution.locate_file(top))
                if target.exists() and not link.is_symlink():
                    link.symlink_to(target)
        about = folder / f"ddpm_pipeline-{ddpm_pipeline.__version__}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Name: ddpm-pipeline\nVersion: {ddpm_pipeline.__version__}\n")
        return folder

    return make


def run_in(folder: Path, code: str):
    """Run code that finds the packages in a folder, and no others."""
    code = f"import sys; sys.path.append({str(folder)!r})\n{code}"
    return run_command(sys.executable, "-I", "-S", "-c", code)


def test_imports_are_declared():
    """Also those inside of functions, which importing a command does not reach."""
    distributions = importlib.metadata.packages_distributions()
    assert requirements("train") <= requirements("eval")
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0]
        allowed = OPTIONAL | requirements("" if room in BASE_ROOMS or path.parent == PACKAGE else "train")
        for top in imported(ast.parse(path.read_text("utf-8"))) - sys.stdlib_module_names:
            found = {canonicalize_name(name) for name in distributions.get(top, [top])}
            assert found & allowed, f"{path} imports {top}, which neither the package nor its extra requires"


def test_the_commands_need_the_extra_of_training_alone(environment_with):
    lines = [f"from ddpm_pipeline.{room} import {name}, __main__" for room, (name, _) in COMMANDS.items()]
    done = run_in(environment_with("train"), "\n".join(lines))
    assert done.returncode == 0, done.stderr


def test_without_extras_all_else_works_and_each_command_names_its_extra(environment_with):
    lines = ["from ddpm_pipeline import *", "import ddpm_pipeline.hub.__main__, ddpm_pipeline.likelihood"]
    for room, (name, _) in COMMANDS.items():
        lines += ["try:", f"    from ddpm_pipeline.{room} import {name}", "except ImportError as error: print(error)"]
    done = run_in(environment_with(""), "\n".join(lines))
    assert done.returncode == 0, done.stderr
    for printed, (_, extra) in zip(done.stdout.splitlines(), COMMANDS.values(), strict=True):
        assert f"ddpm-pipeline[{extra}]" in printed
