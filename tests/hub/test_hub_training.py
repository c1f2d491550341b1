"""train.py and evaluate.py with models and data sets of a Hub that fails: real runs, most of them in one fresh process."""

import json
import sys

import numpy as np
import pytest
from huggingface_hub import HfApi, ModelCard
from safetensors.numpy import load_file

import hub_server
from helpers import run_limited
from hub_fixtures import ROOT, environment, run_checks
from hub_models import early_repository
from text_models import make_unet

ARGUMENTS = [
    "--num_train_timesteps", "8", "--beta_schedule", "squaredcos_cap_v2", "--batch_size", "8", "--max_train_steps", "6",
    "--preview_every", "2", "--preview_images", "2", "--preview_inference_steps", "2", "--num_samples", "4",
    "--log_every", "3", "--checkpoint_every", "0", "--num_cpu_threads", "1", "--lr_warmup_steps", "1", "--fit_noises", "0",
    "--dataset", "org/pictures", "--seed", "3",
]  # fmt: skip
UNET = {
    "layers_per_block": 1, "block_out_channels": [4, 8], "norm_num_groups": 2,
    "down_block_types": ["DownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"],
}  # fmt: skip
EXTRACTOR = """
import torch

def make():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
"""

RUNS = (
    f"""
import contextlib, io, os, sys
from pathlib import Path

ARGUMENTS = ["--model", "unet.json", *{ARGUMENTS!r}]
"""
    + """

def run(output, *arguments, token=os.environ["WRITE"]):
    from dataclasses import replace
    from ddpm_pipeline.hub import push
    from ddpm_pipeline.training import pusher, stop
    from ddpm_pipeline.training.__main__ import main
    stop.end_soon = lambda status: None  # which ends the process, and this one has more to check
    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token
    pusher.push = lambda folder, repo, options, **k: push(folder, repo, replace(options, first_wait=0.01), **k)
    sys.argv = ["train.py", *ARGUMENTS, "--output_dir", output, *arguments]
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        try:
            main()
        except SystemExit as end:
            return (end.code, errors.getvalue())
    return (0, errors.getvalue())

def check_data_set_is_pushed():
    import numpy as np
    from datasets import ClassLabel, Dataset, Features, Image
    images = np.random.default_rng(0).integers(0, 255, (24, 8, 8), dtype=np.uint8)
    from PIL import Image as Picture
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    rows = {"image": [Picture.fromarray(image) for image in images], "label": [i % 2 for i in range(24)]}
    os.environ["HF_TOKEN"] = os.environ["WRITE"]
    Dataset.from_dict(rows, features=features).push_to_hub("org/pictures")
    np.save("pictures.npy", images)

def check_data_set_from_the_hub_is_read_as_it_was():
    import numpy as np
    from ddpm_pipeline.data import DataOptions, load_images
    data = load_images(DataOptions("org/pictures"))
    assert (data.size, data.channels, data.class_names, data.name) == ((8, 8), 1, ["a", "b"], "org/pictures")
    assert (data.pixels(range(24)).numpy()[:, 0] == np.load("pictures.npy")).all()

def check_data_set_from_the_hub_is_streamed():
    import numpy as np
    from ddpm_pipeline.data import ConditionColumns, DataOptions, open_stream
    from ddpm_pipeline.data.options import TrainingDataOptions
    from ddpm_pipeline.training.batches import BatchPlan, batch_loader
    expected = np.load("pictures.npy")
    data = open_stream(DataOptions("org/pictures", resolution=8, channels=1), ConditionColumns("class"))
    assert (data.name, data.class_names, data.num_images) == ("org/pictures", ["a", "b"], None)
    assert (data.first(100).numpy()[:, 0] == expected).all()
    for workers in (0, 2):
        options = TrainingDataOptions(dataloader_num_workers=workers, shuffle_buffer=5)
        batches = batch_loader(data, BatchPlan(0, 4), None, range(6), options)
        images = np.concatenate([batch["pixels"].numpy()[:, 0] for batch in batches])
        assert sorted(image.tobytes() for image in images) == sorted(image.tobytes() for image in expected), workers
    stored = data.stored(10, "stored")
    assert (stored.pixels(range(10)).numpy()[:, 0] == expected[:10]).all()

def check_loose_files_on_the_hub_are_streamed():
    import io
    import numpy as np
    from datasets import load_dataset
    from huggingface_hub import HfApi
    from PIL import Image as Picture
    from ddpm_pipeline.data import ConditionColumns, DataOptions, open_stream
    api = HfApi(token=os.environ["WRITE"])
    api.create_repo("org/files", repo_type="dataset")
    expected = np.load("pictures.npy")
    for kind in ("a", "b"):
        os.makedirs(f"files/train/{kind}")
    for i in range(6):
        Picture.fromarray(expected[i]).save(f"files/train/{'ab'[i % 2]}/{i}.png")
    api.upload_folder(folder_path="files", repo_id="org/files", repo_type="dataset")
    data = open_stream(DataOptions("org/files", resolution=8, channels=1), ConditionColumns("class"))
    assert data.class_names == ["a", "b"]
    assert (data.first(9).numpy()[:, 0] == expected[[0, 2, 4, 1, 3, 5]]).all()

def check_missing_token_ends_the_run_before_it_starts():
    code, _ = run("none", "--push_to_hub", "--hub_model_id", "org/none", token=None)
    assert "hf auth login" in str(code), code
    code, _ = run("none", "--push_to_hub", "--hub_model_id", "org/none", "--overwrite", token=os.environ["READ"])
    assert "may not write there" in str(code), code
    assert not Path("none", "training_config.yaml").exists()

def check_run_without_a_hub():
    code, errors = run("quiet")
    assert code == 0, errors

def check_run_that_pushes():
    code, errors = run("pushed", "--push_to_hub", "--hub_model_id", "org/trained", "--push_every", "2", "--hub_private",
                       "--hub_license", "apache-2.0")
    assert code == 0, (code, errors)
    assert errors.count("pushing to org/trained failed") == 1 and "HTTP Request" not in errors, errors

def check_runs_with_conditions_push_models_that_load_everywhere():
    import numpy as np
    import torch
    from diffusers import DDPMPipeline, DiffusionPipeline, IFPipeline
    from huggingface_hub import hf_hub_download
    from ddpm_pipeline import AlphaDDPMPipeline, AlphaDDPMTextToImagePipeline

    def draw(pipe, **call):
        pipe.set_progress_bar_config(disable=True)
        return pipe(**call, generator=torch.Generator().manual_seed(0), num_inference_steps=8, output_type="np").images

    ours = {"text": (AlphaDDPMTextToImagePipeline, {"prompt": "b"}), "class": (AlphaDDPMPipeline, {"class_labels": "b"})}
    for kind, (our_class, call) in ours.items():
        code, errors = run(kind, "--condition", kind, "--model", f"{kind}.json", "--max_train_steps", "2",
                           "--push_to_hub", "--hub_model_id", f"org/trained-{kind}")
        assert code == 0, (code, errors)
        pipe = our_class.from_pretrained(f"org/trained-{kind}")
        drawn = draw(pipe, **call)
        assert np.abs(drawn - draw(our_class.from_pretrained(kind), **call)).max() <= 1e-6
        stock = DiffusionPipeline.from_pretrained(f"org/trained-{kind}")
        assert type(stock) is (IFPipeline if kind == "text" else DDPMPipeline)
        if kind == "text":
            guided = {**call, "guidance_scale": 2.0}
            assert np.abs(draw(pipe, **guided) - draw(stock, **guided)).max() <= 1e-3
        example = next(iter(call)) if kind == "class" else "pipe('b'"
        card = Path(hf_hub_download(f"org/trained-{kind}", "README.md")).read_text()
        assert example in card and our_class.__name__ in card and f"org/trained-{kind}" in card, card

def check_run_whose_last_push_fails():
    code, errors = run("stranded", "--push_to_hub", "--hub_model_id", "org/stranded")
    assert code == 3, (code, errors)
    assert "python -m ddpm_pipeline.hub push stranded org/stranded" in errors and "Traceback" not in errors, errors

def evaluated(model, *arguments):
    from ddpm_pipeline.evaluation import evaluate
    from ddpm_pipeline.evaluation.options import parse_options
    return evaluate(parse_options([
        "--model", model, "--dataset", "org/pictures", "--split", "train[:20]", "--num_likelihood_images", "3",
        "--num_images", "6", "--batch_size", "4", "--features", "extractor:make", "--num_cpu_threads", "1", *arguments,
    ]))

def check_stock_repository_is_evaluated_on_a_data_set_of_the_hub():
    from ddpm_pipeline import AlphaDDPMPipeline
    found = evaluated("org/early", "--num_inference_steps", "5", "--output", "early.json")
    assert (found["dataset"], found["quality"]["num_real"], found["quality"]["num_generated"]) == ("org/pictures", 20, 6)
    assert (found["bits_per_dim"]["num_images"], found["bits_per_dim"]["variance_type"]) == (3, "fixed_large")
    AlphaDDPMPipeline.from_pretrained("org/early").save_pretrained("early")
    saved = evaluated("early", "--num_inference_steps", "5")
    assert [found[part] for part in ("bits_per_dim", "quality")] == [saved[part] for part in ("bits_per_dim", "quality")]
    assert Path("early.json").is_file() and Path("early", "evaluation.json").is_file()

def check_figures_go_to_a_card_that_was_edited_on_the_hub():
    import json
    from huggingface_hub import HfApi, ModelCard, hf_hub_download
    from ddpm_pipeline.hub.__main__ import main
    os.environ["HF_TOKEN"] = os.environ["WRITE"]
    assert main(["push", "pushed", "org/measured"]) == 0
    text = Path(hf_hub_download("org/measured", "README.md")).read_text()
    assert "Not measured yet." in text
    edited = text.replace("# trained", "# A title of mine").replace("license: apache-2.0", "license: mit")
    assert edited != text
    HfApi().upload_file(path_or_fileobj=edited.encode(), path_in_repo="README.md", repo_id="org/measured")
    found = evaluated("pushed")
    assert main(["push", "pushed", "org/measured"]) == 0
    card = ModelCard.load("org/measured")
    card.validate()
    assert "# A title of mine" in card.text and "Not measured yet." not in card.text and card.data.license == "mit"
    figures = {one.metric_type: one for one in card.data.eval_results}
    assert set(figures) == {"bits-dim", "fid", "kid", "precision", "recall"}
    assert figures["bits-dim"].metric_value == found["bits_per_dim"]["total"]
    assert figures["fid"].metric_value == found["quality"]["fid"] and figures["fid"].dataset_name == "org/pictures"
    assert figures["fid"].metric_args == {
        "num_images": 6, "steps": 8, "scheduler": "AlphaDDPMScheduler", "features": "Sequential", "real_images": 20, "seed": 0
    }
    assert json.loads(Path(hf_hub_download("org/measured", "evaluation.json")).read_text()) == found
"""
)


@pytest.fixture(scope="module")
def runs(hub: hub_server.Hub, tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "unet.json").write_text(json.dumps(UNET))
    (folder / "class.json").write_text(json.dumps(UNET))
    (folder / "text.json").write_text(json.dumps(dict(make_unet(cross_attention_dim=64).config)))
    (folder / "extractor.py").write_text(EXTRACTOR)
    early_repository(folder / "early-layout")
    files = [path for path in (folder / "early-layout").iterdir() if path.is_file()]
    hub.write("org/early", {path.name: path.read_bytes() for path in files})
    hub.fail("POST", "/models/org/trained/commit/", status=500, times=3)  # all attempts of the first push
    hub.fail("POST", "/models/org/stranded/commit/", status=500, times=1000)
    env = environment(
        hub, folder / "home", WRITE=hub_server.WRITE_TOKEN, READ=hub_server.READ_TOKEN,
        CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    outcome = run_checks(RUNS, env, folder)
    hub.heal()
    return {**outcome, "folder": folder}


CHECKS = [line[4:].split("(")[0] for line in RUNS.splitlines() if line.startswith("def check_")]


@pytest.mark.parametrize("check", CHECKS)
def test_run(runs: dict, check: str) -> None:
    assert runs[check] == "passed", runs[check]


def test_pushing_changes_nothing_in_the_training(runs: dict) -> None:
    def weights(run: str) -> dict[str, np.ndarray]:
        return load_file(runs["folder"] / run / "unet" / "diffusion_pytorch_model.safetensors")

    quiet = weights("quiet")
    for run in ("pushed", "stranded"):
        for name, tensor in weights(run).items():
            assert np.array_equal(tensor, quiet[name]), (run, name)
        assert (runs["folder"] / run / "samples.png").read_bytes() == (runs["folder"] / "quiet" / "samples.png").read_bytes()


def test_pushed_run_is_on_the_hub_with_its_card(hub: hub_server.Hub, runs: dict) -> None:
    assert hub.titles("org/trained")[0] == "Training done" and hub.repos["models", "org/trained"]["private"]
    files = hub.files("org/trained")
    assert {"samples.png", "process.png", "README.md", "unet/diffusion_pytorch_model.safetensors"} <= files
    assert not any("checkpoint" in name or "optimizer" in name or name.endswith((".jsonl", ".log", ".yaml")) for name in files)
    folder = runs["folder"] / "pushed"
    for name in ("unet/diffusion_pytorch_model.safetensors", "samples.png", "process.png"):
        assert hub.read("org/trained", name) == (folder / name).read_bytes()
    assert not (folder / ".push").exists()
    text = hub.read("org/trained", "README.md").decode()
    for known in ("org/trained", "24 images of `org/pictures`", "| updates | 6 |", "| seed | 3 |", "--dataset org/pictures",
                  "--num_train_timesteps 8", "Not measured yet.", "![samples](samples.png)", "process.png"):  # fmt: skip
        assert known in text, known
    for private in (str(runs["folder"]), "/home", hub_server.WRITE_TOKEN, "output_dir", "/tmp"):
        assert private not in text, private
    card = ModelCard(text)
    assert card.data.license == "apache-2.0" and card.data.datasets == ["org/pictures"] and card.data.eval_results is None


def test_printed_command_pushes_the_finished_run(hub: hub_server.Hub, runs: dict) -> None:
    assert runs["check_run_whose_last_push_fails"] == "passed"
    assert "model_index.json" not in hub.files("org/stranded")
    command = [sys.executable, "-m", "ddpm_pipeline.hub", "push", "stranded", "org/stranded"]
    env = environment(hub, runs["folder"] / "home", hub_server.WRITE_TOKEN)
    done = run_limited(command, timeout=60, env=env, cwd=runs["folder"])
    assert done.returncode == 0, done.stderr
    assert {"samples.png", "model_index.json", "README.md"} <= hub.files("org/stranded")
    assert HfApi(endpoint=hub.url).model_info("org/stranded").sha


@pytest.mark.slow
def test_two_processes_push_what_one_would(hub: hub_server.Hub, runs: dict) -> None:
    folder = runs["folder"]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        str(ROOT / "training" / "train.py"), "--model", "unet.json", *ARGUMENTS, "--push_to_hub", "--hub_model_id", "org/two",
        "--push_every", "2", "--push_logs", "--output_dir", "two",
    ]  # fmt: skip
    env = environment(hub, folder / "home", hub_server.WRITE_TOKEN, ACCELERATE_USE_CPU="true", CUDA_VISIBLE_DEVICES="")
    done = run_limited(command, timeout=200, env=env, cwd=folder)
    assert done.returncode == 0, done.stderr
    titles = hub.titles("org/two")
    assert titles[0] == "Training done" and titles[-2:] == ["Training in progress, step 2", "initial commit"]
    assert len(titles) == len(set(titles)), "only one of the processes pushes"
    for name in ("unet/diffusion_pytorch_model.safetensors", "samples.png", "process.png", "metrics.jsonl"):
        assert hub.read("org/two", name) == (folder / "two" / name).read_bytes()
    assert "accelerate launch --num_processes 2 training/train.py" in hub.read("org/two", "README.md").decode()
    one, two = (load_file(folder / run / "unet" / "diffusion_pytorch_model.safetensors") for run in ("quiet", "two"))
    for name, tensor in one.items():
        np.testing.assert_allclose(two[name], tensor, atol=1e-5)
