"""Going on with changed things: what a resumed run compares, checkpoints that do not fit, and models made of checkpoints."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_pipeline.training import TrainingOptions, train
from training_helpers import quick_options


def picture(seed: int, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8)).save(file)


def captions(folder: Path, last: str) -> None:
    lines = [f"{seed}.png,a grey square number {seed}\n" for seed in range(5)]
    (folder / "metadata.csv").write_text("".join(["file_name,text\n", *lines, f"5.png,{last}\n"]))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of six updates with checkpoints after two, four and six, each made once: by classes, by captions, by neither."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in range(6):
        picture(seed, folder / "classes" / ("cat" if seed % 2 else "dog") / f"{seed}.png")
        picture(seed, folder / "captioned" / f"{seed}.png")
    captions(folder / "captioned", "a white square")
    base = quick_options(
        folder, max_train_steps=6, checkpoint_every=2, checkpoints_total_limit=9, num_samples=1, lr_warmup_steps=1,
    )  # fmt: skip
    options = {
        "plain": {"dataset": "digits", "split": "train[:20]"},
        "class": {"dataset": str(folder / "classes"), "condition": "class"},
        "text": {"dataset": str(folder / "captioned"), "condition": "text", "text_column": "text", "model": "tiny"},
    }
    made: dict[str, Path] = {}

    def run(kind: str, tmp_path: Path) -> tuple[dict, Path]:
        """The options and a copy of the folder, with the data that the options name."""
        given = {**base, **options[kind]}
        if kind not in made:
            made[kind] = train(TrainingOptions(**given, output_dir=str(folder / kind)))
        if kind != "plain":
            given["dataset"] = shutil.copytree(given["dataset"], tmp_path / "data")
            stored = made[kind] / "training_config.yaml"
            given["dataset"] = str(given["dataset"])
        copy = Path(shutil.copytree(made[kind], tmp_path / "model"))
        for file in (copy / "training_config.yaml", *copy.glob("checkpoints/*/training_config.yaml")):
            file.write_text(file.read_text().replace(options[kind]["dataset"], given["dataset"]))
            sign(file.parent) if file.parent != copy else None
        assert kind == "plain" or stored.is_file()
        return {**given, "output_dir": str(copy), "resume": "latest"}, copy

    return run


def sign(checkpoint: Path) -> None:
    """Write the manifest anew, as somebody who edits a checkpoint by hand might."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for name, listed in manifest["files"].items():
        content = (checkpoint / name).read_bytes()
        listed |= {"size": len(content), "blake2b": hashlib.blake2b(content).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
