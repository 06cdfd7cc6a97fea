"""The command line and YAML files. Run: python -m pytest tests/config/test_parse.py"""

import json

import pytest
import yaml

from resilient_t5.config.parse import config_text, parse_arguments
from resilient_t5.config.schema import REMOVED_KEYS, Config, check_trainable, flat, non_default_settings, trajectory_settings
from resilient_t5.errors import ConfigError

LINES = "model: {preset: tiny}\ntokenizer: {train_vocab_size: 500}\ndata: {train: corpus.txt}\n"


def parse(*argv):
    """Parse as bin/train does."""
    return parse_arguments(argv, "train", "test")


def problems_of(*argv):
    """The problems that parsing reports, one string each."""
    with pytest.raises(ConfigError) as caught:
        parse(*argv)
    return caught.value.problems


@pytest.fixture
def file(tmp_path):
    """Writes a YAML file and returns its path."""

    def write(text, name="my.yaml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_later_sources_win_and_each_value_names_its_source(file):
    """Defaults < first file < second file < command line."""
    first = file(LINES + "optim:\n  lr: 2e-5\n  clip_norm: 0.5\n", "a.yaml")
    second = file("optim: {lr: 3e-5}\n", "b.yaml")
    arguments = parse("--config", first, "--config", second, "--optim.clip_norm", "2")
    assert arguments.config.optim.lr == 3e-5
    assert arguments.config.optim.clip_norm == 2.0
    assert arguments.sources["optim.lr"].startswith(second)
    assert arguments.sources["optim.clip_norm"] == "command line"


def test_scientific_notation_in_yaml_is_a_number(file):
    """5e-5 is a float, not the string that plain YAML makes of it."""
    assert parse("--config", file("optim: {lr: 5e-5}")).config.optim.lr == 5e-5


def test_a_misspelt_key_names_the_nearest_setting_and_its_line(file):
    """The message holds the file, the line and the right name."""
    (problem,) = problems_of("--config", file("convergence:\n  patince: 5\n"))
    assert "my.yaml:2" in problem
    assert "Did you mean convergence.patience?" in problem


def test_a_misspelt_option_names_the_nearest_setting():
    """The same on the command line, where even the section may be missing."""
    assert "--optim.lr?" in problems_of("--optim.lrr", "3")[0]
    assert "--convergence.patience?" in problems_of("--patience", "3")[0]


def test_several_problems_are_told_at_once(file):
    """An unknown key, a wrong type and a value out of range come in one error."""
    path = file("optim:\n  lrr: 1\n  lr: abc\nbatch: {readers: 100}\n")
    problems = "\n".join(problems_of("--config", path))
    assert "optim.lrr" in problems
    assert "optim.lr: 'abc'" in problems
    assert "batch.readers: 100" in problems


def test_an_unquoted_no_is_explained(file):
    """YAML turns it into a boolean; the message explains this."""
    assert "boolean" in problems_of("--config", file("hardware:\n  precision: no\n"))[0]


@pytest.mark.parametrize("key, removed", REMOVED_KEYS.items())
def test_a_removed_setting_is_accepted_where_it_had_no_effect_and_refused_with_a_hint_elsewhere(key, removed, file):
    """config.yaml of an earlier version holds every setting, so an inert value there must not stop the run."""
    section, _, name = key.partition(".")
    for value in removed.inert:
        text = yaml.safe_dump({section: {name: value}})
        assert parse("--config", file(text)).config == Config()
        assert parse(f"--{key}", json.dumps(value), "--run.seed", "3").config.run.seed == 3
    for argv in (["--config", file(f"{section}: {{{name}: 777}}")], [f"--{key}=777"], [f"--{key}={{"]):
        (problem,) = problems_of(*argv)
        assert "no longer a setting" in problem and removed.hint in problem


def test_a_repeated_key_is_refused(file):
    """YAML would let the last one win in silence."""
    assert "is given twice" in problems_of("--config", file("optim:\n  lr: 1e-3\n  lr: 1e-4\n"))[0]


def test_a_file_behind_an_override_is_refused(file):
    """It would win over the override in silence."""
    assert "must come before --optim.lr" in problems_of("--optim.lr", "1e-3", "--config", file(LINES))[0]


@pytest.mark.parametrize("value", ["null", "nan", "inf", "-1"])
def test_a_learning_rate_must_be_a_finite_positive_number(value):
    """None, NaN and infinity pass a plain float type; they do not pass here."""
    assert "optim.lr" in problems_of("--optim.lr", value)[0]


def test_a_missing_and_a_broken_file_are_told(file, tmp_path):
    """Neither ends in a traceback."""
    assert "cannot read" in problems_of("--config", str(tmp_path / "absent.yaml"))[0]
    assert "not valid YAML" in problems_of("--config", file("data: [1,\n"))[0]
    assert "needs indented keys" in problems_of("--config", file("data: 3\n"))[0]


def test_contradictions_between_sections_are_told():
    """A checkpoint and a model from scratch exclude each other."""
    problems = problems_of("--model.preset", "tiny", "--model.name_or_path", "x", "--tokenizer.train_vocab_size", "500")
    assert len(problems) == 2


def test_muon_is_refused_for_a_checkpoint_and_taken_from_scratch():
    """It harms pretrained models; the message names the source and the cure. An export of such a run is no training."""
    config = parse("--model.name_or_path", "google/mt5-small", "--optim.name", "muon", "--data.train", "x").config
    with pytest.raises(ConfigError) as caught:
        check_trainable(config)
    (problem,) = caught.value.problems
    assert "google/mt5-small" in problem and "arXiv 2605.10468" in problem and "adamw" in problem
    assert parse("--model.preset", "tiny", "--optim.name", "muon").config.optim.name == "muon"


@pytest.mark.parametrize("value", ["-0.1", "1.1", "nan"])
def test_the_limit_of_unknown_characters_is_a_share(value):
    """From 0, which allows none, to 1, which allows all."""
    assert "tokenizer.max_unknown_share" in problems_of("--tokenizer.max_unknown_share", value)[0]
    assert parse("--tokenizer.max_unknown_share", "1").config.tokenizer.max_unknown_share == 1.0


def test_training_without_text_tokenizer_and_model_names_all_three():
    """Each missing part has a problem of its own."""
    with pytest.raises(ConfigError) as caught:
        check_trainable(Config())
    assert len(caught.value.problems) == 3


def test_the_written_configuration_starts_an_equal_run(file):
    """config.yaml read back gives an equal Config, unset values included."""
    config = parse("--config", file(LINES), "--schedule.max_updates", "7", "--evaluation.every", "0.5ep").config
    assert parse("--config", file(config_text(config), "again.yaml")).config == config


def test_help_shows_every_setting_with_its_docstring(capsys):
    """--help leaves with 0, lists each key, its unit and the exit codes."""
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    assert all(f"--{key}" in text for key in flat(Config()))
    assert "Maximum encoder input length, in tokens" in text
    assert "78 resume would change the mathematics" in text


def test_print_config_is_yaml_of_the_whole_configuration(capsys, file):
    """It holds every key and stops with 0."""
    with pytest.raises(SystemExit) as caught:
        parse("--config", file(LINES), "--print_config")
    assert caught.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert {f"{s}.{k}" for s, keys in printed.items() for k in keys} == set(flat(Config()))


def test_non_default_settings_lists_what_is_not_the_default(file):
    """Only what was changed, by key."""
    found = non_default_settings(parse("--config", file(LINES)).config)
    assert found == {"model.preset": "tiny", "tokenizer.train_vocab_size": 500, "data.train": "corpus.txt"}


def test_cadence_may_change_on_resume_and_mathematics_may_not():
    """Logging, saving and places are free; seed, rate and batch are not."""
    keys = trajectory_settings(Config())
    assert {"run.seed", "optim.lr", "batch.examples_per_update", "corruption.mask_ratio", "evaluation.every"} <= set(keys)
    assert "tokenizer.max_unknown_share" not in keys
    assert not {"telemetry.log_every", "checkpoint.keep_last", "run.dir", "batch.micro_tokens", "batch.readers"} & set(keys)
