"""Options of training: flags, files, recipes and Python give the same; what cannot be meant is named."""

import os
from pathlib import Path

import numpy as np
import pytest
import yaml

from ddpm_pipeline.data.options import TrainingDataOptions
from ddpm_pipeline.evaluation.options import parse_options as evaluate
from ddpm_pipeline.generation.options import parse_options as generate
from ddpm_pipeline.support.errors import ConfigError
from ddpm_pipeline.training.options import (
    RECIPES,
    ConditionOptions,
    ModelOptions,
    OptimisationOptions,
    TrainingOptions,
    parse_options,
    recipes,
)
from helpers import run_python


def test_without_dataset_and_config_the_digits_recipe_runs():
    options = parse_options([]).flat()
    recipe = yaml.safe_load((RECIPES / "digits.yaml").read_text())
    assert {name: options[name] for name in recipe} == recipe
    assert parse_options(["--max_train_steps", "7"]).optimisation.batch_size == recipe["batch_size"]
    assert parse_options(["--dataset", "folder"]) == TrainingOptions(dataset="folder")


def test_flags_override_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("batch_size: 12\nlearning_rate: 1e-3\nrandom_flip: true\nmax_train_steps: null\n")
    options = parse_options(["--config", str(file), "--batch_size", "6", "--random_flip", "false"])
    assert (options.optimisation.batch_size, options.optimisation.learning_rate) == (6, 1e-3)
    assert options.data.random_flip is False


def test_a_resolved_configuration_is_a_config_file(tmp_path):
    config = TrainingOptions(dataset="somewhere", learning_rate=2e-5, random_flip=True, resolution=16)
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    assert parse_options(["--config", str(tmp_path / "c.yaml")]) == config


def test_recipes_go_by_name_from_anywhere_and_files_by_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert {"cats", "cats_text", "digits"} <= {*recipes()} and "digits_captions" not in recipes()
    for name in recipes():
        by_name = parse_options(["--config", name])
        assert by_name.optimisation.max_train_steps and by_name == TrainingOptions(config=name)
        assert by_name == parse_options(["--config", str(RECIPES / f"{name}.yaml")])
    (tmp_path / "digits").write_text("batch_size: 3")
    assert parse_options(["--config", "digits"]).optimisation.batch_size == 3  # a file goes first
    with pytest.raises(ConfigError, match="digits_text"):
        parse_options(["--config", "digit_text"])


def test_options_from_python_are_flat_or_in_groups():
    flat = TrainingOptions(dataset="x", resolution=16, condition="class", model="tiny", batch_size=4)
    groups = TrainingOptions(
        data=TrainingDataOptions("x", resolution=16),
        condition=ConditionOptions("class"),
        model=ModelOptions("tiny"),
        optimisation=OptimisationOptions(batch_size=4),
    )
    assert flat == groups and flat.with_values(batch_size=8).optimisation.batch_size == 8
    assert TrainingOptions(config="digits_text", seed=4).run.seed == 4
    with pytest.raises(ConfigError, match="--resolution"):
        TrainingOptions(resolutio=8)
    with pytest.raises(ConfigError, match="--batch_size"):
        TrainingOptions(batch_size="many")


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--learning_rat", "1"], "--learning_rate"),
        (["--batchsize=4"], "--batch_size"),
        (["--learning_rate", "fast"], "learning_rate"),
        (["--batch_size", "0"], "at least 1"),
        (["--max_train_time", "40s"], "a number of minutes above 0. Minutes after which"),
        (["--learning_rate", "nan"], "above 0"),
        (["--channels", "65"], "at least 1 and at most 64"),
        (["--mixed_precision", "int8"], "no, bf16, fp16"),
        (["--lr_scheduler", "cosin"], "cosine"),
        (["--variance_type", "learned"], "learned_range"),
        (["--variance_type", "analytic"], "measured after training"),
        (["--objective", "vlb"], "simple, hybrid, bound"),
        (["--timestep_sampling", "random"], "uniform, stratified, importance"),
        (["--objective", "bound", "--snr_gamma", "5"], "snr_gamma"),
        (["--bound_weight", "0"], "above 0"),
        (["--resume", "latest", "--overwrite"], "exclude"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--adam_beta1", "1"], "below 1"),
        (["--batch_size", "10", "--gradient_accumulation_steps", "4"], "multiple of 4"),
        (["--label_column", "kind"], "--condition class or text"),
        (["--condition", "text", "--text_column", "a", "--label_column", "b"], "drop one"),
        (["--hub_private"], "--push_to_hub"),
        (["--checkpoints_total_limit", "0"], "at least 1"),
    ],
)
def test_bad_options_are_named(argv, named):
    with pytest.raises(ConfigError, match=named):
        parse_options(argv)


@pytest.mark.parametrize(
    "line, value",
    [
        ("mixed_precision: no", "no"), ("random_flip: on", True), ("random_flip: Yes", True), ("random_flip: OFF", False),
        ("label_column: no", "no"), ("label_column: 010", "010"), ("label_column: 2024-05-01", "2024-05-01"),
        ("label_column: null", None), ("label_column: 'null'", "null"), ("seed: 010", 10), ("learning_rate: 1e-3", 1e-3),
        ("seed: 0x10", None), ("max_train_time: 12:30", None), ("batch_size: 1e3", None), ("batch_size: 8.5", None),
        ("dataset: [a, b]", None), ("learning_rate: .nan", None), ("batch_size: yes", None), ("random_flip: maybe", None),
    ],
)  # fmt: skip
def test_values_of_a_file_are_read_like_flags(line, value, tmp_path):
    """A value that an option of this type cannot have is refused, whatever YAML would make of it."""
    (tmp_path / "run.yaml").write_text(f"condition: class\n{line}")
    name = line.split(":")[0]
    if value is None and "null" not in line:
        with pytest.raises(ConfigError, match=name):
            TrainingOptions(config=tmp_path / "run.yaml")
    else:
        options = TrainingOptions(config=tmp_path / "run.yaml")
        assert options.flat()[name] == value
        (tmp_path / "again.yaml").write_text(options.to_yaml())
        assert TrainingOptions(config=tmp_path / "again.yaml") == options


@pytest.mark.parametrize(
    "name, value, becomes",
    [
        ("batch_size", np.int64(8), 8), ("learning_rate", 1, 1.0), ("learning_rate", np.float32(0.5), 0.5),
        ("random_flip", np.True_, True), ("output_dir", Path("a/b"), "a/b"),
        ("output_dir", "~/runs", os.path.expanduser("~/runs")), ("dataset", "~", "~"), ("seed", 2**63 - 1, 2**63 - 1),
        ("batch_size", 8.0, None), ("batch_size", True, None), ("learning_rate", "1e-3", None), ("random_flip", 1, None),
        ("random_flip", "no", None), ("dataset", 3, None), ("dataset", None, None),
        ("resolution", (8, 0), None), ("resolution", (8, 8), 8), ("resolution", "48X96", "48x96"),
        ("max_train_steps", 1e3, None), ("seed", 2**63, None), ("seed", -1, None),
    ],
)  # fmt: skip
def test_values_from_python_have_the_type_of_their_option(name, value, becomes):
    if becomes is None:
        with pytest.raises(ConfigError, match=f"--{name}"):
            TrainingOptions(**{name: value})
    else:
        given = TrainingOptions(**{name: value}).flat()[name]
        assert given == becomes and type(given) is type(becomes)


def test_seeds_have_one_range_in_all_commands():
    for parse, argv in (
        (parse_options, []),
        (generate, ["--model=m", "--output_dir=o"]),
        (evaluate, ["--model=m", "--dataset=d"]),
    ):
        parse([*argv, f"--seed={2**63 - 1}"])
        for seed in (2**63, -1):
            with pytest.raises(ConfigError, match="--seed"):
                parse([*argv, f"--seed={seed}"])


def test_the_warm_up_is_shorter_than_the_run():
    warmup = lambda **options: TrainingOptions(**options).optimisation.warmup_steps  # noqa: E731
    assert [warmup(max_train_steps=steps) for steps in (5, 100, 5000, 50_000)] == [0, 10, 500, 500]
    assert warmup(max_train_steps=12, lr_warmup_steps=11) == 11
    with pytest.raises(ConfigError, match="--lr_warmup_steps 12 is not below"):
        TrainingOptions(max_train_steps=12, lr_warmup_steps=12)
    assert warmup(config="digits") == 100 and warmup(config="digits", max_train_steps=50) == 5
    with pytest.raises(ConfigError, match="--lr_warmup_steps"):
        TrainingOptions(config="digits", max_train_steps=50, lr_warmup_steps=100)


MEANT = {
    "lr": "learning_rate", "steps": "max_train_steps", "epochs": "num_train_epochs", "bs": "batch_size",
    "warmup": "lr_warmup_steps", "dataset_name": "dataset", "train_batch_size": "batch_size",
}  # fmt: skip


@pytest.mark.parametrize("given, meant", MEANT.items())
def test_an_unknown_option_names_what_was_meant(given, meant):
    with pytest.raises(ConfigError, match=f"--{given}. Did you mean .*--{meant}"):
        parse_options([f"--{given}", "1"])


@pytest.mark.parametrize("text, named", [("batch: 3", "--batch_size"), ("- a", "option: value"), ("a: [", "YAML")])
def test_bad_config_files_are_named(tmp_path, text, named):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match=named):
        parse_options(["--config", str(tmp_path / "bad.yaml")])


def test_every_option_has_a_sentence_of_help():
    assert all(field.metadata["help"].endswith(".") for field in TrainingOptions.declared().values())


def test_facts_of_options_agree():
    """An option that belongs to the recipe makes another run when it changes, but for those that only lengthen or load it."""
    facts = {name: field.metadata for name, field in TrainingOptions.declared().items()}
    free_in_recipe = {name for name, fact in facts.items() if fact["in_recipe"] and fact["on_resume"] != "refuse"}
    assert free_in_recipe == {
        "max_bad_fraction", "init_from", "max_train_steps", "num_train_epochs", "gradient_checkpointing", "channels_last",
    }  # fmt: skip
    assert all(fact["on_resume"] != "refuse" for fact in facts.values() if not fact["in_recipe"])


def test_mistakes_are_told_before_anything_heavy_is_imported():
    loaded = run_python(
        "import sys\n"
        "from ddpm_pipeline.training.options import parse_options\n"
        "from ddpm_pipeline.support.errors import ConfigError\n"
        "try: parse_options(['--learning_rat', '1'])\n"
        "except ConfigError: print(*sorted(sys.modules))"
    ).split()
    assert "ddpm_pipeline.training.options" in loaded and not {"torch", "diffusers", "datasets", "transformers", "numpy"} & set(
        loaded
    )
