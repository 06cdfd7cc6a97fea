"""Pictures of a replay and of resilience curves.

pytest tests/training/telemetry/test_plots.py
"""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image, ImageColor

from resilient_t5.commands.replay import main
from resilient_t5.config.schema import Config
from resilient_t5.restoration.scoring.metrics import Rate
from resilient_t5.restoration.scoring.resilience import DAMAGES, Curve, Point
from resilient_t5.training.convergence.phases import Phase, Window
from resilient_t5.training.convergence.replay import Curve as LossCurve
from resilient_t5.training.convergence.replay import ReplayComparison, replay
from resilient_t5.training.convergence.rules import Rules
from resilient_t5.training.reports import artifacts
from resilient_t5.training.telemetry.plots import (
    BEST,
    EVALUATION,
    OTHER,
    PATIENCE,
    PHASE_COLORS,
    RESTORATION,
    STOP,
    TRAINING,
    draw_replay,
    draw_resilience,
)

RULES = Rules(200, 400, 5, 0.001, 0.0, "counted", "stop", 0.1, 3.0, 3, every=100)
LOSSES = [5.0, 4.0, 3.0, 3.0, 3.0, 3.0, 2.0, *[2.0] * 9, 1.5, 1.4]


def recorded_run(losses=LOSSES):
    """A curve with all that a run of ours records of its windows."""
    windows = tuple(
        Window(100 * number, 0, 0.0, loss, loss_se=0.1, train_loss=loss - 0.5, series={"term_restoration": 0.05 * number})
        for number, loss in enumerate(losses, 1)
    )
    return LossCurve("a run", tuple((float(window.update), window.loss) for window in windows), windows=windows)


def colors_of(path):
    """Every colour of a picture."""
    return {color[:3] for _, color in Image.open(path).convert("RGB").getcolors(1 << 22)}


def test_the_picture_shows_every_phase_both_losses_restoration_patience_best_and_stop(tmp_path):
    """The colour of each is on the page."""
    result = replay(recorded_run(), RULES)
    draw_replay(result, tmp_path / "a.png")
    phases = {verdict.phase for verdict in result.verdicts}
    assert phases == set(Phase) - {Phase.COOLDOWN, Phase.STOPPED}
    drawn = [PHASE_COLORS[phase] for phase in phases] + [EVALUATION, TRAINING, RESTORATION, PATIENCE, BEST, STOP]
    assert {ImageColor.getrgb(color) for color in drawn} <= colors_of(tmp_path / "a.png")


def test_the_stop_of_another_rule_is_drawn_only_where_one_is_given(tmp_path):
    """Its colour is on the page with it and not without it."""
    own, other = replay(recorded_run(), RULES), replay(recorded_run(), Rules(200, 400, 2, *list(vars(RULES).values())[3:]))
    draw_replay(own, tmp_path / "own.png")
    draw_replay(own, tmp_path / "both.png", ReplayComparison("short", other))
    assert ImageColor.getrgb(OTHER) in colors_of(tmp_path / "both.png") - colors_of(tmp_path / "own.png")


@pytest.mark.parametrize(("suffix", "begin"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF"), ("other", b"\x89PNG")])
def test_the_suffix_chooses_the_format(tmp_path, suffix, begin):
    """PNG where the suffix is none of the three."""
    draw_replay(replay(recorded_run(), RULES), tmp_path / f"a.{suffix}")
    assert (tmp_path / f"a.{suffix}").read_bytes().startswith(begin)


@pytest.mark.parametrize("losses", [[2.0], [math.nan, math.nan], [2.0, math.nan, 1.0], [5.0] * 4, [1e-9, 1e9]])
def test_unusual_recordings_are_drawn(tmp_path, losses, capsys):
    """One evaluation, none finite, gaps, no range, a huge range."""
    path = tmp_path / "odd.jsonl"
    path.write_text(json.dumps({"name": "\u4e2d $a_$", "eval": list(enumerate(losses))}) + "\n", encoding="utf-8")
    assert main([str(path), "--png", str(tmp_path / "odd.png")]) == 0
    assert (tmp_path / "odd.png").is_file()
    capsys.readouterr()


def curve(damage, rates):
    """A resilience curve with `rates` at rising levels; nothing was counted at the first."""
    rate_of = [Rate(rate, max(0.0, rate - 0.1), rate, 9 if number else 0) for number, rate in enumerate(rates)]
    return Curve(damage, tuple(Point(0.1 * number, rate, rate, 0.0, 0.0) for number, rate in enumerate(rate_of)))


def test_resilience_curves_of_several_models_are_drawn_and_one_without_terms_too(tmp_path):
    """Chinese names, a single level, nothing counted at all."""
    models = [
        (name, [curve(damage, rates) for damage in DAMAGES]) for name, rates in (("\u4e2d", [0, 0.9, 0.8]), ("b$", [0.5]))
    ]
    draw_resilience(models, tmp_path / "a.png")
    assert ImageColor.getrgb(EVALUATION) in colors_of(tmp_path / "a.png")


def test_matplotlib_is_loaded_only_to_draw():
    """Importing the module costs nothing, and drawing leaves no global figure."""
    code = "import sys, resilient_t5.training.telemetry.plots; raise SystemExit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_failing_picture_does_not_fail_the_run(monkeypatch):
    """Whatever matplotlib raises is a line on the console, and the final figures are still written."""

    def fail(directory):
        raise RuntimeError("broken matplotlib")

    lines, outcomes = [], []
    monkeypatch.setattr(artifacts, "draw_windows", fail)
    board = SimpleNamespace(outcome=lambda *figures: outcomes.append(figures))
    log = SimpleNamespace(directory=Path("run"), line=lines.append, draw=lambda write: write(board))
    artifacts.write_outcome(Config(), SimpleNamespace(best=None, update=1), 1.0, 1.0, log)
    assert "broken matplotlib" in lines[0]
    assert len(outcomes) == 1
