"""Fixtures for tests that go through a Hub, and processes that load from it as strangers do.

Import `hub` or `client` into a test module to use them.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

import hub_server

ROOT = Path(__file__).parent.parent
MARK = "RESULT: "

# In a process without the package: an editable install is found by a path entry, so blocking the import is not enough
BLOCK_PACKAGE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ddpm_pipeline":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
"""

# Runs every function that the script defined by the name of check_..., and reports what each one did.
RUN_CHECKS = f"""
import faulthandler, json, traceback
faulthandler.dump_traceback_later(120, exit=True)  # where it hangs
outcome = {{}}
for _name, _check in list(globals().items()):
    if _name.startswith("check_"):
        try:
            _check()
            outcome[_name] = "passed"
        except BaseException:
            outcome[_name] = traceback.format_exc()
print({MARK!r} + json.dumps(outcome))
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
    paths = [str(ROOT / name) for name in ("src", "training", "tests")]
    return inherited | {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1",
        **({"HF_TOKEN": token} if token else {}), **more,
    }  # fmt: skip


def run_script(script: str, env: dict[str, str], folder: Path) -> subprocess.CompletedProcess:
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", script]
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=200)


def run_checks(script: str, env: dict[str, str], folder: Path, with_package: bool = True) -> dict[str, Any]:
    """What became of each `check_...` of the script: "passed" or a traceback. Errors outside of checks fail the test."""
    whole = ("" if with_package else BLOCK_PACKAGE) + script + RUN_CHECKS
    done = run_script(whole, env, folder)
    results = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    assert results, f"the process ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    outcome = json.loads(results[-1].removeprefix(MARK))
    outcome["stderr"] = done.stderr
    return outcome
