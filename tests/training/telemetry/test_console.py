"""The live view and the plain lines. Run: python -m pytest tests/training/telemetry/test_console.py"""

import io

import pytest
from rich.cells import cell_len
from rich.console import Console as RichConsole

from resilient_t5.training.telemetry.console import Console, LiveProgress
from resilient_t5.training.telemetry.timing import TimeLeft, Timing


def painted(view, width):
    """Render the view as lines of a terminal of `width` cells."""
    console = RichConsole(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(view)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [24, 40, 80, 200])
def test_no_row_is_wider_than_the_terminal_whatever_the_script(width):
    """Chinese characters take two cells; rows are folded or cut by cells; brackets in the data are not markup."""
    view = LiveProgress(RichConsole(file=io.StringIO()), 1200, 2000)
    view.rows["numbers"] = "update 1200/2000 60.0% | loss 1.8423 | lr 9.95e-06 | 3.9k tok/s | eta 1d 02h (train 23h, eval 2h)"
    view.rows["sample"] = "sample 1200 患者[/b]反复[咳嗽]咳痰十余年，加重伴[气促]三天，查体双肺可闻及[湿性啰音]，血压正常" * 3
    lines = painted(view, width)
    assert all(cell_len(line) <= width for line in lines)
    assert "[/b]" in "".join(lines)[:4000] or width < 30
    assert lines[-1].startswith("sample")


def test_rows_keep_their_order_and_show_their_latest_text():
    """Each row shows its latest text below the bar, in a fixed order."""
    view = LiveProgress(RichConsole(file=io.StringIO()), 5, 10)
    for row, text in (("sample", "old"), ("phase", "phase OBSERVE"), ("numbers", "loss 2"), ("sample", "new")):
        view.rows[row] = text
    view.update = 6
    lines = [line.strip() for line in painted(view, 60)]
    assert lines[0].startswith("update 6/10") and lines[0].endswith("60.0%")
    assert lines[1:] == ["loss 2", "phase OBSERVE", "new"]


def test_on_a_pipe_every_line_is_printed_and_logged(tmp_path, capsys):
    """Without a terminal there is no live view: the same plain lines go to stdout and to train.log."""
    with Console("plain", tmp_path / "train.log") as console:
        console.start_view(0, 10)
        console.line("update 5/10 | loss 2.0", keep="numbers")
        console.line("phase  OBSERVE", keep="phase")
        console.advance(5)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(" ", 1)[1] for line in printed] == ["update 5/10 | loss 2.0", "phase  OBSERVE"]
    assert (tmp_path / "train.log").read_text(encoding="utf-8").splitlines() == printed


def test_the_time_left_counts_evaluations_and_saves():
    """Training, evaluations and saves are projected separately, each by its own mean."""
    timing = Timing()
    for _ in range(10):
        timing.add("update", 2.0)
    timing.add("evaluation", 60.0)
    timing.add("save", 5.0)
    left = timing.left(updates=300, evaluations=3, save_every_s=390.0)
    assert left.training_s == pytest.approx(600.0)
    assert left.evaluation_s == pytest.approx(180.0)
    assert left.save_s == pytest.approx((3 + 2) * 5.0)
    assert left.text() == "13m 25s (train 10m 00s, eval 3m 00s, save 25 s)"
    assert TimeLeft(0.2, 0.0, 0.0).text() == "0.2 s"
