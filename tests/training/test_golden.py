"""Twenty updates whose losses are on file. Run: python -m pytest tests/training/test_golden.py

A change that must not alter results leaves golden.json alone. To write it anew after a change that must:
`RESILIENT_T5_WRITE_GOLDEN=1 python -m pytest tests/training/test_golden.py`, and say why in the commit.
"""

import json
import os
from pathlib import Path

import pytest

from resilient_t5.training.telemetry.metrics_log import read_rows

GOLDEN = Path(__file__).with_name("golden.json")
# Another processor rounds in another order; over twenty updates that stays far below a real change.
RELATIVE_TOLERANCE = 2e-3


def test_twenty_updates_have_the_losses_on_file(fork_server, tiny_config, tmp_path):
    """Training loss, target tokens and gradient norm of every update, and the loss of every evaluation."""
    run, console = tmp_path / "run", tmp_path / "console.txt"
    argv = ["--config", tiny_config, "--run.dir", run, "--schedule.max_updates", "20"]
    assert fork_server.run(argv, console) == 0, console.read_text()
    rows = list(read_rows(run / "metrics.jsonl"))
    found = {
        "train": [[r["loss"], r["gradient_norm"], r["target_tokens"]] for r in rows if r["kind"] == "train"],
        "evaluation": [[r["loss"]] for r in rows if r["kind"] == "evaluation"],
    }
    if os.environ.get("RESILIENT_T5_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    for kind, expected in golden.items():
        assert len(found[kind]) == len(expected)
        for got, want in zip(found[kind], expected, strict=True):
            assert got == pytest.approx(want, rel=RELATIVE_TOLERANCE)
