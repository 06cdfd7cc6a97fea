"""The parts of `bin/benchmark card` that need no device. Run: python -m pytest tests/benchmarks/test_card.py"""

import json
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.profiler import ProfilerActivity, profile

from benchmarks import card
from benchmarks.card_stages.inputs import LONG_CHARACTERS, joined
from benchmarks.card_stages.kernels import covered, kernel_figures
from benchmarks.card_stages.limited import run_limited
from benchmarks.card_stages.report import draw, lines_of, table
from benchmarks.card_stages.sides import spread
from benchmarks.card_stages.speed import summary
from benchmarks.peers.limits import judge_probe


@dataclass(frozen=True)
class Event:
    """An event as the profiler reports it; times in nanoseconds."""

    label: str
    start: int
    duration: int
    kind: str = "DeviceType.CUDA"
    annotation: bool = False

    def name(self):
        return self.label

    def start_ns(self):
        return self.start

    def duration_ns(self):
        return self.duration

    def device_type(self):
        return self.kind

    def is_user_annotation(self):
        return self.annotation


def test_kernels_launches_and_busy_time_are_counted_once():
    """Two kernels overlap; a copy keeps the card busy but is no kernel; an annotation over all of them is neither."""
    cpu = "DeviceType.CPU"
    events = [
        Event("gemm", 0, 100),
        Event("gemm", 50, 100),
        Event("Memcpy HtoD", 200, 50),
        Event("Optimizer.step", 0, 1000, annotation=True),
        Event("cudaLaunchKernel", 0, 5, cpu),
        Event("cudaGraphLaunch", 10, 5, cpu),
        Event("cudaStreamSynchronize", 20, 5, cpu),
        Event("aten::mm", 0, 5, cpu),
    ]
    figures = kernel_figures(events, updates=1)
    assert figures["kernels_per_update"] == 2 and figures["copies_per_update"] == 1
    assert figures["launches_per_update"] == 2 and figures["graph_launches_per_update"] == 1
    assert figures["waits_per_update"] == 1
    assert figures["busy_s_per_update"] == pytest.approx(200e-9, abs=1e-6)
    assert covered([(0, 100), (50, 150), (200, 250), (210, 220)]) == 200


def test_the_events_of_the_profiler_have_what_is_read_from_them():
    """A CPU has no kernels; the figures of its own events are zeros, not an error."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        torch.zeros(3).add_(1)
    events = recorded.profiler.kineto_results.events()
    assert len(events) >= 2
    figures = kernel_figures(events, updates=1)
    assert figures["kernels_per_update"] == figures["launches_per_update"] == figures["busy_s_per_update"] == 0


@pytest.mark.parametrize("count", [1, 2, 3, 12, 24, 50, 97])
def test_every_prefix_of_the_trainers_batches_has_short_and_long_ones(count):
    """Each batch once; the largest gap between the first k positions is below three even gaps."""
    order = spread(count)
    assert sorted(order.tolist()) == list(range(count))
    for first in range(3, count):
        positions = np.sort(order[:first])
        gaps = np.diff([*positions, positions[0] + count])
        assert gaps.max() <= math.ceil(3 * count / first)


def test_joined_documents_are_long_in_order_and_no_more_than_needed():
    """Each text is at least as long as wanted; the documents follow each other; it ends soon after the bytes wanted."""
    documents = [f"document {number} " + "x" * 700 for number in range(100)]
    texts = list(joined(iter(documents), 20_000))
    assert all(len(text) >= LONG_CHARACTERS for text in texts)
    assert " ".join(documents).startswith(" ".join(texts))
    assert 20_000 <= sum(map(len, texts)) < 20_000 + 2 * LONG_CHARACTERS
    assert list(joined(iter(["short"]), 20_000)) == ["short"]


def figures(wall_s, **others):
    """Figures of a side with 16 examples in `wall_s` seconds."""
    plain = {"examples": 16, "updates": 1, "source_tokens": 900, "target_tokens": 300, "cpu_s": 1.0, "warm_s": 2.0}
    return plain | {"wall_s": wall_s, "vocabulary_rows": 1000, "peak_mib": 100.0} | others


def test_the_ratio_over_the_best_trainer_is_taken_within_a_round():
    """The compiled Trainer is faster and was measured once: its ratio is that of the round, not of the medians."""
    rounds = [
        {"ours": figures(1.0), "trainer": figures(4.0), "trainer_compiled": figures(2.0)},
        {"ours": figures(10.0), "trainer": figures(20.0)},
        {"ours": figures(10.0), "trainer": figures(20.0)},
    ]
    result = summary(rounds, ["ours", "trainer", "trainer_compiled"], {"ours_without_graphs": "no time left"})
    assert result["best_trainer"] == "trainer_compiled"
    assert result["ratio_over_best_trainer"] == 2.0 and result["ratio_over_trainer"] == 2.0
    assert result["sides"]["ours"]["rounds"] == 3
    assert "ratio_over_best_trainer" not in summary([{"ours": figures(1.0)}], ["ours", "trainer"], {})


def measured():
    """A result of a GPU with every stage."""
    rounds = [
        {"ours": figures(1.0), "trainer": figures(2.0), "ours_without_graphs": figures(3.0), "trainer_compiled": figures(1.5)}
    ]
    sides = ["ours", "trainer", "ours_without_graphs", "trainer_compiled"]
    profiled = {"kernels_per_update": 3000, "launches_per_update": 9, "busy_share": 0.5, "allocated_peak_mib": 900.0}
    plan = {"planned_peak_mib": 1030.0, "longest_peak_mib": 1000.0, "planned_over_measured": 1.03}
    kernels = {"sides": {"ours": profiled | plan, "trainer": profiled}}
    long = {"tokens_per_s": 9.0, "source_tokens_per_example": 500.0, "target_tokens_per_example": 110.0, "needed_share": 0.3}
    capped = {"memory_gib": 6.0, "ours": {"examples_per_s": 5.0, **plan}, "trainer": {"fits": False, "reason": "does not fit"}}
    return {
        "device": "Card X",
        "sizes": "gpu",
        "versions": {"torch": "2"},
        "stages": {
            "ceilings": {
                "device": "Card X",
                "bf16_tflops": 700.0,
                "fp32_tflops": 50.0,
                "bandwidth_gb_per_s": 3000.0,
                "small_operation_us": 5.0,
                "graph_kernel_us": 1.5,
            },
            "mt5-small": summary(rounds, sides, {}),
            "mt5-small-kernels": kernels,
            "mt5-base": summary([{"ours": figures(1.0)}], sides, {"trainer": "does not fit: CUDA out of memory"}),
            "long-texts": {"sides": {"ours": long, "trainer": long}},
            "memory-cap": capped,
            "small-card": {"multiprocessors": 24, "memory_gib": 6.0, **summary(rounds, sides[:2], {})},
            "quickstart": {"command_s": 71.0, "exit_code": 0},
            "from-scratch": {"parameters": 48e6, "tokens_per_s": 50_000},
            "resume": {
                "identical": False,
                "different": ["model"],
                "killed_at_update": 12,
                "deterministic_price": {"ratio": 1.4},
            },
            "other": {"status": "skipped", "reason": "no time left"},
        },
    }


def test_the_table_and_the_picture_show_every_stage_and_every_reason(tmp_path):
    """Each comparison has a line; a side without figures has its reason; a difference after a resume is not hidden."""
    result = measured()
    text = "\n".join(table(result))
    for shown in ("Card X", "bf16 700", "1.5 us in a CUDA graph", "2.00x", "torch_compile", "1.50x", "3,000", "24 SMs", " 71 "):
        assert shown in text
    for shown in (
        "+3.0 %",
        "T5 of 48 M",
        "DIFFERENT: model",
        "1.4 times",
        "mt5-base trainer: does not fit",
        "other: no time left",
    ):
        assert shown in text
    assert next(line for line in lines_of(result) if line.what == "mt5-base, short texts").ratio is None
    draw(result, tmp_path / "card.png")
    assert Image.open(tmp_path / "card.png").size[0] > 1000
    assert "not measured" not in "\n".join(table({"sizes": "cpu", "versions": {}, "stages": {}}))


def test_a_limit_of_the_multiprocessors_holds_only_where_the_speed_falls_with_it():
    """A quarter of the multiprocessors at a quarter of the speed holds; at the full speed, or with an error, it does not."""
    free = {"multiprocessors": 100, "forward": 1.0, "backward": 1.0, "graph": 1.0}
    judged = judge_probe(
        free, {"multiprocessors": 25, "forward": 4.0, "backward": 1.0, "graph": "invalid handle"}, 25, "context"
    )
    assert judged["holds"] == {"forward": True, "backward": False, "graph": False}
    assert judged["speed_share"] == {"forward": 0.25, "backward": 1.0} and judged["errors"] == {"graph": "invalid handle"}


@dataclass
class Stored:
    """The part of a session that `keep_earlier` reads."""

    folder: Path
    named: tuple
    result: dict = field(default_factory=dict)

    def say(self, line):
        """No output."""


def test_naming_stages_keeps_the_others_and_a_full_run_keeps_the_earlier_result_aside(tmp_path):
    """Only with the same card, sizes and versions; a damaged file is moved aside as well."""
    same = {"device": "Card X", "sizes": "gpu", "versions": {"torch": "2"}, "resilient_t5": "0.1.0", "cores": 2}
    earlier = {**same, "stages": {"ceilings": {"status": "done"}, "resume": {"status": "failed"}}, "texts": {"short": {}}}
    path = tmp_path / "card.json"
    path.write_text(json.dumps(earlier), encoding="utf-8")
    session = Stored(tmp_path, ("resume",), {**same, "stages": {}})
    card.keep_earlier(session)
    assert session.result["stages"] == {"ceilings": {"status": "done"}} and path.exists()
    other = Stored(tmp_path, ("resume",), {**same, "device": "Card Y", "stages": {}})
    card.keep_earlier(other)
    assert other.result["stages"] == {} and not path.exists()
    assert json.loads((tmp_path / "card.previous.json").read_text(encoding="utf-8")) == earlier
    path.write_text("{", encoding="utf-8")
    card.keep_earlier(session)
    assert not path.exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--minutes", "0"], "--minutes"),
        (["--corpus", "absent.txt", "--terms", "absent.txt"], "absent.txt"),
        (["--corpus", __file__], "belong together"),
        (["--out", str(Path(card.resilient_t5.__file__).parent / "out")], "inside the package"),
    ],
)
def test_options_that_cannot_be_are_a_usage_error(argv, message, capsys):
    """Exit code 2 and the option."""
    with pytest.raises(SystemExit) as caught:
        card.parse(argv)
    assert caught.value.code == 2 and message in capsys.readouterr().err


def divide(value):
    """A function that fails for 0."""
    return 1 / value


def start_and_sleep(path):
    """Start a process that writes its id, and sleep longer than any limit."""
    import subprocess
    import sys

    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(path).write_text(str(child.pid), encoding="ascii")
    time.sleep(600)


@pytest.mark.slow
def test_a_measurement_ends_at_its_limit_with_all_that_it_started(tmp_path):
    """A value, an error and a limit each become an outcome; no process is left."""
    log = tmp_path / "log"
    assert run_limited(divide, (4,), 60, log).value == 0.25
    assert "ZeroDivisionError" in run_limited(divide, (0,), 60, log).reason and "Traceback" in log.read_text(encoding="utf-8")
    outcome = run_limited(start_and_sleep, (str(tmp_path / "pid"),), 5, log)
    assert "time limit of 5 s" in outcome.reason
    pid = int((tmp_path / "pid").read_text(encoding="ascii"))
    end_s = time.monotonic() + 10
    while _runs(pid) and time.monotonic() < end_s:
        time.sleep(0.05)
    assert not _runs(pid)


def _runs(pid):
    """Whether a process exists and is not a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text(encoding="ascii")
