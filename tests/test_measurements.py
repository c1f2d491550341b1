"""The figures in README and docs are those in benchmarks/results."""

import json
import runpy

import pytest

from helpers import ROOT

RESULTS = ROOT / "benchmarks/results"


def measured(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def words_of(page: str) -> str:
    """A page's text, wherever its lines break."""
    return " ".join((ROOT / page).read_text("utf-8").split())


@pytest.mark.parametrize("name", ["cats_recognizer", "few_steps", "fitted_sampler", "memorisation", "scale", "small_data"])
def test_tables_of_benchmarks_are_made_of_their_figures(name):
    table = runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py"))["table"]
    assert table(measured(name)) == (RESULTS / f"{name}.md").read_text("utf-8")


def test_training_throughput():
    table = runpy.run_path(str(ROOT / "benchmarks/training_throughput.py"))["table"]
    assert table(measured("training_throughput")).strip() in (ROOT / "docs/training.md").read_text("utf-8")


def test_memorisation():
    table = runpy.run_path(str(ROOT / "benchmarks/memorisation.py"))["table"]
    assert table(measured("memorisation")).strip() in (ROOT / "docs/memorisation.md").read_text("utf-8")


def test_cats():
    page, samplers = words_of("docs/results.md"), {"dpm-solver++": "DPM-Solver++", "sde-dpm-solver++": "SDE-DPM-Solver++"}
    for found in measured("cats_quality")["results"]:
        shares = [(found[name], found[f"{name}_standard_error"]) for name in ("valid", "new", "copies")]
        cells = " | ".join(f"{100 * share:.1f} ± {100 * error:.1f} %" for share, error in shares)
        by_chance = f"{100 * found['valid'] * found['copies_by_chance']:.1f} %"
        assert f"| {samplers[found['scheduler']]} | {found['steps']} | {cells} | {by_chance} | {found['fid']:.2f} |" in page
    assert f"| {cells.split(' | ')[0]} |" in words_of("README.md")  # of the last


def test_ablations():
    table = runpy.run_path(str(ROOT / "benchmarks/ablations.py"))["table"]
    page = (ROOT / "docs/training.md").read_text("utf-8")
    for name in ("ablations_recipe", "ablations_architecture"):
        rows = table(measured(name)).splitlines()
        assert "\n".join(row for row in rows if row.startswith("|")) in page
    for name, weighting in {"cats_quality": "Min-SNR", "cats_shifted": "Min-SNR", "cats_unweighted": "none"}.items():
        row = measured(name)["results"][0]
        valid = f"{100 * row['valid']:.1f} ± {100 * row['valid_standard_error']:.1f} %"
        assert f"/{name}.json) | {weighting} | {valid} | {row['fid']:.1f} |" in page


def test_cats_from_words():
    report, page = measured("cats_text_quality"), words_of("docs/results.md")
    table = runpy.run_path(str(ROOT / "benchmarks/cats_quality.py"))["table"]
    assert table(report["results"]) in (ROOT / "docs/conditions.md").read_text("utf-8")
    for found in report["results"]:
        right = found["attributes"]["all"]
        shares = [(right["accuracy"], right["standard_error"])]
        shares += [(found[name], found[f"{name}_standard_error"]) for name in ("valid", "copies")]
        assert " | ".join(f"{100 * share:.1f} ± {100 * error:.1f} %" for share, error in shares) in page
        if found["asked"] in ("held-out cats", "unseen wordings"):
            assert f"| {100 * shares[0][0]:.1f} ± {100 * shares[0][1]:.1f} % |" in words_of("README.md")


@pytest.mark.parametrize("name", ["cats_text_second_seed", "cats_text_second_seed_sde"])
def test_a_second_run_of_cats_from_words(name):
    found, page = measured(name)["results"], words_of("docs/results.md")
    *first, last = (f"{100 * row['attributes']['all']['accuracy']:.1f}" for row in found)
    assert f"{', '.join(first)} and {last} %" in page
    valid = [100 * row["valid"] for row in found]
    assert f"{min(valid):.1f} to {max(valid):.1f} %" in page


@pytest.mark.parametrize("name", ["cats_text_one_sentence", "cats_text_word_dropout", "cats_text_quality"])
def test_sentences_of_captions(name):
    right = {row["asked"]: row["attributes"] for row in measured(name)["results"]}
    found = [right["held-out cats"]["all"], right["held-out cats"]["mouth"]]
    found += [right["unseen wordings"]["all"], right["unseen wordings"]["body"]]
    cells = " | ".join(f"{100 * one['accuracy']:.1f} ± {100 * one['standard_error']:.1f} %" for one in found)
    assert f"results/{name}.json) | {cells} |" in words_of("docs/conditions.md")


def test_fitted_samplers():
    assert (RESULTS / "fitted_sampler.md").read_text("utf-8").strip() in (ROOT / "docs/fitted_sampler.md").read_text("utf-8")
    rows = [row for row in measured("fitted_sampler")["rows"] if row["seed"] != "pilot" and "rmse" in row]
    for steps, ratio in {5: "0.43", 10: "0.20", 20: "0.30"}.items():
        fitted = next(row["rmse"] for row in rows if row["steps"] == steps and row["sampler"] == "fitted")
        stock = min(row["rmse"] for row in rows if row["steps"] == steps and "fitted" not in row["sampler"])
        assert f"{fitted / stock:.2f}" == ratio
        if steps == 10:
            assert f"best stock solver | {fitted:.3f}, {stock:.3f} |" in words_of("README.md")


def test_few_images():
    runs, page = measured("small_data")["runs"], words_of("docs/training.md")
    for rows in runs.values():
        for row in rows.values():
            assert f"{row['held_out']['mean']:.2f} ± {row['held_out']['standard_error']:.2f}" in page
        assert f"{list(rows.values())[-1]['trained_on']['mean']:.2f}" in page


def test_super_resolution():
    table = runpy.run_path(str(ROOT / "benchmarks/super_resolution.py"))["table"]
    assert table(measured("super_resolution")["results"]) in (ROOT / "docs/conditions.md").read_text("utf-8")


def test_bits_per_dimension():
    for name in ("digits_evaluation", "digits_likelihood_evaluation"):
        bits = measured(name)["bits_per_dim"]
        for page in ("README.md", "docs/results.md", "docs/likelihood.md"):
            assert f"{bits['total']:.2f} ± {bits['total_standard_error']:.2f}" in words_of(page)
    full_chain = {row["sampler"]: row["bits_per_dim"] for row in measured("few_steps")["rows"] if "bits_per_dim" in row}
    plain, analytic, from_errors = (full_chain[name] for name in ("fixed_small", "analytic", "analytic, from errors"))
    assert f"({analytic:.2f} bits/dim, where β̃ gives {plain:.2f})" in words_of("docs/likelihood.md")
    assert f"is better ({from_errors:.2f})" in words_of("docs/likelihood.md")
    assert f"{plain:.2f} bits/dim rather than" in words_of("docs/results.md")


def test_the_best_of_few_steps():
    rows, page = measured("few_steps")["rows"], (ROOT / "docs/results.md").read_text("utf-8")
    for steps in {row["steps"] for row in rows}:
        at = [row for row in rows if row["steps"] == steps]
        distance = min(row["frechet_distance"] for row in at if "frechet_distance" in row)
        ours = min(row["frechet_distance"] for row in at if "bits_per_dim" in row and "frechet_distance" in row)
        bound = min(row["bits_per_dim"] for row in at if "bits_per_dim" in row)
        (line,) = (line for line in page.splitlines() if line.startswith(f"| {steps} |"))
        cells = [cell.strip() for cell in line.split("|")]
        assert f"{distance:.2f}" in cells[2] and f"{ours:.2f}" in cells[3] and f"{bound:.2f}" in cells[4], line


def test_the_table_of_scale():
    lines = [line for line in (RESULTS / "scale.md").read_text("utf-8").splitlines() if line.startswith("|")]
    page = (ROOT / "docs/scale.md").read_text("utf-8")
    assert len(lines) > 9 and all(line in page for line in lines[2:])  # below its head


def test_the_recognizer_of_cats():
    report, page = measured("cats_recognizer"), (ROOT / "docs/evaluation.md").read_text("utf-8")
    assert (RESULTS / "cats_recognizer.md").read_text("utf-8") in page
    assert f"{report['sides']['32']['real']['0.0']['pictures_per_core_second']:,.0f} pictures of 32x32" in page
    for noise in ("0.0", "0.05"):  # what is asked of a judge: 99.5 % of all parts
        assert sum(report["sides"]["32"]["real"][noise]["wrong"].values()) <= 0.005 * 5 * report["num_images"]
