"""Which run may use a run directory. Run: python -m pytest tests/training/test_run_directory.py"""

import dataclasses
import json

import pytest

from resilient_t5.config.schema import Config, OptimConfig, RunConfig, TelemetryConfig
from resilient_t5.errors import ExitCode, ResumeMismatch, RunDirectoryError
from resilient_t5.training.resume_check import changed_conditions, removed_settings
from resilient_t5.training.run_directory import claim, inspect


def config_for(path, resume="auto", lr=1e-3, log_every=100):
    """A configuration with its run at `path`."""
    return Config(
        run=RunConfig(dir=str(path), resume=resume), optim=OptimConfig(lr=lr), telemetry=TelemetryConfig(log_every=log_every)
    )


@pytest.fixture
def existing_run(tmp_path):
    """A directory that holds a run, started with the default settings of `config_for`."""
    directory = inspect(config_for(tmp_path))
    claim(directory, config_for(tmp_path), "optim: {lr: 0.001}\n", "CPU")
    return tmp_path


def contents(path):
    """Every file with its bytes."""
    return {item.name: item.read_bytes() for item in path.iterdir()}


def test_a_new_directory_is_written_only_when_claimed(tmp_path):
    """inspect writes nothing; claim writes the two files that describe the run."""
    directory = inspect(config_for(tmp_path))
    assert directory.is_new
    assert contents(tmp_path) == {}
    claim(directory, config_for(tmp_path), "x: 1\n", "CPU")
    assert set(contents(tmp_path)) == {"config.yaml", "environment.json"}
    assert json.loads((tmp_path / "environment.json").read_text())["run_id"] == directory.run_id


def test_the_same_settings_continue_the_run_and_keep_its_files(existing_run):
    """The id stays; claiming again writes nothing."""
    before = contents(existing_run)
    directory = inspect(config_for(existing_run))
    claim(directory, config_for(existing_run), "other: text\n", "GPU")
    assert not directory.is_new
    assert contents(existing_run) == before


def test_another_mathematics_is_refused_by_key_and_nothing_is_written(existing_run):
    """Exit 78, old and new value named."""
    before = contents(existing_run)
    with pytest.raises(ResumeMismatch, match=r"optim\.lr: 0\.001 -> 0\.002") as caught:
        inspect(config_for(existing_run, lr=2e-3))
    assert caught.value.exit_code == ExitCode.RESUME_MISMATCH
    assert contents(existing_run) == before


def test_logging_may_change(existing_run):
    """Cadence of the log is free."""
    assert not inspect(config_for(existing_run, log_every=5)).is_new


def test_resume_none_refuses_a_directory_that_holds_a_run(existing_run):
    """Exit 2, and the hint is the command that continues the run."""
    with pytest.raises(RunDirectoryError, match=r"holds a run.*config\.yaml") as caught:
        inspect(config_for(existing_run, resume="none"))
    assert caught.value.exit_code == ExitCode.USAGE


def test_foreign_files_are_never_touched(tmp_path):
    """A directory with other content is refused; the message names a file."""
    (tmp_path / "thesis.docx").write_text("x")
    with pytest.raises(RunDirectoryError, match=r"thesis\.docx"):
        inspect(config_for(tmp_path))
    assert set(contents(tmp_path)) == {"thesis.docx"}


def test_a_file_in_place_of_the_directory_is_refused(tmp_path):
    """It is not replaced."""
    path = tmp_path / "run"
    path.write_text("x")
    with pytest.raises(RunDirectoryError, match="is a file"):
        inspect(config_for(path))


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"run_id": 1}', "\xff"])
def test_a_damaged_environment_is_a_clear_refusal(existing_run, damage):
    """No traceback, nothing overwritten."""
    (existing_run / "environment.json").write_text(damage, encoding="latin-1")
    with pytest.raises(RunDirectoryError, match="damaged"):
        inspect(dataclasses.replace(config_for(existing_run)))
    assert (existing_run / "environment.json").read_text(encoding="latin-1") == damage


def test_a_setting_that_a_later_version_removed_is_reported_where_it_had_an_effect():
    """Values that switched it off are not reported, nor settings that still exist."""
    old = {"convergence.overfit_percent": 40.0, "convergence.overfit_windows": 6, "optim.lr": 1e-3}
    assert removed_settings(old) == ["convergence.overfit_percent: 40.0 -> removed"]


def test_conditions_of_an_earlier_version_are_reported_only_where_they_had_an_effect():
    """A checkpoint without `shard_layers` and with `compile: false` resumes under equal conditions; compiled layers do not."""
    new = {"threads": 2, "shard_layers": False}
    assert changed_conditions({"threads": 2, "compile": False}, new) == []
    assert changed_conditions({"threads": 1, "compile": True}, new) == ["threads: 1 -> 2", "compile: True -> None"]
