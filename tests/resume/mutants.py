"""Take one item of the state away at a time: the comparison of two runs must notice. It proves the comparison, not the run.

python -m tests.resume.mutants
"""

import shutil
import signal
import sys
import time

from tests.resume.harness import Arena, differences, main, whole_rows

STORM = [
    ("tests.resume.placing:short_memory", {}),
    ("tests.resume.placing:spoil", {"place": "loss", "update": 3}),
    ("tests.resume.placing:spoil", {"place": "spike", "update": 5, "updates": 3, "value": "1000"}),
]
"""One update is refused and one spikes before the interruption, so that the guard has something to remember."""
INTERRUPTED_CALLS = {signal.SIGTERM: 34, signal.SIGKILL: 43}
"""The micro-batch before which the signal comes: SIGTERM in the middle of an update between two logged rows, SIGKILL after
a logged row and before the save that would cover it."""


def attack_mutants(server, folder):
    """R9: resumed without one item of section 4 of the state list, a run is told from one that was left alone."""
    started_s, arena = time.monotonic(), Arena(server, folder)
    reference = arena.finish("reference", before=STORM)
    halves = {number: interrupted(arena, number, "none") for number in (signal.SIGTERM, signal.SIGKILL)}
    detail = {name: resumed(arena, halves, reference, name) for name in ("none", *MUTANTS)}
    assert detail.pop("none") == [], "the run differs without a mutant"
    missed = [name for name, found in detail.items() if not found]
    figures = {
        "attack": "R9",
        "mutants": len(MUTANTS),
        "caught": len(MUTANTS) - len(missed),
        "missed": missed,
        "detail": detail,
        "seconds": round(time.monotonic() - started_s, 1),
    }
    return figures, max(0, len(missed) - 1)


def interrupted(arena, number, mutant, more=()):
    """A run that got one signal in the middle of an update, and is not resumed yet."""
    name = f"half-{int(number)}-{mutant}".replace(" ", "-")
    strike = (
        "tests.resume.placing:signal_at",
        {"place": "micro-batch", "number": int(number), "call": INTERRUPTED_CALLS[number]},
    )
    status = arena.server.run(arena.argv(name), arena.console(name), [*more, *STORM, strike])
    assert status == -number, f"exit {status}: {arena.console(name).read_text()[-1500:]}"
    return arena.folder / name


def resumed(arena, halves, reference, name):
    """What tells the run that was resumed with the mutant `name` from the reference."""
    options, number, both = SPECIAL.get(name, ((), signal.SIGTERM, False))
    mutant = [] if name == "none" else [("tests.resume.mutants:install", {"name": name})]
    if both:  # the mutant belongs into the process that saves, too
        half = interrupted(arena, number, name, mutant)
        whole = arena.finish(f"whole-{name}", before=[*STORM, *mutant]) if name in OWN_REFERENCE else reference
    else:
        half, whole = halves[number], reference
    run = arena.folder / f"mutant-{name}".replace(" ", "-")
    shutil.copytree(half, run)
    resuming = [("tests.resume.mutants:install", {"name": OTHER_HALF[name]})] if name in OTHER_HALF else mutant
    status = arena.server.run(arena.argv(run.name, *options), arena.console(run.name), [*STORM, *resuming])
    if status != 0:
        return [f"exit {status}"]
    if name in IN_CONDITIONS:
        reported = [row["changed_conditions"] for row in whole_rows(run) if row["kind"] == "start"][-1]
        return [] if any(IN_CONDITIONS[name] in line for line in reported) else [f"{IN_CONDITIONS[name]} is not reported"]
    found = differences(run, whole)
    shutil.rmtree(run)
    return found


def install(name):
    """Called in the child: take the item `name` away."""
    (MUTANTS | HELPERS)[name]()


def _after_restore(change):
    """Let `change(saver, state)` spoil what `Saver.restore` gave back."""
    from resilient_t5.training.saver import Saver

    inner = Saver.restore

    def restore(self, loaded):
        inner(self, loaded)
        change(self, self.state)

    Saver.restore = restore


def _parameters():
    from resilient_t5.training import saver

    inner = saver.load_model_tensors

    def put(model, tensors):
        own = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        first = next(iter(own.keys() & tensors.keys() - {"shared.weight"}))
        inner(model, {**tensors, first: own[first]})

    saver.load_model_tensors = put


def _optimizer():
    from resilient_t5.training import saver

    inner = saver.load_named_state

    def load(optimizer, model, tensors, description):
        first = next(iter(tensors)).rpartition("/")[0]
        inner(optimizer, model, {n: t for n, t in tensors.items() if not n.startswith(first + "/")}, description)

    saver.load_named_state = load


def _learning_rate():
    _after_restore(lambda saver, state: setattr(saver.guard.memory, "backoff_until", 0))


def _scaler_on_cpu():
    """A loss scaler where none is needed, so that its state can be missed on a CPU."""
    import torch

    from resilient_t5.training import build

    inner = build.build_device

    def build_device(config):
        device, precision, accelerator = inner(config)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=5)
        return device, precision, accelerator

    build.build_device = build_device


def _scaler():
    _scaler_on_cpu()

    def forget(saver, state):
        import torch

        saver.updater.accelerator.scaler.load_state_dict(
            torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=5).state_dict()
        )

    _after_restore(forget)


def _counters():
    _after_restore(lambda saver, state: setattr(state, "target_tokens", 0))


def _cursor():
    _after_restore(lambda saver, state: setattr(state, "attempted", state.update))


def _corruption():
    from resilient_t5.data.batches import Batches

    inner = Batches._corrupt
    Batches._corrupt = lambda self, example_ids, epochs: inner(self, example_ids, epochs * 0)


def _dropout():
    from resilient_t5.training import update

    inner = update.seed_dropout
    update.seed_dropout = lambda seed, attempted, index: inner(seed, 0, index)


def _random_states():
    from resilient_t5.checkpoint import rng

    rng.restore = lambda tensors, rest: []


def _remainder():
    """Half an update moves the weights before the save."""
    from resilient_t5.training.update import Updater

    inner = Updater.__call__

    def call(self, micro_batches, attempted, lr, interrupted):
        def moved():
            if interrupted():
                self.optimizer.step()
                return True
            return False

        return inner(self, micro_batches, attempted, lr, moved)

    Updater.__call__ = call


def _convergence():
    from resilient_t5.training.convergence.machine import ConvergenceMachine

    ConvergenceMachine.restore = lambda self, values: None


def _running_sums():
    from resilient_t5.training.state import SinceLog

    _after_restore(lambda saver, state: setattr(state, "since_log", SinceLog()))


def _log_rows():
    from resilient_t5.training.telemetry import metrics_log

    metrics_log.drop_rows_beyond = lambda path, update, evaluated_update: None


def _guard_history():
    from resilient_t5.training.spike_guard import SpikeGuard

    SpikeGuard.restore = lambda self, values: None


def _without(part):
    from resilient_t5.training import build

    inner = build.numeric_conditions
    build.numeric_conditions = lambda device: {name: value for name, value in inner(device).items() if part not in name}


def _flags():
    _without("threads")


def _versions():
    _without("version of")


def _other_torch_unseen():
    _other_torch()
    _versions()


def _other_torch():
    """A process of another version of torch."""
    from resilient_t5.training import build

    inner = build.numeric_conditions
    build.numeric_conditions = lambda device: {**inner(device), "version of torch": "0.0.0"}


MUTANTS = {
    "parameters": _parameters,
    "optimizer": _optimizer,
    "learning rate": _learning_rate,
    "scaler": _scaler,
    "counters": _counters,
    "cursor": _cursor,
    "corruption": _corruption,
    "dropout": _dropout,
    "random states": _random_states,
    "remainder": _remainder,
    "convergence": _convergence,
    "running sums": _running_sums,
    "log rows": _log_rows,
    "guard history": _guard_history,
    "flags": _flags,
    "versions": _versions,
}
HELPERS = {"scaler on cpu": _scaler_on_cpu, "other torch unseen": _other_torch_unseen}
SPECIAL = {
    "scaler": ((), signal.SIGTERM, True),
    "remainder": ((), signal.SIGTERM, True),
    "log rows": ((), signal.SIGKILL, False),
    "flags": (("--hardware.threads", "2"), signal.SIGTERM, True),
    "versions": ((), signal.SIGTERM, True),
}
"""Options of the resumed run, the signal of the interruption, and whether the mutant belongs into both processes."""
OWN_REFERENCE = ("scaler",)
OTHER_HALF = {"versions": "other torch unseen"}
IN_CONDITIONS = {"flags": "threads", "versions": "version of torch"}


if __name__ == "__main__":
    sys.exit(main(attack_mutants))
