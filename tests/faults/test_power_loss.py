"""Power loss after every call of a save, in every state that two models of a file system allow; and broken protocols.

The protocol must survive all states. Each mutant leaves out one thing that the protocol does, and must be caught: this is
the proof that the states are harsh enough for the first half to mean something.

python -m pytest tests/faults/test_power_loss.py
"""

import json
import shutil

import pytest

from resilient_t5.checkpoint import manager, manifest
from resilient_t5.checkpoint.manager import CheckpointManager, CorruptCheckpoint, NoValidCheckpoint
from resilient_t5.checkpoint.reader import read_directory
from resilient_t5.files import FileSystem, remove_tree, replace_file
from tests.checkpoint.harness import RUN_ID, commit, is_exactly, leftovers, live_names, make_manager, make_parts
from tests.faults.power_loss import Recorder, materialise, states

pytestmark = pytest.mark.slow

MODELS = ("journal", "weak")
KEEP_LAST = 2


def save_once(saving):
    """One save, with a new best and a victim of retention."""
    saving.save(make_parts(9, metric=0.5), best=True)


def save_twice(saving):
    """Two saves after another: what the first left pending is still pending in the second."""
    saving.save(make_parts(9, metric=0.5), best=True)
    saving.save(make_parts(10), best=False)


def start_and_save(saving):
    """The calls of a start that finds the newest checkpoint damaged, and of the save after it."""
    saving.sweep()
    saving.load_newest()
    saving.save(make_parts(9, metric=0.5), best=True)


def recorded(base, work, kind=CheckpointManager, kind_of_fs=FileSystem, action=save_once):
    """The calls of `action` on a copy of `base`, with the moments of acknowledgement among them."""
    shutil.copytree(base, work)
    recorder = Recorder(work)
    recording = make_manager(work, fs=kind_of_fs(recorder), keep_last=KEEP_LAST, kind=kind)
    if action is not start_and_save:
        recording.load_newest()
    recorder.calls.clear()
    recording._audit = lambda event, fields: recorder.acknowledge(fields["q"]) if event == "save" else None
    action(recording)
    return recorder.calls


def violations(directory, acknowledged):
    """What is wrong with a state, as a list of words; a start must be able to live with every state."""
    found, whole = [], 0
    for name in live_names(directory):
        try:
            read_directory(FileSystem(), directory / "checkpoints" / name, RUN_ID)
            whole += 1
        except CorruptCheckpoint as damage:
            found.append(f"part of {name}: {damage}")
    if whole < min(KEEP_LAST, acknowledged):
        found.append(f"only {whole} whole checkpoints")
    for pointer in ("last.json", "best.json"):
        if (directory / pointer).exists():
            found += pointer_violations(directory, pointer)
    try:
        starting = make_manager(directory, keep_last=KEEP_LAST)
        starting.sweep()
        loaded = starting.load_newest()
    except NoValidCheckpoint as error:
        return [*found, str(error)]
    if (loaded.commit_number if loaded else 0) < acknowledged:
        found.append("an acknowledged save is lost")
    if loaded and not is_exactly(loaded, loaded.update):
        found.append("silently wrong")
    return found + [f"left over: {path}" for path in leftovers(directory)]


def pointer_violations(directory, pointer):
    try:
        name = json.loads((directory / pointer).read_text())["name"]
    except (ValueError, KeyError, TypeError):
        return [f"torn {pointer}"]
    return [] if (directory / "checkpoints" / name).is_dir() else [f"{pointer} names what is not there"]


def count_bad(base, calls, model, scratch, *, saved, stop_at=None):
    """(states, bad ones, the first complaint); ends at the first complaint that holds the words `stop_at`.

    `saved` is the commit number acknowledged before the first call.
    """
    total, bad, complaint = 0, 0, ""
    for acknowledged, tree in states(base, calls, model, saved):
        directory = scratch / "state"
        directory.mkdir()
        materialise(tree, directory)
        found = violations(directory, acknowledged)
        shutil.rmtree(directory)
        total += 1
        bad, complaint = bad + bool(found), complaint or "".join(found[:1])
        caught = [words for words in found if stop_at is not None and stop_at in words]
        if caught:
            return total, bad, caught[0]
    return total, bad, complaint


@pytest.fixture
def three_saved(scratch):
    """A run with three commits, of which retention kept the last two."""
    base = scratch / "base"
    base.mkdir()
    commit(make_manager(base, keep_last=KEEP_LAST), 1, 2, 3)
    return base


@pytest.mark.parametrize(("model", "fewest"), [("journal", 100), ("weak", 300)])
def test_no_power_loss_during_two_saves_loses_or_mixes_anything(three_saved, scratch, model, fewest, record_property):
    """In every state: the acknowledged checkpoint loads exactly, live names are whole, and the pointers hold."""
    calls = recorded(three_saved, scratch / "work", action=save_twice)
    total, bad, complaint = count_bad(three_saved, calls, model, scratch, saved=3)
    assert bad == 0, complaint
    assert total > fewest
    record_property("trials", total)


@pytest.mark.parametrize("model", MODELS)
def test_no_power_loss_during_a_start_with_quarantine_loses_anything(three_saved, scratch, model, record_property):
    """The damaged newest checkpoint is in the way or in quarantine; the older one and then the new one load."""
    newest = three_saved / "checkpoints" / live_names(three_saved)[-1] / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"?")
    calls = recorded(three_saved, scratch / "work", action=start_and_save)
    bad, total = [], 0
    for acknowledged, tree in states(three_saved, calls, model, acknowledged=2):
        directory = scratch / "state"
        directory.mkdir()
        materialise(tree, directory)
        events = []
        loaded = make_manager(directory, events=events).load_newest()
        total += 1
        if loaded.commit_number < acknowledged or loaded.commit_number == 3 or not is_exactly(loaded, loaded.update):
            bad.append(acknowledged)
        shutil.rmtree(directory)
    assert bad == []
    assert total > 60
    record_property("trials", total)


@pytest.mark.parametrize("model", MODELS)
def test_no_power_loss_during_the_first_save_prevents_a_start(scratch, model, record_property):
    """Before the acknowledgement there may be nothing; after it there is the first checkpoint."""
    base = scratch / "base"
    base.mkdir()
    total, bad, complaint = count_bad(base, recorded(base, scratch / "work"), model, scratch, saved=0)
    assert bad == 0, complaint
    assert total > 50
    record_property("trials", total)


class WithoutFsync(FileSystem):
    """Leaves out the fsync of files whose name ends in `of`."""

    of: tuple[str, ...] = ()

    def fsync(self, file):
        if not file.path.name.endswith(self.of):
            super().fsync(file)


class WithoutDirectoryFsync(FileSystem):
    """Leaves out the fsync of a directory at one place of the protocol; every fsync of a directory has a number."""

    def __init__(self, hook=None):
        super().__init__(hook)
        self.last_rename = None

    def rename(self, source, target):
        super().rename(source, target)
        self.last_rename = target.name

    def is_left_out(self, path):
        raise NotImplementedError

    def fsync_directory(self, path):
        if not self.is_left_out(path):
            super().fsync_directory(path)


def no_payload_fsync(monkeypatch):
    return CheckpointManager, type("Mutant", (WithoutFsync,), {"of": (".safetensors", "state.json")})


def no_payload_fsync_and_no_checksum(monkeypatch):
    monkeypatch.setattr(manifest.HashedReader, "verify", lambda self: None)
    return no_payload_fsync(monkeypatch)


def no_manifest_fsync(monkeypatch):
    return CheckpointManager, type("Mutant", (WithoutFsync,), {"of": ("MANIFEST.json",)})


def no_pointer_fsync(monkeypatch):
    return CheckpointManager, type(
        "Mutant", (FileSystem,), {"fsync": lambda s, f: None if "last.json" in f.path.name else FileSystem.fsync(s, f)}
    )


def no_fsync_of_the_temporary_directory(monkeypatch):
    return CheckpointManager, type(
        "Mutant", (WithoutDirectoryFsync,), {"is_left_out": lambda s, path: path.name.startswith(".tmp-")}
    )


def no_fsync_of_the_parent_after_the_rename(monkeypatch):
    def is_left_out(self, path):
        return path.name == "checkpoints" and str(self.last_rename).startswith("u")

    return CheckpointManager, type("Mutant", (WithoutDirectoryFsync,), {"is_left_out": is_left_out})


def no_fsync_between_trash_and_removal(monkeypatch):
    def is_left_out(self, path):
        return path.name == "checkpoints" and str(self.last_rename).startswith(".trash-")

    return CheckpointManager, type("Mutant", (WithoutDirectoryFsync,), {"is_left_out": is_left_out})


def delete_without_renaming_first(monkeypatch):
    def delete(fs, parent, names, emit):
        for name in names:
            remove_tree(fs, parent / name)

    monkeypatch.setattr(manager, "delete", delete)
    return CheckpointManager, FileSystem


def write_under_the_final_name(monkeypatch):
    written = manifest.write_checkpoint

    def write_checkpoint(fs, directory, draft, layouts, state):
        return written(fs, directory.parent / draft.name, draft, layouts, state)

    class Mutant(FileSystem):
        def rename(self, source, target):
            if not source.name.startswith(".tmp-"):
                super().rename(source, target)

    monkeypatch.setattr(manager, "write_checkpoint", write_checkpoint)
    return CheckpointManager, Mutant


def delete_before_the_commit(monkeypatch):
    class Mutant(CheckpointManager):
        def _commit(self, parts, is_best):
            oldest = [item.name for item in self._scan()][KEEP_LAST - 1 :]
            manager.delete(self._fs, self.directory, oldest, self.emit)
            return super()._commit(parts, is_best)

    return Mutant, FileSystem


def move_the_pointer_before_the_commit(monkeypatch):
    class Mutant(CheckpointManager):
        def _draft(self, parts, is_best, shared):
            draft = super()._draft(parts, is_best, shared)
            data = json.dumps({"name": draft.name, "q": draft.commit_number}).encode()
            replace_file(self._fs, self.run_directory / "last.json", data)
            return draft

    return Mutant, FileSystem


MUTANTS = {
    no_payload_fsync: "lost",
    no_payload_fsync_and_no_checksum: "silently wrong",
    no_manifest_fsync: "lost",
    no_pointer_fsync: "torn last.json",
    no_fsync_of_the_temporary_directory: "lost",
    no_fsync_of_the_parent_after_the_rename: "lost",
    no_fsync_between_trash_and_removal: "part of",
    delete_without_renaming_first: "part of",
    write_under_the_final_name: "part of",
    delete_before_the_commit: "only 1 whole",
    move_the_pointer_before_the_commit: "names what is not there",
}


@pytest.mark.parametrize(("mutant", "words"), MUTANTS.items(), ids=lambda item: getattr(item, "__name__", ""))
def test_a_protocol_that_leaves_one_thing_out_is_caught(three_saved, scratch, monkeypatch, mutant, words, record_property):
    """At least one state of each mutant does the damage that the left-out thing prevents."""
    kind, kind_of_fs = mutant(monkeypatch)
    calls = recorded(three_saved, scratch / "work", kind, kind_of_fs)
    total, _, complaint = count_bad(three_saved, calls, "weak", scratch, saved=3, stop_at=words)
    assert words in complaint, f"{mutant.__name__}: {total} states, {complaint}"
    record_property("mutants_caught", 1)


def test_a_first_save_without_fsync_of_the_run_directory_is_caught(scratch, record_property):
    """The directory `checkpoints` itself must be durable before the first acknowledgement."""
    base = scratch / "base"
    base.mkdir()

    class Mutant(WithoutDirectoryFsync):
        def is_left_out(self, path):
            return path.name == "work" and self.last_rename is None

    calls = recorded(base, scratch / "work", kind_of_fs=Mutant)
    assert any(call[0] == "make_directory" for call in calls)
    assert "lost" in count_bad(base, calls, "weak", scratch, saved=0, stop_at="lost")[2]
    record_property("mutants_caught", 1)


def test_without_any_fsync_even_an_ordered_journal_loses_an_acknowledged_save(three_saved, scratch, record_property):
    """The stronger of the two models can fail as well."""
    mutant = type("Mutant", (FileSystem,), {"fsync": lambda s, f: None, "fsync_directory": lambda s, p: None})
    calls = recorded(three_saved, scratch / "work", kind_of_fs=mutant)
    assert "lost" in count_bad(three_saved, calls, "journal", scratch, saved=3, stop_at="lost")[2]
    record_property("mutants_caught", 1)
