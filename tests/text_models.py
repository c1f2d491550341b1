"""Tiny text-to-image models, of whose texts something is seen in the images."""

import torch
from diffusers import UNet2DConditionModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from ddpm_pipeline import AlphaDDPMScheduler, AlphaDDPMTextToImagePipeline, describe_conditions

SPECIAL_TOKENS = ("<pad>", "<start>", "<end>")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte, so that any text has tokens; capitals have others than small letters."""
    vocabulary = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    pad, start, end = SPECIAL_TOKENS
    tokenizer.post_processor = processors.TemplateProcessing(f"{start} $A {end}", special_tokens=[(start, 1), (end, 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=start, eos_token=end, model_max_length=77
    )


def make_encoder(kind: str, vocabulary: int) -> PreTrainedModel:
    size = {"vocab_size": vocabulary, "hidden_size": 16}
    if kind == "t5":
        return T5EncoderModel(T5Config(vocab_size=vocabulary, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    if kind == "bert":
        return BertModel(BertConfig(**size, **heads))
    return CLIPTextModel(CLIPTextConfig(**size, **heads, max_position_embeddings=77))


def make_unet(**config) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        **{
            "sample_size": 8,
            "in_channels": 1,
            "out_channels": 2,
            "block_out_channels": (8, 16),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "cross_attention_dim": 16,
            "attention_head_dim": 2,
            **config,
        }
    )


def make(
    kind: str = "clip", dropout: float = 0.1, scheduler: AlphaDDPMScheduler | None = None, seed: int = 0
) -> AlphaDDPMTextToImagePipeline:
    tokenizer, scheduler = make_tokenizer(), scheduler or AlphaDDPMScheduler(variance_type="learned_range")
    learned = scheduler.config.variance_type == "learned_range"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet, encoder = make_unet(out_channels=1 + learned), make_encoder(kind, len(tokenizer))
        with torch.no_grad():  # a fresh network hardly hears its text: make it loud
            for parameter in [*unet.parameters(), *encoder.parameters()]:
                parameter.add_(0.1 * torch.randn_like(parameter))
    describe_conditions(unet, condition_dropout=dropout)
    pipe = AlphaDDPMTextToImagePipeline(unet.eval(), encoder.eval(), tokenizer, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe
