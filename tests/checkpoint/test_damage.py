"""Damage of every kind to the newest checkpoint: found, put into quarantine, and the older one loaded.

Set RESILIENT_T5_DAMAGES for more of it.

python -m pytest tests/checkpoint/test_damage.py
"""

import json
import os
import random
import shutil

import pytest

from resilient_t5.checkpoint.reader import load_checkpoint
from resilient_t5.errors import NoValidCheckpoint, ResumeMismatch
from tests.checkpoint.harness import commit, is_exactly, live_names, make_manager, make_parts

DAMAGES = int(os.environ.get("RESILIENT_T5_DAMAGES", "200"))
FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json")


def flip_a_bit(path, draw):
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def truncate(path, draw):
    data = path.read_bytes()
    path.write_bytes(data[: draw.randrange(len(data))])


def zero_the_tail(path, draw):
    data = path.read_bytes()
    # The last byte of a JSON file is never zero, but a tensor may end in zeros: reach back to a byte that is not.
    last = max(index for index, byte in enumerate(data) if byte)
    keep = draw.randrange(last + 1)
    path.write_bytes(data[:keep] + bytes(len(data) - keep))


def lengthen(path, draw):
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.randrange(1, 9)))


def remove(path, draw):
    path.unlink()


def swap_with_the_older_one(path, draw):
    older = path.parent.parent / live_names(path.parents[2])[-2] / path.name
    here, there = path.read_bytes(), older.read_bytes()
    assert here != there
    path.write_bytes(there)


def replace_by_a_link(path, draw):
    elsewhere = path.parents[2] / f"moved-{path.name}"
    shutil.move(path, elsewhere)
    path.symlink_to(elsewhere)


def replace_by_a_directory(path, draw):
    path.unlink()
    path.mkdir()


def replace_by_a_pipe(path, draw):
    path.unlink()
    os.mkfifo(path)


def edit_the_json(path, draw):
    path = path.with_name(draw.choice(["state.json", "MANIFEST.json"]))
    value = json.loads(path.read_text())
    key = draw.choice(sorted(value))
    others = [0, "x", None, [], {"model.safetensors": {"bytes": 1, "sha256": "0" * 64}}, 10**30]
    value[key] = draw.choice([other for other in others if other != value[key]])
    path.write_text(json.dumps(value, sort_keys=True, indent=1) + "\n")


def add_a_blank(path, draw):
    path = path.with_name(draw.choice(["state.json", "MANIFEST.json"]))
    path.write_bytes(path.read_bytes() + b"\n")


def rename_the_directory(path, draw):
    name = path.parent.name
    path.parent.rename(path.parent.with_name(name.replace("u0000", "u0001")))


DAMAGE = (
    flip_a_bit,
    flip_a_bit,
    truncate,
    zero_the_tail,
    lengthen,
    remove,
    swap_with_the_older_one,
    replace_by_a_link,
    replace_by_a_directory,
    replace_by_a_pipe,
    edit_the_json,
    add_a_blank,
    rename_the_directory,
)


@pytest.fixture
def base(scratch):
    """A run with three checkpoints."""
    commit(make_manager(scratch / "base", keep_last=3), 1, 2, 3)
    return scratch / "base"


def test_every_damage_to_the_newest_checkpoint_is_found_and_the_older_one_loads(base, scratch, record_property):
    """All of them, with one extra load at most, one entry in quarantine, and nothing deleted."""
    draw = random.Random(11)
    for number in range(DAMAGES):
        damage = DAMAGE[number % len(DAMAGE)]
        directory, events = scratch / "run", []
        shutil.copytree(base, directory)
        name = FILES[number // len(DAMAGE) % len(FILES)]
        damage(directory / "checkpoints" / live_names(directory)[-1] / name, draw)
        loaded = make_manager(directory, events=events).load_newest()
        assert is_exactly(loaded, 2), f"{damage.__name__} of {name} passed"
        assert [kind for kind, _ in events] == ["quarantine", "fallback"]
        quarantined = list((directory / "checkpoints" / "quarantine").iterdir())
        assert len(quarantined) == 1 and len(live_names(directory)) == 2
        assert quarantined[0].name.endswith("." + events[0][1]["reason"])
        shutil.rmtree(directory)
    record_property("trials", DAMAGES)


def test_a_flipped_bit_anywhere_in_a_checkpoint_is_found(base, scratch):
    """Every byte of every file of a small checkpoint, one bit each."""
    newest = base / "checkpoints" / live_names(base)[-1]
    for name in FILES:
        data = (newest / name).read_bytes()
        for position in range(len(data)):
            changed = bytearray(data)
            changed[position] ^= 1 << position % 8
            (newest / name).write_bytes(changed)
            with pytest.raises(NoValidCheckpoint):
                load_checkpoint(newest)
        (newest / name).write_bytes(data)
    assert is_exactly(load_checkpoint(newest), 3)


def test_when_all_checkpoints_are_damaged_the_run_refuses_to_start_and_deletes_nothing(base):
    """Exit 66, now and at every later start; never a silent fresh start."""
    for name in live_names(base):
        flip_a_bit(base / "checkpoints" / name / "model.safetensors", random.Random(1))
    for _ in range(2):
        with pytest.raises(NoValidCheckpoint) as caught:
            make_manager(base).load_newest()
        assert caught.value.exit_code == 66
    assert len(list(base.rglob("model.safetensors"))) == 3


def test_a_run_whose_checkpoints_were_removed_by_hand_does_not_start_from_scratch(base):
    """The pointer remembers that there was something."""
    shutil.rmtree(base / "checkpoints")
    with pytest.raises(NoValidCheckpoint):
        make_manager(base).load_newest()


def test_a_run_that_never_committed_starts_fresh(scratch):
    """An empty directory, and one with a dead half-written save only."""
    assert make_manager(scratch).load_newest() is None
    (scratch / "checkpoints" / ".tmp-0001-1-dead").mkdir(parents=True)
    manager = make_manager(scratch)
    manager.sweep()
    assert manager.load_newest() is None
    assert list((scratch / "checkpoints").iterdir()) == []


def test_a_checkpoint_of_another_run_is_refused_but_may_be_forked_from(base, scratch):
    """Copied into this run it goes into quarantine; named by path it loads."""
    other = make_manager(scratch / "other")
    other._run_id = "another"
    commit(other, 1, 2, 3, 4, 5)
    name = live_names(scratch / "other")[-1]
    shutil.copytree(scratch / "other" / "checkpoints" / name, base / "checkpoints" / name)
    events = []
    assert is_exactly(make_manager(base, events=events).load_newest(), 3)
    assert events[0][1]["reason"] == "run"
    assert is_exactly(load_checkpoint(scratch / "other" / "checkpoints" / name), 5)


def test_a_whole_checkpoint_of_another_format_is_refused_without_being_moved(base, monkeypatch):
    """An older program must not condemn what a newer one wrote."""
    monkeypatch.setattr("resilient_t5.checkpoint.manifest.FORMAT", 2)
    make_manager(base)  # a newer version of this program writes
    manager = make_manager(base)
    with pytest.raises(ResumeMismatch) as caught:
        manager.load_newest()
    assert caught.value.exit_code == 78
    assert len(live_names(base)) == 3


@pytest.mark.parametrize("name", ["../../etc", "u00000003-0003/..", "u3-3", "u00000003-0003x", "u٠٠٠٠٠٠٠١-0001", ""])
def test_a_name_that_no_save_gave_is_refused(base, name):
    """No path leads out of the checkpoints, and no second spelling leads in."""
    with pytest.raises(NoValidCheckpoint):
        make_manager(base).load(name)


def test_a_link_in_the_place_of_a_checkpoint_is_not_followed(base, scratch):
    """It goes into quarantine as a link; what it points to stays."""
    newest = base / "checkpoints" / live_names(base)[-1]
    shutil.move(newest, scratch / "moved")
    newest.symlink_to(scratch / "moved")
    assert is_exactly(make_manager(base).load_newest(), 2)
    assert (scratch / "moved" / "MANIFEST.json").exists()


def test_pointers_are_hints_whatever_they_say(base):
    """Wrong, torn, foreign or huge pointers change neither what loads nor the next name."""
    for text in (b"", b"{", b"[]", b'{"name": "../x"}', b'{"name": "u00000001-0001"}', b"\xff" * 10, b" " * 100_000):
        for pointer in ("last.json", "best.json"):
            (base / pointer).write_bytes(text)
        manager = make_manager(base, keep_last=3)
        assert is_exactly(manager.load_newest(), 3)
        assert manager._next_commit_number() == 4


def test_the_best_that_is_damaged_is_replaced_by_the_next_best_that_exists(scratch):
    """Both the export and the following saves see the next best."""
    manager = make_manager(scratch, keep_last=4)
    for update, best in ((1, True), (2, False), (3, True), (4, False)):
        manager.save(make_parts(update, metric=1 / update), best=best)
    assert is_exactly(manager.load_best(), 3)
    flip_a_bit(scratch / "checkpoints" / "u00000003-0003" / "model.safetensors", random.Random(2))
    events = []
    manager._audit = lambda *event: events.append(event)
    assert is_exactly(manager.load_best(), 1)
    assert [kind for kind, _ in events] == ["quarantine", "best_lost"]
    manager.save(make_parts(5), best=False)
    assert manager.committed()[0].manifest.best_commit == 1
    assert '"update": 1' in (scratch / "best.json").read_text()


def test_a_start_puts_every_visibly_damaged_checkpoint_into_quarantine(base):
    """Retention ignores a damaged checkpoint, so without quarantine it would never be removed."""
    remove(base / "checkpoints" / live_names(base)[0] / "state.json", None)
    events = []
    assert is_exactly(make_manager(base, keep_last=3, events=events).load_newest(), 3)
    assert [kind for kind, _ in events] == ["quarantine"]
    assert len(live_names(base)) == 2


def test_a_trailing_file_that_nobody_listed_is_ignored(base):
    """A file manager's remains are no damage."""
    (base / "checkpoints" / live_names(base)[-1] / ".DS_Store").write_bytes(b"x")
    assert is_exactly(make_manager(base).load_newest(), 3)
