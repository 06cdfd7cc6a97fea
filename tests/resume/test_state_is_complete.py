"""Each item of the saved state is needed. Run: python -m pytest tests/resume/test_state_is_complete.py"""

import pytest

from tests.resume.mutants import attack_mutants

pytestmark = pytest.mark.slow


def test_a_run_that_lacks_one_item_of_its_state_is_told_from_the_whole_one(fork_server, tmp_path, record_property):
    """R9: sixteen items, taken away one at a time; at least fifteen are noticed. A comparison that notices nothing is none."""
    figures, _ = attack_mutants(fork_server, tmp_path)
    record_property("trials", figures["mutants"])
    record_property("caught", figures["caught"])
    assert figures["mutants"] == 16
    assert figures["caught"] >= 15, figures["missed"]
