"""Pushing: one commit with what belongs into it, cards that keep what was edited, and a Hub that fails in every way."""

import json
import os
import sys
import time
from pathlib import Path
from subprocess import CompletedProcess
from typing import ClassVar

import pytest
import torch
from diffusers import UNet2DModel
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results

import ddpm_pipeline
import hub_server
from ddpm_pipeline import AlphaDDPMPipeline, AlphaDDPMScheduler
from ddpm_pipeline.hub import (
    Measurement,
    PushError,
    PushOptions,
    TrainingFacts,
    build_card,
    export,
    push,
    record_evaluation,
    refresh_card,
)
from ddpm_pipeline.hub.__main__ import main
from helpers import run_limited
from hub_fixtures import environment


@pytest.fixture(scope="module")
def pipe() -> AlphaDDPMPipeline:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(4, 8), norm_num_groups=2,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return AlphaDDPMPipeline(unet, AlphaDDPMScheduler(20, beta_schedule="squaredcos_cap_v2"))


FIGURES = [
    Measurement("bits/dim", 2.345678, 1797, "digits", standard_error=0.01, settings={"steps": 1000, "form": "exact KLs"}),
    Measurement("FID", 1.5, 1797, "digits", settings={"steps": 100, "scheduler": "AlphaDDPMScheduler"}),
]
TRAINING = TrainingFacts("digits", 1797, "org/digits", {"updates": 7, "seed": 0}, "accelerate launch x")


def card_of(pipe: AlphaDDPMPipeline, **options) -> ModelCard:
    return build_card(pipe, **{"name": "ddpm", "training": TRAINING, **options})


@pytest.fixture
def folder(pipe: AlphaDDPMPipeline, tmp_path: Path) -> Path:
    """A finished run's folder, with what does not belong on the Hub beside the model."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "samples.png").write_bytes(b"\x89PNG\0")
    export(pipe, folder, card_of(pipe, pictures={"samples.png": "samples"}, license="apache-2.0"))
    for name in ("checkpoints/step-1/optimizer.bin", "logs/events", "train.log", "metrics.jsonl", "training_config.yaml"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("private\n")
    return folder


QUICK = PushOptions(first_wait=0.01)
MODEL_FILES = {
    "README.md", "model_index.json", *AlphaDDPMPipeline.shipped_files(), "samples.png",
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
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\nhf_" + "a" * 34)
    with pytest.raises(ValueError, match="token"):
        push(folder, "org/refused", api=client)


def test_format_follows_what_the_pipeline_class_says(pipe, tmp_path: Path) -> None:
    """As for a text model, whose stock class wants null components and an option in the index."""

    class OtherPipeline(AlphaDDPMPipeline):
        _stock_class = "IFPipeline"
        _stock_components: ClassVar = {"safety_checker": [None, None], "requires_safety_checker": False}

    OtherPipeline(pipe.unet, pipe.scheduler).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "IFPipeline" and index["safety_checker"] == [None, None]
    assert index["requires_safety_checker"] is False and index["scheduler"] == ["diffusers", "DDPMScheduler"]
    package = Path(ddpm_pipeline.__file__).parent
    for name, source in OtherPipeline.shipped_files().items():
        assert source.parent == package and (tmp_path / name).read_bytes() == source.read_bytes()
    again = OtherPipeline.from_pretrained(tmp_path)
    assert isinstance(again, OtherPipeline) and type(again.scheduler) is AlphaDDPMScheduler


# ---- what is on the disk --------------------------------------------------------------------------


def test_folder_is_no_pipeline_before_its_export_is_complete(pipe, tmp_path: Path, monkeypatch) -> None:
    """Interrupted after any number of its files, the last of which is the index, in whatever order the disk lists them."""
    replace, iterdir = os.replace, Path.iterdir
    complete = {"README.md", "model_index.json", "unet", "scheduler", *AlphaDDPMPipeline.shipped_files()}

    def interrupted(folder: Path, steps: int) -> list[str]:
        """The entries that an export placed, which is interrupted before it places one more."""
        placed = []

        def place(source: Path, target: Path) -> None:
            if Path(target).parent == folder:
                if len(placed) == steps:
                    raise KeyboardInterrupt
                placed.append(Path(target).name)
            replace(source, target)

        monkeypatch.setattr(os, "replace", place)
        monkeypatch.setattr(Path, "iterdir", lambda path: iter(sorted(iterdir(path), key=lambda one: one.name[0] != "m")))
        with pytest.raises(KeyboardInterrupt):
            export(pipe, folder, card_of(pipe))
        monkeypatch.undo()
        return placed

    for steps in range(len(complete)):
        folder = tmp_path / str(steps)
        folder.mkdir()
        (folder / "mine.txt").write_text("mine")
        placed = interrupted(folder, steps)
        assert {path.name for path in folder.iterdir()} == {"mine.txt", *placed} and len(placed) == steps
        assert "model_index.json" not in placed
    export(pipe, folder, card_of(pipe))
    AlphaDDPMPipeline.from_pretrained(folder)
    assert {path.name for path in folder.iterdir()} == {"mine.txt", *complete}
    assert (folder / "mine.txt").read_text() == "mine"


# ---- the card -------------------------------------------------------------------------------------


def test_card_says_what_is_known_and_passes_the_hub_s_validation(hub, client: HfApi, pipe, monkeypatch) -> None:
    card = card_of(pipe, evaluation=FIGURES, license="apache-2.0", pictures={"samples.png": "grid"})
    text = str(card)
    for known in ("1,797 images of `digits`", "![grid](samples.png)", "| updates | 7 |", "accelerate launch x", "apache-2.0",
                  "8x8", "squaredcos_cap_v2", "| bits/dim | 2.346 ± 0.01 | 1,797 |", "steps 1000", "fixed_small"):  # fmt: skip
        assert known in text, known
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    card.validate()
    again = ModelCard(text)
    assert again.data.library_name == "diffusers" and again.data.pipeline_tag == "unconditional-image-generation"
    assert again.data.datasets == ["org/digits"] and again.data.license == "apache-2.0"
    results = again.data.eval_results
    assert [(one.metric_name, one.metric_value) for one in results] == [("bits/dim", 2.345678), ("FID", 1.5)]
    assert results[0].metric_args == {"num_images": 1797, "steps": 1000, "form": "exact KLs"}
    assert not results[0].source_url and "pypi.org" not in text.split("---")[1]
    assert model_index_to_eval_results(again.data.to_dict()["model-index"])[0] == "ddpm"


def test_card_without_facts_invents_none(pipe) -> None:
    text = str(build_card(pipe, name="ddpm"))
    assert "trained from scratch" not in text and "Not measured" not in text and "![" not in text
    assert "eval_results" not in text and "model-index" not in text and "license" not in text
    assert "None" not in text.replace("Nonetheless", "")


def test_card_of_a_class_or_text_model_says_which_call_draws(folder: Path) -> None:
    def changed(file: str, **values) -> None:
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | values))

    changed("unet/config.json", num_class_embeds=11)
    text = str(build_card(folder, name="c", repo_id="org/c"))
    assert "class_labels=[0]" in text and "cannot be told a class" in text
    assert "image = pipe(num_inference_steps" not in text
    changed("model_index.json", text_encoder=["transformers", "CLIPTextModel"])
    text = str(build_card(folder, name="t", repo_id="org/t"))
    assert "AlphaDDPMTextToImagePipeline" in text and "pipeline_tag: text-to-image" in text
    with pytest.raises(ValueError, match="not a pipeline folder"):
        build_card(folder / "unet", name="u")


def test_example_of_a_card_outlives_pushes(hub, client: HfApi, folder: Path) -> None:
    """The label that a training run put into its card, whatever is pushed over it; but not for a model of another kind."""
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"num_class_embeds": 11}))
    example = "class_labels='nine', guidance_scale=3"
    (folder / "README.md").write_text(str(build_card(folder, name="c", example=example)))
    push(folder, "org/example", api=client)
    card = hub.read("org/example", "README.md").decode()
    assert card.count(f"pipe({example}, num_inference_steps=20)") == 2 and 'from_pretrained("org/example")' in card
    (folder / "README.md").unlink()
    push(folder, "org/example", api=client)
    assert hub.read("org/example", "README.md").decode() == card
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    push(folder, "org/example", api=client)
    card = hub.read("org/example", "README.md").decode()
    assert "pipe(num_inference_steps=20)" in card and "nine" not in card


def test_card_with_a_token_or_a_local_path_is_refused(pipe) -> None:
    with pytest.raises(ValueError, match="token"):
        card_of(pipe, training=TrainingFacts(facts={"seed": 0}, command="train --token hf_" + "x" * 30))
    with pytest.raises(ValueError, match="local path"):
        card_of(pipe, training=TrainingFacts(facts={"data": str(Path.home() / "pictures")}))


EDITED = """---
license: mit  # chosen by hand
tags:
- mine
---

# My title

My introduction, with `<!-- a comment -->`.

<!-- ddpm-pipeline: summary -->
old
<!-- /ddpm-pipeline: summary -->

<!-- ddpm-pipeline: evaluation -->
<!-- /ddpm-pipeline: evaluation -->

My last words.\r
"""


def test_edited_card_keeps_every_character_outside_our_sections(pipe) -> None:
    refreshed = refresh_card(EDITED, card_of(pipe))
    before, after = EDITED.split("\nold\n")
    assert refreshed.startswith(before) and refreshed.endswith(after)
    assert "8x8" in refreshed and "AlphaDDPMPipeline" not in refreshed, "a section that was removed stays so"
    assert refresh_card("# Mine alone\n", card_of(pipe)) == "# Mine alone\n"
    torn = EDITED.replace("<!-- /ddpm-pipeline: summary -->", "")
    assert refresh_card(torn, card_of(pipe)) == torn


def test_evaluation_replaces_ours_and_keeps_theirs(pipe) -> None:
    theirs = EvalResult("t", "d", "D", "fid", 3.0, source_name="somebody", source_url="https://example.org")
    older = EvalResult("t", "e", "E", "fid", 8.0, source_name="ddpm-pipeline", source_url="https://example.org")
    ours = Measurement("KID", 9.0, 10, "old").as_eval_result()
    data = ModelCardData(model_name="m", eval_results=[theirs, older, ours])
    existing = EDITED.replace("license: mit  # chosen by hand\ntags:\n- mine", data.to_yaml())
    refreshed = refresh_card(existing, card_of(pipe, evaluation=FIGURES))
    results = ModelCard(refreshed).data.eval_results
    assert sorted(one.metric_value for one in results) == [1.5, 2.345678, 3.0]
    assert "| FID | 1.5 | 1,797 |" in refreshed
    reset = refresh_card(refreshed, card_of(pipe, evaluation=[]))  # trained further: the figures are of other weights
    assert [one.metric_value for one in ModelCard(reset).data.eval_results] == [3.0]
    assert "Not measured yet." in reset


def test_evaluation_goes_into_a_folder_and_on_to_an_edited_card(hub, client: HfApi, folder: Path) -> None:
    push(folder, "org/evaluated", api=client)
    edited = hub.read("org/evaluated", "README.md").decode().replace("# ddpm", "# A better title")
    hub.write("org/evaluated", {"README.md": edited.encode()})
    record_evaluation(folder, FIGURES)
    push(folder, "org/evaluated", api=client)
    card = ModelCard(hub.read("org/evaluated", "README.md").decode())
    assert "# A better title" in card.text and "| FID | 1.5 |" in card.text and "| updates | 7 |" in card.text
    assert len(card.data.eval_results) == 2 and card.data.license == "apache-2.0"
    assert 'from_pretrained("org/evaluated")' in card.text


def test_blank_form_of_diffusers_is_replaced_and_a_filled_one_is_not(pipe) -> None:
    sentence = (
        "This is the model card of a 🧨 diffusers pipeline that has been pushed on the Hub. This model card has been "
        "automatically generated."
    )
    blank = str(ModelCard.from_template(ModelCardData(library_name="diffusers"), model_description=sentence))
    assert "AlphaDDPMPipeline" in refresh_card(blank, card_of(pipe))
    filled = blank.replace("[More Information Needed]", "Me", 1)
    assert refresh_card(filled, card_of(pipe)) == filled


# ---- a Hub that fails -----------------------------------------------------------------------------

COMMIT, LFS, PREUPLOAD = r"/commit/main", r"/_lfs/[0-9a-f]{64}$", "/preupload/"
FAULTS = {
    "500 at the commit": ("POST", COMMIT, {"status": 500, "times": 2}),
    "503 at the listing": ("POST", PREUPLOAD, {"status": 503, "times": 1}),
    "500 at making the repository": ("POST", "/api/repos/create", {"status": 500}),
    "401": ("POST", COMMIT, {"status": 401, "times": 2}),
    "403": ("POST", PREUPLOAD, {"status": 403}),
    "409 at the commit": ("POST", COMMIT, {"status": 409, "times": 2}),
    "412 at the commit": ("POST", COMMIT, {"status": 412, "times": 2}),
    "400 of the upload": ("PUT", LFS, {"status": 400}),
    "connection dropped in the middle of the upload": ("PUT", LFS, {"drop": True}),
    "connection dropped at the commit": ("POST", COMMIT, {"drop": True, "times": 2}),
    "answer to the commit lost": ("POST", COMMIT, {"lose_answer": True}),
    "timeout at the commit": ("POST", COMMIT, {"stall": 3.0, "status": 500}),
    "timeout of the upload": ("PUT", LFS, {"stall": 3.0, "drop": True}),
}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that waits a second for an answer, not ten, and starts its own retries at once."""
    from huggingface_hub.utils import _http, close_session, set_client_factory

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

    done = run("--private", "--include", "metrics.jsonl", "--message", "From here")
    assert done.returncode == 0, done.stderr
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
    (folder / "unet" / "weights.bin").write_bytes(b"")
    with pytest.raises(SystemExit, match=r"error: .* is a pickle"):
        main(push_here)
    with pytest.raises(SystemExit, match="2"):
        main([*push_here, "--attempts", "0"])
