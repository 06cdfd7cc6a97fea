"""RELIABILITY.md says what the result files say. Run: python -m pytest tests/test_reliability_report.py"""

import importlib.util
import json

from tests.conftest import ROOT


def load_script():
    """benchmarks/reliability_report.py as a module; the folder is no package."""
    found = importlib.util.spec_from_file_location("reliability_report", ROOT / "benchmarks" / "reliability_report.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_the_committed_report_is_what_the_script_makes_of_the_committed_results():
    """Nobody edits a figure by hand, and no result is left out."""
    assert (ROOT / "RELIABILITY.md").read_text(encoding="utf-8") == load_script().make_report()


def test_a_changed_result_changes_the_report(tmp_path, monkeypatch):
    """One failure more in one attack is another page; and without results nothing is claimed."""
    script = load_script()
    path = sorted(script.RESULTS.glob("*_reliability_*.json"))[-1]
    result = json.loads(path.read_text(encoding="utf-8"))
    before = script.make_report()
    result["attacks"]["R1"]["failures"] += 1
    (tmp_path / path.name).write_text(json.dumps(result), encoding="utf-8")
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    assert script.attacks_section() not in before
    assert "Not run yet" in script.peers_section()
