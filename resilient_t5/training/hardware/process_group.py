"""The processes that train one run together: what they tell each other, how work is shared out, and sums over all of them.

Every process holds the whole run and plans the same updates. It computes its share of the micro-batches; gradients and
loss sums are then added up over all processes, and every one makes the same move. So all that moves is equal in all of
them, and what only one of them knows (a signal, a clock, a full disk) must be told in an exchange before anything is
decided by it. Process 0 is the only writer. With one process every method here is the identity and costs nothing.

A process that ends, however it ends, is noticed by the others in the exchange that they are in or come to next, since its
connections close. One that fails tells why in its last exchange.

That the processes hold the same is seen to at the start, where it is given to all and compared, and at every evaluation.
Of layers that are cut (`sharding.py`) there is one copy in all the processes together, so nothing of them can differ.
"""

import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import nn
from torch.distributed.tensor import DTensor

from resilient_t5.errors import ConfigError, ExitCode, ProcessFailed, ProcessLost, ResilientError
from resilient_t5.training.signals import Stopped, StopSignal

ENVIRONMENT = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
NOTE_BYTES = 2048
FAILURE_CHARACTERS = 300
SLICE = timedelta(seconds=1)
"""How long a wait keeps Python's signal handlers from running."""
PATIENCE_S = 1800.0
"""For a process that is alive and says nothing: longer than any micro-batch, evaluation or save."""
FOREVER = timedelta(days=365)
BUCKET_BYTES = 32 << 20
GLOO = "gloo"
"""In what gloo says of a connection that closed; its errors have no type of their own."""
MICRO_BATCH_TOKENS = 64
"""What a micro-batch costs beside its padded tokens, as in `data.batches`."""


@dataclass(eq=False)
class ProcessGroup:
    """This process among those of its run; `ALONE` is the usual one. `join` makes it.

    index: from 0; process 0 writes.
    count: processes of the run.
    local_count: those of them on this machine.
    stop: what this process knows of signals; every exchange tells the others.
    """

    index: int = 0
    count: int = 1
    local_count: int = 1
    backend: str = ""
    stop: StopSignal | None = None
    stop_agreed: bool = False
    """Whether all processes know, since the same exchange, that the run is to stop."""
    _group: Any = None
    _adding: bool = False
    _stuck: bool = False

    @property
    def is_writer(self) -> bool:
        """Whether this process writes the run directory and the console."""
        return self.index == 0

    def stops(self, stop: StopSignal) -> bool:
        """Whether the run is to stop: the same answer in every process, so it may lag behind a signal by an exchange."""
        return stop.requested if self.count == 1 else self.stop_agreed

    def all_gather_object(self, place: str, note: Mapping[str, Any], *, patient: bool = False) -> list[dict[str, Any]]:
        """What every process says at this place, in the order of their indices; all wait until the last one comes.

        Args:
            place: where in the run this is; must be the same in all of them.
            note: small JSON values.
            patient: wait without a limit, as for the process that prepares a corpus or writes the last checkpoint.

        Raises:
            ProcessFailed: one of them ended by an error, which it told.
            ProcessLost: one of them is gone or does not answer.
            Stopped: one of them was stopped where there is nothing to save.
        """
        if self.count == 1:
            return [dict(note)]
        notes = self._gather({"place": place, **note, **self._asked()}, math.inf if patient else PATIENCE_S)
        self._adopt(notes)
        for index, told in enumerate(notes):
            if told.get("stopped"):
                raise Stopped
            if "failed" in told:
                raise ProcessFailed(f"process {index} failed: {told['failed']}", exit_code=ExitCode(told["code"]))
        if len({told["place"] for told in notes}) > 1:
            places = ", ".join(f"{index}: {told['place']}" for index, told in enumerate(notes))
            raise ProcessLost(f"the processes are not at the same place of the run ({places})")
        return notes

    def broadcast(self, place: str, value: Any, *, patient: bool = True) -> Any:
        """What process 0 says at this place: a small JSON value; what the others hand in is not looked at."""
        said = value if self.is_writer else None
        return self.all_gather_object(place, {"word": said}, patient=patient)[0]["word"]

    def all_reduce_min(self, place: str, value: float) -> float:
        """The smallest of the values that all processes hold."""
        return float(min(told["value"] for told in self.all_gather_object(place, {"value": value})))

    def share(self, padded_tokens: Sequence[int]) -> list[int]:
        """Which of these pieces this process computes, ascending."""
        return self.shares(padded_tokens)[self.index]

    def shares(self, padded_tokens: Sequence[int]) -> list[list[int]]:
        """Which of these pieces each process computes, ascending: a function of their sizes and the number of processes.

        The largest piece goes first, each to the process that has least so far, so their work is as even as pieces allow.
        A process may get none.
        """
        loads: list[int] = [0] * self.count
        shares: list[list[int]] = [[] for _ in loads]
        for piece in sorted(range(len(padded_tokens)), key=lambda number: -padded_tokens[number]):
            least = loads.index(min(loads))
            loads[least] += padded_tokens[piece] + MICRO_BATCH_TOKENS
            shares[least].append(piece)
        return [sorted(share) for share in shares]

    def all_reduce(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by its sum over all processes; afterwards its bits are the same in each of them.

        Large tensors are added where they lie, neighbours of one type travel together in a buffer. The order of the
        additions depends on the number of processes alone.

        Raises:
            ProcessLost: a process is gone.
        """
        if self.count == 1:
            return
        self._adding = True
        for bucket in _buckets(tensors):
            alone = len(bucket) == 1 and bucket[0].is_contiguous()
            flat = bucket[0] if alone else torch.cat([tensor.reshape(-1) for tensor in bucket])
            self._add_up(flat)
            if not alone:
                for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                    tensor.copy_(part.view_as(tensor))
        self._adding = False

    def all_gather(self, own: torch.Tensor, rows: int) -> torch.Tensor:
        """The rows of all processes under one another, `rows` in all, cut as torch.chunk cuts; inside `adding`.

        Raises:
            ProcessLost: a process is gone.
        """
        size = -(-rows // self.count)
        padded = own.new_zeros((size, *own.shape[1:]))
        padded[: len(own)] = own
        whole = own.new_empty((size * self.count, *own.shape[1:]))
        parts = list(whole.split(size))
        if own.device.type == "cpu":
            self._wait(lambda: dist.all_gather(parts, padded, group=self._group, async_op=True), PATIENCE_S)
        else:
            dist.all_gather(parts, padded)
        return whole[:rows]

    @contextmanager
    def collective(self) -> Iterator[None]:
        """Around what torch waits for by itself: a process that fails in here ends without a word, since nobody listens.

        Raises:
            ProcessLost: a process is gone.
        """
        before, self._adding = self._adding, True
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, dist.DistError) or GLOO in str(error):
                raise _lost(error) from error
            raise
        self._adding = before

    def _add_up(self, flat: torch.Tensor) -> None:
        if flat.device.type == "cpu":
            self._wait(lambda: dist.all_reduce(flat, group=self._group, async_op=True), PATIENCE_S)
            return
        try:  # the device waits for it, this thread does not
            dist.all_reduce(flat)
        except RuntimeError as error:
            raise _lost(error) from error

    @contextmanager
    def leaving_together(self) -> Iterator[None]:
        """Let an error that ends this process end all the others too, with its words and its exit code; then part."""
        try:
            with self._telling_why():
                yield
        except ResilientError as error:
            if self._stuck:  # what was begun never ends, and would hold up the end of the interpreter
                sys.stderr.write(f"{error}\n")
                sys.stderr.flush()
                os._exit(error.exit_code)
            raise
        finally:
            if self.count > 1 and not self._stuck:  # threads of a group that the interpreter finds at its end make it abort
                self._group = None
                dist.destroy_process_group()

    @contextmanager
    def _telling_why(self) -> Iterator[None]:
        try:
            yield
        except (ProcessFailed, ProcessLost):
            raise
        except Stopped:
            self._leave({"stopped": True})
            raise
        except ResilientError as error:
            self._leave({"failed": str(error)[:FAILURE_CHARACTERS], "code": int(error.exit_code)})
            raise
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"[:FAILURE_CHARACTERS]
            self._leave({"failed": said, "code": int(ExitCode.UNEXPECTED)})
            raise

    def _leave(self, note: Mapping[str, Any]) -> None:
        if self.count == 1 or self._adding:  # in a sum nobody listens; that this process is gone, the others will see
            return
        try:
            self._gather({"place": "leaving", **note, **self._asked()}, PATIENCE_S)
        except ProcessLost:  # then the others know already that something is wrong
            return

    def _asked(self) -> dict[str, Any]:
        """What this process was asked for by signals, as part of a note."""
        if self.stop is None or not (self.stop.requested or self.stop.save_requested):
            return {}
        left_s = self.stop.left_s
        received = self.stop.received
        return {
            "signal": None if received is None else int(received),
            "left_s": left_s if math.isfinite(left_s) else None,
            "save": self.stop.save_requested,
        }

    def _adopt(self, notes: Sequence[Mapping[str, Any]]) -> None:
        """Make what any process was asked for this process' own; the first of them decides where they differ."""
        if self.stop is None:
            return
        stopping = [told for told in notes if told.get("signal") is not None]
        if stopping:
            self.stop_agreed = True
            left_s = min((told["left_s"] for told in stopping if told["left_s"] is not None), default=math.inf)
            self.stop.adopt(stopping[0]["signal"], left_s)
        if self.is_writer:
            self.stop.save_requested |= any(told.get("save") for told in notes)
        elif notes[self.index].get("save"):  # passed on to the writer
            self.stop.save_requested = False

    def _gather(self, note: Mapping[str, Any], patience_s: float) -> list[dict[str, Any]]:
        text = json.dumps(note, ensure_ascii=False).encode()
        if len(text) > NOTE_BYTES:
            raise ValueError(f"a note of {len(text)} bytes; {NOTE_BYTES} fit")
        own = torch.frombuffer(bytearray(text.ljust(NOTE_BYTES)), dtype=torch.uint8)
        all_notes = [torch.empty_like(own) for _ in range(self.count)]
        self._wait(lambda: dist.all_gather(all_notes, own, group=self._group, async_op=True), patience_s)
        return [json.loads(found.numpy().tobytes()) for found in all_notes]

    def _wait(self, begin: Any, patience_s: float) -> None:
        """Begin a collective operation and wait for it in slices, between which signal handlers run."""
        until_s = time.monotonic() + patience_s
        over = False
        try:
            work = begin()
        except RuntimeError as error:
            raise _lost(error) from error
        while True:
            try:
                work.wait(SLICE)
                return
            except RuntimeError as error:
                if over:  # what was raised is what ended it, and no slice that ran out
                    raise _lost(error) from error
            over = work.is_completed()
            if time.monotonic() > until_s:
                self._stuck = True
                raise ProcessLost(f"another process has not answered for {patience_s / 60:.0f} minutes")


SINGLE_PROCESS = ProcessGroup()
"""One process; nothing in it ever changes."""


def join(on_gpu: bool) -> ProcessGroup:
    """Meet the other processes that a launcher started, or be alone.

    Blocks until all have come. No signal handler of ours should be installed yet: it could not run in here.

    Raises:
        ConfigError: the launcher left out a variable, or asks for Accelerate's own FSDP.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ConfigError(
            "accelerate launch --use_fsdp asks Accelerate to wrap the model, which this loop does not let it; start with"
            " --multi_gpu or torchrun, and set hardware.shard_layers true"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return ProcessGroup()
    missing = [name for name in ENVIRONMENT if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set; start with torchrun, or set all of"
            f" {', '.join(ENVIRONMENT)}"
        )
    state = PartialState(cpu=not on_gpu)
    group = dist.new_group(backend="gloo", timeout=FOREVER)
    ranks = ProcessGroup(state.process_index, state.num_processes, backend=str(state.backend), _group=group)
    hosts = [told["host"] for told in ranks.all_gather_object("start", {"host": _host()})]
    ranks.local_count = hosts.count(hosts[ranks.index])
    return ranks


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Neighbours of one type and device, together at most BUCKET_BYTES; a larger tensor stays by itself."""
    bucket: list[torch.Tensor] = []
    size = 0
    for tensor in tensors:
        fits = not bucket or (tensor.dtype, tensor.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and (not fits or size + tensor.nbytes > BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


def _lost(error: RuntimeError) -> ProcessLost:
    return ProcessLost("another process of this run is gone", where=str(error).partition(". ")[0][:200])


def _host() -> str:
    return os.uname().nodename[:80]


def begin_equal(ranks: ProcessGroup, model: nn.Module, values: Mapping[str, str], *, is_new: bool) -> None:
    """Give a new run the first weights of process 0 everywhere, and make sure that all hold the same weights and values.

    Raises:
        ConfigError: they do not; every name and both values are told.
    """
    if ranks.count == 1:
        return
    if is_new:
        follow(ranks, _whole(model))
    notes = ranks.all_gather_object("ready", {**values, "weights": weights_mark(model)})
    for index, told in enumerate(notes):
        odd = [f"{name} {notes[0][name]} and {told[name]}" for name in (*values, "weights") if notes[0][name] != told[name]]
        if odd:
            raise ConfigError(
                f"processes 0 and {index} differ: {'; '.join(odd)}. All of them need the same text, model files, settings"
                " and kind of card"
            )


@torch.no_grad()
def follow(ranks: ProcessGroup, tensors: Sequence[torch.Tensor]) -> None:
    """Give every process the tensors of process 0; afterwards their bits are the same in each of them."""
    if not ranks.is_writer:
        for tensor in tensors:
            tensor.zero_()
    ranks.all_reduce(tensors)


def weights_mark(model: nn.Module) -> str:
    """A hash of the bits of all parameters that are not cut, summed where they lie: 16 hexadecimal digits."""
    sums = [parameter.detach().view(torch.int32).sum(dtype=torch.int64) for parameter in _whole(model)]
    return hashlib.sha256(repr(torch.stack(sums).tolist()).encode()).hexdigest()[:16]


def _whole(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if not isinstance(parameter, DTensor)]
