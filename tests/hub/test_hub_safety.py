"""Folders and repositories that were made to do harm, or are just broken, end in a clear error: quickly, within memory."""

import contextlib
import json
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel

from ddpm_pipeline import AlphaDDPMPipeline, AlphaDDPMScheduler
from ddpm_pipeline.stock_format import check_folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a pipeline folder."""
    folder = tmp_path_factory.mktemp("sound")
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(4, 8), norm_num_groups=2,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    AlphaDDPMPipeline(unet, AlphaDDPMScheduler(20, beta_schedule="squaredcos_cap_v2")).save_pretrained(folder)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def with_values(content: bytes, **values: object) -> bytes:
    return json.dumps(json.loads(content) | values).encode()


@contextlib.contextmanager
def little_memory(more: int = 300 * 2**20) -> Iterator[None]:
    """Within, this process can take no more than so many bytes in addition to those it has."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


SCHEDULER, UNET, INDEX = "scheduler/scheduler_config.json", "unet/config.json", "model_index.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
NAN = float("nan")

# what is changed in which file -> a part of the message
BAD_VALUES = [
    (SCHEDULER, {"num_train_timesteps": 10**12}, "num_train_timesteps=1000000000000"),
    (SCHEDULER, {"num_train_timesteps": -5}, "num_train_timesteps=-5"),
    (SCHEDULER, {"num_train_timesteps": "1000"}, "num_train_timesteps"),
    (SCHEDULER, {"num_train_timesteps": [1] * 5}, "num_train_timesteps"),
    (SCHEDULER, {"beta_start": NAN}, "NaN"),
    (SCHEDULER, {"beta_end": -1.0}, "beta_end=-1.0"),
    (SCHEDULER, {"beta_schedule": "../../x"}, "beta_schedule"),
    (SCHEDULER, {"variance_type": "no such"}, "variance_type='no such'"),
    (SCHEDULER, {"trained_betas": [0.1, 0.2]}, "trained_betas has shape"),
    (SCHEDULER, {"trained_betas": {"a": 1}}, "trained_betas"),
    (SCHEDULER, {"_alpha_ddpm": "x"}, "_alpha_ddpm"),
    (SCHEDULER, {"_alpha_ddpm": {"unknown": 1}}, "unknown"),
    (SCHEDULER, {"_alpha_ddpm": {"inference_timesteps": {"2": [5, 9]}}}, "strictly descending"),
    (UNET, {"block_out_channels": [10**12, 8]}, "block_out_channels=1000000000000"),
    (UNET, {"block_out_channels": [4] * 10**5}, "block_out_channels=100000"),
    (UNET, {"block_out_channels": "48"}, "block_out_channels='48' has the wrong type"),
    (UNET, {"layers_per_block": 10**9}, "layers_per_block=1000000000"),
    (UNET, {"sample_size": 10**9}, "sample_size=1000000000"),
    (UNET, {"sample_size": "8"}, "sample_size='8' has the wrong type"),
    (UNET, {"sample_size": [8, 8, 8]}, r"sample_size=\[8, 8, 8\] has the wrong type"),
    (UNET, {"sample_size": [0, 8]}, r"sample_size=\[0, 8\] must be at least 1"),
    (UNET, {"in_channels": 0}, "in_channels=0 must be at least 1"),
    (UNET, {"norm_num_groups": 3}, r"unet/config\.json: num_channels \(4\) must be divisible"),
    (UNET, {"norm_eps": NAN}, "NaN"),
    (UNET, {"in_channels": 1.5}, "in_channels=1.5 has the wrong type"),
    (UNET, {"down_block_types": ["NoSuchBlock", "DownBlock2D"]}, "NoSuchBlock"),
    (UNET, {"block_out_channels": [8, 16]}, "size mismatch|shape"),
    (INDEX, {"../../etc": ["diffusers", "UNet2DModel"]}, "'../../etc'"),
    (INDEX, {"unet": ["os", "system"]}, "unet comes from 'os'"),
    (INDEX, {"unet": ["../evil", "Evil"]}, "unet comes from '../evil'"),
    (INDEX, {"unet": "UNet2DModel"}, "unet"),
    (INDEX, {"unet": ["diffusers"]}, "unet must be"),
    (INDEX, {"unet": ["diffusers", "NoSuchModel"]}, "NoSuchModel"),
]
BAD_BYTES = [
    (SCHEDULER, b"{", "scheduler_config.json is not a valid config"),
    (SCHEDULER, b"[" * 100_000, "scheduler_config.json is not a valid config"),
    (UNET, b"\xff\xfe\x00", "config.json is not a valid config"),
    (UNET, b"[1, 2]", "must hold a JSON object, not a list"),
    (INDEX, b"", "model_index.json is not a valid config"),
    (INDEX, b" " * (32 * 2**20 + 1), "33554433 bytes"),
    (WEIGHTS, b"", "safetensors|header"),
    (WEIGHTS, b"\xff" * 4096, "safetensors|header|HeaderTooLarge"),
]
CASES = [(file, values, message) for file, values, message in [*BAD_VALUES, *BAD_BYTES]]


@pytest.mark.parametrize(("file", "values", "message"), CASES, ids=[f"{i}-{case[0]}" for i, case in enumerate(CASES)])
def test_bad_folder_is_refused(tmp_path: Path, sound: dict[str, bytes], file: str, values, message: str) -> None:
    changed = values if isinstance(values, bytes) else with_values(sound[file], **values)
    folder = write(tmp_path / "a" / "model", {**sound, file: changed})
    before = sorted(tmp_path.rglob("*"))
    with little_memory(), pytest.raises((ValueError, OSError, RuntimeError), match=message):
        AlphaDDPMPipeline.from_pretrained(folder)
    assert sorted(tmp_path.rglob("*")) == before


def test_sound_folder_is_not_refused(tmp_path: Path, sound: dict[str, bytes]) -> None:
    folder = write(tmp_path, sound)
    check_folder(folder)
    with little_memory():
        pipe = AlphaDDPMPipeline.from_pretrained(folder)
        with pytest.raises(RuntimeError, match="memory"):
            torch.empty(2**29)
    assert pipe(1, num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 1)


def test_scheduler_alone_refuses_absurd_sizes(tmp_path: Path, sound: dict[str, bytes]) -> None:
    folder = write(tmp_path, {"scheduler_config.json": with_values(sound[SCHEDULER], num_train_timesteps=10**12)})
    with pytest.raises(ValueError, match="num_train_timesteps=1000000000000"):
        AlphaDDPMScheduler.from_pretrained(folder)


def test_weights_truncated_by_an_interrupted_copy_are_refused(tmp_path: Path, sound: dict[str, bytes]) -> None:
    folder = write(tmp_path, {**sound, WEIGHTS: sound[WEIGHTS][:-100]})
    with pytest.raises((ValueError, OSError, RuntimeError), match=r"safetensors|incomplete|header"):
        AlphaDDPMPipeline.from_pretrained(folder)


def test_code_in_a_folder_is_not_run_without_trust(tmp_path: Path, sound: dict[str, bytes]) -> None:
    """A component module, the pipeline code and a pickle that would each leave a file behind if they were executed."""
    trace = tmp_path / "executed"
    code = f"open({str(trace)!r}, 'w')\n".encode()
    pickle = b"c__builtin__\nopen\n(V" + str(trace).encode() + b"\nVw\ntR."
    files = {
        **sound, "pipeline.py": code, "scheduling_alpha_ddpm.py": code, "unet/evil.py": code,
        "unet/diffusion_pytorch_model.bin": pickle,
        INDEX: with_values(sound[INDEX], unet=["evil", "UNet2DModel"]),
    }  # fmt: skip
    folder = write(tmp_path / "model", files)
    with pytest.raises(ValueError, match="trust_remote_code"):
        AlphaDDPMPipeline.from_pretrained(folder)
    pickled_only = {name: content for name, content in files.items() if name not in (WEIGHTS, "unet/evil.py")}
    folder = write(tmp_path / "pickled", {**pickled_only, INDEX: sound[INDEX]})
    with pytest.raises(OSError, match="only safetensors weights"):
        AlphaDDPMPipeline.from_pretrained(folder)
    assert not trace.exists()
