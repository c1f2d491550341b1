"""The command's one-line errors, and the Space that it writes."""

import ast
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from ddpm_pipeline import AlphaDDPMPipeline, AlphaDDPMScheduler
from ddpm_pipeline.app.__main__ import main
from ddpm_pipeline.app.options import parse_options
from ddpm_pipeline.app.space import push_space, write_space
from ddpm_pipeline.generation.pipelines import load_pipeline
from ddpm_pipeline.support.errors import ConfigError, PushError
from helpers import tiny_unet


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "ddpm-tiny"
    AlphaDDPMPipeline(tiny_unet(), AlphaDDPMScheduler(12, beta_start=0.02, beta_end=0.6)).save_pretrained(folder)
    (folder / "README.md").write_text("a card")
    (folder / "samples.txt").write_text("row 1: a seven\n")
    (folder / "train.log").write_text("private")
    return folder


def error_of(monkeypatch, *words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["app", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert "\n" not in str(stopped.value.code)
    return str(stopped.value.code)


def test_the_model_may_stand_first():
    assert (
        parse_options(["ddpm-digits", "--port", "8000"]).flat() == parse_options(["--port=8000", "--model=ddpm-digits"]).flat()
    )
    assert parse_options(["x"]).server.host == "127.0.0.1" and not parse_options(["x"]).server.share


def test_mistakes_are_one_line_with_the_fix(monkeypatch, model, tmp_path):
    for name in ("ddpm_pipeline.app.server", "ddpm_pipeline.app.screens"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "pip install 'ddpm-pipeline[app]'" in error_of(monkeypatch, str(model))
    assert "--model is required" in error_of(monkeypatch)
    assert "Did you mean --port" in error_of(monkeypatch, str(model), "--prot", "1")
    assert "from 1 to 65535" in error_of(monkeypatch, str(model), "--port", "0")
    assert "give it as well" in error_of(monkeypatch, str(model), "--push_space", "me/demo")
    assert "neither the folder of a pipeline nor a name" in error_of(monkeypatch, str(tmp_path), "--space", str(tmp_path / "s"))
    assert "exists already" in error_of(monkeypatch, str(model), "--space", str(model))


def test_a_space_bundles_a_folder_and_names_a_repository(model, tmp_path):
    bundled, named = write_space(str(model), tmp_path / "a/bundled"), write_space("org/ddpm-digits", tmp_path / "named")
    for space in (bundled, named):
        assert {path.name for path in space.iterdir()} - {"ddpm-tiny"} == {"app.py", "requirements.txt", "README.md"}
        ast.parse((space / "app.py").read_text())
        assert "ddpm-pipeline[app]==" in (space / "requirements.txt").read_text()
    front = yaml.safe_load((named / "README.md").read_text().split("---")[1])
    expected = {"sdk": "gradio", "app_file": "app.py", "models": ["org/ddpm-digits"], "title": "ddpm-digits"}
    assert expected.items() <= front.items()
    assert 'serve("org/ddpm-digits")' in (named / "app.py").read_text()
    assert "models" not in (bundled / "README.md").read_text().split("---")[1]
    assert sorted(path.name for path in (bundled / "ddpm-tiny").iterdir()) == [
        "model_index.json",
        "samples.txt",
        "scheduler",
        "unet",
    ]
    assert load_pipeline(str(bundled / "ddpm-tiny")).unet.config.sample_size == 8


def test_a_space_is_pushed_whole_or_says_how_to_push_it_later(model, tmp_path):
    folder, calls = write_space(str(model), tmp_path / "space"), []

    class Hub:
        def create_repo(self, repo_id, **options):
            calls.append(options)
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def repo_info(self, repo_id, repo_type):
            return SimpleNamespace(private=repo_id == "me/demo")

        def upload_folder(self, **options):
            calls.append(options)

    assert push_space(folder, "demo", private=True, api=Hub()) == "https://huggingface.co/spaces/me/demo"
    created, uploaded = calls
    assert created == {"repo_type": "space", "space_sdk": "gradio", "private": True, "exist_ok": True}
    assert (uploaded["repo_id"], uploaded["repo_type"], uploaded["folder_path"]) == ("me/demo", "space", folder)
    with pytest.raises(ConfigError, match="--push_space"):
        push_space(folder, "a/b/c", api=Hub())
    with pytest.raises(PushError, match="is public, and the push was asked to be private"):
        push_space(folder, "seen", private=True, api=Hub())
    assert not any("folder_path" in call for call in calls[2:])
    Hub.upload_folder = lambda self, **options: 1 / 0
    with pytest.raises(PushError, match=r"hf upload demo .* --repo-type space"):
        push_space(folder, "demo", api=Hub())
