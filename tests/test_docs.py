"""Commands that the documents show are commands that exist. Run: python -m pytest tests/test_docs.py

Every line of a code block that calls a launcher is read here: the launcher is there, the configuration files are there,
and `bin/train` and `bin/prepare` take every setting as it is written.
"""

import re
import shlex
from pathlib import Path

import pytest

from resilient_t5.commands import plan, prepare, train
from resilient_t5.commands.arguments import parse_arguments

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CALL = re.compile(r"(?:^|&& )(bin/\w+)( .*)?$")
FLAGS = {"bin/train": train.FLAGS, "bin/prepare": prepare.FLAGS, "bin/plan": plan.FLAGS}
SHOWN_ONLY = "..."
"""Stands for settings that a page does not repeat."""


def shown_commands():
    """(page, launcher, arguments) of every call in a code block, fenced or indented; lines behind a backslash belong to it."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        fenced = False
        for line in text.splitlines():
            if line.startswith("```"):
                fenced = not fenced
            elif (fenced or line.startswith("    ")) and (found := CALL.search(line.strip())):
                yield page.name, found[1], tuple(shlex.split(found[2] or "", comments=True))


COMMANDS = sorted(set(shown_commands()))


def test_the_documents_show_commands():
    """The reading above finds them; a test over an empty list could not fail."""
    assert len(COMMANDS) >= 5


@pytest.mark.parametrize(("page", "launcher", "arguments"), COMMANDS, ids=lambda value: str(value)[:60])
def test_a_shown_command_is_one_that_works(page, launcher, arguments):
    """The launcher exists, its configuration files exist, and every setting has a name and a value that are taken."""
    assert (ROOT / launcher).is_file(), page
    for flag, value in zip(arguments, arguments[1:], strict=False):
        assert flag != "--config" or not value.startswith("configs/") or (ROOT / value).is_file(), value
    if launcher in FLAGS:
        own_files = [str(ROOT / argument) if argument.startswith("configs/") else argument for argument in arguments]
        written = [argument for argument in own_files if argument != SHOWN_ONLY]
        if "--config" in written and not (ROOT / written[written.index("--config") + 1]).is_file():
            del written[written.index("--config") : written.index("--config") + 2]  # a file of the reader's own
        parse_arguments(written, launcher, "shown in the documents", FLAGS[launcher])
