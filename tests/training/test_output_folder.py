"""The output folder: somebody else's files are never touched, an earlier run is never replaced unasked."""

import pytest

from ddpm_pipeline.support.errors import ConfigError
from ddpm_pipeline.training.options import RunOptions
from ddpm_pipeline.training.output_folder import prepare_output_folder


def test_somebody_elses_folder_is_never_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for config in (RunOptions(), RunOptions(overwrite=True), RunOptions(resume="latest")):
        with pytest.raises(ConfigError, match=r"thesis\.tex"):
            prepare_output_folder(tmp_path, config)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_overwrite_removes_only_what_runs_write(tmp_path):
    (tmp_path / "training_config.yaml").write_text("")
    (tmp_path / "samples.png").write_text("")
    (tmp_path / "notes.txt").write_text("mine")
    prepare_output_folder(tmp_path, RunOptions(overwrite=True))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_unwritable_folder_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        prepare_output_folder(tmp_path / "file", RunOptions())
    with pytest.raises(ConfigError, match="cannot be written"):
        prepare_output_folder(tmp_path / "file" / "below", RunOptions())
