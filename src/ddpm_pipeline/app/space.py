"""The app of a model as a Hugging Face Space: a folder that runs there and anywhere, pushed in one commit.

Needs neither gradio nor torch.
"""

import json
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id, yaml_dump

from ..hub.card import ROWS
from ..hub.files import INDEX, files_to_push
from ..hub.upload import PublicRepositoryError, create_repository
from ..support.atomic import replace_folder, temporary_beside
from ..support.errors import ConfigError, PushError
from ..support.exceptions import describe_exception

GRADIO = "6.31.0"  # the version that the app was tried with, where none is installed
REQUIREMENTS = "--extra-index-url https://download.pytorch.org/whl/cpu\nddpm-pipeline[app]=={version}\n"
CODE = '''"""The demo of a DDPM in the browser; see https://huggingface.co/docs/hub/spaces-sdks-gradio."""

{imports}from ddpm_pipeline.app import serve

serve({model})
'''
README = """---
{front}---

# {title}

A demo of a denoising diffusion model (DDPM){of}: drawing step by step, the forward process, inpainting, interpolation, and
the bound on the likelihood by timestep. Made by `python -m ddpm_pipeline.app MODEL --space FOLDER`.
"""


def write_space(model: str, folder: str | Path) -> Path:
    """Write a Space with the app of a model into a new or empty folder, whole or not at all, and return the folder.

    A folder as `model` is copied into the Space, without checkpoints and logs; else it is the name of a repository on the Hub,
    which the Space loads when it starts. Raises ConfigError for anything else, and for a folder that is not empty.
    """
    folder, source = Path(folder), Path(model)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--space {folder} exists already; name a new folder.")
    try:
        if not source.is_dir():
            validate_repo_id(model)
        found = files_to_push(source, [ROWS]) if source.is_dir() else {}
    except (ValueError, HFValidationError) as error:
        raise ConfigError(f"MODEL {model} is neither the folder of a pipeline nor a name on the Hub: {error}") from error
    files = {name: path for name, path in found.items() if "/" in name or name in (INDEX, ROWS)}  # no card, pictures or code
    title = source.resolve().name
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(folder)
    try:
        for name, path in files.items():
            (temporary / title / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, temporary / title / name)
        temporary.mkdir(exist_ok=True)
        for name, text in _texts(title, None if files else model).items():
            (temporary / name).write_text(text, "utf-8")
        replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _texts(title: str, repo_id: str | None) -> dict[str, str]:
    """The files of a Space beside the model; `repo_id` names one on the Hub."""
    quoted = json.dumps(repo_id or title, ensure_ascii=False)
    model = quoted if repo_id else f"str(Path(__file__).parent / {quoted})"
    code = CODE.format(imports="" if repo_id else "from pathlib import Path\n\n", model=model)
    try:
        gradio = version("gradio")
    except PackageNotFoundError:
        gradio = GRADIO
    front = {
        "title": title, "emoji": "🎲", "colorFrom": "gray", "colorTo": "yellow", "sdk": "gradio", "sdk_version": gradio,
        "python_version": "3.11", "app_file": "app.py", "pinned": False, "tags": ["ddpm", "ddpm-pipeline"],
    } | ({"models": [repo_id]} if repo_id else {})  # fmt: skip
    of = f", [{repo_id}](https://huggingface.co/{repo_id})" if repo_id else ""
    return {
        "app.py": code,
        "requirements.txt": REQUIREMENTS.format(version=version("ddpm-pipeline")),
        "README.md": README.format(front=yaml_dump(front, sort_keys=False), title=title, of=of),
    }


def push_space(folder: str | Path, repo_id: str, private: bool = False, *, api: HfApi | None = None) -> str:
    """Push the folder of a Space in one commit, and return the Space's address. It is created if it does not exist.

    Raises ConfigError for a name that cannot be one, PushError if the Hub did not take the push, or the Space exists and is
    public and the push was asked to be private.
    """
    api = api or HfApi()
    try:
        validate_repo_id(repo_id)
        name = create_repository(api, repo_id, private or None, repo_type="space", space_sdk="gradio")
        api.upload_folder(repo_id=name, repo_type="space", folder_path=folder, commit_message="Upload the app")
    except HFValidationError as error:
        raise ConfigError(f"--push_space {repo_id}: {error}") from error
    except PublicRepositoryError as error:
        raise PushError(f"{error}.") from error
    except Exception as error:  # of the network, the server or the token
        again = f"hf upload {repo_id} {folder} --repo-type space"
        problem = f"pushing to the Space {repo_id} failed ({describe_exception(error)})"
        raise PushError(f"{problem}. The folder is complete; push it later with\n  {again}") from error
    return f"https://huggingface.co/spaces/{name}"
