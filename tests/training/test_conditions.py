"""Conditions in training: what is drawn is a function of (seed, step, position), and runs with them end, resume and load."""

import shutil

import datasets
import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from PIL import Image
from tokenizers import normalizers
from transformers import BertConfig, BertModel

from ddpm_pipeline import AlphaDDPMPipeline, AlphaDDPMTextToImagePipeline
from ddpm_pipeline.conditioning_alpha_ddpm import prepare_prompt, tokenize
from ddpm_pipeline.data import ConditionColumns, DataOptions, load_images
from ddpm_pipeline.support.draws import image_indices
from ddpm_pipeline.support.errors import ConfigError
from ddpm_pipeline.training import TrainingOptions, train
from ddpm_pipeline.training.captions import Captions, Templates
from ddpm_pipeline.training.conditions import ClassCondition, build_condition
from ddpm_pipeline.training.identity import changes
from ddpm_pipeline.training.options import RECIPES, ConditionOptions
from ddpm_pipeline.training.text_conditions import TextCondition
from ddpm_pipeline.training.text_encoders import make_small_encoder, make_tokenizer
from training_helpers import digits as load_digits
from training_helpers import metrics, whole_batch

DIGIT_CAPTIONS = "digits_captions.yaml"
STRANGE = ["", "七个手写数字", "seven 🎉👩‍👩‍👧", "word " * 2_000, "\x00", None]


def text(**options) -> ConditionOptions:
    return ConditionOptions("text", **options)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return load_digits(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """Twelve grey images with strange captions, some with several."""
    folder = tmp_path_factory.mktemp("captioned")
    images = [np.full((8, 8), 20 * i, dtype=np.uint8) for i in range(12)]
    features = datasets.Features({"image": datasets.Array2D((8, 8), "uint8"), "text": datasets.List(datasets.Value("string"))})
    texts = [[STRANGE[i % 6]] if i < 6 else ["a grey square", f"grey {i}"] for i in range(12)]
    datasets.Dataset.from_dict({"image": images, "text": texts}, features=features).save_to_disk(str(folder / "data"))
    return str(folder / "data")


# ---- labels -----------------------------------------------------------------------------------------


def test_labels_are_those_of_the_images_and_a_tenth_is_left_out(digits):
    condition = ClassCondition(ConditionOptions("class"), digits)
    known = digits.column(condition.column, np.arange(1000))
    labels = condition.draw(known, whole_batch(7, 1000))
    kept = labels != 10
    assert torch.equal(labels[kept], known[kept])
    assert 0.07 < 1 - kept.float().mean() < 0.13
    assert not torch.equal(kept, condition.draw(known, whole_batch(8, 1000)) != 10)


@pytest.mark.parametrize("kind", ["class", "text"])
def test_conditions_are_the_same_however_the_batch_is_split(kind, digits):
    condition = build_condition(ConditionOptions(kind, word_dropout=0.3), digits)
    indices = image_indices(0, len(digits), 3, 32)
    values = digits.column(condition.column, indices).tolist()
    whole = list(condition.draw(values, whole_batch(3, 32)))
    slices = [slice(start, start + 8) for start in range(0, 32, 8)]
    parts = [condition.draw(values[each], whole_batch(3, 32, each)) for each in slices]
    assert whole == [value for part in parts for value in part]
    assert whole != list(condition.draw(values, whole_batch(4, 32)))


# ---- captions ---------------------------------------------------------------------------------------


def test_captions_name_their_class_and_never_use_a_held_out_wording(digits):
    captions = Captions(text(caption_templates=DIGIT_CAPTIONS, word_dropout=0.3), digits)
    names = yaml.safe_load((RECIPES / DIGIT_CAPTIONS).read_text())["names"]
    labels = digits.column("label", range(1797)).tolist()
    drawn = [captions.draw(labels, whole_batch(step, 1797), [False] * 1797) for step in range(12)]
    for batch in drawn:
        for label, caption in zip(labels, batch, strict=True):
            words = caption.replace(",", " ").replace(":", " ").split()
            assert not words or set(words) & {str(name) for name in names[str(label)]}
    different = {prepare_prompt(caption) for batch in drawn for caption in batch}
    assert len(different) > 800  # fresh wordings at each use
    assert not different & captions.templates.held_out
    assert {"a seven", "number seven", "seven, handwritten"} <= captions.templates.held_out


def test_word_dropout_keeps_the_name_and_nothing_else_for_certain():
    templates = Templates(["a small {name} here"], [["cat"]])
    drawn = [templates.caption(0, np.random.default_rng(seed), 0.5) for seed in range(200)]
    assert all("cat" in caption.split() for caption in drawn)
    assert len(set(drawn)) == 8 and len([c for c in drawn if c == "a small cat here"]) in range(10, 45)
    assert {templates.caption(0, np.random.default_rng(seed), 0.0) for seed in range(9)} == {"a small cat here"}


def test_a_text_column_gives_one_of_an_image_s_captions_and_survives_any_of_them(captioned, tmp_path):
    data = load_images(DataOptions(captioned, cache_dir=str(tmp_path)), ConditionColumns(text_column="text"))
    conditions = TextCondition(text(condition_dropout=0.0, word_dropout=0.1), data)
    assert "guidance" not in conditions.example()  # which such a model does not have
    values = data.column(conditions.column, range(12))
    drawn = {step: conditions.draw(values, whole_batch(step, 12)) for step in range(8)}
    assert drawn[0][0] == "" and drawn[0][5] == ""  # an empty caption and a missing one
    assert len({batch[7] for batch in drawn.values()}) > 2
    arguments = conditions.inputs(drawn[0], torch.zeros(1))
    states = conditions.text_encoder(arguments["input_ids"], attention_mask=arguments["attention_mask"])[0]
    assert torch.isfinite(states).all() and states.shape[1] == 77
    request, columns = conditions.preview(6)
    assert list(request.arguments) == ["prompt"] and len(request) == 6 and columns == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("templates: [a digit]", "has no {name}"),
        ("names: {}", "must hold `templates`"),
        ("templates: ['{name}']\nnames: {ten: [x]}", "'ten' is not a class"),
        ("templates: ['{name}']\nnames: {'1': []}", "empty list of names"),
        ("templates: ['A {name}']\nheld_out: ['a {name}']", "is held out and also made"),
        ("templates: [", "cannot be read"),
    ],
)
def test_a_bad_file_of_wordings_is_refused(content, message, digits, tmp_path):
    (tmp_path / "captions.yaml").write_text(content)
    with pytest.raises(ConfigError, match=message):
        Captions(text(caption_templates=str(tmp_path / "captions.yaml")), digits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"condition": "words"}, "one of none, class, text"),
        ({"condition": "class", "text_column": "text"}, "needs --condition text"),
        ({"condition_dropout": 1.0}, "below 1"),
        ({"word_dropout": -0.1}, "at least 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        ConditionOptions(**{"condition": "text", **options})


# ---- encoders ---------------------------------------------------------------------------------------


def test_the_small_encoder_is_small_and_its_tokenizer_takes_any_text():
    words = [" ".join(f"{a}{b}ology" for b in range(30)) for a in range(1000)]  # more different words than tokens
    tokenizer = make_tokenizer(words)
    assert sum(parameter.numel() for parameter in make_small_encoder(tokenizer).parameters()) < 2e6
    tokens = tokenize(tokenizer, [text or "" for text in STRANGE])
    assert tokens["input_ids"].shape == (6, 77) and tokens["attention_mask"][0].sum() == 2
    small = make_tokenizer(["a handwritten seven", "Seven!"])
    assert small("seven").input_ids == small("SEVEN").input_ids and len(small("a handwritten seven").input_ids) == 5


def test_a_loaded_encoder_is_frozen_and_encodes_each_caption_once(digits, tmp_path):
    tokenizer = make_tokenizer(["the digit seven"])
    tokenizer.save_pretrained(tmp_path / "bert")
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(tokenizer), **size)).save_pretrained(tmp_path / "bert")
    conditions = TextCondition(text(text_encoder=str(tmp_path / "bert")), digits)
    assert conditions.network(torch.nn.Identity()).__class__ is torch.nn.Identity  # the UNet alone is trained
    assert conditions.unet_config() == {"cross_attention_dim": 16}
    assert not conditions.text_encoder.training
    assert not any(parameter.requires_grad for parameter in conditions.text_encoder.parameters())
    calls = []
    conditions.text_encoder.register_forward_hook(lambda module, inputs, output: calls.append(len(output[0])))
    first = conditions.inputs(["one", "two", "one"], torch.zeros(1))["encoder_hidden_states"]
    again = conditions.inputs(["two", "three"], torch.zeros(1))["encoder_hidden_states"]
    assert calls == [2, 1] and first.shape == (3, 77, 16) and not first.requires_grad
    assert torch.equal(first[0], first[2]) and torch.equal(first[1], again[0])
    with pytest.raises(ConfigError, match="cannot be used as a text encoder"):
        TextCondition(text(text_encoder=str(tmp_path / "nothing")), digits)


def test_prompts_are_lower_case_whatever_the_tokenizer_does():
    tokenizer = make_tokenizer(["a seven"])
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()  # sees capitals
    ids = [tokenize(tokenizer, [prompt])["input_ids"] for prompt in ("a seven", " A SEVEN ")]
    assert torch.equal(*ids)


def test_changed_templates_are_another_condition(digits, tmp_path):
    conditions = []
    for name, held_out in (("a", ["two {name}"]), ("b", ["three {name}"])):
        (tmp_path / name).write_text(yaml.safe_dump({"templates": ["a {name}"], "held_out": held_out}))
        conditions.append(TextCondition(text(caption_templates=str(tmp_path / name)), digits).identity())
    assert [change.split(" was ")[0] for change in changes(*conditions)] == [
        f"captions of classes held out {i}" for i in range(10)
    ]
    assert conditions[0]["tokenizer"] == conditions[1]["tokenizer"] and conditions[0]["frozen text encoder"] is None


# ---- whole runs -------------------------------------------------------------------------------------

RUN = {
    "batch_size": 8, "max_train_steps": 4, "num_train_timesteps": 8, "checkpoint_every": 2, "preview_every": 2,
    "preview_images": 20, "preview_inference_steps": 2, "num_samples": 4, "num_cpu_threads": 1, "mixed_precision": "no",
    "fit_noises": 0,
}  # fmt: skip


def run(recipe: str, folder, **options):
    return train(TrainingOptions(config=recipe, **{**RUN, "output_dir": str(folder), **options}))


def weights(folder) -> dict[str, torch.Tensor]:
    kind = AlphaDDPMTextToImagePipeline if (folder / "tokenizer").is_dir() else AlphaDDPMPipeline
    pipe = kind.from_pretrained(folder)
    parts = [pipe.unet, *([pipe.text_encoder] if hasattr(pipe, "text_encoder") else [])]
    return {f"{i}.{name}": value for i, part in enumerate(parts) for name, value in part.state_dict().items()}


@pytest.mark.filterwarnings("ignore::UserWarning")  # 8 timesteps do not reach noise
@pytest.mark.parametrize("recipe", ["digits_class", pytest.param("digits_text", marks=pytest.mark.slow)])
def test_a_recipe_runs_resumes_bit_for_bit_and_leaves_a_model_that_draws(recipe, tmp_path):
    whole = run(recipe, tmp_path / "whole")
    shutil.copytree(whole, tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-00000004")
    resumed = run(recipe, tmp_path / "parts", resume="latest")
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name
    assert np.isfinite(metrics(whole)[-1]["loss"])
    preview = Image.open(whole / "samples" / "step-00000002.png")
    assert preview.height > 4 * preview.width  # ten rows of two
    card = (whole / "README.md").read_text()
    stock = DiffusionPipeline.from_pretrained(whole)
    stock.set_progress_bar_config(disable=True)
    if "text" in recipe:
        assert "a handwritten nine" in card and "text-to-image" in card
        assert stock("a handwritten seven", num_inference_steps=2).images[0].size == (8, 8)
    else:
        assert "class_labels='9'" in card
        with pytest.raises(ValueError, match="class_labels"):
            stock(num_inference_steps=2)
        assert AlphaDDPMPipeline.from_pretrained(whole)(class_labels="7", num_inference_steps=2).images[0].size == (8, 8)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_text_reaches_every_level_of_a_larger_network_and_diffusers_alone_loads_it(tmp_path):
    quick = {"checkpoint_every": 0, "preview_every": 0, "num_samples": 1, "max_train_steps": 1, "lr_warmup_steps": 0}
    folder = run("cats_text", tmp_path, dataset_config="num_images=64", **quick)
    stock, ours = DiffusionPipeline.from_pretrained(folder), AlphaDDPMTextToImagePipeline.from_pretrained(folder)
    assert type(stock).__module__.startswith("diffusers.") and stock.unet.config.addition_embed_type == "text"
    how = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np"}
    prompts = ["a green cat with a black hat", "a spotted kitten"]
    theirs, same = (pipe(prompts, generator=torch.Generator().manual_seed(0), **how).images for pipe in (stock, ours))
    np.testing.assert_allclose(theirs, same, atol=1e-4)
    for module in stock.unet.modules():  # without attention, the embedding alone tells the text
        if hasattr(module, "attn2"):
            torch.nn.init.zeros_(module.attn2.to_out[0].weight)
    one, other = stock(prompts, generator=[torch.Generator().manual_seed(0) for _ in prompts], **how).images
    assert not np.allclose(one, other, atol=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_text_model_is_a_start_for_another_with_its_own_encoder(tmp_path):
    quick = {"checkpoint_every": 0, "preview_every": 0, "num_samples": 1}
    first = run("digits_text", tmp_path / "first", max_train_steps=1, **quick)
    tuned = {"text_encoder": None, "init_from": str(first), "lr_warmup_steps": 1}
    second = run("digits_text", tmp_path / "second", **quick, **tuned)
    before, after = weights(first), weights(second)
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("1."))  # frozen
    assert any(not torch.equal(before[name], after[name]) for name in before if name.startswith("0."))
