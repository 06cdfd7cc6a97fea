"""bin/benchmark finds and runs the scripts. Run: python -m pytest tests/commands/test_benchmark.py"""

import subprocess
import sys
from pathlib import Path

import pytest

from resilient_t5.commands import benchmark
from resilient_t5.commands.benchmark import NoBenchmarks, benchmarks, main

ROOT = Path(__file__).parents[2]
NAMES = {"throughput", "memory", "loop_overhead", "prepare", "corruption", "stopping"}


def test_every_script_is_listed_with_its_title(capsys):
    """--help names all benchmarks and what each measures, and exits 0."""
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    found = benchmarks(ROOT / "benchmarks")
    assert set(found) >= NAMES
    assert "crash_systems" not in found, "a part of a benchmark that cannot be started alone"
    assert all(claim and f"{name} " in printed and claim in printed for name, claim in found.items())


def test_an_unknown_name_is_a_usage_error_with_the_nearest_one(capsys):
    """Exit code 2, all names, and the one that was probably meant."""
    assert main(["throughputs"]) == 2
    message = capsys.readouterr().err
    assert "throughputs is not a benchmark" in message
    assert "Did you mean throughput?" in message


def test_without_a_source_checkout_it_exits_with_a_hint(tmp_path, monkeypatch, capsys):
    """An installed wheel has no benchmarks: exit code 2 and how to install them."""
    monkeypatch.setattr(benchmark, "FOLDER", tmp_path / "benchmarks")
    assert main(["memory"]) == 2
    assert "source checkout" in capsys.readouterr().err
    with pytest.raises(NoBenchmarks):
        benchmarks(tmp_path)


def test_options_and_the_exit_code_pass_through(tmp_path):
    """The script gets its options as they are, and its exit code is the command's."""
    body = 'import sys\nif __name__ == "__main__":\n    print(sys.argv[1:])\n    raise SystemExit(7)\n'
    (tmp_path / "echo.py").write_text(f'"""Echo."""\n{body}', encoding="utf-8")
    code = f"""
import pathlib, resilient_t5.commands.benchmark as b
b.FOLDER = pathlib.Path({str(tmp_path)!r})
raise SystemExit(b.main(["echo", "--rounds", "2"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (7, "['--rounds', '2']")
