"""Pushing: one commit with what belongs into it, and a Hub that refuses or fails in every way."""

import json
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess
from typing import ClassVar

import pytest
from diffusers import UNet2DModel
from huggingface_hub import HfApi, close_session

import hub_server
from ddpm_pipeline import AlphaDDPMPipeline, AlphaDDPMScheduler
from ddpm_pipeline.hub import PushError, PushOptions, push
from ddpm_pipeline.hub.__main__ import main
from helpers import run_limited
from hub_fixtures import environment

QUICK = PushOptions(first_wait=0.01)
MODEL_FILES = {
    "README.md", "model_index.json", "modular_config.json", *AlphaDDPMPipeline.shipped_files(), "samples.png",
    "scheduler/scheduler_config.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", ".gitattributes",
}  # fmt: skip


# ---- what is pushed -------------------------------------------------------------------------------


def test_push_is_one_commit_of_model_card_and_pictures(hub, client: HfApi, folder: Path) -> None:
    address = push(folder, "org/plain", PushOptions(commit_message="Here it is"), api=client)
    assert hub.files("org/plain") == MODEL_FILES
    assert hub.titles("org/plain") == ["Here it is", "initial commit"]
    assert address.startswith(f"{hub.url}/org/plain/commit/")
    assert not hub.repos["models", "org/plain"]["private"]


def test_further_files_are_pushed_where_asked_for(hub, client: HfApi, folder: Path) -> None:
    push(folder, "org/logs", PushOptions(private=True, include=["metrics.jsonl"]), api=client)
    assert hub.files("org/logs") == {*MODEL_FILES, "metrics.jsonl"}
    assert hub.repos["models", "org/logs"]["private"]


def test_push_to_a_branch_and_as_a_pull_request_leave_main_as_it_is(hub, client: HfApi, folder: Path) -> None:
    client.create_repo("org/reviewed")
    client.create_branch("org/reviewed", branch="next")
    push(folder, "org/reviewed", PushOptions(revision="next", commit_message="On a branch"), api=client)
    push(folder, "org/reviewed", PushOptions(create_pr=True, commit_message="For review"), api=client)
    assert hub.files("org/reviewed") == {".gitattributes"}
    for branch, title in {"next": "On a branch", "refs/pr/1": "For review"}.items():
        assert hub.files("org/reviewed", branch=branch) == MODEL_FILES
        assert hub.head("org/reviewed", branch=branch)["title"] == title


def test_second_push_without_a_change_makes_no_commit(hub, client: HfApi, folder: Path) -> None:
    first = push(folder, "org/twice", api=client)
    assert push(folder, "org/twice", api=client) == first
    assert len(hub.titles("org/twice")) == 2


SMALL_SHARDS = "40KB"
WEIGHTS = "unet/diffusion_pytorch_model"


def resaved(pipe: AlphaDDPMPipeline, folder: Path, **options) -> Path:
    pipe.save_pretrained(folder, **options)
    return folder


def test_no_weights_of_an_earlier_model_stay_beside_those_that_are_pushed(hub, client, pipe, tmp_path: Path) -> None:
    """Of shards with their index, which loaders prefer, of a pickle, of a tokenizer and of a component that is no more."""
    push(resaved(pipe, tmp_path / "sharded", max_shard_size=SMALL_SHARDS), "org/stale", api=client)
    index = json.loads(hub.read("org/stale", "model_index.json")) | {"text_encoder": ["transformers", "CLIPTextModel"]}
    theirs = {
        "unet/notes.md": b"mine", "unet/pytorch_lora_weights.safetensors": b"mine", "samples/model.safetensors": b"mine",
        "vocab.json": b"mine", "text_encoder/mine.json": b"mine", "text_encoder/model.safetensors.txt": b"mine",
    }  # fmt: skip
    hub.write("org/stale", {
        "model_index.json": json.dumps(index).encode(), "unet/diffusion_pytorch_model.bin": b"old",
        "unet/special_tokens_map.json": b"{}", "text_encoder/config.json": b"{}", "text_encoder/model.safetensors": b"old",
        "text_encoder/model.fp16.safetensors": b"old", **theirs,
    })  # fmt: skip
    assert f"{WEIGHTS}.safetensors.index.json" in hub.files("org/stale")
    push(resaved(pipe, tmp_path / "whole"), "org/stale", api=client)
    assert hub.files("org/stale") == (MODEL_FILES - {"samples.png"}) | theirs.keys()
    assert len(hub.titles("org/stale")) == 4, "one commit a push"
    assert all(hub.read("org/stale", name) == b"mine" for name in theirs)
    push(resaved(pipe, tmp_path / "again", max_shard_size=SMALL_SHARDS), "org/stale", api=client)
    assert f"{WEIGHTS}.safetensors" not in hub.files("org/stale")


def test_variants_stay_until_the_model_they_are_of_is_replaced(hub, client, pipe, tmp_path: Path) -> None:
    def variants() -> set[str]:
        return {name.removeprefix(WEIGHTS) for name in hub.files("org/variants") if name.startswith(WEIGHTS)}

    plain = resaved(pipe, tmp_path / "plain")
    push(plain, "org/variants", api=client)
    shards = resaved(pipe, tmp_path / "shards", variant="fp16", max_shard_size=SMALL_SHARDS)
    push(shards, "org/variants", api=client)
    assert ".safetensors" in variants() and ".safetensors.index.fp16.json" in variants() and len(variants()) > 3
    push(resaved(pipe, tmp_path / "fp16", variant="fp16"), "org/variants", api=client)
    push(plain, "org/variants", api=client)
    assert variants() == {".safetensors", ".fp16.safetensors"}
    other = UNet2DModel.from_config(pipe.unet.config)
    push(resaved(AlphaDDPMPipeline(other, pipe.scheduler), tmp_path / "other"), "org/variants", api=client)
    assert variants() == {".safetensors"}


def test_repository_whose_index_is_broken_can_be_pushed_to(hub, client: HfApi, folder: Path) -> None:
    for index in (b"{", b"[]", b"\xff", b'{"unet": 3}'):
        hub.write("org/broken", {"model_index.json": index, "unet/diffusion_pytorch_model.bin": b"old"})
        push(folder, "org/broken", api=client)
        assert hub.files("org/broken") == MODEL_FILES


def test_push_refuses_what_must_not_leave(client: HfApi, folder: Path, tmp_path: Path) -> None:
    (folder / "unet" / "weights.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"weights\.bin is a pickle"):
        push(folder, "org/refused", api=client)
    (folder / "unet" / "weights.bin").unlink()
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    (folder / "unet" / "link.json").symlink_to(secret)
    with pytest.raises(ValueError, match="link to a file outside"):
        push(folder, "org/refused", api=client)
    (folder / "unet" / "link.json").unlink()
    (folder / "unet" / ".env").write_text("")
    with pytest.raises(ValueError, match="hidden"):
        push(folder, "org/refused", api=client)
    (folder / "unet" / ".env").unlink()
    with pytest.raises(ValueError, match="not a pipeline folder"):
        push(tmp_path, "org/refused", api=client)
    for pattern in ("/etc/passwd", ""):
        with pytest.raises(ValueError, match=f"'{pattern}' must name files relative to"):
            push(folder, "org/refused", PushOptions(include=[pattern]), api=client)


def test_format_follows_what_the_pipeline_class_says(pipe, tmp_path: Path) -> None:
    """As for a text model, whose stock class wants null components and an option in the index."""

    class OtherPipeline(AlphaDDPMPipeline):
        _stock_class = "IFPipeline"
        _stock_components: ClassVar = {"safety_checker": [None, None], "requires_safety_checker": False}

    OtherPipeline(pipe.unet, pipe.scheduler).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "IFPipeline" and index["safety_checker"] == [None, None]
    assert index["requires_safety_checker"] is False and index["scheduler"] == ["diffusers", "DDPMScheduler"]
    for name, code in OtherPipeline.shipped_code().items():
        assert (tmp_path / name).read_text("utf-8") == code
    again = OtherPipeline.from_pretrained(tmp_path)
    assert isinstance(again, OtherPipeline) and type(again.scheduler) is AlphaDDPMScheduler


# ---- a Hub that fails -----------------------------------------------------------------------------

COMMIT, LFS, PREUPLOAD = r"/commit/main", r"/_lfs/[0-9a-f]{64}$", "/preupload/"
FAULTS = {
    "500 at the commit": ("POST", COMMIT, {"status": 500, "times": 2}),
    "503 at the listing": ("POST", PREUPLOAD, {"status": 503, "times": 1}),
    "500 at making the repository": ("POST", "/api/repos/create", {"status": 500}),
    "412 at the commit": ("POST", COMMIT, {"status": 412, "times": 2}),
    "400 of the upload": ("PUT", LFS, {"status": 400}),
    "address of the upload expired": ("PUT", LFS, {"status": 403}),
    "connection dropped in the middle of the upload": ("PUT", LFS, {"drop": True}),
    "connection dropped at the commit": ("POST", COMMIT, {"drop": True, "times": 2}),
    "answer to the commit lost": ("POST", COMMIT, {"lose_answer": True}),
    "timeout at the commit": ("POST", COMMIT, {"stall": 3.0, "status": 500}),
    "timeout of the upload": ("PUT", LFS, {"stall": 3.0, "drop": True}),
}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that waits a second for an answer, not ten, and starts its own retries at once."""
    from huggingface_hub.utils import _http, set_client_factory

    original = _http.default_client_factory

    def factory():
        session = original()
        session.timeout = 1.0
        return session

    set_client_factory(factory)
    real_sleep = time.sleep
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: real_sleep(min(seconds, 0.05)))
    yield
    set_client_factory(original)
    close_session()


@pytest.mark.parametrize("fault", FAULTS)
def test_push_gets_through_in_the_end(hub, client: HfApi, folder: Path, impatient, fault: str) -> None:
    method, path, how = FAULTS[fault]
    hub.fail(method, path, **how)
    repo_id = f"org/{fault.replace(' ', '-')}"
    if method == "PUT":  # contents that no test before has uploaded
        (folder / "samples.png").write_bytes(b"\x89PNG\0" + fault.encode() * 10_000)
    push(folder, repo_id, QUICK, api=client)
    assert all(fault.times == 0 for fault in hub.faults), "the fault did not happen"
    assert hub.files(repo_id) == MODEL_FILES
    for name in ("unet/diffusion_pytorch_model.safetensors", "samples.png", "model_index.json"):
        assert hub.read(repo_id, name) == (folder / name).read_bytes()


def test_push_that_never_gets_through_names_the_command(hub, client: HfApi, folder: Path) -> None:
    fault = hub.fail("POST", COMMIT, status=500, times=100)
    with pytest.raises(PushError, match=r"HTTP 500: Internal Server Error") as error:
        push(folder, "org/never", PushOptions(private=True, attempts=3, first_wait=0.01), api=client)
    assert 100 - fault.times == 3
    assert f"python -m ddpm_pipeline.hub push {folder} org/never --private" in str(error.value)
    assert "README.md" not in hub.files("org/never"), "a commit is whole or not there"


REFUSALS = {
    401: ("POST", COMMIT, "hf auth login"),
    403: ("POST", PREUPLOAD, "right to write"),
    404: ("POST", COMMIT, "name of the repository"),
    **{status: ("POST", COMMIT, f"org/refused-{status}") for status in (400, 402, 409, 410, 413, 422, 451)},
}


@pytest.mark.parametrize("status", REFUSALS)
def test_refused_push_is_not_tried_again(hub, client: HfApi, folder: Path, status: int) -> None:
    method, path, advice = REFUSALS[status]
    fault = hub.fail(method, path, status=status, times=100)
    with pytest.raises(PushError, match=advice):
        push(folder, f"org/refused-{status}", PushOptions(first_wait=30), api=client)
    assert 100 - fault.times == 1


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [({"Retry-After": "41"}, 41), ({"RateLimit": '"api";r=0;t=42'}, 42), ({"Retry-After": "9999"}, 300), ({}, 2)],
)
def test_push_waits_as_long_as_the_hub_asks_for(hub, client: HfApi, folder: Path, monkeypatch, headers, seconds: int) -> None:
    waits = []
    monkeypatch.setattr("ddpm_pipeline.hub.upload.time.sleep", waits.append)
    hub.fail("POST", COMMIT, status=429, headers=headers)
    push(folder, f"org/limited-{seconds}", api=client)
    assert [wait for wait in waits if wait] == [seconds]  # the server sleeps too


def test_push_is_not_tried_again_where_the_user_is_offline(client: HfApi, folder: Path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    close_session()  # it may have been made before
    monkeypatch.setattr("ddpm_pipeline.hub.upload.time.sleep", lambda seconds: pytest.fail("a second try"))
    with pytest.raises(PushError, match=r"offline(.|\n)*hub push"):
        push(folder, "org/offline", api=client)
    close_session()


def test_push_to_a_branch_that_is_missing_is_refused_at_once(hub, client: HfApi, folder: Path) -> None:
    with pytest.raises(PushError, match=r"hf repos branch create org/no-branch next"):
        push(folder, "org/no-branch", PushOptions(revision="next", first_wait=30), api=client)
    assert hub.files("org/no-branch") == {".gitattributes"}


def test_private_push_into_a_public_repository_is_refused_before_any_upload(hub, client: HfApi, folder: Path) -> None:
    client.create_repo("org/public")
    hub.requests.clear()
    with pytest.raises(PushError, match=r"is public.*private"):
        push(folder, "org/public", PushOptions(private=True, first_wait=30), api=client)
    assert {method for method, path in hub.requests if path != "/api/repos/create"} == {"GET"}
    hub.repos["models", "org/public"]["private"] = True  # what the message says to do
    push(folder, "org/public", PushOptions(private=True), api=client)
    assert hub.files("org/public") == MODEL_FILES


def test_advised_command_is_the_same_push(hub, client: HfApi, folder: Path, pipe, monkeypatch) -> None:
    """Whatever options it had: the command of the message is parsed as the command line would."""
    asked = []
    monkeypatch.setattr("ddpm_pipeline.hub.__main__.push", lambda *arguments: asked.append(arguments) or "address")
    hub.fail("POST", "/api/repos/create", status=500, times=100)
    changes = ({}, {"private": True}, {"revision": "a b"}, {"commit_message": "It's done\nfor now"}, {"create_pr": True},
               {"include": ["*.jsonl", "logs/*"], "attempts": 1})  # fmt: skip
    for change in (*changes, {name: value for one in changes for name, value in one.items()}):
        options = PushOptions(**{"attempts": 2, "first_wait": 0.0, **change})
        with pytest.raises(PushError) as error:
            push(folder, "org/again", options, api=client)
        command = shlex.split(str(error.value).split("later with\n  ")[1])
        assert command[:3] == ["python", "-m", "ddpm_pipeline.hub"] and main(command[3:]) == 0
        assert asked.pop() == (folder, "org/again", replace(options, include=list(options.include), first_wait=2.0))

    monkeypatch.setattr("ddpm_pipeline.hub.upload.HfApi", lambda token: client)
    monkeypatch.setattr("ddpm_pipeline.hub.upload.time.sleep", lambda seconds: None)
    call = r"pipe\.push_to_hub\('org/again', variant='fp16', private=True, commit_message='Half', create_pr=True\)$"
    with pytest.raises(PushError, match=call):  # of a pipeline in memory, whose temporary folder is gone by then
        pipe.push_to_hub("org/again", variant="fp16", private=True, commit_message="Half", create_pr=True, token="hf_secret")


def test_edit_made_while_pushing_is_kept(hub, client: HfApi, folder: Path) -> None:
    """Somebody edits the card between our reading it and our commit: the Hub answers 412, and we pour into theirs."""
    push(folder, "org/race", api=client)
    edit = hub.read("org/race", "README.md").decode().replace("# ddpm", "# Edited meanwhile")
    (folder / "samples.png").write_bytes(b"\x89PNG\0 newer")
    create_commit = client.create_commit
    edits = [edit]

    def late_commit(*args, **kwargs):
        if edits:
            hub.write("org/race", {"README.md": edits.pop().encode()})
        return create_commit(*args, **kwargs)

    client.create_commit = late_commit
    push(folder, "org/race", QUICK, api=client)
    assert "# Edited meanwhile" in hub.read("org/race", "README.md").decode()
    assert hub.read("org/race", "samples.png") == b"\x89PNG\0 newer"
    assert ("POST", "/api/models/org/race/commit/main") in hub.requests


# ---- the command ----------------------------------------------------------------------------------


def test_command_line_pushes_a_folder(hub, client: HfApi, folder: Path, tmp_path: Path, monkeypatch) -> None:
    def run(*flags: str, token: str = hub_server.WRITE_TOKEN) -> CompletedProcess:
        command = [sys.executable, "-m", "ddpm_pipeline.hub", "push", str(folder), "org/by-command", *flags]
        return run_limited(command, timeout=60, env=environment(hub, tmp_path / "home", token))

    done = run("--private", "--include", "metrics.jsonl", "--include", "metric.jsonl", "--message", "From here")
    assert done.returncode == 0, done.stderr
    assert "--include metric.jsonl" in done.stderr and "--include metrics.jsonl" not in done.stderr
    assert done.stdout.startswith(hub.url) and hub.titles("org/by-command")[0] == "From here"
    assert hub.files("org/by-command") == {*MODEL_FILES, "metrics.jsonl"}
    assert hub.repos["models", "org/by-command"]["private"]
    refused = run("--attempts", "1", token=hub_server.READ_TOKEN)
    assert refused.returncode == 3 and refused.stderr.startswith("error: pushing to org/by-command failed (HTTP 403")
    assert "Traceback" not in refused.stderr

    # the other flags in this process
    monkeypatch.setattr("ddpm_pipeline.hub.upload.HfApi", lambda: client)
    client.create_branch("org/by-command", branch="next")
    push_here = ["push", str(folder), "org/by-command"]
    (folder / "samples.png").write_bytes(b"\x89PNG\0 newer")
    assert main([*push_here, "--revision", "next", "--message", "Next"]) == 0
    assert main([*push_here, "--create_pr", "--message", "Review"]) == 0
    titles = [hub.head("org/by-command", branch=branch)["title"] for branch in ("main", "next", "refs/pr/1")]
    assert titles == ["From here", "Next", "Review"]
    for pattern in ("**logs", "/absolute"):
        with pytest.raises(SystemExit, match="error: the pattern"):
            main([*push_here, "--include", pattern])
    (folder / "unet" / "weights.bin").write_bytes(b"")
    with pytest.raises(SystemExit, match=r"error: .* is a pickle"):
        main(push_here)
    with pytest.raises(SystemExit, match="2"):
        main([*push_here, "--attempts", "0"])
