"""How near samples come to the images whose conditions they were given: PSNR and SSIM, by torchmetrics."""

import torch

SAME = 100.0  # decibels, for images that are equal, or nearer than 16 bits can tell
SMALLEST_SIDE = 6  # pixels; SSIM's window of 11 mirrors 5 at each border


def likeness(samples: torch.Tensor, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """PSNR in decibels, at most SAME, and SSIM (Wang et al. 2004) of each pair, float64 [B] each.

    Images are [B, C, H, W] in [-1, 1], of which the peak is the whole range; there is no SSIM for sides below SMALLEST_SIDE.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    pair = [(values.double() + 1) / 2 for values in (samples, images)]
    found = {"psnr": peak_signal_noise_ratio(*pair, data_range=1.0, reduction="none", dim=(1, 2, 3)).clamp(max=SAME)}
    if min(images.shape[-2:]) >= SMALLEST_SIDE:
        found["ssim"] = structural_similarity_index_measure(*pair, data_range=1.0, reduction="none")
    return found
