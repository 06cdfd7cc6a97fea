"""Several processes train one run with sharded layers. Run: python -m pytest tests/resume/test_sharded.py"""

import json
import signal

import pytest

from resilient_t5.config.schema import Config, HardwareConfig
from resilient_t5.errors import ConfigError
from resilient_t5.model.load import PRESETS
from resilient_t5.model.memory import optimizer_bytes
from resilient_t5.model.shapes import sizes_of_shape
from resilient_t5.training.hardware.process_group import ProcessGroup, join
from resilient_t5.training.hardware.sharding import shard_model
from tests.resume.harness import Arena, committed_update, differences, metric_rows, newest_checkpoint, tensor_sha256, whole_rows
from tests.resume.several import attack_lost, console, damage, run_together, start_together, summary, wait_for_both
from tests.resume.test_several import UPDATES, assert_close, order

pytestmark = pytest.mark.slow

CUT = (*UPDATES, "--hardware.shard_layers", "true")
CODES = ("--run.signal_exit", "code")


@pytest.fixture(scope="module")
def arena(fork_server, tmp_path_factory):
    """A folder with a store and the run of one process over 20 updates, dropout and several micro-batches included."""
    arena = Arena(fork_server, tmp_path_factory.mktemp("sharded"))
    arena.finish("alone", *UPDATES)
    return arena


def weighed(arena, index):
    """The fault that lets process `index` write down what it holds."""
    return ("tests.resume.several:weigh", {"place": str(arena.folder / f"held-{index}.json"), "update": 7})


@pytest.fixture(scope="module")
def two(arena):
    """The same run on two processes that hold half of the layers each."""
    faults = {index: [weighed(arena, index)] for index in range(2)}
    assert run_together(arena, "two", 2, *CUT, before=faults) == [0, 0], console(arena, "two")
    return arena.folder / "two"


def test_two_processes_with_cut_layers_give_the_losses_of_one(arena, two):
    """Twenty updates: losses and gradient norms to 1e-6, the same examples, and evaluations with the same answers."""
    assert_close(two, arena.folder / "alone")
    assert "layers sharded over 2 processes" in arena.console("two").read_text()


def test_evaluations_of_equal_weights_give_equal_figures(arena, two):
    """Before the first update both runs hold the same weights: every figure of both rows is the same number."""
    for kind in ("evaluation", "restoration"):
        assert metric_rows(two, kind)[0] == metric_rows(arena.folder / "alone", kind)[0]


def test_all_begin_with_the_first_weights_of_process_0(arena, two):
    """Process 1 builds other ones: the first evaluation and the loss of the first update are those of the run all the same."""
    fault = ("tests.resume.several:begin_otherwise", {"shift": 0.1})
    assert run_together(arena, "otherwise", 2, *CUT, "--schedule.max_updates", "1", before={1: [fault]}) == [0, 0]
    for kind in ("evaluation", "train"):
        assert metric_rows(arena.folder / "otherwise", kind)[0]["loss"] == metric_rows(two, kind)[0]["loss"]


def test_a_fork_takes_the_weights_of_a_checkpoint_and_exports_the_best(arena, two):
    """Its first evaluation is the last one of the run it forks from; trained badly, it exports those weights as the best."""
    settings = ("--run.fork", newest_checkpoint(two), "--schedule.max_updates", "1", "--optim.lr", "1.0")
    assert run_together(arena, "fork", 2, *CUT, *settings) == [0, 0], console(arena, "fork")
    first, last = metric_rows(arena.folder / "fork", "evaluation")
    assert first["loss"] == metric_rows(two, "evaluation")[-1]["loss"] < last["loss"]
    exports = [
        tensor_sha256(run / "export" / name / "model.safetensors")
        for run, name in ((arena.folder / "fork", "best"), (two, "last"))
    ]
    assert exports[0] == exports[1]


def test_three_processes_with_unequal_shares_and_rows_give_the_losses_of_one(arena):
    """Four or five micro-batches for three processes, with checkpointing, and layers of 64 rows: some have fewer of both."""
    more = ("--model.gradient_checkpointing", "true")
    assert run_together(arena, "three", 3, *CUT, *more) == [0, 0, 0], console(arena, "three")
    assert_close(arena.folder / "three", arena.folder / "alone")


def test_two_runs_of_two_processes_with_cut_layers_are_the_same_bit_for_bit(arena, two):
    """Weights, optimizer, random states, counters, metric rows and exports by sha256."""
    assert run_together(arena, "two again", 2, *CUT) == [0, 0], console(arena, "two again")
    assert differences(arena.folder / "two again", two) == []


def test_each_process_holds_its_part_of_the_layers(arena, two):
    """Weights, gradients and states of the layers: half of them in each of two processes, beside the whole table."""
    sizes = sizes_of_shape(PRESETS["tiny"], rows=800)
    for index in range(2):
        sizes_by_kind = json.loads((arena.folder / f"held-{index}.json").read_text())
        assert sizes_by_kind["weights"] == sizes_by_kind["gradients"] == 4 * sizes.per_process(2)
        assert sizes_by_kind["states"] == optimizer_bytes(sizes, "adamw", 2)
    assert sizes_by_kind["weights"] - 4 * sizes.table == 2 * (sizes.encoder + sizes.decoder)


def test_a_checkpoint_of_cut_layers_goes_on_whole_and_on_another_number(arena):
    """SIGTERM to process 1 of two, 143 from both; then one process with whole layers, stopped too; then three with cut ones."""
    fault = ("tests.resume.placing:signal_at", {"place": "micro-batch", "number": int(signal.SIGTERM), "call": 17})
    plain = (*UPDATES, *CODES)
    assert run_together(arena, "stopped", 2, *CUT, *CODES, before={1: [fault]}) == [143, 143], console(arena, "stopped")
    first = summary(arena, "stopped")["updates"]
    assert newest_checkpoint(arena.folder / "stopped").name.startswith(f"u{first:08d}")
    assert run_together(arena, "stopped", 1, *plain, before={0: [fault]}) == [143], console(arena, "stopped")
    assert 0 < first < summary(arena, "stopped")["updates"] < 20
    assert run_together(arena, "stopped", 3, *CUT, *CODES) == [0, 0, 0], console(arena, "stopped")
    assert order(arena.folder / "stopped") == order(arena.folder / "alone")
    assert_close(arena.folder / "stopped", arena.folder / "alone")
    changed = [row["changed_conditions"] for row in whole_rows(arena.folder / "stopped") if row["kind"] == "start"]
    assert changed == [
        [],
        ["processes: 2 -> 1", "shard_layers: True -> False"],
        ["processes: 1 -> 3", "shard_layers: False -> True"],
    ]


@pytest.mark.parametrize(("place", "victim", "call"), [("micro-batch", 1, 23), ("rows", 1, 250), ("save", 0, 300)])
def test_a_killed_process_leaves_the_last_commit_and_the_other_goes(arena, two, place, victim, call):
    """In a pass, while rows are collected, in a save: no hang, 75, checkpoints whole; and the run goes on as if nothing was."""
    name = f"killed in {place}"
    fault = ("tests.resume.placing:signal_at", {"place": place, "number": int(signal.SIGKILL), "call": call})
    pids = start_together(arena, name, 2, *CUT, before={victim: [fault]})
    statuses, waited_s = wait_for_both(arena.server, pids, victim)
    assert statuses[victim] == -signal.SIGKILL and statuses[1 - victim] == 75, console(arena, name)
    assert waited_s < 20 and damage(arena.folder / name) == []
    assert "another process of this run is gone" in console(arena, name)
    assert 0 < committed_update(arena.folder / name) < 20
    if place == "micro-batch":
        assert run_together(arena, name, 2, *CUT) == [0, 0], console(arena, name)
        assert differences(arena.folder / name, two) == []


def test_ten_processes_killed_in_saves_lose_nothing_of_cut_layers(fork_server, tmp_path):
    """R22 with sharded layers: one of two is killed in a save, ten times; all commits are intact, and the run ends the same."""
    figures, _ = attack_lost(fork_server, tmp_path, 10, seed=3, more=("--hardware.shard_layers", "true"))
    assert figures["bad"] == [] and figures["different"] == [] and figures["kills"] == 10


def test_memory_that_runs_out_in_a_pass_ends_the_run_with_what_would_help(arena):
    """The others cannot do a pass again with the one that failed: 71 and the cheapest setting from it, 75 from the other."""
    fault = ("tests.resume.several:run_out_of_memory", {"call": 5})
    more = ("--batch.micro_tokens", "600")
    assert run_together(arena, "short", 2, *CUT, *more, before={1: [fault]}) == [75, 71], console(arena, "short")
    assert "no room" in console(arena, "short") and "--batch.micro_tokens 300" in console(arena, "short")


def test_rows_that_are_not_finite_in_one_process_move_no_weight(arena):
    """NaN in a gradient that process 1 alone holds: both refuse the update and agree to the end."""
    fault = ("tests.resume.several:spoil_rows", {"update": 6})
    assert run_together(arena, "spoilt", 2, *CUT, "--schedule.max_updates", "8", before={1: [fault]}) == [0, 0], console(
        arena, "spoilt"
    )
    guard_rows = [row for row in whole_rows(arena.folder / "spoilt") if row["kind"] == "guard"]
    assert [(row["action"], row["attempted"], row["gradient_norm"]) for row in guard_rows] == [("skip", 6, "nan")]


def test_a_rollback_goes_back_in_all_processes(arena):
    """Losses that are not finite four times in a row: the run goes back to a checkpoint, passes over them and ends well."""
    fault = ("tests.resume.placing:spoil", {"place": "loss", "update": 4, "updates": 4})
    short = ("--schedule.max_updates", "8")
    for name, settings, count in (("back whole", UPDATES, 1), ("back", CUT, 2)):
        faults = {index: [fault] for index in range(count)}
        assert run_together(arena, name, count, *settings, *short, before=faults) == [0] * count, console(arena, name)
        assert "rolled back" in [row["action"] for row in whole_rows(arena.folder / name) if row["kind"] == "guard"]
    assert_close(arena.folder / "back", arena.folder / "back whole")


def test_tables_that_drift_apart_end_the_run(arena):
    """The vocabulary table is whole in both processes; one changed value of it is found at the next evaluation."""
    fault = ("tests.resume.placing:spoil", {"place": "parameter", "update": 0, "value": "0.5"})
    assert run_together(arena, "drifted", 2, *CUT, before={1: [fault]}) == [70, 70], console(arena, "drifted")
    assert "weights of the processes differ" in console(arena, "drifted")


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw8bit", "muon"])
def test_an_optimizer_that_looks_at_whole_matrices_is_refused(arena, optimizer):
    """By name, before anything is written."""
    assert run_together(arena, "refused", 1, *CUT, "--optim.name", optimizer) == [2]
    assert "hardware.shard_layers needs optim.name adamw" in console(arena, "refused")
    assert not (arena.folder / "refused").exists()


def test_a_number_format_with_a_loss_scaler_is_refused_where_a_card_chose_it():
    """fp16 by `auto` on an old card, in every process alike; asked for by name it is refused with the settings."""
    cut = HardwareConfig(shard_layers=True)
    with pytest.raises(ConfigError, match="fp16"):
        shard_model(None, Config(hardware=cut), ProcessGroup(count=2), "fp16", is_new=True)
    with pytest.raises(ConfigError, match="fp16"):
        Config(hardware=HardwareConfig(shard_layers=True, precision="fp16"))


def test_a_start_by_the_fsdp_of_accelerate_is_refused(monkeypatch):
    """It would wrap the model, and change the number format, behind the loop's back."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="hardware.shard_layers"):
        join(on_gpu=False)
