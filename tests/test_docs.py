"""The commands in the documents are valid. Run: python -m pytest tests/test_docs.py

These tests parse every line of a code block that calls a launcher. The launcher and the configuration files exist, and
`bin/train`, `bin/prepare` and `bin/plan` accept every setting. `test_docs_run.py` runs the commands.
"""

import pytest

from resilient_t5.commands import plan, train
from resilient_t5.config.parse import parse_arguments
from resilient_t5.data.corpus.sample import FACTS
from tests.shown_commands import FIRST_RUN, ROOT, shown_commands

pytestmark = pytest.mark.slow

FLAGS = {"bin/train": train.FLAGS, "bin/prepare": (), "bin/plan": plan.FLAGS}
COMMANDS = shown_commands()


def test_the_documents_show_commands():
    """The parser finds commands; a test over an empty list could not fail."""
    assert len(COMMANDS) >= 20
    assert {shown.launcher for shown in COMMANDS} >= {f"bin/{name}" for name in ("train", "prepare", "evaluate", "restore")}


@pytest.mark.parametrize("shown", COMMANDS, ids=lambda shown: str(shown)[:70])
def test_a_shown_command_is_valid(shown):
    """The launcher and its configuration files exist, and every setting has a valid name and value."""
    arguments = shown.arguments
    assert (ROOT / shown.launcher).is_file()
    for flag, value in zip(arguments, arguments[1:], strict=False):
        assert flag != "--config" or not value.startswith("configs/") or (ROOT / value).is_file(), value
    if shown.launcher in FLAGS:
        written = [str(ROOT / argument) if argument.startswith("configs/") else argument for argument in arguments]
        if "--config" in written and not (ROOT / written[written.index("--config") + 1]).is_file():
            del written[written.index("--config") : written.index("--config") + 2]  # a file that the reader creates
        parse_arguments(written, shown.launcher, "shown in the documents", FLAGS[shown.launcher])


def test_the_first_page_names_the_diseases_that_the_notes_know():
    """The first page lists all of them, so that readers can write a sentence about one."""
    page = " ".join(FIRST_RUN.read_text(encoding="utf-8").split())
    assert all(facts.disease in page for facts in FACTS["en"])
    assert f"each of {len(FACTS['en'])} diseases" in page
