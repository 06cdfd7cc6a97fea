"""The comparisons end to end, tiny. Run: python -m pytest tests/benchmarks/test_scripts.py"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.peers.results import document

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SIDES = ("script", "script_mended", "tuned_trainer", "ours")


def run(name, *options):
    """The last line of a benchmark, read."""
    done = subprocess.run(
        [sys.executable, ROOT / "bin" / "benchmark", name, *options],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_throughput_compares_all_sides_on_the_same_examples(tmp_path):
    """Ratios, figures of every side, the picture; the tuned Trainer and ours train the very same tokens of one window."""
    options = ["--quick", "--rounds", "1", "--updates", "50", "--json", tmp_path / "r.json", "--png", tmp_path / "r.png"]
    result = run("throughput", *options, "--peak-tflops", "0.1")
    assert result == json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert {"ratio_over_script", "ratio_over_tuned_trainer"} <= result.keys()
    assert result["ratio_over_script"] > 1
    assert result["flops_ratio_over_script"] > 2
    assert result["sides"].keys() == set(SIDES)
    assert result["sides"]["ours"]["vocabulary_rows"] < result["sides"]["tuned_trainer"]["vocabulary_rows"]
    tokens = {side: result["sides"][side]["target_tokens_per_example"] for side in ("tuned_trainer", "ours")}
    assert tokens["ours"] == tokens["tuned_trainer"]
    assert all(result["sides"][side]["peak_mib"] > 0 for side in SIDES)
    for figures in result["sides"].values():
        assert 0 < figures["useful_gflop_per_s"] < figures["gflop_per_s"], "useful operations are some of those that are done"
        assert figures["useful_share_of_peak"] == pytest.approx(figures["useful_gflop_per_s"] / 100, abs=1e-4)
    assert str(tmp_path) not in json.dumps(result)
    assert Image.open(tmp_path / "r.png").size[0] > 1000


def test_a_search_keeps_the_fastest_sizes():
    """One of the sizes tried is kept for each side that is searched."""
    result = run("throughput", "--quick", "--rounds", "1", "--updates", "3", "--search")
    assert result["searched"]["micro_examples"] in (16, 8, 4, 2)
    assert result["searched"]["micro_tokens"] in ("auto", 1024, 2048, 4096, 8192, 16384, 32768)


def test_memory_compares_ours_with_the_trainer():
    """Both sides are measured; the full vocabulary weighs on the Trainer more than on ours."""
    result = run("memory", "--quick", "--rounds", "1", "--micro-batches", "2")
    assert result["trainer_mib"] > result["ours_mib"] > 0


def test_launches_counts_the_calls_of_an_update_on_both_sides():
    """Each side makes calls; a part of our tokens is padding; one shape at least occurs in an epoch."""
    result = run("launches", "--quick", "--updates", "1")
    assert result["ours_calls_per_update"] > 100 and result["tuned_trainer_calls_per_update"] > 100
    assert result["host_syncs_per_update"] >= 0 and result["shapes_per_epoch"] >= 1
    assert 0.5 < result["useful_token_share"] <= 1


def test_card_measures_every_stage_that_a_cpu_can_and_says_why_not_for_the_others(tmp_path):
    """Both sides have figures; a killed run resumes bit for bit; the file is the last line; the picture is drawn."""
    result = run("card", "--quick", "--minutes", "6", "--device", "cpu", "--out", tmp_path)
    assert result == json.loads((tmp_path / "card.json").read_text(encoding="utf-8"))
    assert result["ended"] == "complete" and str(tmp_path) not in json.dumps(result)
    stages = result["stages"]
    skipped = {name for name, stage in stages.items() if stage["status"] == "skipped"}
    assert skipped == {"mt5-base", "mt5-base-kernels", "memory-cap", "small-card"}
    assert all(stages[name]["reason"] for name in skipped)
    assert {name: stage for name, stage in stages.items() if stage["status"] == "failed"} == {}
    sides = stages["mt5-small"]["sides"]
    assert sides["ours"]["examples_per_s"] > 0 and sides["trainer"]["examples_per_s"] > 0
    assert stages["mt5-small"]["ratio_over_trainer"] > 0
    counted = stages["mt5-small-kernels"]["sides"]
    assert counted["ours"]["calls_per_update"] > 100 and counted["trainer"]["calls_per_update"] > 100
    assert counted["ours"]["planned_over_measured"] == pytest.approx(1.0, abs=0.25)
    assert 0 < stages["long-texts"]["sides"]["ours"]["useful_share"] < 1
    assert stages["resume"]["identical"] and stages["resume"]["sha256"].keys() >= {"model", "optimizer"}
    assert Image.open(tmp_path / "card.png").size[0] > 1000


def test_card_keeps_what_it_measured_when_it_is_interrupted(tmp_path):
    """SIGTERM in the second stage: exit code 143, and the first stage is in the file and in the last line."""
    options = ["card", "--quick", "--device", "cpu", "--only", "ceilings,quickstart", "--out", tmp_path]
    command = [sys.executable, ROOT / "bin" / "benchmark", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("quickstart"):
                process.send_signal(signal.SIGTERM)
                break
        rest = process.stdout.read()
        assert process.wait() == 143
    result = json.loads(rest.splitlines()[-1])
    assert result == json.loads((tmp_path / "card.json").read_text(encoding="utf-8"))
    assert result["ended"] == "interrupted by SIGTERM"
    assert result["stages"]["ceilings"]["status"] == "done" and result["stages"]["ceilings"]["fp32_tflops"] > 0
    assert result["stages"]["quickstart"]["status"] == "interrupted"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("throughput", "--corpus", "absent.txt"), "absent.txt"),
        (("throughput", "--quick", "--rounds", "0"), "--rounds"),
        (("memory", "--micro-batches", "1"), "--micro-batches"),
    ],
)
def test_options_that_cannot_be_are_a_usage_error(options, message):
    """Exit code 2 and the option, before anything is prepared."""
    done = subprocess.run([sys.executable, ROOT / "bin" / "benchmark", *options], capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_ratio_is_taken_within_a_round_and_a_side_that_does_not_fit_has_none():
    """Median of the rounds' own ratios, not the ratio of medians; None beside a side without figures."""

    def figures(wall_s):
        names = (
            "peak_mib",
            "loading_peak_mib",
            "vocabulary_rows",
            "target_tokens",
            "updates",
            "flops",
            "useful_flops",
            "cpu_s",
        )
        return {**dict.fromkeys(names, 1.0), "examples": 16.0, "wall_s": wall_s}

    walls = [(1.0, 2.0), (10.0, 50.0), (2.0, 6.0)]
    rounds = [
        {"ours": figures(ours), "tuned_trainer": figures(peer), "script": None, "script_mended": None} for ours, peer in walls
    ]
    result = document(rounds, SIDES)
    assert (result["ratio_over_tuned_trainer"], result["ratio_over_tuned_trainer_rounds"]) == (3.0, [2.0, 5.0, 3.0])
    assert (result["ratio_over_script"], result["sides"]["script"]) == (None, None)


def test_packing_counts_an_epoch_of_packed_rows():
    """Packed rows have more useful tokens than length buckets, at most eight shapes, and never more than the bound."""
    result = run("packing", "--quick")
    shares = [result[side]["useful_token_share"] for side in ("packed", "buckets")]
    assert result["best_share"] >= shares[0] > shares[1]
    assert result["packed"]["shapes"] <= len(result["chosen"]) <= 8
