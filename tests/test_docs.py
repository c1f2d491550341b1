"""What the docs name exists, and their tables are those of the code and of the measurements. test_snippets.py runs them."""

import json
import re
from typing import get_type_hints

import pytest

import ddpm_pipeline
import diffusers_suites
from ddpm_pipeline.app.options import AppOptions
from ddpm_pipeline.evaluation.options import EvaluationOptions
from ddpm_pipeline.fitting.options import FittingOptions
from ddpm_pipeline.generation.options import GenerationOptions
from ddpm_pipeline.support.options import OptionGroup, options_table
from ddpm_pipeline.training.options import TrainingOptions
from helpers import ROOT

DOCS = ROOT / "docs"
PAGES = {"README.md": (ROOT / "README.md").read_text("utf-8")}
PAGES |= {page.relative_to(DOCS).as_posix(): page.read_text("utf-8") for page in sorted(DOCS.rglob("*.md"))}
PACKAGE = ROOT / "src" / "ddpm_pipeline"
COMMANDS = {  # by script: its options, and where their tables are
    "training/train.py": (TrainingOptions, "training.md", "All options"),
    "training/evaluate.py": (EvaluationOptions, "evaluation.md", "Options of evaluate.py"),
    "training/generate.py": (GenerationOptions, "evaluation.md", "Options of generate.py"),
    "training/fit_sampler.py": (FittingOptions, "fitted_sampler.md", "Options of fit_sampler.py"),
    "ddpm_pipeline.app": (AppOptions, "app.md", "Options"),
}


def groups_of(options: type) -> list[type[OptionGroup]]:
    hints = get_type_hints(options).values()
    return [hint for hint in hints if isinstance(hint, type) and issubclass(hint, OptionGroup)]


def folder_of(name: str):
    return ROOT if name == "README.md" else (DOCS / name).parent


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", PAGES[name]):
        if target.startswith("http"):
            continue
        file = folder_of(name) / (target or name.split("/")[-1])
        assert file.exists(), f"{name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text("utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("name", PAGES)
def test_named_files_exist(name):
    for path in re.findall(r"`((?:\w+/)+[\w*]*(?:\.(?:py|md|json|yaml|png))?)`", PAGES[name]):
        if path.split("/")[0] in ("unet", "scheduler", "samples", "checkpoints", "wandb"):  # in a run's folder
            continue
        assert any(next(place.glob(path.rstrip("/")), None) for place in (ROOT, PACKAGE)), f"{name} names {path}"


def test_code_names_of_the_equations_exist():
    for name in re.findall(r"`([a-z_]+)`(?=[ ,|]|$)", PAGES["equations.md"]):
        if name.startswith(("q_", "p_", "forward_")) or name.endswith(("_noise", "_target", "_sample")):
            assert hasattr(ddpm_pipeline.AlphaDDPMScheduler, name), name


@pytest.mark.parametrize("script", COMMANDS)
def test_option_tables_are_those_of_the_code(script):
    options, name, heading = COMMANDS[script]
    section = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", PAGES[name], re.DOTALL | re.MULTILINE)
    assert section[1].strip() == options_table(groups_of(options)).strip()


def test_class_accuracies_are_those_that_were_measured():
    for recipe, condition in {"class": "label", "text": '"a handwritten seven" and the like'}.items():
        report = json.loads((ROOT / f"benchmarks/results/digits_{recipe}_accuracy.json").read_text("utf-8"))
        accuracies = [f"{100 * row['class_accuracy']:#.3g} %".replace("100.", "100") for row in report["results"]]
        for row, accuracy in zip(report["results"], accuracies, strict=True):
            times = "" if row["times_in_training"] is None else f"{row['times_in_training']:,} "
            line = (
                f"| {row['asked_by']} | {row['guidance_scale']:g} | {row['num_images']:,} | {accuracy} | "
                f"{row['diversity']:.2f} | {times}|"
            )
            assert line in PAGES["conditions.md"]
        assert f"| {condition} | {accuracies[0]} | {accuracies[1]} |" in PAGES["results.md"]


def test_exceptions_from_diffusers_own_tests_are_listed():
    names = {name.partition("::")[2] for name in diffusers_suites.EXCEPTIONS}
    assert len(names) <= 5
    assert set(re.findall(r"^\| `(test_\w+)` \|", PAGES["scheduler.md"], flags=re.MULTILINE)) == names
