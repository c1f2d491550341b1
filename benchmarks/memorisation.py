"""How many images does a model need before it draws new ones? Counted on cats, all of which are known.

    python benchmarks/memorisation.py runs --output benchmarks/results/memorisation

Trains the same network for the same number of updates on 100 to 30,000 cats, and counts among its samples copies of these, new
valid cats, and what is no cat. Beside the counts stands what `evaluate --validation_split` says without knowing the cats, with
its rank correlation with the counts. A model that is finished in the folder is kept, so a second run continues, and several
commands can share the sizes.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch

from ddpm_pipeline.evaluation import EvaluationOptions, evaluate
from ddpm_pipeline.evaluation.memorisation import rank_correlations
from ddpm_pipeline.support.provenance import provenance
from ddpm_pipeline.training import TrainingOptions, train

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SIZES = (100, 300, 1_000, 3_000, 10_000, 30_000)
RECIPE = {
    "config": "cats", "model": "tiny", "batch_size": 64, "preview_every": 0, "checkpoint_every": 0, "num_samples": 36,
    "sample_inference_steps": 25, "fit_noises": 0,
}  # fmt: skip
SAMPLER = {"scheduler": "dpm-solver++", "num_inference_steps": 25}
ROW = "memorisation.json"
# what is to be expected of each figure where a model copies: more of it, or less
SIGNS = {"bits/dim": 1, "ratio in pixels": -1, "ratio in features": -1, "near in pixels": 1, "near in features": 1}


def one_size(size: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate, or read what an earlier command found."""
    folder, data = arguments.folder / str(size), {"dataset": "cats", "dataset_config": f"num_images={size},seed=0"}
    if (folder / ROW).is_file():
        return json.loads((folder / ROW).read_text())
    threads = {"num_cpu_threads": arguments.threads}
    given = {**RECIPE, **data, **threads, "max_train_steps": arguments.updates, "seed": arguments.seed}
    began = time.monotonic()
    train(TrainingOptions(**given, output_dir=str(folder), overwrite=True))
    trained = time.monotonic()
    found = evaluate(
        EvaluationOptions(
            model=str(folder), **data, **SAMPLER, **threads, validation_split="test", num_images=arguments.num_images,
            num_likelihood_images=arguments.num_likelihood_images, likelihood_calls=arguments.calls, seed=arguments.seed,
        )
    )  # fmt: skip
    seconds = {"training": trained - began, "evaluation": time.monotonic() - trained}
    row = {"training_cats": size, "seconds": seconds, **{name: found[name] for name in ("cats", "memorisation", "quality")}}
    (folder / ROW).write_text(json.dumps(row))
    return row


def copied_more_than_by_chance(row: dict[str, Any]) -> float:
    """The share of samples that are copies, beyond what valid cats that know nothing of the training cats would have."""
    cats = row["cats"]
    return cats["copies"] - cats["valid"] * cats["copies_by_chance"]


def figures(row: dict[str, Any]) -> dict[str, float]:
    """What `evaluate` says of a model without knowing the cats."""
    found = row["memorisation"]
    return {
        "bits/dim": found["bits_per_dim"]["difference"],
        **{f"ratio in {space}": found[space]["distance_ratio"] for space in ("pixels", "features")},
        **{f"near in {space}": found[space]["share_unusually_near"] for space in ("pixels", "features")},
    }


def correlations(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Of each figure with the share of copies beyond chance, signed so that 1 is the best."""
    columns = {name: [figures(row)[name] for row in rows] for name in SIGNS}
    found = rank_correlations([copied_more_than_by_chance(row) for row in rows], columns)
    return {name: SIGNS[name] * value for name, value in found.items()}


def table(report: dict[str, Any]) -> str:
    """The counts, and what is said without them; ± one standard error."""
    lines = [
        "| training cats | copies | of these by chance | new cats | no cats | bits/dim, training | held out | ratio in pixels "
        "| in features | near in pixels | in features |",
        "|---" * 11 + "|",
    ]
    for row in report["rows"]:
        cats, found = row["cats"], row["memorisation"]
        bits, spaces = found["bits_per_dim"], (found["pixels"], found["features"])
        shares = [cats["copies"], cats["valid"] * cats["copies_by_chance"], cats["new"], 1 - cats["valid"]]
        cells = [f"{row['training_cats']:,}", *(f"{100 * share:.1f} %" for share in shares)]
        cells += [f"{bits[part]:.2f} ± {bits[f'{part}_standard_error']:.2f}" for part in ("training", "held_out")]
        cells += [f"{each['distance_ratio']:.2f} ± {each['distance_ratio_standard_error']:.2f}" for each in spaces]
        cells += [f"{100 * each['share_unusually_near']:.1f} %" for each in spaces]
        lines.append(f"| {' | '.join(cells)} |")
    found = report["rank_correlations"]
    lines += ["", "| rank correlation with copies beyond chance | " + " | ".join(found) + " |", "|---" * (len(found) + 1) + "|"]
    lines.append(f"| over {len(report['rows'])} models | {' | '.join(f'{value:.2f}' for value in found.values())} |")
    minutes = sum(sum(row["seconds"].values()) for row in report["rows"]) / 60
    lines += [
        "",
        f"{report['updates']:,} updates of 64 for each size, {report['num_images']:,} samples. `{report['command']}`, "
        f"{report['date']}, {report['processor']}, {report['threads']} threads, {minutes:.0f} minutes.",
    ]
    return "\n".join(lines) + "\n"


def plot(report: dict[str, Any], path: Path) -> None:
    rows = report["rows"]
    sizes = [row["training_cats"] for row in rows]
    figure, (counted, likelihood, distances) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for name, label in {"copies": "copies", "new": "new cats"}.items():
        shares, errors = ([row["cats"][key] for row in rows] for key in (name, f"{name}_standard_error"))
        counted.errorbar(sizes, shares, errors, marker="o", label=label)
    counted.plot(sizes, [1 - row["cats"]["valid"] for row in rows], marker="o", label="no cats")
    counted.plot(
        sizes, [row["cats"]["valid"] * row["cats"]["copies_by_chance"] for row in rows], "k:", label="copies by chance"
    )
    counted.set(title="counted: share of samples")
    for part, label in {"training": "training", "held_out": "held out"}.items():
        bits = [row["memorisation"]["bits_per_dim"] for row in rows]
        values, errors = ([each[key] for each in bits] for key in (part, f"{part}_standard_error"))
        likelihood.errorbar(sizes, values, errors, marker="o", label=label)
    likelihood.set(title="bits/dim (upper bound)")
    for name in list(SIGNS)[1:]:
        distances.plot(sizes, [figures(row)[name] for row in rows], marker="o", label=name, ls="-" if "ratio" in name else "--")
    distances.set(title="distances to training images")
    for axis in (counted, likelihood, distances):
        axis.set(xscale="log", xlabel="training cats")
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the models go")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of training cats")
    parser.add_argument("--updates", type=int, default=3000, help="of 64 images, for each size")
    parser.add_argument("--num_images", type=int, default=1000, help="samples of each model")
    parser.add_argument("--num_likelihood_images", type=int, default=256, help="of each kind")
    parser.add_argument("--calls", type=int, default=30, help="network calls per image for bits/dim")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="without suffix; a .json, a .md and a .png are written")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    rows = [one_size(size, arguments) for size in sorted(arguments.sizes)]
    report = {"command": " ".join(["python", "benchmarks/memorisation.py", *sys.argv[1:]]), **provenance(torch.device("cpu"))}
    report |= {
        name: getattr(arguments, name)
        for name in ("updates", "num_images", "num_likelihood_images", "calls", "threads", "seed")
    }
    report |= {"sampler": SAMPLER, "rows": rows}
    if len(rows) > 1:
        report["rank_correlations"] = correlations(rows)
        print(table(report))
    if arguments.output:
        arguments.output.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
        arguments.output.with_suffix(".md").write_text(table(report))
        plot(report, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
