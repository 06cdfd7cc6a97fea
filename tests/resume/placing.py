"""A real signal at an exact place of a real run, or a value that is not finite in it; called in the child by the fork server.

Each function wraps one function of the program so that something happens just before or in the n-th call of it. Nothing is
replaced: the call itself is then made as ever.
"""

import functools
import json
import os
import signal
import threading
import time
from pathlib import Path


def signal_at(place, number, call=1, stamp=None, times=1):
    """Send signal `number` to this process just before call number `call` of `place`, and note when.

    Args:
        place: a key of PLACES.
        number: of the signal.
        call: counted from 1; with `place` "save" from the first byte of a checkpoint's file on.
        stamp: file that gets the moment on the monotonic clock, in seconds.
        times: how many of them, 20 ms apart.
    """
    counter = iter(range(1, 1 << 60))

    def strike(*arguments, **keywords):
        if next(counter) != call:
            return
        if stamp is not None:
            Path(stamp).write_text(json.dumps(time.monotonic()))
        for _ in range(times):
            os.kill(os.getpid(), number)
            if times > 1:  # two signals of one kind that come together are one
                time.sleep(0.02)
        if number == signal.SIGKILL:
            time.sleep(10)

    owner, name = PLACES[place]()
    before(owner, name, strike)


def forget_setting(key):
    """This process writes down its settings as a version did that had no setting `key` yet."""
    from resilient_t5.training import run_directory, saver

    for module in (run_directory, saver):
        settings = module.trajectory_settings
        module.trajectory_settings = lambda config, settings=settings: {k: v for k, v in settings(config).items() if k != key}


def before(owner, name, action):
    """Let `action` see the arguments of every call of `owner.name` first."""
    inner = getattr(owner, name)

    @functools.wraps(inner)
    def outer(*arguments, **keywords):
        action(*arguments, **keywords)
        return inner(*arguments, **keywords)

    setattr(owner, name, outer)


def _preparing():
    from resilient_t5.data.store import build

    return build, "documents_of"


def _starting():
    from resilient_t5.training import build

    return build, "build_optimizer"


def _micro_batch():
    from resilient_t5.training.update import Updater

    return Updater, "accumulate"


def _evaluation():
    from resilient_t5.training import evaluator

    return evaluator, "token_nll"


def _generation():
    from resilient_t5.restoration.decoder import TokenDecoder

    return TokenDecoder, "logits"


def _save():
    from resilient_t5.files import FileSystem

    return FileSystem, "write"


def _commit():
    from resilient_t5.files import FileSystem

    return FileSystem, "rename"


def _disk_wait():
    fill_disk_from(2)
    from resilient_t5.files import FileSystem

    return FileSystem, "free_bytes"


def _export():
    from resilient_t5.training.entrypoints import finish

    return finish, "write_export"


def _rows():
    from resilient_t5.training.hardware.process_group import ProcessGroup

    return ProcessGroup, "all_gather"


PLACES = {
    "rows": _rows,
    "preparing": _preparing,
    "starting": _starting,
    "micro-batch": _micro_batch,
    "evaluation": _evaluation,
    "generation": _generation,
    "save": _save,
    "commit": _commit,
    "disk wait": _disk_wait,
    "export": _export,
}


def fill_disk_from(call, free_again_after=None):
    """From question number `call` on there is no room on the disk, for `free_again_after` questions or for good."""
    from resilient_t5.files import FileSystem

    inner, asked, lock = FileSystem.free_bytes, [0], threading.Lock()

    def free_bytes(self, path):
        with lock:
            asked[0] += 1
        over = free_again_after is not None and asked[0] >= call + free_again_after
        return inner(self, path) if asked[0] < call or over else 0

    FileSystem.free_bytes = free_bytes


def ignore_hangup():
    """What nohup does."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def hang_at_write(call):
    """Write number `call` of a checkpoint never comes back."""
    from resilient_t5.files import FileSystem

    counter = iter(range(1, 1 << 60))
    before(FileSystem, "write", lambda *_: time.sleep(3600) if next(counter) == call else None)


def lose_device(call):
    """Micro-batch number `call` finds that the device is gone."""
    import torch

    from resilient_t5.training.update import Updater

    counter = iter(range(1, 1 << 60))

    def fail(*arguments):
        if next(counter) == call:
            raise torch.AcceleratorError("CUDA error: unspecified launch failure\nmore of it")

    before(Updater, "accumulate", fail)


def sleep_machine(call, device):
    """At look number `call` the clock says that the machine slept for an hour; the run takes its device for `device`."""
    import torch

    from resilient_t5.training import recovery

    inner, counter = recovery.slept_s, iter(range(1, 1 << 60))
    recovery.slept_s = lambda: inner() + (3600.0 if next(counter) >= call else 0.0)
    check = recovery.SuspendDetector.check
    recovery.SuspendDetector.check = lambda self, update, own, log: check(self, update, torch.device(device), log)


def kill_after_rollback():
    """SIGKILL as soon as a rollback is committed."""
    from resilient_t5.checkpoint.manager import CheckpointManager

    inner = CheckpointManager.save

    def save(self, parts, *, best):
        committed = inner(self, parts, best=best)
        if parts.reason == "rollback":
            os.kill(os.getpid(), signal.SIGKILL)
        return committed

    CheckpointManager.save = save


def spoil(place, update=6, value="nan", updates=1):
    """Put a value that is not finite into a real run, once (or in `updates` attempts one after the other).

    Args:
        place: loss, gradient, parameter, optimizer, metric, ignored (all labels -100) or range (an id that no row has).
        update: the attempted update, from 0, in which it happens; for `metric` the evaluation, from 1.
        value: nan, inf or -inf.
        updates: attempts that are spoilt; the same ones are spoilt again after a resume or a rollback.
    """
    number, attempts = float(value), range(update, update + updates)
    SPOILERS[place](attempts, number)


def _spoil_loss(attempts, number):
    from resilient_t5.training import update as module

    inner = module.forward_loss
    current = _current_attempt()

    def forward_loss(*arguments, **keywords):
        parts = inner(*arguments, **keywords)
        if current[0] not in attempts:
            return parts
        return type(parts)(parts.loss * number, parts.nll_sum * number)

    module.forward_loss = forward_loss


def _spoil_gradient(attempts, number):
    from resilient_t5.training.update import Updater

    inner = Updater.accumulate

    def accumulate(self, micro_batch, tokens, attempted, index):
        nll_sum = inner(self, micro_batch, tokens, attempted, index)
        if attempted in attempts:
            parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
            parameters[attempted % len(parameters)].grad.reshape(-1)[0] = number
        return nll_sum

    Updater.accumulate = accumulate


def _spoil_once(attempts, action):
    """Call `action(updater)` before the first of `attempts`, once in this process: a flipped bit does not come back."""
    from resilient_t5.training.update import Updater

    inner, done = Updater.__call__, [False]

    def call(self, micro_batches, attempted, lr, interrupted):
        if attempted in attempts and not done[0]:
            done[0] = True
            action(self)
        return inner(self, micro_batches, attempted, lr, interrupted)

    Updater.__call__ = call


def _spoil_parameter(attempts, number):
    def action(updater):
        parameters = list(updater.model.parameters())
        parameters[attempts[0] % len(parameters)].data.reshape(-1)[-1] = number

    _spoil_once(attempts, action)


def _spoil_optimizer(attempts, number):
    def action(updater):
        states = [state for state in updater.optimizer.state.values() if state]
        tensors = [tensor for tensor in states[attempts[0] % len(states)].values() if tensor.ndim > 0]
        tensors[0].reshape(-1)[-1] = number

    _spoil_once(attempts, action)


def _spoil_metric(attempts, number):
    from resilient_t5.training import run_evaluation

    inner, counter = run_evaluation.evaluate, iter(range(1, 1 << 60))

    def evaluate(*arguments):
        found = inner(*arguments)
        return found if next(counter) not in attempts else type(found)(**{**vars(found), "loss": number})

    run_evaluation.evaluate = evaluate


def _spoil_batch(attempts, change):
    from dataclasses import replace

    from resilient_t5.data.batches import Batches

    inner = Batches.at

    def at(self, update):
        micro_batches = inner(self, update)
        return [replace(batch, **change(batch)) for batch in micro_batches] if update in attempts else micro_batches

    Batches.at = at


def _spoil_ignored(attempts, number):
    _spoil_batch(attempts, lambda batch: {"labels_BT": batch.labels_BT * 0 - 100, "target_tokens": 0})


def _spoil_range(attempts, number):
    from resilient_t5.data.batches import IGNORED, _id_range

    def change(batch):
        source_BS = batch.source_BS + (1 << 20) * (batch.source_BS == batch.source_BS.max())
        targets = batch.labels_BT[batch.labels_BT != IGNORED]
        # A micro-batch carries the range of its ids, which is computed when its tensors are made.
        return {"source_BS": source_BS, "id_range": _id_range(source_BS.numpy(), targets.numpy())}

    _spoil_batch(attempts, change)


def _current_attempt():
    from resilient_t5.training.update import Updater

    current, inner = [-1], Updater.accumulate

    def accumulate(self, micro_batch, tokens, attempted, index):
        current[0] = attempted
        return inner(self, micro_batch, tokens, attempted, index)

    Updater.accumulate = accumulate
    return current


def short_memory():
    """Let the guard call something a spike after three updates, so that a run of a few seconds can see one."""
    from dataclasses import replace

    from resilient_t5.training import spike_guard

    inner = spike_guard.Limits
    spike_guard.Limits = lambda: replace(inner(), spike_window_fewest=3)


def _spike_gradient(attempts, number):
    from resilient_t5.training.update import Updater

    inner = Updater.accumulate

    def accumulate(self, micro_batch, tokens, attempted, index):
        nll_sum = inner(self, micro_batch, tokens, attempted, index)
        if attempted in attempts:
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(number)
        return nll_sum

    Updater.accumulate = accumulate


SPOILERS = {
    "spike": _spike_gradient,
    "loss": _spoil_loss,
    "gradient": _spoil_gradient,
    "parameter": _spoil_parameter,
    "optimizer": _spoil_optimizer,
    "metric": _spoil_metric,
    "ignored": _spoil_ignored,
    "range": _spoil_range,
}
