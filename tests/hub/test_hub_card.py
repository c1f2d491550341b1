"""The card: what it says is true, what others wrote in it stays, and nothing in it is more than text."""

import json
from pathlib import Path

import pytest
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results

from ddpm_pipeline.hub import Measurement, TrainingFacts, build_card, push, record_evaluation, refresh_card
from hub_models import FIGURES, card_of


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
    assert results[0].metric_args == {"num_images": 1797, "steps": 1000, "form": "exact KLs"}
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


def test_card_with_a_token_or_a_local_path_is_refused(pipe) -> None:
    with pytest.raises(ValueError, match="token"):
        card_of(pipe, training=TrainingFacts(facts={"seed": 0}, command="train --token hf_" + "x" * 30))
    with pytest.raises(ValueError, match="local path"):
        card_of(pipe, training=TrainingFacts(facts={"data": str(Path.home() / "pictures")}))


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
