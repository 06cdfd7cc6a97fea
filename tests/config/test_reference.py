"""The commented configuration and the page of all settings. Run: python -m pytest tests/config/test_reference.py"""

import dataclasses
from pathlib import Path

import pytest

from resilient_t5.commands.train import main
from resilient_t5.config.parse import KEYS, parse_config
from resilient_t5.config.reference import commented_yaml, page
from resilient_t5.config.schema import Config, DataConfig, OptimConfig

DOCS = Path(__file__).parents[2] / "docs"


def test_every_setting_has_a_meaning():
    """The reference has one table row for every key of the command line, with a meaning."""
    rows = [line.strip("| ").split(" | ") for line in page().splitlines() if line.startswith("| `")]
    assert [row[0].strip("`") for row in rows] == list(KEYS)
    assert [row for row in rows if len(row) < 4 or row[-1] in ("", "None")] == []


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(data=DataConfig(train=["a b.txt", "报告/*.txt"], terms="no"), optim=OptimConfig(lr=3e-5, eps=1e-30)),
    ],
    ids=["defaults", "values that YAML could misread"],
)
def test_a_commented_file_reads_back_as_the_configuration_it_was_made_from(config, tmp_path):
    """No value changes on its way through the file, whatever YAML makes of it."""
    path = tmp_path / "my.yaml"
    path.write_text(commented_yaml(config, "my.yaml"), encoding="utf-8")
    assert parse_config(["--config", str(path)], "train", "test") == config


def test_init_writes_the_settings_of_the_command_line_and_never_overwrites(tmp_path, capsys):
    """bin/train --init FILE takes presets and overrides along; a second time it leaves the file alone and exits with 2."""
    path = tmp_path / "my.yaml"
    assert main(["--init", str(path), "--optim.lr", "3e-4"]) == 0
    written = path.read_text(encoding="utf-8")
    assert parse_config(["--config", str(path)], "train", "test") == dataclasses.replace(Config(), optim=OptimConfig(lr=3e-4))
    assert str(path) in capsys.readouterr().out
    assert main(["--init", str(path)]) == 2
    assert path.read_text(encoding="utf-8") == written
    assert "already exists" in capsys.readouterr().err


def test_the_page_of_all_settings_is_up_to_date():
    """docs/configuration.md is what the command in its head prints."""
    assert (DOCS / "configuration.md").read_text(encoding="utf-8") == page()
