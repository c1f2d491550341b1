"""From what a call is told to what the UNet is told: class labels, numbers, condition images and prompts.

Mixed into the pipelines, and used by the modular blocks. Travels inside model repositories.
"""

import difflib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .editing_alpha_ddpm import Batch, expanded
from .encoding_alpha_ddpm import embedding_width, image_condition, own_settings, vector_condition
from .pictures_alpha_ddpm import Images, read_labels
from .sampling_alpha_ddpm import Conditioning, Guidance, check_unet
from .tables_alpha_ddpm import check_integer, plain, warn

ClassLabels = int | str | Sequence[int | str | None] | Tensor
Vector = float | None | Sequence[float | None] | Mapping[str, float | None] | Tensor
ConditionVector = Vector | Sequence[Vector]
Rows = tuple[Tensor | None, Tensor | None]  # an argument of the UNet and that of the unconditional half, each [1 or N, ...]
CONDITIONS = ("class_labels", "condition_vector", "condition_image")

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


@dataclass(frozen=True)
class Told:
    """The conditions of a call, None where it is not told, each with one row for all images or one per image."""

    class_labels: list[int] | None = None
    condition_vector: Tensor | None = None  # float64 [N, K], NaN where a value is not told
    condition_image: Tensor | None = None  # encoded, [N, input_channels, H, W]
    guided: Collection[str] = CONDITIONS  # what the unconditional half is not told: of these, or single attributes

    def prompts(self, batch_size: int | None) -> int | None:
        """How many images of different conditions are asked for, None if any number."""
        if (batch_size := plain(batch_size)) is not None:
            check_integer("batch_size", batch_size, 1)
            return batch_size
        told = (self.class_labels, self.condition_vector, self.condition_image)
        most = max(len(rows) for rows in (*told, [0]) if rows is not None)
        return most if most > 1 else None


class Conditioned:
    """Class labels, numbers and condition images: mixed into a class with a `unet`, and with what `AlphaDDPMSampling` adds."""

    _takes_image: ClassVar = False

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

    def _check_model(self, unet: Any) -> None:
        check_unet(unet)
        if unet.config.get("cross_attention_dim"):
            raise ValueError(f"{type(unet).__name__} reads text states; use AlphaDDPMTextToImagePipeline for this model.")
        if (image_condition(unet) is not None) != self._takes_image:
            found, use = ("no", "AlphaDDPMPipeline") if self._takes_image else ("a", "AlphaDDPMImageToImagePipeline")
            raise ValueError(f"the UNet's config describes {found} condition image; use {use} for this model.")

    def _told(self, labels: Any, vector: Any, guidance_conditions: Any, image: Tensor | None = None) -> Told:
        labels = None if labels is None else self._label_ids(labels)
        return Told(labels, self._vectors(vector), image, self._guided(guidance_conditions))

    def _guided(self, names: str | Sequence[str] | None) -> Collection[str]:
        """`guidance_conditions` of a call, by default all that this model has."""
        vector = vector_condition(self.unet)
        has = zip(CONDITIONS, (self._num_embeddings, vector, image_condition(self.unet)), strict=True)
        own = [name for name, condition in has if condition]
        if names is None:
            return own
        allowed, names = [*own, *(vector.names if vector else ())], [names] if isinstance(names, str) else names
        if not isinstance(names, Collection) or not names or any(name not in allowed for name in names):
            known = ", ".join(allowed) or "nothing, since this model has no condition"
            raise ValueError(f"guidance_conditions={names!r} must name some of: {known}.")
        return names

    def _vectors(self, given: ConditionVector | None) -> Tensor | None:
        """float64 [N, K], NaN where a value is not told."""
        if given is None:
            return None
        if (condition := vector_condition(self.unet)) is None:
            raise ValueError("condition_vector was given to a model without numbers as its condition; leave it out.")
        names, given, rows = condition.names, plain(given), []
        if given == []:
            raise ValueError("condition_vector is empty; give at least one.")
        several = isinstance(given, list) and (len(names) == 1 or any(isinstance(row, list | Mapping) for row in given))
        for row in given if several else [given]:
            by_name = isinstance(row, Mapping) and row.keys() <= set(names)
            values = plain([row.get(name) for name in names]) if by_name else row if isinstance(row, list) else [row]
            numbers = all(value is None or (isinstance(value, int | float) and not math.isinf(value)) for value in values)
            if len(values) != len(names) or not numbers:
                allowed = f"one finite number for each of {', '.join(names)}, None for what is not told, or a dict by name"
                raise ValueError(f"condition_vector: {row!r} must be {allowed}.")
            rows.append([math.nan if value is None else value for value in values])
        return torch.tensor(rows, dtype=torch.float64)

    def _condition_images(self, images: Images | None, mask: Images | None, denormalize: bool) -> Tensor | None:
        """Encoded condition images, [N, input_channels, H, W]."""
        condition, size, name = image_condition(self.unet), self._shape(1)[2:], "condition_image"
        if (mask is not None) != (images is not None and condition is not None and condition.task == "inpaint"):
            raise ValueError("condition_mask goes with the condition_image of a model for inpainting, and with no other.")
        if images is None:
            return None
        if condition is None:
            raise ValueError("condition_image was given to a model without one; leave it out.")
        if condition.classes:
            x = read_labels(images, name).to(self._execution_device)
        else:
            channels = 1 if condition.task == "gray" else condition.channels
            x = self._values_in(images, name, channels, condition.value_range, denormalize)
        sizes = {size, tuple(length // (condition.factor or 1) for length in size)}
        if tuple(x.shape[2:]) not in sizes:
            allowed = " or ".join(f"{height}x{width}" for height, width in sorted(sizes))
            raise ValueError(f"{name} has {x.shape[2]}x{x.shape[3]} pixels; this model needs {allowed} (height x width).")
        if condition.classes:
            return condition.encode(x)
        unknown = None if mask is None else ~self._kept_pixels(mask, "condition_mask")
        if unknown is not None and len(unknown) != len(x):
            count = max(len(unknown), len(x))
            x, unknown = expanded(x, count, "condition images"), expanded(unknown, count, "condition masks")
        return condition.arrange(x, unknown, size)

    def _check_left_out(self, name: str) -> None:
        if own_settings(self.unet).get("condition_dropout") == 0:
            raise ValueError(f"give {name}: this model never went without it, since it was trained without condition dropout.")

    def _label_rows(self, told: Told) -> Rows:
        """The UNet's `class_labels`: ids, or encoded numbers, of which the unconditional half is not told what is guided."""
        labels, device, null = told.class_labels, self._execution_device, self._null_label
        if (condition := vector_condition(self.unet)) is None:
            if labels is None and not self._num_embeddings:
                return None, None
            ids = torch.tensor([self._label_id(None)] if labels is None else labels, device=device)
            guided = labels is not None and null is not None and "class_labels" in told.guided
            return ids, torch.full_like(ids, null) if guided else None
        names, vectors = condition.names, told.condition_vector
        if vectors is None:
            self._check_left_out("condition_vector")
            vectors = torch.full((1, len(names)), math.nan)
        dropped = [not {"condition_vector", name}.isdisjoint(told.guided) for name in names]
        nulls = torch.where(torch.tensor(dropped), math.nan, vectors)
        width = embedding_width(self.unet)
        rows, null_rows = (condition.encode(each, width).to(device) for each in (vectors, nulls))
        return rows, null_rows if told.condition_vector is not None and any(dropped) else None

    def _image_rows(self, told: Told) -> Rows:
        """The encoded condition images, or zeros, and those of the unconditional half."""
        if (condition := image_condition(self.unet)) is None:
            return None, None
        if (images := told.condition_image) is None:
            self._check_left_out("condition_image")
            return torch.zeros(1, condition.input_channels, *self._shape(1)[2:], device=self._execution_device), None
        return images, torch.zeros_like(images) if "condition_image" in told.guided else None

    def _conditioning(self, told: Told, batch: Batch, guidance: Guidance) -> Conditioning:
        if guidance.in_use and told.class_labels is not None and "class_labels" in told.guided and self._null_label is None:
            needed = "an embedding for 'no class', which this model lacks"
            raise ValueError(f"guidance_scale={guidance.scale} needs {needed}; use guidance_scale=1.")
        pairs = {"class_labels": self._label_rows(told), "condition_image": self._image_rows(told)}
        pairs = {name: (row, row if null is None else null) for name, (row, null) in pairs.items() if row is not None}
        rows, null_rows = ({name: batch.spread(pair[half], name) for name, pair in pairs.items()} for half in (0, 1))
        if guidance.in_use and all(row is null for row, null in pairs.values()):
            missing = " or ".join(told.guided) or "a condition, of which this model has none"
            warn(f"guidance_scale={guidance.scale} has no effect without {missing}.", stacklevel=4)
        elif guidance.in_use:
            self._warn_if_never_unconditional()
            return Conditioning(rows, null_rows, guidance)
        return Conditioning(rows, guidance=guidance)


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
