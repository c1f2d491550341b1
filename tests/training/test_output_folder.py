"""The output folder: nobody else's files are touched, and an earlier run stays whole until another has begun in its place."""

import contextlib
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from ddpm_pipeline.support.atomic import write_text
from ddpm_pipeline.support.errors import CheckpointError, ConfigError
from ddpm_pipeline.training import TrainingOptions, loop, train
from ddpm_pipeline.training.options import RunOptions
from ddpm_pipeline.training.output_folder import OPTIONS_FILE, OutputFolder, output_folder
from training_helpers import quick_options

FILE_OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}
OVERWRITE = RunOptions(overwrite=True)


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


@pytest.fixture
def earlier(tmp_path) -> Path:
    """A folder with a run that has ended, and notes of its owner."""
    model = {"unet__weights": "old", "checkpoints__step__state": "old", "README_DOT_md": "old", "model_index_DOT_json": "old"}
    write(tmp_path / "model", training_config_DOT_yaml="old", metrics_DOT_jsonl="old", notes_DOT_txt="mine", **model)
    write(tmp_path / "model", **{"ddpm-pipeline__events": "old", "train_DOT_log": "old"})
    return tmp_path / "model"


def set_up(folder: Path, options: RunOptions, ends_early: bool = False) -> None:
    """What a run does with its folder until its first update is done."""
    with output_folder(folder, options) as output:
        output.set_aside()
        (folder / "train.log").write_text("new")
        write_text(folder / OPTIONS_FILE, "new")
        write(folder, **{"ddpm-pipeline__events": "new"})
        if ends_early:
            raise RuntimeError("out of memory")
        output.keep()
        (folder / "metrics.jsonl").write_text("new")


NEW = {"notes.txt": "mine", **dict.fromkeys(("train.log", OPTIONS_FILE, "ddpm-pipeline/events", "metrics.jsonl"), "new")}


def killed_at(operation: int, folder: Path, options: RunOptions) -> bool:
    """Sets up in a process that is killed before its n-th file operation there; whether it had so many."""
    child = os.fork()
    if not child:
        left = [operation]

        def count(event, arguments):
            if event in FILE_OPERATIONS and str(folder) in str(arguments):
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        try:
            set_up(folder, options)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_somebody_elses_folder_is_never_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for config in (RunOptions(), OVERWRITE, RunOptions(resume="latest")):
        with pytest.raises(ConfigError, match=r"thesis\.tex"):
            OutputFolder(tmp_path, config)
    assert contents(tmp_path) == {"thesis.tex": "years of work"}
    (tmp_path / "thesis.tex").rename(tmp_path / "README.md")  # a name that runs use as well
    with pytest.raises(ConfigError, match=r"README\.md"):
        OutputFolder(tmp_path, OVERWRITE)


def test_an_earlier_run_goes_only_when_asked_and_only_when_the_new_one_has_begun(earlier):
    old = contents(earlier)
    with pytest.raises(ConfigError, match=r"--resume latest.*--overwrite"):
        set_up(earlier, RunOptions())
    with pytest.raises(RuntimeError, match="out of memory"):
        set_up(earlier, OVERWRITE, ends_early=True)
    assert contents(earlier) == old
    set_up(earlier, OVERWRITE)
    assert contents(earlier) == NEW, "without the curves of the other run, with the notes"


def test_a_kill_before_any_file_operation_leaves_one_run_or_the_other_whole(earlier, tmp_path):
    old, begun = contents(earlier), False
    for operation in range(1, 200):
        folder = shutil.copytree(earlier, tmp_path / str(operation))
        if not killed_at(operation, folder, OVERWRITE):
            break
        with contextlib.suppress(ConfigError), output_folder(folder, RunOptions()):
            begun = True  # not refused for the sake of the earlier run
        found = contents(folder)
        assert {"metrics.jsonl": "new", **found} == NEW if begun else found == old
    assert operation > 20 and begun
    assert contents(folder) == NEW


def test_the_command_can_be_repeated_after_a_kill_while_the_folder_is_set_up(tmp_path):
    for operation in range(1, 200):
        if not killed_at(operation, tmp_path / "model", RunOptions()):
            break
    assert operation > 5 and not (tmp_path / "model/.lock").exists()


def test_one_run_at_a_time_has_a_folder(tmp_path):
    with output_folder(tmp_path / "model", RunOptions()):
        reader, writer = os.pipe()
        if not os.fork():
            try:
                OutputFolder(tmp_path / "model", RunOptions(resume="latest"))
            except ConfigError as error:
                os.write(writer, str(error).encode())
            finally:
                os._exit(0)
        os.wait()
        with pytest.raises(ConfigError, match="this process"):  # such as in another thread
            OutputFolder(tmp_path / "model", RunOptions(resume="latest"))
        os.close(writer)
        told = os.read(reader, 1000).decode()
        assert f"process {os.getpid()} on " in told
    assert not (tmp_path / "model").exists(), "a run that wrote nothing leaves no folder"


def test_unwritable_folder_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(ConfigError, match=str(path)):
            OutputFolder(path, RunOptions())
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(ConfigError, match=r"link .*gone"):
        OutputFolder(tmp_path / "link", RunOptions())
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize("loss", ["removed", "renamed"])
def test_a_folder_that_is_lost_in_mid_run_is_told_in_one_line(loss, tmp_path, monkeypatch):
    folder, whole = tmp_path / "model", loop.update

    def lose(run, objective, step):
        if step == 2:
            shutil.rmtree(folder) if loss == "removed" else folder.rename(tmp_path / loss)
        return whole(run, objective, step)

    monkeypatch.setattr(loop, "update", lose)
    options = quick_options(tmp_path, max_train_steps=4, log_every=50)
    with pytest.raises(CheckpointError, match="removed or renamed"):
        train(TrainingOptions(**options, output_dir=str(folder)))
    assert not folder.exists()


EXTRACTOR = {"eval_features": "nowhere:f", "eval_every": 1, "eval_samples": 5}


@pytest.mark.parametrize("fault", [{"dataset": "/nowhere"}, {"model": "/nowhere"}, EXTRACTOR])
def test_a_mistake_in_another_option_costs_no_model(fault, earlier, tmp_path):
    old = contents(earlier)
    with pytest.raises(ValueError, match="nowhere"):
        train(TrainingOptions(**quick_options(tmp_path) | fault, output_dir=str(earlier), overwrite=True))
    assert contents(earlier) == old
