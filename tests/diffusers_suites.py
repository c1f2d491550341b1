"""Run diffusers' own tests of schedulers, pipelines and modular blocks on our classes and, but for the last, on stock's.

    git clone --depth 1 --branch v0.42.1 https://github.com/huggingface/diffusers
    pip install parameterized requests-mock
    python tests/diffusers_suites.py --checkout diffusers

The tests come from the checkout and run on the installed diffusers; `diffusers_cases.py` puts the classes in place. Exit status
1 if ours fails a test that is not among the exceptions, or passes one that is. What stock fails as well is not held against us.
The modular tests came after 0.42.1, and one of them wants a default of before it, which is put back for that test.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

HERE = Path(__file__).parent
# Tests that ours need not pass, at most five: where stock accepts what can only be a mistake, or a figure is inexact
EXCEPTIONS = {
    "TestScheduler::test_betas": "beta_end=2 is refused: variances lie below 1",
    "TestScheduler::test_trained_betas": "two trained betas for 1,000 timesteps are refused: there must be one for each",
    "TestScheduler::test_rescale_betas_zero_snr": "is refused with epsilon prediction, where stock divides by zero",
    "TestScheduler::test_variance_type": "variance_type='other' is refused: it names no variance",
    "TestScheduler::test_full_loop_with_noise": "a sum of 387.9 differs by 0.02 (5e-5), as stock's tables are float32",
}


def outcomes(checkout: Path, classes: str) -> dict[str, str]:
    """ "passed", "failed" or "skipped" by "class::test", for the "ours" or the "stock" classes."""
    paths = os.pathsep.join(map(str, (checkout, HERE.parent / "src", HERE)))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", folder, "--import-mode=importlib", "-q"]
        command += ["-p", "no:cacheprovider", "--disable-warnings", "--tb=line", "--show-capture=no", f"--junitxml={report}"]
        env = os.environ | {"PYTHONPATH": paths, "DIFFUSERS_CASES": classes}
        subprocess.run([*command, str(HERE / "diffusers_cases.py")], cwd=folder, env=env, check=False)
        found = {}
        for case in ElementTree.parse(report).iter("testcase"):
            name = f"{case.get('classname').rpartition('.')[2]}::{case.get('name')}"
            kinds = {child.tag for child in case}
            found[name] = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Run diffusers' own tests on our classes and on stock's.")
    parser.add_argument("--checkout", type=Path, required=True, help="Folder of a diffusers repository; it is not changed.")
    checkout = parser.parse_args().checkout.resolve()
    if not (checkout / "tests" / "schedulers" / "test_scheduler_ddpm.py").is_file():
        parser.error(f"--checkout {checkout} is not a checkout of diffusers with its tests.")
    stock, ours = (outcomes(checkout, classes) for classes in ("stock", "ours"))
    if not ours or not stock:
        print("No tests were run; the output above says why.")
        return 1

    print(f"\n| {'tests':14} | stock: passed | failed | skipped | ours: passed | failed | skipped |\n|{'---|' * 7}")
    for group in dict.fromkeys(name.partition("::")[0] for name in ours):
        counts = [Counter(kind for name, kind in found.items() if name.startswith(f"{group}::")) for found in (stock, ours)]
        cells = [str(count[kind]) for count in counts for kind in ("passed", "failed", "skipped")]
        print(f"| {group:14} | {' | '.join(cells)} |")
    failed = {name for name, kind in ours.items() if kind == "failed"}
    unexpected = sorted(name for name in failed - EXCEPTIONS.keys() if stock.get(name) != "failed")
    stale = sorted(EXCEPTIONS.keys() - failed)
    print("\nExceptions:", *(f"  {name}: {reason}" for name, reason in EXCEPTIONS.items()), sep="\n")
    for name in unexpected:
        print(f"Unexpected failure: {name} (stock: {stock.get(name, 'not run')})")
    for name in stale:
        print(f"Stale exception: {name} does not fail.")
    return 1 if unexpected or stale else 0


if __name__ == "__main__":
    sys.exit(main())
