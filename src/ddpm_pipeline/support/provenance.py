"""What a figure or a file was made from: versions, processor, date, and digests of weights. Imports torch and diffusers."""

import hashlib
import importlib.metadata
import platform
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import torch
from torch import nn


def provenance(device: torch.device, *libraries: ModuleType) -> dict[str, Any]:
    """When, with what versions and on what processor a figure was measured; `libraries` are further ones that matter."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": torch.cuda.get_device_name() if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "versions": {
            "ddpm-pipeline": importlib.metadata.version("ddpm-pipeline"),
            **{library.__name__: library.__version__ for library in (torch, diffusers, *libraries)},
        },
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def weights_digest(module: nn.Module) -> str:
    """16 hex digits of a module's class and weights."""
    digest = hashlib.sha256(type(module).__qualname__.encode())
    tensors = {name: value for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
    for name, value in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
