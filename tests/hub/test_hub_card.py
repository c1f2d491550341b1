"""The card: what it says is true, what others wrote in it stays, and nothing in it is more than text."""

import ast
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import model_index_to_eval_results
from markdown_it import MarkdownIt

from ddpm_pipeline import ValueRange
from ddpm_pipeline.evaluation.figures import measurements
from ddpm_pipeline.hub import Measurement, TrainingFacts, build_card, pictures_in, push, record_evaluation, refresh_card
from ddpm_pipeline.hub.readme import metadata, private_lines, sections
from ddpm_pipeline.tables_alpha_ddpm import OWN_KEY
from hub_models import FIGURES, TRAINING, card_of, text_pipeline


def test_card_says_what_is_known_and_passes_the_hub_s_validation(hub, client: HfApi, pipe, monkeypatch) -> None:
    card = card_of(pipe, evaluation=FIGURES, license="apache-2.0", pictures={"samples.png": "grid"})
    text = str(card)
    for known in ("1,797 images of `digits`", "![grid](samples.png)", "| updates | 7 |", "accelerate launch x", "apache-2.0",
                  "8x8", "squaredcos_cap_v2", "| bits/dim | 2.346 ± 0.01 | 1,797 |", "steps 1000", "fixed_small"):  # fmt: skip
        assert known in text, known
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    card.validate()
    again = ModelCard(text)
    assert again.data.library_name == "diffusers" and again.data.pipeline_tag == "unconditional-image-generation"
    assert again.data.datasets == ["org/digits"] and again.data.license == "apache-2.0"
    results = again.data.eval_results
    assert [(one.metric_name, one.metric_value) for one in results] == [("bits/dim", 2.345678), ("FID", 1.5)]
    assert results[1].dataset_split is None and "standard error" in text and "None" not in text
    assert results[0].metric_args == {"num_images": 1797, "standard_error": 0.01, "steps": 1000, "form": "exact KLs"}
    assert not results[0].source_url and "pypi.org" not in text.split("---")[1]
    assert model_index_to_eval_results(again.data.to_dict()["model-index"])[0] == "ddpm"


def test_card_without_facts_invents_none(pipe) -> None:
    text = str(build_card(pipe, name="ddpm"))
    assert "trained from scratch" not in text and "Not measured" not in text and "![" not in text
    assert "eval_results" not in text and "model-index" not in text and "license" not in text
    assert "None" not in text.replace("Nonetheless", "")


def test_card_of_a_class_or_text_model_says_which_call_draws(folder: Path) -> None:
    def changed(file: str, **values) -> None:
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | values))

    changed("unet/config.json", num_class_embeds=11)
    text = str(build_card(folder, name="c", repo_id="org/c"))
    assert "class_labels=[0]" in text and "cannot be told a class" in text
    assert "image = pipe(num_inference_steps" not in text
    changed("model_index.json", text_encoder=["transformers", "CLIPTextModel"])
    text = str(build_card(folder, name="t", repo_id="org/t"))
    assert "AlphaDDPMTextToImagePipeline" in text and "pipeline_tag: text-to-image" in text
    with pytest.raises(ValueError, match="not a pipeline folder"):
        build_card(folder / "unet", name="u")


def test_example_of_a_card_outlives_pushes(hub, client: HfApi, folder: Path) -> None:
    """The label that a training run put into its card, whatever is pushed over it; but not for a model of another kind."""
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"num_class_embeds": 11}))
    example = "class_labels='nine', guidance_scale=3"
    (folder / "README.md").write_text(str(build_card(folder, name="c", example=example)))
    push(folder, "org/example", api=client)
    card = hub.read("org/example", "README.md").decode()
    assert card.count(f"pipe({example}, num_inference_steps=20)") == 2 and 'from_pretrained("org/example")' in card
    (folder / "README.md").unlink()
    push(folder, "org/example", api=client)
    assert hub.read("org/example", "README.md").decode() == card
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    push(folder, "org/example", api=client)
    card = hub.read("org/example", "README.md").decode()
    assert "pipe(num_inference_steps=20)" in card and "nine" not in card


SAID = {  # of models, by a change of their configs
    "16-bit": ({"sample_size": [8, 16], OWN_KEY: {"value_range": {"low": [0], "high": [4095], "dtype": "uint16"}}},
               ("grey 8x16 images", "16-bit integers from 0 to 4095.", 'output_type="np", denormalize=True).images')),
    "bands": ({"in_channels": 13, OWN_KEY: {"value_range": {"low": [0.0] * 13, "high": [*range(1, 14)], "dtype": "float32"}}},
              ("13-channel 8x8", "floats from 0 to 13, each channel in a range of its own",
               'images = pipe(num_inference_steps=20, output_type="np").images')),
    "numbers": ({"class_embed_type": "identity",
                 OWN_KEY: {"condition_vector": {"names": ["age", "`x`"], "mean": [41.23456, 0.5], "std": [1, 1]}}},
                ("conditioned on numbers: age, \\`x\\`.", "condition_vector={'age': 41.23, '`x`': 0.5}, guidance_scale=2.0",
                 "cannot be told numbers")),
    "inpainting": ({"in_channels": 7, OWN_KEY: {"condition_image": {
                    "channels": 3, "classes": None, "task": "inpaint", "value_range": ValueRange().to_json()}}},
                   ("RGB 8x8 images", "is the image with a part left out.", 'condition_mask = Image.open("mask.png")',
                    "condition_image=condition_image, condition_mask=condition_mask", "pipeline_tag: image-to-image",
                    "what it samples without means nothing", "AlphaDDPMImageToImageBlocks")),
    "of arrays": ({"num_class_embeds": 3, "in_channels": 6, OWN_KEY: {"condition_image": {
                   "channels": 5, "classes": None, "task": None, "value_range": ValueRange((-1,), (1,), "float32").to_json()}}},
                  ('condition_image = np.load("condition.npy")', "Its values are floats from -1 to 1", "A class-conditional",
                   "values = pipe(condition_image=condition_image, class_labels=[0]", "- class-conditional")),
    "classes without 'none of them'": ({"num_class_embeds": 3}, ("pipe(class_labels=[0], num_inference_steps=20)",)),
    "inpainting bands": ({"in_channels": 11, OWN_KEY: {"condition_image": {
                          "channels": 5, "classes": None, "task": "inpaint", "value_range": ValueRange().to_json()}}},
                         ("5-channel 8x8", "import numpy as np\nfrom PIL import Image\nfrom ddpm_pipeline")),
}  # fmt: skip


def test_card_says_that_diffusers_alone_cannot_use_a_scheduler(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    config = folder / "scheduler" / "scheduler_config.json"
    kept = {OWN_KEY: {"fitted_samplers": {"1": {"timesteps": [9], "coefficients": [[0, 1]]}}}}
    config.write_text(json.dumps(json.loads(config.read_text()) | kept))
    assert "`num_inference_steps` of 1 uses" in str(build_card(folder, name="c"))
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", "UniPCMultistepScheduler"]}))
    card = str(build_card(folder, name="c"))
    assert "fitted to this model" not in card, "which only our schedulers use"
    assert "cannot sample with the UniPCMultistepScheduler that it is saved with:" in card and card.count("pipe(") == 2


@pytest.mark.parametrize("kind", SAID)
def test_card_says_what_images_and_conditions_are(folder: Path, kind: str) -> None:
    changes, words = SAID[kind]
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps(config | changes))
    text = str(build_card(folder, name="x", repo_id="org/x"))
    for expected in words:
        assert expected in text, expected
    assert ("denormalize" in text) == (kind in ("16-bit", "bands", "of arrays"))
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        ast.parse(block)


@pytest.mark.parametrize(
    "changes",
    [
        {"sample_size": [8]}, {"in_channels": "x"}, {OWN_KEY: 5}, {OWN_KEY: {"value_range": {"low": [0]}}},
        {OWN_KEY: {"condition_vector": {"names": ["a"]}}}, {OWN_KEY: {"condition_image": {"channels": 1}}},
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_no_card_can_say_end_a_push_before_it_begins(hub, client: HfApi, folder: Path, changes: dict) -> None:
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=r"^\S+unet/config.json: its settings [^\n]* are malformed [^\n]*$"):
        push(folder, "org/malformed", api=client)
    assert ("models", "org/malformed") not in hub.repos


def test_card_of_a_text_model_that_is_not_square_names_its_size_for_diffusers_alone() -> None:
    pipe = text_pipeline()
    pipe.unet.register_to_config(sample_size=(8, 16))
    calls = re.findall(r"pipe\(.*\)", str(build_card(pipe, name="x")))
    assert ["height=8, width=16" in call for call in calls] == [True, False, False]


def test_captions_say_how_images_are_shown(folder: Path) -> None:
    shown = "channels 3, 2, 1 of 13, contrast stretched from percentile 1 to 99, for viewing only"
    (folder / "samples.txt").write_text(f"shown: {shown}\nleft: condition images\nrow 1: cat\nrow 2: dog\n")
    (folder / "process.png").write_bytes(b"")
    samples = f"samples ({shown}), on the left the condition images, row by row: cat, dog"
    assert pictures_in(folder) == {"samples.png": samples, "process.png": f"from noise to images ({shown})"}


TOKEN = "hf_" + "x" * 30


def test_card_leaves_out_what_looks_private_and_says_where(pipe, caplog) -> None:
    home = str(Path.home())
    facts = {"seed": 0, "data": f"{home}/pictures", "note": TOKEN}
    figure = replace(FIGURES[1], dataset=TOKEN, settings={"features": f"'{home}/x.py'"})
    training = TrainingFacts(TOKEN, 3, f"org/{TOKEN}", facts, f"train --token {TOKEN}", TOKEN, f"org/{TOKEN}")
    private = {"training": training, "pictures": {"samples.png": TOKEN}, "evaluation": [figure]}
    text = str(card_of(pipe, example=f"class_labels='{TOKEN}'", name=TOKEN, repo_id=f"org/{TOKEN}", **private))
    assert not private_lines(text) and TOKEN not in caplog.text
    assert "| seed | 0 |" in text and "| FID | 1.5 | 1,797 |" in text
    for place in ("the training command", "the value of 'data'", "the value of 'note'", "the example", "the name"):
        assert place in caplog.text, place


@pytest.mark.parametrize("home", ["/train", "/project", "/home/me", "/unet"])
def test_card_may_hold_words_that_are_a_home_folder(pipe, monkeypatch, caplog, home: str) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path(home))
    text = str(card_of(pipe, training=replace(TRAINING, command="accelerate launch training/train.py --dataset org/project")))
    assert "accelerate launch training/train.py --dataset org/project" in text and not caplog.records
    harmless = f"see https://example.org{home}/x, data{home}, x{home}/y and {home}-2/z"
    assert not private_lines(harmless)
    for line in (f"read from {home}/cats.", f"`{home}/cats`", f"file://{home}/x", f'"{home}/.cache"'):
        assert private_lines(f"first\n{line}") == {2: "a path in the home folder"}, line


@pytest.mark.parametrize("addition", [f"token: {TOKEN}", f"My data: {Path.home()}/cats"])
def test_doubt_about_a_readme_keeps_back_the_readme_and_not_the_model(hub, client, folder: Path, caplog, addition: str) -> None:
    readme = (folder / "README.md").read_text() + f"\n{addition}\n"
    (folder / "README.md").write_text(readme)
    repo_id = f"org/doubt-{len(addition)}"
    push(folder, repo_id, api=client)
    assert "unet/diffusion_pytorch_model.safetensors" in hub.files(repo_id)
    assert not private_lines(hub.read(repo_id, "README.md").decode())
    assert f"line {len(readme.splitlines())}" in caplog.text and TOKEN not in caplog.text
    assert (folder / "README.md").read_text() == readme


# ---- what others wrote ----------------------------------------------------------------------------

FORM = """---
# filled in on the web page
license: cc-by-4.0  # as the data
datasets:
- owner/pictures
tags: [medical, mine]
language:
- en

x-unknown: {kept: true}
extra_gated_prompt: |
  ---
  Please be kind
---
"""
KEPT = {"license": "cc-by-4.0", "language": ["en"], "x-unknown": {"kept": True}, "extra_gated_prompt": "---\nPlease be kind\n"}
ENCODINGS = {
    "UTF-8": str.encode, "CRLF": lambda text: text.replace("\n", "\r\n").encode(), "BOM": lambda text: text.encode("utf-8-sig"),
    "UTF-16": lambda text: text.encode("utf-16"), "Latin-1": lambda text: text.encode("latin-1"),
}  # fmt: skip


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("marked", [False, True])
def test_push_keeps_every_key_of_front_matter_written_elsewhere(hub, client, folder: Path, encoding: str, marked: bool) -> None:
    form = FORM.replace("be kind", "be très kind") + ("\n# À moi\n" + EDITED.split("# My title\n")[1] if marked else "")
    repo_id = f"org/form-{encoding}-{marked}"
    hub.write(repo_id, {"README.md": ENCODINGS[encoding](form)})
    push(folder, repo_id, api=client)
    readme = hub.read(repo_id, "README.md").decode()
    data = metadata(readme)
    assert data | KEPT | {"extra_gated_prompt": "---\nPlease be très kind\n"} == data
    assert data["datasets"] == (["owner/pictures"] if marked else ["owner/pictures", "org/digits"])
    assert data["tags"] == (["medical", "mine"] if marked else ["medical", "mine", "ddpm", "ddpm-pipeline", "pytorch"])
    for comment in ("# filled in on the web page", "cc-by-4.0  # as the data"):
        assert comment in readme
    assert ("# À moi" in readme) == marked and "8x8" in readme
    assert encoding != "CRLF" or readme.count("\r\n") == readme.count("\n")
    again = push(folder, repo_id, api=client)
    assert hub.read(repo_id, "README.md").decode() == readme and again.endswith(
        hub.repos["models", repo_id]["branches"]["main"]
    )


ODD_FRONT_MATTER = {
    "one line": "{license: mit, tags: [a]}", "anchors": "license: &l mit\ntags: &t [a]\nother: {is: *t}", "empty": "",
    "quoted keys": "'license': mit\n\"tags\": [a]", "a key twice": "license: apache-2.0\nlicense: mit\ntags: a",
    "aliases of aliases": "tags: [a]\na0: &a0 [x]\n" + "\n".join(
        f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]" for n in range(12)),
}  # fmt: skip


@pytest.mark.parametrize("front", ODD_FRONT_MATTER)
def test_front_matter_in_any_style_takes_our_keys(pipe, front: str) -> None:
    theirs = metadata(f"---\n{ODD_FRONT_MATTER[front]}\n---\n")
    data = metadata(refresh_card(f"---\n{ODD_FRONT_MATTER[front]}\n---\n", card_of(pipe, license="bsd")))
    assert data["license"] == theirs.get("license", "bsd") and data["library_name"] == "diffusers"
    assert data["tags"] == ["a"] * bool(theirs) + ["ddpm", "ddpm-pipeline", "pytorch"]
    assert theirs.keys() <= data.keys()
    assert "aliases" in front or {**data, **theirs, "tags": data["tags"]} == data


@pytest.mark.parametrize("front", ["license: [mit", "just words", "- a\n- b", "license: mit\n\ttabs: bad", "day: 2024-13-45"])
def test_broken_front_matter_stays_and_ends_nothing(hub, client, pipe, folder: Path, caplog, front: str) -> None:
    broken = EDITED.replace("license: mit  # chosen by hand\ntags:\n- mine", front)
    refreshed = refresh_card(broken, card_of(pipe, evaluation=FIGURES))
    assert refreshed.startswith(f"---\n{front}\n---\n") and "| FID | 1.5 |" in refreshed
    repo_id = f"org/broken-{sum(front.encode())}"
    (folder / "README.md").write_text(broken)
    push(folder, repo_id, api=client)  # with a card of the configs alone
    assert metadata(hub.read(repo_id, "README.md").decode())["library_name"] == "diffusers"
    hub.write(repo_id, {"README.md": broken.encode(), "unet/config.json": b"{}"})
    push(folder, repo_id, api=client)
    assert hub.read(repo_id, "README.md").decode() == broken and hub.read(repo_id, "unet/config.json") != b"{}"
    assert caplog.text.count("front matter") >= 2


def test_marks_are_marks_on_lines_of_their_own_outside_of_code(pipe) -> None:
    quoted = "<!-- ddpm-pipeline: summary -->\nquoted\n<!-- /ddpm-pipeline: summary -->\n"
    for around in ("```html\n{}```\n", "~~~~\n```\n{}~~~~\n", "> `a` {}", "text {}"):
        other = around.format(quoted if around[0] in "`~" else quoted.replace("\n", " "))
        existing = EDITED.replace("My introduction", other + "\nMy introduction")
        refreshed = refresh_card(existing, card_of(pipe))
        assert other in refreshed and refreshed.count("8x8") == 1, around
    prose = "see " + quoted.replace("\n<", "\nand <")
    assert refresh_card(prose, card_of(pipe)) == prose
    crossed = "<!-- ddpm-pipeline: summary -->\na\n<!-- ddpm-pipeline: limits -->\nb\n<!-- /ddpm-pipeline: summary -->\n"
    assert refresh_card(crossed, card_of(pipe)) == crossed


EDITED = """---
license: mit  # chosen by hand
tags:
- mine
---

# My title

My introduction, with `<!-- a comment -->`.

<!-- ddpm-pipeline: summary -->
old
<!-- /ddpm-pipeline: summary -->

<!-- ddpm-pipeline: evaluation -->
<!-- /ddpm-pipeline: evaluation -->

My last words.\r
"""


def test_edited_card_keeps_every_character_outside_our_sections(pipe) -> None:
    refreshed = refresh_card(EDITED, card_of(pipe))
    before, after = EDITED.split("\nold\n")
    assert refreshed.startswith(before) and refreshed.endswith(after)
    assert "8x8" in refreshed and "AlphaDDPMPipeline" not in refreshed, "a section that was removed stays so"
    assert refresh_card("# Mine alone\n", card_of(pipe)) == "# Mine alone\n"
    torn = EDITED.replace("<!-- /ddpm-pipeline: summary -->", "")
    assert refresh_card(torn, card_of(pipe)) == torn


def test_evaluation_replaces_ours_and_keeps_theirs(pipe) -> None:
    theirs = EvalResult("t", "d", "D", "fid", 3.0, source_name="somebody", source_url="https://example.org")
    older = EvalResult("t", "e", "E", "fid", 8.0, source_name="ddpm-pipeline", source_url="https://example.org")
    ours = Measurement("KID", 9.0, 10, "old").as_eval_result()
    data = ModelCardData(model_name="m", eval_results=[theirs, older, ours])
    existing = EDITED.replace("license: mit  # chosen by hand\ntags:\n- mine", data.to_yaml())
    refreshed = refresh_card(existing, card_of(pipe, evaluation=FIGURES))
    results = ModelCard(refreshed).data.eval_results
    assert sorted(one.metric_value for one in results) == [1.5, 2.345678, 3.0]
    assert "| FID | 1.5 | 1,797 |" in refreshed
    reset = refresh_card(refreshed, card_of(pipe, evaluation=[]))  # trained further: the figures are of other weights
    assert [one.metric_value for one in ModelCard(reset).data.eval_results] == [3.0]
    assert "Not measured yet." in reset


def test_card_has_each_figure_of_an_evaluation_under_its_own_name(folder: Path) -> None:
    """Read back from the table and from the metadata, with what each is an estimate from."""
    quality = {"fid": 11.25, "kid": 0.125, "kid_std": 0.0625, "precision": 0.75, "recall": 0.375, "num_generated": 64,
               "num_real": 1797, "steps": 100, "scheduler": "DDIMScheduler", "features": "Sequential"}  # fmt: skip
    bits = {"total": 3.5, "total_standard_error": 0.21, "num_images": 48, "steps": 1000, "network_calls": 20}
    results = {"dataset": "held-out", "split": "test", "seed": 7, "quality": quality, "bits_per_dim": bits}
    record_evaluation(folder, measurements(results))
    text = (folder / "README.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if " images | " not in line]
    table = {row[0]: row for row in rows if len(row) == 5 and row[0] in ("bits/dim", "FID", "KID", "precision", "recall")}
    indexed = {one.metric_name: one for one in ModelCard(text).data.eval_results}
    given = {"bits/dim": bits["total"]} | {name: quality[name.lower()] for name in ("FID", "KID", "precision", "recall")}
    assert table.keys() == indexed.keys() == given.keys()
    for name, value in given.items():
        _, shown, images, data, how = table[name]
        assert float(shown.split(" ±")[0]) == indexed[name].metric_value == value, name
        assert int(images) == indexed[name].metric_args["num_images"] == (48 if name == "bits/dim" else 64)
        assert data == "held-out (test)" and indexed[name].dataset_split == "test" and "seed 7" in how


def test_evaluation_goes_into_a_folder_and_on_to_an_edited_card(hub, client: HfApi, folder: Path) -> None:
    push(folder, "org/evaluated", api=client)
    edited = hub.read("org/evaluated", "README.md").decode().replace("# ddpm", "# A better title")
    hub.write("org/evaluated", {"README.md": edited.encode()})
    record_evaluation(folder, FIGURES)
    push(folder, "org/evaluated", api=client)
    card = ModelCard(hub.read("org/evaluated", "README.md").decode())
    assert "# A better title" in card.text and "| FID | 1.5 |" in card.text and "| updates | 7 |" in card.text
    assert len(card.data.eval_results) == 2 and card.data.license == "apache-2.0"
    assert 'from_pretrained("org/evaluated")' in card.text


def test_blank_form_of_diffusers_is_replaced_and_a_filled_one_is_not(pipe) -> None:
    sentence = (
        "This is the model card of a 🧨 diffusers pipeline that has been pushed on the Hub. This model card has been "
        "automatically generated."
    )
    blank = str(ModelCard.from_template(ModelCardData(library_name="diffusers"), model_description=sentence))
    assert "AlphaDDPMPipeline" in refresh_card(blank, card_of(pipe))
    filled = blank.replace("[More Information Needed]", "Me", 1)
    assert refresh_card(filled, card_of(pipe)) == filled


# ---- what others named ----------------------------------------------------------------------------

HOSTILE = {
    "marks": "a\n<!-- /ddpm-pipeline: summary -->\n<!-- ddpm-pipeline: evaluation -->\nb",
    "fences": "```\n~~~\n````python\nimport os\n```",
    "HTML": "<script>alert(1)</script><img src=x onerror=y>&lt;b>",
    "quotes": 'it\'s "quoted" \\" and \\n',
    "Jinja": "{{ 7 * 7 }}{% for x in y %}{# c #}",
    "front matter": "---\nlicense: evil\n---",
    "table": "a | b\n|---|---|\n| c | d |",
    "Markdown": "# Title\n![x](http://y) [l](z) **b** `c` ~~s~~",
    "long": "x y" * 1_000_000,
    "control": "a\x1b[31mb\x00c\u2028d\u202ee\r",
    "backticks": "`` ` ```",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_names_of_others_are_text_and_nothing_else(pipe, kind: str) -> None:
    """Of data, classes, captions, models: sections, code blocks and metadata are those of an innocent card."""

    def card(name: str) -> tuple[str, list[tuple[str, str]]]:
        example = f"class_labels={name!r}, guidance_scale=2"
        figures = [replace(FIGURES[0], dataset=name, split=name, settings={"features": name, name: 1})]
        training = TrainingFacts(name, 3, None, {"classes": name, name: name}, shlex.join(["train", "--x", name]), name)
        parts = {"training": training, "evaluation": figures, "pictures": {"samples.png": name}}
        text = str(card_of(pipe, name=name, example=example, **parts))
        return text, MarkdownIt().enable("table").parse(text[REGEX_YAML_BLOCK.match(text).end() :])

    (innocent, expected), (text, found) = card("name"), card(HOSTILE[kind])
    assert [section.name for section in sections(text)] == [section.name for section in sections(innocent)]
    assert metadata(text).keys() == metadata(innocent).keys() and len(text) < 20_000
    assert [token.type for token in found if token.type != "fence" or token.info == "python"] == [
        token.type for token in expected if token.type != "fence" or token.info == "python"
    ]
    for token in found:
        if token.type == "fence" and token.info == "python":
            ast.parse(token.content)
        assert token.type != "fence" or token.info in ("python", "bash")
        for inline in token.children or ():
            assert inline.type in ("text", "softbreak", "code_inline", "image", "text_special", "link_open", "link_close")
            assert inline.type != "link_open" or inline.attrs["href"].startswith("https://huggingface.co/docs/")
            assert inline.type != "image" or inline.attrs["src"] == "samples.png"
    assert HOSTILE["Jinja"] != HOSTILE[kind] or "{{ 7 * 7 }}" in text
