"""The variational bound of report §6 on a model's likelihood of images, in bits per dimension.

Two evaluations of one bound share their network calls: the report's two-term form (6.10), a Monte-Carlo estimate along one
sampled chain, and the three-term form of Ho et al. 2020 (eq. 5), whose terms are divergences between Gaussians in closed form.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from tqdm.auto import tqdm

from ..encoding_alpha_ddpm import numbers_in_own_precision
from ..scheduling_alpha_ddpm import AlphaDDPMScheduler, Moments, ReverseMoments
from ..tables_alpha_ddpm import LEARNED_VARIANCE_TYPES, Generators, Timesteps, check_generators, check_integer
from .densities import NumBins, gaussian_kl, gaussian_log_density, levels_of, log_decoder, nats_to_bits_per_dim

NoiseSource = Callable[[int, torch.Size], Tensor]
Stratum = tuple[int, int, int]  # start and stop among the chain's positions, and the number of timesteps to draw


def bound_terms(
    scheduler: AlphaDDPMScheduler,
    mean: Tensor,
    log_variance: Tensor,
    original_samples: Tensor,
    sample: Tensor,
    timesteps: Timesteps,
    num_bins: NumBins | None = 256,
) -> Tensor:
    """The bound's term for each image's timestep in the three-term form, [B] in bits per dimension.

    KL(q(x_s|x_t,x_0) ‖ p_θ(x_s|x_t)), or -log p_θ(x_0|x_t) if s is clean data. `mean` and `log_variance` are p_θ's.
    """
    posterior = scheduler.q_posterior(original_samples, sample, timesteps)
    at_data = torch.isinf(posterior.log_variance)  # the posterior is the point x_0 there
    finite = Moments(posterior.mean, posterior.variance, posterior.log_variance.masked_fill(at_data, 0.0))
    nats = gaussian_kl(finite, Moments(mean, log_variance, log_variance))
    if at_data.device.type != "cpu" or at_data.any():  # on another device the question would synchronise
        nats = torch.where(at_data, -log_decoder(original_samples, mean, log_variance, num_bins), nats)
    return nats_to_bits_per_dim(nats)


@dataclass(frozen=True)
class BitsPerDim:
    """Upper bounds on -log2 p_θ(x_0) / d of B images: every field in bits per dimension, float64 on the CPU."""

    prior: Tensor  #: [B]
    diffusion: Tensor  #: [B], the sum of the terms without the decoder, or an estimate of it
    standard_error: Tensor  #: [B], uncertainty of that estimate; 0 if all timesteps were evaluated
    timesteps: Tensor  #: [B, n] int64, those that were evaluated, ascending
    terms: Tensor  #: [B, n], theirs
    two_term: Tensor | None = None  #: [B], an estimate of the same total in the report's form, (6.10), if asked for

    @property
    def decoder(self) -> Tensor:  # [B]
        return self.terms[:, 0]

    @property
    def total(self) -> Tensor:  # [B], the bound
        return self.prior + self.diffusion + self.decoder


@dataclass(frozen=True)
class BoundOptions:
    """Which bound is evaluated, and how closely; `bits_per_dim` takes each by name and describes it."""

    num_inference_steps: int | None = None
    timesteps: Sequence[int] | None = None
    num_evaluated: int | None = None
    two_term: bool = False
    num_bins: NumBins | None = 256
    batch_size: int = 64


def bits_per_dim(
    unet: Callable,
    scheduler: Any,
    images: Tensor,
    *,
    generator: Generators = None,
    noise: NoiseSource | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    progress: bool = True,
    **options: Any,
) -> BitsPerDim:
    """The variational bound on the negative log-likelihood of each image.

    Args:
        unet: called as `unet(x_t, t, **model_kwargs)`; returns [B, C, H, W] or, with a learned variance, 2C channels.
        scheduler: ours or diffusers' own; its config determines prediction type, variance and clipping.
        images: [B, C, H, W], or signals and volumes [B, ...], in [-1, 1] on the `num_bins` levels.
        generator: one for all images, or a list of one per image, whose result then does not depend on the others.
        noise: instead of `generator`, called with a timestep and a shape [b, C, H, W].
        model_kwargs: conditions; tensors with a first dimension of B are split into batches along with the images.
        num_inference_steps, timesteps: the chain, as in `AlphaDDPMScheduler.set_timesteps`; the default is all T timesteps.
        num_evaluated: network calls per image, at least 3, to estimate the bound from timesteps drawn for each image in
            strata of equal fall of log-SNR; the default is the whole chain.
        two_term: also estimate the report's two-term form from the same network calls, with noise along one chain
            x_0 -> x_1 -> ... -> x_T; otherwise noise is independent at every timestep, mostly with less variance.
        num_bins: levels of a value, 256 (the default) for 8-bit images, or one number per channel; None for the density of
            continuous values, which are in [-1, 1] (likelihood.md says what it is in other units).
        batch_size, progress: images per network call, 64 by default; whether to show a progress bar, except in a log file.

    Raises ValueError for images off the levels, and arguments outside these ranges.
    """
    bound = BoundOptions(**options)
    chain = own_scheduler(scheduler, bound.num_inference_steps, bound.timesteps)
    check_images(unet, images, bound.num_bins, generator, bound.batch_size)
    strata = _strata(chain, bound, noise)
    calls = len(chain.timesteps) if strata is None else bound.num_evaluated
    total = -(-len(images) // bound.batch_size) * calls
    parts = []
    with evaluating(unet) as network, tqdm(total=total, disable=not progress or None, desc="bits/dim") as bar:
        evaluation = _Evaluation(network, chain, bound.num_bins, bar)
        for batch in batches(network, images, bound.batch_size, bound.num_bins, generator, model_kwargs):
            if strata is None:
                parts.append(evaluation.of_chain(batch, noise or batch.noise, bound.two_term))
            else:
                parts.append(evaluation.of_subset(batch, strata))
    names = [name for name, value in vars(parts[0]).items() if value is not None]
    return BitsPerDim(**{name: torch.cat([getattr(part, name) for part in parts]).cpu() for name in names})


@dataclass(frozen=True)
class _Evaluation:
    """The bound of one model's chain on batches of images."""

    network: "Network"
    chain: AlphaDDPMScheduler
    num_bins: NumBins | None
    bar: tqdm

    def of_chain(self, batch: "Batch", noise: NoiseSource, two_term: bool) -> BitsPerDim:
        ascending = self.chain.timesteps.flip(0).cpu()
        x_0 = x_s = batch.x_0
        terms, log_ratios = [], []
        for t in ascending.tolist():
            z = noise(t, x_0.shape).to(x_0)
            x_t = self.chain.forward_step(x_s, t, z) if two_term else self.chain.add_noise(x_0, z, t)
            p, term = self._term(batch, x_t, t)
            terms.append(term)
            if two_term:  # report 6.10: log p_θ(x_s|x_t) - log q(x_t|x_s)
                log_p = gaussian_log_density(x_s, p)
                if t == ascending[0]:
                    log_p = log_decoder(x_0, p.mean, p.log_variance, self.num_bins)
                log_q = gaussian_log_density(x_t, self.chain.forward_mean_variance(x_s, t))
                log_ratios.append(nats_to_bits_per_dim(log_p - log_q))
                x_s = x_t
        estimate = None
        if two_term:
            log_prior = nats_to_bits_per_dim(gaussian_log_density(x_s, _standard_normal(x_s)))
            estimate = -(log_prior + torch.stack(log_ratios).sum(dim=0))
        terms, prior = torch.stack(terms, dim=1), self._prior(x_0)  # n x [B] -> [B, n]
        timesteps = ascending.expand(len(x_0), -1)
        return BitsPerDim(prior, terms[:, 1:].sum(dim=1), torch.zeros_like(prior), timesteps, terms, estimate)

    def of_subset(self, batch: "Batch", strata: list[Stratum]) -> BitsPerDim:
        """Stratified sampling without replacement: Σ_h N_h·mean_h, with variance Σ_h N_h² (1 - n_h/N_h) s_h²/n_h."""
        x_0, keys = batch.x_0, batch.uniform(len(self.chain.timesteps))
        drawn = [torch.zeros(len(x_0), 1, dtype=torch.long)]  # the decoder always
        for start, stop, count in strata:
            drawn.append(start + keys[:, start:stop].argsort(dim=1)[:, :count].sort(dim=1).values)
        timesteps = self.chain.timesteps.flip(0).cpu()[torch.cat(drawn, dim=1)]  # [B, n]
        noisy = ((t, self.chain.add_noise(x_0, batch.noise(-1, x_0.shape).to(x_0), t)) for t in timesteps.unbind(dim=1))
        terms = torch.stack([self._term(batch, x_t, t)[1] for t, x_t in noisy], dim=1)  # n x [B] -> [B, n]
        prior = self._prior(x_0)
        diffusion = variance = torch.zeros_like(prior)
        columns = terms[:, 1:].split([count for _, _, count in strata], dim=1)
        for (start, stop, count), values in zip(strata, columns, strict=True):
            size = stop - start
            diffusion = diffusion + size * values.mean(dim=1)
            if size > count:
                variance = variance + size**2 * (1 - count / size) * values.var(dim=1) / count
        return BitsPerDim(prior, diffusion, variance.sqrt(), timesteps, terms)

    def _term(self, batch: "Batch", x_t: Tensor, t: Timesteps) -> tuple[ReverseMoments, Tensor]:
        p = self.chain.p_mean_variance(self.network(x_t, t, self.chain, batch.model_kwargs), t, x_t)
        self.bar.update()
        return p, bound_terms(self.chain, p.mean, p.log_variance, batch.x_0, x_t, t, self.num_bins)

    def _prior(self, x_0: Tensor) -> Tensor:
        """L_T = KL(q(x_T|x_0) ‖ N(0, I)), [B] in bits per dimension."""
        last = self.chain.q_mean_variance(x_0, int(self.chain.timesteps[0]))
        return nats_to_bits_per_dim(gaussian_kl(last, _standard_normal(x_0)))


def _standard_normal(like: Tensor) -> Moments:
    zero = like.new_zeros((1,) * like.ndim)
    return Moments(zero, zero + 1, zero)


def _strata(chain: AlphaDDPMScheduler, bound: BoundOptions, noise: NoiseSource | None) -> list[Stratum] | None:
    """Strata of the ascending chain's positions 1..N-1, of equal fall of log-SNR: short where the bound's terms are large,
    which fall about as it does. Each has at least two draws, for its variance. None if the whole chain is evaluated.
    """
    if bound.num_evaluated is None or bound.num_evaluated >= len(chain.timesteps):
        return None
    if bound.two_term:
        raise ValueError("two_term=True follows whole chains; leave out num_evaluated.")
    if bound.num_evaluated < 3 or noise is not None:
        raise ValueError(f"num_evaluated={bound.num_evaluated} must be at least 3, and takes a generator, not `noise`.")
    log_snr = chain.schedule.log_snr.numpy()
    fall = np.cumsum(-np.diff(np.maximum(log_snr, -50)))  # of positions 1..N-1
    positions, draws = len(log_snr), bound.num_evaluated - 1
    count = max(1, draws // 2)
    strata, start = [], 1
    for index in range(count):
        later = count - index - 1
        stop = positions if later == 0 else 1 + int(np.searchsorted(fall, fall[-1] * (index + 1) / count, side="right"))
        stop = min(max(stop, start + 2), positions - 2 * later)
        strata.append((start, stop, 2))
        start = stop
    if draws % 2:  # the odd one goes to the longest
        longest = max(range(count), key=lambda index: strata[index][1] - strata[index][0])
        start, stop, _ = strata[longest]
        strata[longest] = (start, stop, min(3, stop - start))
    return strata


@contextlib.contextmanager
def evaluating(unet: Callable) -> Iterator["Network"]:
    """The network in evaluation mode without gradients; back in its own mode after the block."""
    was_training = isinstance(unet, torch.nn.Module) and unet.training
    if was_training:
        unet.eval()
    inner = getattr(unet, "unet", unet)
    numbers = numbers_in_own_precision(inner) if hasattr(inner, "class_embedding") else contextlib.nullcontext()
    try:
        with torch.no_grad(), numbers:
            yield Network(unet)
    finally:
        if was_training:
            unet.train()


class Network:
    """The noise predictor, in its own precision on its own device."""

    def __init__(self, unet: Callable):
        self.unet, self.device, self.dtype = unet, torch.device("cpu"), None
        if isinstance(unet, torch.nn.Module) and (parameter := next(unet.parameters(), None)) is not None:
            self.device, self.dtype = parameter.device, parameter.dtype

    def __call__(self, x_t: Tensor, t: Timesteps, scheduler: AlphaDDPMScheduler, kwargs: dict[str, Any]) -> Tensor:
        """The prediction, with the variance half if the scheduler uses one, in the dtype of x_t."""
        t = torch.as_tensor(t, device=self.device)
        output = self.unet(x_t if self.dtype is None else x_t.to(self.dtype), t, **kwargs)
        output = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
        if output.shape[1] == 2 * x_t.shape[1] and scheduler.config.variance_type not in LEARNED_VARIANCE_TYPES:
            output = output.chunk(2, dim=1)[0]  # [B, 2C, H, W] -> [B, C, H, W]
        return output.to(x_t.dtype)


@dataclass(frozen=True)
class Batch:
    """Images [b, C, H, W] on the network's device, in float64 if it has that, with their conditions and generators."""

    x_0: Tensor
    model_kwargs: dict[str, Any]
    generator: Generators

    def noise(self, timestep: int, shape: torch.Size) -> Tensor:
        """New standard normal noise, drawn in float32 whatever the computation uses."""
        first = self.generator[0] if isinstance(self.generator, list) else self.generator
        device = torch.device("cpu") if first is None else first.device
        return randn_tensor(shape, generator=self.generator, device=device, dtype=torch.float32)

    def uniform(self, length: int) -> Tensor:
        """Numbers in [0, 1), [b, length], on the CPU; each row from its image's own generator if there are several."""
        if isinstance(self.generator, list):
            rows = [torch.rand(length, generator=each, device=each.device).cpu() for each in self.generator]
            return torch.stack(rows)
        device = None if self.generator is None else self.generator.device
        return torch.rand(len(self.x_0), length, generator=self.generator, device=device).cpu()


def batches(
    network: Network,
    images: Tensor,
    batch_size: int,
    num_bins: NumBins | None,
    generator: Generators,
    model_kwargs: Mapping[str, Any] | None,
) -> Iterator[Batch]:
    """The images in order, with the rows of `model_kwargs` that belong to them."""
    dtype = torch.float32 if network.device.type == "mps" else torch.float64
    for start in range(0, len(images), batch_size):
        rows = slice(start, start + batch_size)
        kwargs = {}
        for name, value in (model_kwargs or {}).items():
            if isinstance(value, Tensor):
                value = (value[rows] if value.ndim and len(value) == len(images) else value).to(network.device)
            kwargs[name] = value
        x_0 = _on_levels(images[rows], num_bins).to(network.device, dtype)
        yield Batch(x_0, kwargs, list(generator[rows]) if isinstance(generator, Sequence) else generator)


def own_scheduler(
    scheduler: Any, num_inference_steps: int | None = None, timesteps: Sequence[int] | None = None, **changes: Any
) -> AlphaDDPMScheduler:
    """A scheduler of ours with the given one's config, but for `changes`, in the chain asked for, or else the full one."""
    chain = AlphaDDPMScheduler.from_config(scheduler.config, **changes)
    if num_inference_steps is not None or timesteps is not None:
        chain.set_timesteps(num_inference_steps, timesteps=timesteps)
    return chain


def check_images(unet: Any, images: Tensor, num_bins: NumBins | None, generator: Generators, batch_size: int) -> None:
    """Raise ValueError if shape, dtype, levels or number of generators do not fit, or batches would be empty."""
    check_integer("batch_size", batch_size, 1)
    of_pictures = isinstance(unet, UNet2DModel | UNet2DConditionModel)
    fits = images.ndim == 4 and images.shape[1] == unet.config.in_channels if of_pictures else images.ndim >= 2
    if not fits or not len(images) or not images.is_floating_point():
        needed = f"[B, {unet.config.in_channels}, H, W]" if of_pictures else "[B, ...]"
        kind = f"{images.dtype} of shape {tuple(images.shape)}"
        raise ValueError(f"images are {kind}; this network takes floating-point {needed} in [-1, 1].")
    if num_bins is not None:
        counts = [num_bins] * images.shape[1] if isinstance(num_bins, int) else num_bins
        if len(counts) != images.shape[1] or min(counts) < 2:
            allowed = f"at least 2, {images.shape[1]} such numbers, one per channel, or None for continuous values"
            raise ValueError(f"num_bins={num_bins} must be {allowed}.")
    for some in images.split(1024):  # at a time, for the memory
        _on_levels(some, num_bins)
    check_generators(generator, len(images))


def _on_levels(images: Tensor, num_bins: NumBins | None) -> Tensor:
    """Images in float64, exactly on the nearest of the levels -1..1. Raises ValueError if one is not near."""
    images = images.double()
    if num_bins is None:
        return images
    last = levels_of(num_bins, images) - 1
    levels = ((images + 1) * (last / 2)).round()
    exact = levels * (2 / last) - 1
    off = (images - exact).abs() * (last / 2)
    near = off < 0.01 + 2**-24 * last  # the rounding of float32; False for NaN
    if not near.all() or levels.min() < 0 or (levels > last).any():
        raise ValueError(
            f"images are up to {off.max():.2g} of a level off the {num_bins} levels of [-1, 1], or outside: "
            f"{images.min():.4g} to {images.max():.4g}. Give uint8 / 127.5 - 1 for num_bins=256, the right num_bins, "
            "or None for a density."
        )
    return exact
