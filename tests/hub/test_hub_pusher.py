"""Pushes during training: one at a time, never in the way, reported once if they fail, given up where they stall."""

import itertools
import signal
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
from huggingface_hub import HfApi

import hub_server
from ddpm_pipeline import AlphaDDPMPipeline
from ddpm_pipeline.hub import TrainingFacts, build_card, export, push
from ddpm_pipeline.support.errors import ConfigError, PushError, Stopped
from ddpm_pipeline.training import pusher
from ddpm_pipeline.training.options import HubOptions, TrainingOptions
from ddpm_pipeline.training.pusher import Pusher
from ddpm_pipeline.training.stop import StopRequest
from helpers import tiny_unet
from hub_models import scheduler

COMMIT = r"/commit/main"
MODEL_FILES = {
    "README.md", "model_index.json", "modular_config.json", *AlphaDDPMPipeline.shipped_files(), "samples.png",
    "scheduler/scheduler_config.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", ".gitattributes",
}  # fmt: skip


@pytest.fixture(scope="module")
def pipe() -> AlphaDDPMPipeline:
    return AlphaDDPMPipeline(tiny_unet(), scheduler())


def card_of(pipe: AlphaDDPMPipeline, **facts):
    return build_card(pipe, name="ddpm", training=TrainingFacts("digits", 1797, facts=facts))


def hub_options(repo_id: str | None, **options) -> HubOptions:
    return HubOptions(push_to_hub=True, hub_model_id=repo_id, **options)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    def quick_push(folder, repo_id, options, **more):
        return push(folder, repo_id, replace(options, first_wait=0.01), **more)

    monkeypatch.setattr(pusher, "push", quick_push)


def test_repository_and_rights_are_there_before_training(hub, client: HfApi, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    pusher = Pusher(hub_options("org/new", hub_private=True), tmp_path / "run", client)
    assert pusher.repo_id == "org/new" and hub.repos["models", "org/new"]["private"]
    assert Pusher(hub_options(None), tmp_path / "ddpm-cats", client).repo_id == "tester/ddpm-cats"
    for token, repo_id, words in (
        (None, "org/x", "run `hf auth login`, or set HF_TOKEN"),
        ("hf_unknown", "org/x", "does not accept the token"),
        (hub_server.READ_TOKEN, "org/new", "may not write there"),
        (hub_server.READ_TOKEN, "org/x", "may not write there"),
        (hub_server.OTHER_TOKEN, "org/x", "may not write there"),
        (hub_server.WRITE_TOKEN, "org/../x", "not a valid repository name"),
        (hub_server.WRITE_TOKEN, "a/b/c", "not a valid repository name"),
    ):
        with pytest.raises(ConfigError, match=words):
            Pusher(hub_options(repo_id), tmp_path / "run", HfApi(endpoint=hub.url, token=token))
    with pytest.raises(ConfigError, match="cannot be reached"):
        Pusher(hub_options("org/x"), tmp_path / "run", HfApi(endpoint="http://127.0.0.1:9", token="hf_write"))
    with pytest.raises(ConfigError, match="push_every 5 has no effect without --push_to_hub"):
        TrainingOptions(push_every=5)


def test_pushes_go_one_at_a_time_and_never_block(hub, client: HfApi, pipe, tmp_path: Path, quick) -> None:
    folder = tmp_path / "run"
    (folder / "samples").mkdir(parents=True)
    (folder / "samples" / "step-00000001.png").write_bytes(b"\x89PNG\0 preview")
    (folder / "samples" / "step-00000900.png").write_bytes(b"left by a course of the run that went back")
    pusher = Pusher(hub_options("org/going"), folder, client)
    hub.fail("POST", COMMIT, stall=1.5)

    def save(snapshot: Path) -> None:
        export(pipe, snapshot, card_of(pipe, updates=next(updates)))

    updates = itertools.count(1)
    assert pusher.push_soon(1, save)
    began = time.monotonic()
    assert not pusher.push_soon(2, save) and not pusher.push_soon(3, save)
    assert time.monotonic() - began < 0.2 and pusher.busy
    pusher._under_way.result()
    assert hub.titles("org/going")[0] == "Training in progress, step 1"
    assert hub.files("org/going") == MODEL_FILES and hub.read("org/going", "samples.png") == b"\x89PNG\0 preview"
    assert pusher.push_soon(4, save)
    save(folder)
    pusher.finish()
    assert hub.titles("org/going")[:2] == ["Training done", "Training in progress, step 4"]
    assert not (folder / ".push").exists()


def test_failing_pushes_are_reported_once_and_the_last_one_catches_up(
    hub, client: HfApi, pipe, tmp_path: Path, quick, caplog
) -> None:
    folder = tmp_path / "run"
    pusher = Pusher(hub_options("org/failing"), folder, client)
    hub.fail("POST", COMMIT, status=500, times=9)
    save = lambda snapshot: export(pipe, snapshot, card_of(pipe))  # noqa: E731
    for step in (1, 2, 3):
        assert pusher.push_soon(step, save)
        pusher._under_way.exception()
    export(pipe, folder, card_of(pipe))
    pusher.finish()
    reports = [record for record in caplog.records if "failed" in record.getMessage()]
    assert len(reports) == 1 and "HTTP 500" in reports[0].getMessage() and "Training continues" in reports[0].getMessage()
    assert hub.titles("org/failing") == ["Training done", "initial commit"]


def test_snapshot_that_cannot_be_written_is_reported_once_and_ends_nothing(hub, client, pipe, tmp_path, caplog) -> None:
    pusher = Pusher(hub_options("org/full"), tmp_path / "run", client)
    for error in (OSError(28, "No space left on device"), OSError(5, "Input/output error"), ValueError("a doubt")):
        assert not pusher.push_soon(1, Mock(side_effect=error))
        assert not (tmp_path / "run" / ".push").exists(), "what is left of it takes room"
    assert len(caplog.records) == 1 and "No space left on device" in caplog.text
    with pytest.raises(Stopped):
        pusher.push_soon(1, Mock(side_effect=Stopped("SIGTERM")))
    assert pusher.push_soon(2, lambda snapshot: export(pipe, snapshot, card_of(pipe)))
    assert pusher._under_way.exception() is None


def test_private_run_does_not_begin_with_a_public_repository(hub, client: HfApi, tmp_path: Path) -> None:
    client.create_repo("org/public-before")
    with pytest.raises(ConfigError, match=r"--hub_private.*is public"):
        Pusher(hub_options("org/public-before", hub_private=True), tmp_path / "run", client)


def test_stalled_push_is_given_up_after_a_signal(hub, client: HfApi, pipe, tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr("ddpm_pipeline.training.stop.LONGEST_PUSH", 0.3)
    folder = tmp_path / "run"

    def save(target: Path) -> None:
        export(pipe, target, card_of(pipe))

    save(folder)
    hub.fail("POST", COMMIT, stall=2.0, status=500, times=100)
    for push_before in (False, True):
        stalled, stop = (
            Pusher(hub_options("org/stalled", hub_private=True, push_logs=True), folder, client),
            StopRequest(None, 0),
        )
        assert not push_before or stalled.push_soon(1, save)
        stop._on_signal(signal.SIGTERM, None)
        began = time.monotonic()
        with pytest.raises(PushError, match=r"given up(.|\n)*push \S+/run org/stalled --private --message 'Training done'"):
            stalled.finish(stop)
        assert time.monotonic() - began < 1.5
    assert f"push {folder / '.push'} org/stalled --private --message 'Training in progress, step 1'" in caplog.text
    assert (folder / ".push" / "model_index.json").is_file(), "what the command pushes"
