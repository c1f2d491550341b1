"""Tokenizers and text encoders: a small one built from the captions, or any text model of transformers."""

import json
from collections.abc import Iterable
from itertools import islice

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..conditioning_alpha_ddpm import MAX_TOKENS
from ..data.sources import hash_of
from ..support.errors import ConfigError
from ..support.exceptions import describe_exception

SMALL_ENCODER = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
MAX_VOCABULARY = 8192  # with it the small encoder has 0.6 M parameters
MAX_CAPTIONS_READ = 1_000_000  # for the tokenizer
NO_TEXT_MODEL = "has no text encoder that can be read; use --condition none or class, or a text model to start from."
SPECIAL_TOKENS = ("<|pad|>", "<|startoftext|>", "<|endoftext|>")


def make_tokenizer(captions: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on captions. It can encode any other text as well."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # a word is the same token everywhere
    tokenizer.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), list(SPECIAL_TOKENS)
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(islice(captions, MAX_CAPTIONS_READ), trainer)
    pad, start, end = SPECIAL_TOKENS
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(token, tokenizer.token_to_id(token)) for token in (start, end)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=start, eos_token=end, model_max_length=MAX_TOKENS
    )


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """32 hex digits of what turns a text into numbers: vocabulary, normalisation, splitting."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    calls = ("truncation", "padding")  # which the latest call left
    return hash_of({name: value for name, value in sorted(state.items()) if name not in calls})


def make_small_encoder(tokenizer: PreTrainedTokenizerBase) -> CLIPTextModel:
    """A CLIP-style text transformer of under 2 M parameters, with weights from torch's global generator. Its token
    embeddings are drawn from N(0, 1), as T5's, not with CLIP's 0.02: words are then far apart from the first update on.
    """
    size = {**SMALL_ENCODER, "vocab_size": len(tokenizer), "max_position_embeddings": MAX_TOKENS}
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    encoder = CLIPTextModel(CLIPTextConfig(**size, **special))
    torch.nn.init.normal_(encoder.get_input_embeddings().weight)
    return encoder


def load_text_encoder(source: str | None, init_from: str | None) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Tokenizer and encoder, in float32, from a Hub name or folder, or from the pipeline `init_from` if `source` is None. No
    code of theirs is run and nothing pickled is opened. Raises ConfigError if they cannot be used.
    """
    name, option = (source, f"--text_encoder {source}") if source else (init_from, f"--init_from {init_from}")
    safe = {"trust_remote_code": False}  # given explicitly, since transformers would ask on standard input
    of_tokenizer, of_encoder = (safe | ({} if source else {"subfolder": part}) for part in ("tokenizer", "text_encoder"))
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **of_tokenizer)
        config = transformers.AutoConfig.from_pretrained(name, **of_encoder)
        text_models = transformers.AutoModelForTextEncoding
        loader = text_models if type(config) in text_models._model_mapping else transformers.AutoModel
        loader = CLIPTextModel if config.model_type == "clip" else loader  # the text half of a whole CLIP
        encoder = loader.from_pretrained(name, dtype=torch.float32, use_safetensors=True, **of_encoder)
    except (OSError, ValueError, KeyError) as error:
        why = describe_exception(error)
        if source is None:
            raise ConfigError(f"{option} {NO_TEXT_MODEL} ({why})") from error
        raise ConfigError(f"{option} cannot be used as a text encoder: {why}") from error
    positions = getattr(encoder.config, "max_position_embeddings", None)
    if positions is not None and positions < MAX_TOKENS:
        raise ConfigError(f"{option} takes {positions} tokens, and captions are padded to {MAX_TOKENS}; use another.")
    if tokenizer.pad_token is None:
        raise ConfigError(f"{option} has a tokenizer without a padding token, which captions need; use another.")
    return tokenizer, encoder
