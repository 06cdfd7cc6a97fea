"""How a command ends. Run: python -m pytest tests/commands/test_failure.py"""

import subprocess
import sys

from resilient_t5.commands.failure import reported
from resilient_t5.errors import ExitCode
from tests.conftest import ROOT

WRITES = "import sys; from resilient_t5.commands.failure import reported; sys.exit(reported(lambda: print('x' * 10**6) or 0))"


def test_a_reader_that_has_seen_enough_is_no_error_to_talk_about():
    """`bin/... | head -1`: nothing on standard error, neither ours nor Python's at exit; a script sees the exit code."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITES], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.read(1) == "x"
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(30) == ExitCode.IO_ERROR


def test_ctrl_c_is_answered_with_what_the_command_says_of_it(capsys):
    """130 and one line; only bin/train speaks of training."""

    def interrupted():
        raise KeyboardInterrupt

    assert reported(interrupted) == reported(interrupted, "before training") == ExitCode.INTERRUPTED
    assert capsys.readouterr().err == "interrupted\nbefore training\n"
