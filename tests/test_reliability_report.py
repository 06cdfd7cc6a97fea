"""RELIABILITY.md agrees with the result files. Run: python -m pytest tests/test_reliability_report.py"""

import importlib.util
import json

from tests.conftest import ROOT


def load_script():
    """Import benchmarks/reliability_report.py by path; the folder is not a package."""
    spec = importlib.util.spec_from_file_location("reliability_report", ROOT / "benchmarks" / "reliability_report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_report_is_what_the_script_makes_of_the_committed_results():
    """No figure is edited by hand and no result is omitted."""
    assert (ROOT / "RELIABILITY.md").read_text(encoding="utf-8") == load_script().make_report()


def test_a_changed_result_changes_the_report(tmp_path, monkeypatch):
    """One more failure in one attack changes the page; without results the page claims nothing."""
    script = load_script()
    path = sorted(script.RESULTS.glob("*_reliability_*.json"))[-1]
    result = json.loads(path.read_text(encoding="utf-8"))
    before = script.make_report()
    result["attacks"]["R1"]["failures"] += 1
    (tmp_path / path.name).write_text(json.dumps(result), encoding="utf-8")
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    assert script.attacks_section() not in before
    assert "Not run yet" in script.peers_section()
