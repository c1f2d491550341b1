"""Where a run takes place: its folder, and the precision of attention."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from ddpm_pipeline.training.processes import attention_on, default_output_dir


@pytest.mark.parametrize(
    "dataset, folder",
    [("scans.2023", "ddpm-scans-2023"), ("/a/pets.ZIP", "ddpm-pets"), ("me/v1.5/", "ddpm-v1-5"), ("*.arrow", "ddpm-model")],
)
def test_data_sets_of_other_names_have_other_folders(dataset, folder):
    assert default_output_dir(dataset) == folder


def attended(precision: str, device: str = "cpu", dtype=torch.bfloat16, **options) -> list[torch.Tensor]:
    """Result and gradients of attention under autocast, as the processes of a run with this precision compute it."""
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 4, length, 8, generator=draw).to(dtype).requires_grad_() for length in (5, 7, 7)]
    accelerator = SimpleNamespace(device=torch.device(device), mixed_precision=precision)
    with attention_on(accelerator), torch.autocast("cpu", torch.bfloat16):
        query, key, value = inputs
        result = F.scaled_dot_product_attention(query, key, value=value, **options)
        assert (query @ key.mT).dtype == torch.bfloat16  # all else stays as it is
    return [result.detach(), *torch.autograd.grad(result.float().square().sum(), inputs)]


@pytest.mark.parametrize("mask", [None, (torch.arange(7) < 4).expand(5, 7), torch.linspace(-1, 1, 35).reshape(5, 7).bfloat16()])
def test_under_bf16_a_cpu_computes_attention_in_float32(mask):
    with torch.no_grad():
        draw = torch.Generator().manual_seed(0)
        query, key, value = (torch.randn(2, 4, length, 8, generator=draw).bfloat16().double() for length in (5, 7, 7))
        products = query @ key.mT / 8**0.5
        if mask is not None:
            products = products.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else products + mask
        exact = products.softmax(-1) @ value
    result, *gradients = attended("bf16", attn_mask=mask)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, exact.bfloat16())  # rounded once
    in_float32 = attended("no", dtype=torch.float32, attn_mask=mask)  # under autocast in bfloat16 all the same
    for gradient, rough in zip(gradients, in_float32[1:], strict=True):
        torch.testing.assert_close(gradient.float(), rough, rtol=0.05, atol=0.05)


def test_elsewhere_attention_is_left_alone():
    plain = attended("no")
    for precision in ("no", "fp16", "bf16"):
        assert all(map(torch.equal, attended(precision, "cuda"), plain))
    assert not torch.equal(attended("bf16")[1], plain[1])
