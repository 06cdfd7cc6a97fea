"""Retention under random saves, metrics with NaN, crashes, damage, resumes and clock jumps.

Set RESILIENT_T5_EXAMPLES for more of it.

python -m pytest tests/checkpoint/test_retention.py
"""

import math
import os
import shutil
import tempfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resilient_t5.checkpoint.manager import NoValidCheckpoint
from resilient_t5.checkpoint.retention import max_kept
from resilient_t5.files import FileSystem
from tests.checkpoint.harness import CountingHook, leftovers, live_names, make_manager, make_parts, valid_updates

EXAMPLES = int(os.environ.get("RESILIENT_T5_EXAMPLES", "300"))
METRICS = st.sampled_from([0.5, 0.9, 1.0, 1.0, 2.0, math.nan, math.inf, None])
ACTIONS = st.one_of(
    st.tuples(st.just("save"), METRICS, st.booleans()),
    st.tuples(st.just("crash"), st.integers(0, 80), st.booleans()),
    st.tuples(st.just("resume"), st.booleans(), st.booleans()),
    st.tuples(st.just("roll back"), st.none(), st.none()),
    st.tuples(st.just("damage"), st.sampled_from(["newest", "best"]), st.none()),
    st.tuples(st.just("clock"), st.integers(-(10**8), 10**8), st.none()),
)


class Crash(BaseException):
    """The process dies here; no further code of the manager may run."""


class Run:
    """A run as the loop sees it, and what must be on disk according to a model of a few lines."""

    def __init__(self, directory, keep_last):
        self.directory, self.keep_last = directory, keep_last
        self.update, self.best, self.committed = 0, None, {}
        self.resumed_q, self.commits = None, 0
        self.fs = FileSystem()
        self.open()

    def open(self):
        self.manager = make_manager(self.directory, keep_last=self.keep_last, fs=self.fs)

    def save(self, metric, healthy, hook=None, reason="periodic"):
        self.update += reason != "rollback"
        improves = metric is not None and math.isfinite(metric) and (self.best is None or metric < self.best[1])
        parts = make_parts(self.update, metric=metric, health={"finite": healthy}, reason=reason)
        # A careless comparison in the loop may pass a NaN as the best: the manager must reject it.
        careless = improves or (metric is not None and math.isnan(metric))
        self.fs._hook = hook
        try:
            saved = self.manager.save(parts, best=careless)
        finally:
            self.fs._hook = None
        self.committed[saved.commit_number] = healthy
        self.commits += 1
        if improves:
            self.best = (saved.commit_number, metric)

    def crash(self, at, healthy):
        def dies():
            self.fs._hook = None
            raise Crash

        try:
            self.save(0.01, healthy, CountingHook(at, dies))
        except Crash:
            self.resume()

    def resume(self, rollback=False):
        if not rollback:
            self.open()
            self.manager.sweep()
            assert leftovers(self.directory) == []
        loaded = self.manager.load_newest(healthy=rollback)
        self.resumed_q, self.commits = (loaded.commit_number, 0) if loaded else (None, 0)
        self.update = loaded.update if loaded else 0
        if loaded:
            assert rollback or loaded.commit_number >= max([0, *self.committed])
            self.committed.setdefault(loaded.commit_number, loaded.manifest.health["finite"])
            best = {q: m for q, m in self.metrics().items() if q == loaded.manifest.best_commit}
            self.best = next(iter(best.items()), None)

    def metrics(self):
        return {item.commit_number: item.manifest.metric for item in self.manager.committed()}

    def whole(self):
        return valid_updates(self.directory)

    def check(self):
        whole = self.whole()
        lasting = sorted(self.committed, reverse=True)
        assert len(whole) >= min(self.keep_last, len(lasting)), "too few are left"
        assert not lasting or lasting[0] in whole, "the newest is gone"
        assert self.best is None or self.best[0] in whole, "the best is gone"
        healthy = [q for q in lasting if self.committed[q]]
        assert not healthy or healthy[0] in whole, "the newest healthy one is gone"
        assert self.commits >= 2 or self.resumed_q in {None, *whole}, "the one resumed from is gone"
        assert len(live_names(self.directory)) < max_kept(self.keep_last)

    def forget(self, q):
        """Damage took it: nothing may be asked of it any more."""
        if self.best is not None and self.best[0] == q:
            self.best = None
        # What retention deleted while `q` counted cannot come back.
        self.committed = {kept: healthy for kept, healthy in self.committed.items() if kept in self.whole()}


def damage(run, which):
    whole = run.whole()
    q = max(whole, default=None) if which == "newest" else run.best and run.best[0]
    if q is None or len(whole) < 2:
        return
    name = next(name for name in live_names(run.directory) if int(name.split("-")[1]) == q)
    (run.directory / "checkpoints" / name / "model.safetensors").write_bytes(b"rot")
    run.committed.pop(q)
    run.resume()
    run.manager.load_best()
    run.forget(q)


def act(run, action, value, flag):
    if action == "save":
        run.save(value, flag)
    elif action == "crash":
        run.crash(value, flag)
    elif action == "resume":
        run.resume()
    elif action == "roll back":
        if any(run.committed[q] for q in run.committed if q in run.whole()):
            run.resume(rollback=True)
            run.save(None, True, reason="rollback")
    elif action == "damage":
        damage(run, value)
    elif action == "clock":
        for path in run.directory.rglob("*"):
            os.utime(path, (10**9 + value, 10**9 + value))


@pytest.fixture
def tried(record_property):
    """One entry for every run that was tried; hypothesis decides how many those are."""
    runs = []
    yield runs
    record_property("trials", len(runs))
    record_property("actions", sum(runs))


@pytest.mark.slow
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(keep_last=st.integers(2, 4), actions=st.lists(ACTIONS, min_size=3, max_size=9))
def test_retention_keeps_what_it_promises_whatever_happens(tried, keep_last, actions):
    """Best on disk, enough whole ones, newest and newest healthy never deleted, the count bounded; after every action."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place) as directory:
        run = Run(type(make_manager(directory).directory)(directory), keep_last)
        for action in actions:
            act(run, *action)
            run.check()
    tried.append(len(actions))


def test_the_checkpoint_that_was_resumed_from_stays_until_two_newer_are_committed(scratch):
    """It is the only one that is known to load on this machine."""
    manager = make_manager(scratch, keep_last=2)
    for update in range(1, 4):
        manager.save(make_parts(update), best=False)
    manager = make_manager(scratch, keep_last=2)
    manager.load("u00000002-0002")
    manager.save(make_parts(4), best=False)
    assert 2 in valid_updates(scratch).values()
    manager.save(make_parts(5), best=False)
    assert sorted(valid_updates(scratch).values()) == [4, 5]


def test_an_unhealthy_series_does_not_push_the_last_healthy_checkpoint_out(scratch):
    """A rollback needs somewhere to go."""
    manager = make_manager(scratch, keep_last=2)
    manager.save(make_parts(1), best=False)
    for update in range(2, 8):
        manager.save(make_parts(update, health={"finite": True, "in_band": False}), best=False)
    assert sorted(valid_updates(scratch).values()) == [1, 6, 7]
    assert manager.load_newest(healthy=True).update == 1
    manager.save(make_parts(1, reason="rollback"), best=False)
    assert manager.load_newest().manifest.reason == "rollback"


def test_a_best_that_is_not_a_number_is_no_best(scratch):
    """NaN and infinity never replace a figure."""
    manager = make_manager(scratch, keep_last=2)
    manager.save(make_parts(1, metric=3.0), best=True)
    for update, metric in ((2, math.nan), (3, math.inf), (4, -math.inf), (5, math.nan)):
        manager.save(make_parts(update, metric=metric), best=True)
    assert manager.load_best().update == 1
    assert '"update": 1' in (scratch / "best.json").read_text()


def test_a_rollback_finds_no_healthy_checkpoint(scratch):
    """The caller learns it from an error, not from an unhealthy load."""
    manager = make_manager(scratch)
    manager.save(make_parts(1, health={"finite": False}), best=False)
    with pytest.raises(NoValidCheckpoint, match="healthy"):
        manager.load_newest(healthy=True)
    shutil.rmtree(scratch / "checkpoints")
