"""Fixtures for tests that go through a Hub, and processes that load from it as strangers do.

tests/hub/conftest.py hands `hub` and `client` to the tests of that room; others import them.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

import hub_server
from helpers import run_limited

ROOT = Path(__file__).parent.parent
MARK = "RESULT: "
LIMIT_OF_A_CHECK, LIMIT = 120, 300  # seconds, many times what is needed: of a check, and of a process with many

IMPORT_FASTER = "import gc\ngc.disable()\n"  # until the checks begin: what is imported stays
# In a process without the package: an editable install is found by a path entry, so blocking the import is not enough
BLOCK_PACKAGE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ddpm_pipeline":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
"""

# Runs every function that the script defined by the name of check_..., and reports what each one did. Those called
# check_first_... run before the others, each in a fork of the process, which has imported all it needs and done nothing yet;
# the caches are emptied afterwards.
RUN_CHECKS = f"""
gc.freeze()
gc.enable()
import faulthandler, json, os, shutil, traceback

def _outcome_of(check):
    faulthandler.dump_traceback_later({LIMIT_OF_A_CHECK}, exit=True)  # where it hangs
    try:
        check()
        return "passed"
    except BaseException:
        return traceback.format_exc()

def _outcome_in_a_fork(check):
    reading, writing = os.pipe()
    if not os.fork():
        os.write(writing, _outcome_of(check).encode())
        os._exit(0)
    os.close(writing)
    with open(reading) as file:
        outcome = file.read()
    os.wait()
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)
    return outcome or "the process ended"

_checks = {{_name: _value for _name, _value in globals().items() if _name.startswith("check_")}}
_first = {{_name: _outcome_in_a_fork(_checks.pop(_name)) for _name in list(_checks) if _name.startswith("check_first_")}}
print({MARK!r} + json.dumps(_first | {{_name: _outcome_of(_check) for _name, _check in _checks.items()}}))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[hub_server.Hub]:
    hub, server = hub_server.start(tmp_path_factory.mktemp("hub"))
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def client(hub: hub_server.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HfApi:
    """A client in this process that knows the token, with nothing downloaded yet."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    hub.heal()
    return HfApi(endpoint=hub.url, token=hub_server.WRITE_TOKEN)


def environment(hub: hub_server.Hub, home: Path, token: str | None = None, **more: str) -> dict[str, str]:
    """For a process whose Hub is `hub` and whose caches lie in `home`."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    paths = [str(ROOT / name) for name in ("src", "tests")]
    return inherited | {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONFAULTHANDLER": "1", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(paths),
        **({"HF_TOKEN": token} if token else {}), **more,
    }  # fmt: skip


def run_checks(script: str, env: dict[str, str], folder: Path, with_package: bool = True) -> dict[str, Any]:
    """What became of each `check_...` of the script: "passed" or a traceback. Errors outside of checks fail the test."""
    whole = IMPORT_FASTER + ("" if with_package else BLOCK_PACKAGE) + script + RUN_CHECKS
    folder.mkdir(parents=True, exist_ok=True)
    done = run_limited([sys.executable, "-c", whole], LIMIT, env=env, cwd=folder)
    results = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    assert results, f"the process ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    outcome = json.loads(results[-1].removeprefix(MARK))
    outcome["stderr"] = done.stderr
    return outcome
