"""Everything that README and docs show runs: Python block after block, as a reader copies it, and the commands.

Both run in a folder of `snippet_world`, where the models that the pages name are tiny. Training, evaluation, generation and
fits are real, but of few updates and images. Command lines are all parsed; that they run is a slow test.
"""

import ast
import json
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable
from functools import partial, wraps
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ddpm_pipeline.fitting import fit_sampler
from helpers import ROOT, imported
from hub_fixtures import client, hub  # noqa: F401, fixtures
from hub_server import WRITE_TOKEN
from snippet_world import SHORT_CHAIN, STEPS, UNET, make_world
from text_models import make_unet

PAGES = {
    str(page.relative_to(ROOT)): page.read_text("utf-8")
    for page in (*sorted(ROOT.glob("README*.md")), *sorted((ROOT / "docs").rglob("*.md")))
}
NOT_INSTALLED = {"monai"}  # libraries that a page names and the tests do without

FEW = {"batch_size": 2, "num_cpu_threads": 1}
UPDATES = {
    **FEW, "max_train_steps": 2, "lr_warmup_steps": 1, "num_train_timesteps": 20, "beta_end": 0.4, "preview_every": 0,
    "num_samples": 2, "fit_noises": 0, "mixed_precision": "no", "checkpoint_every": 1, "eval_images": 2, "eval_calls": 3,
}  # fmt: skip
FIGURES = {**FEW, "num_images": 6, "num_likelihood_images": 2, "likelihood_calls": 3, "num_inference_steps": 5}
COMMANDS = {  # by script: its room, the function that it calls, and how that is made short
    "train": ("training", "train", UPDATES),
    "evaluate": ("evaluation", "evaluate", FIGURES),
    "generate": ("generation", "generate", {**FEW, "num_images": 3, "num_inference_steps": 5}),
    "fit_sampler": ("fitting", "fit", {**FEW, "num_noises": 3, "long_steps": 20}),
}
SCRIPTS = {room: script for script, (room, _, _) in COMMANDS.items()}
OTHERS = ("pip", "git", "sphinx-build", "tensorboard", "pytest", "scontrol", "OUT=", "[")  # commands that are not ours to run
RESOLVE = "/{repo_id}/resolve/{revision}/{filename}"  # where a Hub has a file


class Block(NamedTuple):
    language: str
    line: int  # of its first line on the page
    text: str


def blocks_of(page: str, *languages: str) -> list[Block]:
    found = re.finditer(r"^```(\w+)[^\n]*\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    return [Block(m[1], page[: m.start(2)].count("\n") + 1, m[2]) for m in found if m[1] in languages]


def commands_of(page: str) -> list[list[str]]:
    """The words of every command line on a page, those within `bash -c '...'` too."""
    found = []
    for block in blocks_of(page, "sh", "bash"):
        for line in block.text.replace("\\\n", " ").splitlines():
            for part in re.split(r" && | \|\| ", line.replace("'$OUT'", "OUT")):
                words = shlex.split(part, comments=True)
                found.append(next((shlex.split(word) for word in words if "training/train.py" in word and " " in word), words))
    return [words for words in found if words]


def script_of(words: list[str]) -> tuple[str, list[str]] | None:
    """Which of COMMANDS a command line runs, and its arguments."""
    for place, word in enumerate(words):
        script = re.fullmatch(r"training/(\w+)\.py", word)
        module = re.fullmatch(r"ddpm_pipeline\.(\w+)", word) if words[place - 1] == "-m" else None
        if script or (module and module[1] in SCRIPTS):
            return (script[1] if script else SCRIPTS[module[1]]), words[place + 1 :]
    return None


ALL_COMMANDS = {shlex.join(words): words for page in PAGES.values() for words in commands_of(page)}
OURS = {line: script_of(words) for line, words in ALL_COMMANDS.items() if script_of(words)}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


@pytest.fixture
def place(world: Path, tmp_path: Path, client, hub, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """A copy of the world to work in, with a Hub, and with everything that takes long made short."""
    folder = shutil.copytree(world, tmp_path / "here")
    monkeypatch.chdir(folder)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.url}{RESOLVE}")
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.url)
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    for room, name, few in COMMANDS.values():
        module = import_module(f"ddpm_pipeline.{room}")
        monkeypatch.setattr(module, name, shortened(getattr(module, name), few, tmp_path))
    monkeypatch.setattr("ddpm_pipeline.fitting.fit_sampler", partial(fit_sampler, num_noises=3, long_steps=12))
    return folder


def shortened(function: Callable, few: dict[str, Any], tmp_path: Path) -> Callable:
    """The same function of options, of which these are replaced."""

    @wraps(function)
    def run(options: Any, **more: Any) -> Any:
        given, values = options.flat(), dict(few)
        if "cache_dir" in given:
            values["cache_dir"] = str(tmp_path / "cache")
        if given.get("dataset") == "cats":
            values["dataset_config"] = "num_images=20"
        if given.get("validation_split"):
            values["validation_split"] = "50%"  # of few images
        if given.get("num_images") == 0:
            del values["num_images"]
        if function.__name__ == "train":
            values |= network(given, tmp_path) | {"output_dir": tempfile.mkdtemp(dir=tmp_path)}  # the model of this name stays
        result = function(options.with_values(**values), **more)
        if function.__name__ == "train" and not Path("ddpm-photos").exists():  # the checkpoint that the docs name
            shutil.copytree(result / "checkpoints/step-00000002", "ddpm-photos/checkpoints/step-00001000")
        return result

    return run


def network(given: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A tiny one in the place of a preset."""
    if str(given["model"]).endswith(".json"):
        return {}
    text = given["condition"] == "text"
    config = dict(make_unet(cross_attention_dim=64).config) if text else UNET
    left = {name: value for name, value in config.items() if name not in ("sample_size", "in_channels", "out_channels")}
    (tmp_path / "tiny.json").write_text(json.dumps(left))
    return {"model": str(tmp_path / "tiny.json")}


def parsed(script: str, arguments: list[str]) -> Any:
    return import_module(f"ddpm_pipeline.{COMMANDS[script][0]}.options").parse_options(arguments)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(PAGES[page], "python")])
def test_python_runs_by_copying(page, place):
    """The blocks of a page one after the other, as in one notebook. Where no timestep is named, chains are short."""
    for file in place.rglob("scheduler_config.json"):
        config = json.loads(file.read_text())
        config["num_train_timesteps"] = STEPS if str(STEPS - 1) in PAGES[page] else SHORT_CHAIN
        file.write_text(json.dumps(config))
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks_of(PAGES[page], "python"):
        tree = ast.parse("\n" * (block.line - 1) + block.text, page)
        if all(find_spec(name) for name in imported(tree) & NOT_INSTALLED):
            exec(compile(tree, page, "exec"), names)


@pytest.mark.parametrize("line", ALL_COMMANDS)
def test_commands_can_be_understood(line, world, monkeypatch):
    words = ALL_COMMANDS[line]
    monkeypatch.chdir(world)
    if line in OURS:
        parsed(*OURS[line])  # raises ConfigError for options, values and recipes that do not exist
    elif script := next((word for word in words if re.match(r"(benchmarks|tests)/\w+\.py$", word)), None):
        text = (ROOT / script).read_text("utf-8")
        unknown = [word for word in words if word.startswith("--") and f'"{word}"' not in text]
        assert not unknown, f"{script} has no {unknown}"
    elif "-m" in words:
        assert find_spec(words[words.index("-m") + 1]), line
    else:
        assert words[0].startswith(OTHERS), f"{line} is a command that this test does not know"


@pytest.mark.slow
@pytest.mark.parametrize("line", OURS)
def test_commands_run(line, place):
    (place / "unet.json").write_text(blocks_of(PAGES["docs/training.md"], "json")[0].text)
    room, name, _ = COMMANDS[OURS[line][0]]
    getattr(import_module(f"ddpm_pipeline.{room}"), name)(parsed(*OURS[line]))
