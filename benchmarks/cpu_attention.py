"""Attention on a CPU, forward and backward: bfloat16 as autocast would have it, against float32, which training takes there.

    python benchmarks/cpu_attention.py --output benchmarks/results/cpu_attention.json

Of both torch's fused kernel on one thread, float32 with the conversions from bfloat16 and back, in turn; the ratio of the
fastest times. "plain" are the products written out (torch's "math" backend), in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ddpm_pipeline.support.provenance import provenance
from ddpm_pipeline.training.processes import Float32Attention

# images, heads, queries, keys, channels of a head: self-attention at 4x4, 8x8, 16x16 and 32x32, words seen at 4x4, words
SHAPES = [
    (64, 16, 16, 16, 8), (32, 16, 64, 64, 8), (16, 32, 256, 256, 8), (8, 8, 1024, 1024, 8),
    (64, 8, 16, 77, 16), (64, 4, 77, 77, 16),
]  # fmt: skip
ROUNDS = 7


def seconds(shape: tuple[int, ...], kind: str) -> float:
    """One pass forward and backward."""
    images, heads, queries, keys, channels = shape
    draw = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(images, length, heads, channels, generator=draw).bfloat16().transpose(1, 2).requires_grad_()
        for length in (queries, keys, keys)
    ]
    fused = SDPBackend.MATH if kind == "plain" else SDPBackend.FLASH_ATTENTION
    began = time.perf_counter()
    with sdpa_kernel(fused):
        if kind == "float32":
            with Float32Attention():
                result = F.scaled_dot_product_attention(*inputs)
        else:
            result = F.scaled_dot_product_attention(*inputs)
        result.backward(torch.ones_like(result))
    return time.perf_counter() - began


def measured(shape: tuple[int, ...]) -> dict[str, Any]:
    kinds = ("bfloat16", "plain", "float32")
    taken = [{kind: seconds(shape, kind) for kind in kinds} for _ in range(ROUNDS + 1)][1:]
    fastest = {kind: min(each[kind] for each in taken) for kind in kinds}
    ratios = {f"{kind}_over_float32": round(fastest[kind] / fastest["float32"], 2) for kind in kinds[:2]}
    return {"shape": shape, **ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("cpu_attention.json"))
    output = parser.parse_args().output
    torch.set_num_threads(1)
    rows = [measured(shape) for shape in SHAPES]
    for row in rows:
        print(row)
    columns = "images, heads, queries, keys, channels of a head"
    result = {"shape": columns, "threads": 1, "rounds": ROUNDS, "rows": rows, **provenance(torch.device("cpu"))}
    output.write_text(json.dumps(result, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
