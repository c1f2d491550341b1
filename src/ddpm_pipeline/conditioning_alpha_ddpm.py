"""From what a call is told to what the UNet is told: class labels and prompts.

Mixed into the pipelines, and used by the modular blocks. Travels inside model repositories.
"""

import difflib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .editing_alpha_ddpm import Batch, expanded
from .encoding_alpha_ddpm import own_settings
from .samplers_alpha_ddpm import plain
from .sampling_alpha_ddpm import Conditioning, Guidance
from .tables_alpha_ddpm import warn

ClassLabels = int | str | Sequence[int | str | None] | Tensor

MAX_TOKENS = 77  # IFPipeline pads to 77, whatever the tokenizer
SHOWN = 200  # most characters of a cut prompt that the warning shows


def prepare_prompt(prompt: str) -> str:
    """The prompt as the tokenizer gets it, in training and in sampling."""
    return prompt.lower().strip()


def tokenize(tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, each int64 [B, 77], cut and padded."""
    prompts = [prepare_prompt(prompt) for prompt in prompts]
    fixed_length = {"padding": "max_length", "max_length": MAX_TOKENS, "truncation": True}
    tokens = tokenizer(prompts, **fixed_length, return_attention_mask=True, return_tensors="pt")
    return {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}


class ClassConditioning:
    """Mixed into a class with a `unet`, and with what `AlphaDDPMSampling` adds."""

    @property
    def id2label(self) -> dict[int, str]:
        """Class names by id; empty if the model has none."""
        return dict(enumerate(own_settings(self.unet).get("class_names") or []))

    @property
    def _num_embeddings(self) -> int:
        return self.unet.config.get("num_class_embeds") or 0

    @property
    def _null_label(self) -> int | None:
        """The id for "no class": that of the embedding after the named classes."""
        return len(self.id2label) if 0 < len(self.id2label) < self._num_embeddings else None

    def _label_ids(self, class_labels: ClassLabels) -> list[int]:
        if not self._num_embeddings:
            raise ValueError("class_labels were given to a model without classes; leave them out.")
        class_labels = plain(class_labels)
        several = isinstance(class_labels, Sequence) and not isinstance(class_labels, str)
        labels = list(class_labels) if several else [class_labels]
        if not labels:
            raise ValueError("class_labels is empty; give at least one label.")
        return [self._label_id(label) for label in labels]

    def _label_id(self, label: int | str | None) -> int:
        if label is None:
            if self._null_label is None:
                raise ValueError("class_labels holds None, but this model has no embedding for 'no class'.")
            return self._null_label
        names = list(self.id2label.values())
        if isinstance(label, str):
            if label not in names:
                raise ValueError(f"class_labels: there is no class {label!r}; {self._nearest_names(label, names)}.")
            return names.index(label)
        count = len(names) or self._num_embeddings
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < count:
            raise ValueError(f"class_labels: {label!r} is not a class of this model, whose ids are 0 to {count - 1}.")
        return label

    def _nearest_names(self, label: str, names: list[str]) -> str:
        if not names:
            return f"this model has no names, only ids from 0 to {self._num_embeddings - 1}"
        folded = difflib.get_close_matches(label.casefold(), [name.casefold() for name in names], n=5)
        if near := [name for name in names if name.casefold() in folded]:
            return f"near it: {', '.join(map(repr, near))}"
        return f"its classes are {', '.join(map(repr, names[:10]))}{', ...' if len(names) > 10 else ''}"

    def _class_rows(self, labels: list[int] | None) -> tuple[Tensor | None, Tensor | None]:
        """The UNet's embeddings for the labels or, without, for "no class", and those of the unconditional half, each [N]."""
        if labels is None and not self._num_embeddings:
            return None, None
        ids = torch.tensor([self._label_id(None)] if labels is None else labels, device=self._execution_device)
        return ids, None if labels is None or self._null_label is None else torch.full_like(ids, self._null_label)

    def _class_conditioning(self, labels: list[int] | None, batch: Batch, guidance: Guidance) -> Conditioning:
        rows, null_rows = ({"class_labels": batch.spread(ids, "class_labels")} for ids in self._class_rows(labels))
        if labels is None:
            if guidance.in_use:
                warn(f"guidance_scale={guidance.scale} has no effect without class_labels.", stacklevel=4)
            return Conditioning(rows if self._num_embeddings else {}, guidance=guidance)
        if not guidance.in_use:
            return Conditioning(rows, guidance=guidance)
        if self._null_label is None:
            needed = "an embedding for 'no class', which this model lacks"
            raise ValueError(f"guidance_scale={guidance.scale} needs {needed}; use guidance_scale=1.")
        self._warn_if_never_unconditional()
        return Conditioning(rows, null_rows, guidance)


class TextConditioning:
    """Mixed into a class with a `unet`, a `text_encoder` and a `tokenizer`, and with what `AlphaDDPMSampling` adds."""

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        do_classifier_free_guidance: bool = True,
        num_images_per_prompt: int = 1,
        device: torch.device | None = None,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        clean_caption: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Text states of the prompts and, for guidance, of the negative ones, each [B, 77, D], as in `IFPipeline`.

        B is the number of prompts times `num_images_per_prompt`, those of one prompt being neighbours. `clean_caption` strips
        links, mark-up and punctuation from the prompts as `IFPipeline` does, which training does not.
        """
        device = device or self._execution_device
        states = self._states(prompt, prompt_embeds, "prompt", clean_caption)
        prompt_embeds = states.repeat_interleave(num_images_per_prompt, dim=0).to(device)
        if do_classifier_free_guidance:
            if negative_prompt is None and negative_prompt_embeds is None:
                negative_prompt = ""
            null_states = self._states(negative_prompt, negative_prompt_embeds, "negative_prompt", clean_caption)
            null_states = expanded(null_states, len(states), "negative prompts")
            if null_states.shape[1] != states.shape[1]:
                lengths = f"{states.shape[1]} and {null_states.shape[1]} tokens"
                raise ValueError(f"prompt_embeds and negative_prompt_embeds have {lengths}; guidance needs equal lengths.")
            negative_prompt_embeds = null_states.repeat_interleave(num_images_per_prompt, dim=0).to(device)
        else:
            negative_prompt_embeds = None
        return prompt_embeds, negative_prompt_embeds

    def _encode(self, prompts: list[str]) -> Tensor:
        """Text states [B, 77, D] of the prompts; a warning shows what is cut."""
        for prompt in prompts:
            ids = self.tokenizer(prepare_prompt(prompt), verbose=False).input_ids
            if len(ids) > MAX_TOKENS:
                cut = self.tokenizer.decode(ids[MAX_TOKENS - 1 : -1]).strip()
                cut = cut if len(cut) <= SHOWN else f"{cut[:SHOWN]}... ({len(cut)} characters)"
                problem = f"the prompt has more than {MAX_TOKENS} tokens; this was cut from it: {cut!r}"
                warn(problem, stacklevel=7)
        tokens = {name: ids.to(self._execution_device) for name, ids in tokenize(self.tokenizer, prompts).items()}
        return self.text_encoder(**tokens)[0]

    def _states(self, prompt: Any, embeds: Tensor | None, name: str, clean_caption: bool) -> Tensor:
        """The states given as `embeds`, or those of the prompts, [B, tokens, D]. `name` is the prompt's in the call."""
        if (prompt is None) == (embeds is None):
            raise ValueError(f"give either {name} or {name}_embeds.")
        if embeds is None:
            prompts = [prompt] if isinstance(prompt, str) else prompt
            if not isinstance(prompts, list | tuple) or not prompts or not all(isinstance(p, str) for p in prompts):
                raise ValueError(f"{name} must be a string or a list of strings with at least one, not {prompt!r}.")
            if self.text_encoder is None:
                raise ValueError(f"without a text encoder this pipeline cannot read {name}={prompt!r}; give {name}_embeds.")
            embeds = self._encode(_cleaned(prompts) if clean_caption else list(prompts))
        embeds = torch.as_tensor(embeds)
        if self.unet is not None:
            width = self.unet.config.get("encoder_hid_dim") or self.unet.config.cross_attention_dim
            if embeds.ndim != 3 or embeds.shape[2] != width:
                raise ValueError(f"{name}_embeds has shape {tuple(embeds.shape)}; this model takes [B, tokens, {width}].")
        reader = self.text_encoder if self.unet is None else self.unet
        return embeds.to(self._execution_device, reader.dtype)


def _cleaned(prompts: list[str]) -> list[str]:
    """As `IFPipeline` cleans them, which needs beautifulsoup4 and ftfy."""
    from diffusers import IFPipeline  # slow to import

    return IFPipeline.__new__(IFPipeline)._text_preprocessing(list(prompts), clean_caption=True)
