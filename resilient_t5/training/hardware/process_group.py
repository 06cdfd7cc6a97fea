"""The processes (ranks) of one run: small messages, work partition, collectives and a common exit.

Every rank executes the whole run and plans the same updates. A rank computes its part of the micro-batches; gradients and
loss sums are then all-reduced, and every rank takes the same optimizer step, so the training state is identical on all
ranks. Facts that one rank alone knows (a signal, the clock, a full disk) are exchanged before a decision depends on them.
Rank 0 is the only writer. With one process every method is an identity without cost.

When a process ends, its connections close, and its peers get an error in their current or next exchange. A process that
fails reports the reason in its last exchange.

`sync_processes` broadcasts and compares the weights at the start; every evaluation compares them again. Sharded layers
(`sharding.py`) exist once across all ranks and need no comparison.
"""

import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
MESSAGE_BYTES = 2048
FAILURE_CHARACTERS = 300
WAIT_SLICE = timedelta(seconds=1)
"""Python signal handlers cannot run during a wait of this length."""
TIMEOUT_S = 1800.0
"""For a peer that is alive but does not answer: longer than any micro-batch, evaluation or save."""
GROUP_TIMEOUT = timedelta(days=365)
GLOO = "gloo"
"""Part of gloo's messages about a closed connection; these errors have no type of their own."""
BUCKET_BYTES = 32 << 20
MICRO_BATCH_TOKENS = 64
"""Fixed cost of a micro-batch, in padded tokens, as in `data.batches`."""


@dataclass(eq=False)
class ProcessGroup:
    """This process and its peers; `join` creates it, `SINGLE_PROCESS` is the default.

    index: rank of this process; rank 0 writes.
    count: number of processes of the run.
    local_count: number of them on this machine.
    stop: signals that this process received; every exchange shares them with all ranks.
    """

    index: int = 0
    count: int = 1
    local_count: int = 1
    backend: str = ""
    stop: StopSignal | None = None
    stop_agreed: bool = False
    """Whether all ranks know, since the same exchange, that the run is to stop."""
    _group: Any = None
    _in_collective: bool = False
    _timed_out: bool = False

    @property
    def is_writer(self) -> bool:
        """Whether this process writes the run directory and the console."""
        return self.index == 0

    def stops(self, stop: StopSignal) -> bool:
        """Whether the run is to stop: the same answer on every rank, up to one exchange later than the signal."""
        return stop.requested if self.count == 1 else self.stop_agreed

    def all_gather_object(self, place: str, message: Mapping[str, Any], *, no_timeout: bool = False) -> list[dict[str, Any]]:
        """Gather a small message from every rank, in rank order; a barrier.

        Args:
            place: position in the run; must be the same on all ranks.
            message: small JSON values.
            no_timeout: wait without a limit, for example while rank 0 prepares a corpus or writes the last checkpoint.

        Raises:
            ProcessFailed: a peer ended with an error and reported it.
            ProcessLost: a peer is gone or does not answer.
            Stopped: a peer was stopped where there is nothing to save.
        """
        if self.count == 1:
            return [dict(message)]
        timeout_s = math.inf if no_timeout else TIMEOUT_S
        messages = self._exchange({"place": place, **message, **self._signal_fields()}, timeout_s)
        self._apply_signals(messages)
        for index, received in enumerate(messages):
            if received.get("stopped"):
                raise Stopped
            if "failed" in received:
                raise ProcessFailed(f"process {index} failed: {received['failed']}", exit_code=ExitCode(received["code"]))
        if len({received["place"] for received in messages}) > 1:
            places = ", ".join(f"{index}: {received['place']}" for index, received in enumerate(messages))
            raise ProcessLost(f"the processes are at different places of the run ({places})")
        return messages

    def broadcast(self, place: str, value: Any) -> Any:
        """Return rank 0's small JSON value on every rank; waits for rank 0 without a limit."""
        sent = value if self.is_writer else None
        return self.all_gather_object(place, {"value": sent}, no_timeout=True)[0]["value"]

    def partition(self, padded_tokens: Sequence[int]) -> list[list[int]]:
        """Assign micro-batches of these sizes to ranks: for each rank its ascending indices, possibly none.

        Longest-processing-time-first: the largest remaining micro-batch goes to the rank with the least work.
        """
        loads: list[int] = [0] * self.count
        parts: list[list[int]] = [[] for _ in loads]
        for index in sorted(range(len(padded_tokens)), key=lambda index: -padded_tokens[index]):
            rank = loads.index(min(loads))
            loads[rank] += padded_tokens[index] + MICRO_BATCH_TOKENS
            parts[rank].append(index)
        return [sorted(part) for part in parts]

    def all_reduce(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor in place by its sum over all ranks; the result has the same bits on every rank.

        Small tensors are concatenated into buckets. The order of the additions depends on the number of ranks only.

        Raises:
            ProcessLost: a peer is gone.
        """
        if self.count == 1:
            return
        with self.collective():
            for bucket in _buckets(tensors):
                is_in_place = len(bucket) == 1 and bucket[0].is_contiguous()
                flat = bucket[0] if is_in_place else torch.cat([tensor.reshape(-1) for tensor in bucket])
                self._all_reduce_tensor(flat)
                if not is_in_place:
                    for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                        tensor.copy_(part.view_as(tensor))

    def _all_reduce_tensor(self, tensor: torch.Tensor) -> None:
        if tensor.device.type == "cpu":
            self._wait(lambda: dist.all_reduce(tensor, group=self._group, async_op=True), TIMEOUT_S)
        else:
            dist.all_reduce(tensor)  # synchronizes the device, not this thread

    def all_gather(self, shard: torch.Tensor, rows: int) -> torch.Tensor:
        """Concatenate the shards of all ranks along dim 0; call it inside `collective`.

        Args:
            shard: this rank's chunk of a tensor that torch.chunk split.
            rows: size of the result along dim 0.

        Raises:
            ProcessLost: a peer is gone.
        """
        size = -(-rows // self.count)
        padded = shard.new_zeros((size, *shard.shape[1:]))
        padded[: len(shard)] = shard
        gathered = shard.new_empty((size * self.count, *shard.shape[1:]))
        parts = list(gathered.split(size))
        if shard.device.type == "cpu":
            self._wait(lambda: dist.all_gather(parts, padded, group=self._group, async_op=True), TIMEOUT_S)
        else:
            dist.all_gather(parts, padded)
        return gathered[:rows]

    @contextmanager
    def collective(self) -> Iterator[None]:
        """Enclose collectives, including those that torch issues itself (FSDP).

        A process that fails in here exits without a report, since its peers are in the collective and cannot receive it.

        Raises:
            ProcessLost: a peer is gone.
        """
        before, self._in_collective = self._in_collective, True
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, dist.DistError) or GLOO in str(error):
                raise _process_lost(error) from error
            raise
        self._in_collective = before

    @contextmanager
    def synchronized_exit(self) -> Iterator[None]:
        """Make an error that ends this process end all ranks with its message and exit code; destroy the group at the end."""
        try:
            yield
        except BaseException as error:
            if not isinstance(error, (ProcessFailed, ProcessLost)):
                self._report_failure(error)
            if self._timed_out and isinstance(error, ResilientError):
                # The pending collective never completes, and the interpreter would wait for its thread at shutdown.
                sys.stderr.write(f"{error}\n")
                sys.stderr.flush()
                os._exit(error.exit_code)
            raise
        finally:
            if self.count > 1 and not self._timed_out:  # a group that still exists at shutdown aborts the interpreter
                self._group = None
                dist.destroy_process_group()

    def _report_failure(self, error: BaseException) -> None:
        if self.count == 1 or self._in_collective:
            return
        message: dict[str, Any] = {"place": "exit", **self._signal_fields()}
        if isinstance(error, Stopped):
            message["stopped"] = True
        else:
            is_known = isinstance(error, ResilientError)
            message["failed"] = (str(error) if is_known else f"{type(error).__name__}: {error}")[:FAILURE_CHARACTERS]
            message["code"] = int(error.exit_code if isinstance(error, ResilientError) else ExitCode.UNEXPECTED)
        try:
            self._exchange(message, TIMEOUT_S)
        except ProcessLost:  # the other ranks notice the closed connection
            return

    def _signal_fields(self) -> dict[str, Any]:
        """The requests that this process received as signals, as fields of a message."""
        if self.stop is None or not (self.stop.requested or self.stop.save_requested):
            return {}
        left_s = self.stop.left_s
        received = self.stop.received
        return {
            "signal": None if received is None else int(received),
            "left_s": left_s if math.isfinite(left_s) else None,
            "save": self.stop.save_requested,
        }

    def _apply_signals(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Apply the requests of all ranks to this process; the lowest rank with a stop signal decides which one counts."""
        if self.stop is None:
            return
        stopping = [message for message in messages if message.get("signal") is not None]
        if stopping:
            self.stop_agreed = True
            left_s = min((message["left_s"] for message in stopping if message["left_s"] is not None), default=math.inf)
            self.stop.adopt(stopping[0]["signal"], left_s)
        if self.is_writer:
            self.stop.save_requested |= any(message.get("save") for message in messages)
        elif messages[self.index].get("save"):  # rank 0 has received the request
            self.stop.save_requested = False

    def _exchange(self, message: Mapping[str, Any], timeout_s: float) -> list[dict[str, Any]]:
        text = json.dumps(message, ensure_ascii=False).encode()
        if len(text) > MESSAGE_BYTES:
            raise ValueError(f"a message of {len(text)} bytes exceeds {MESSAGE_BYTES}")
        own = torch.frombuffer(bytearray(text.ljust(MESSAGE_BYTES)), dtype=torch.uint8)
        received = [torch.empty_like(own) for _ in range(self.count)]
        self._wait(lambda: dist.all_gather(received, own, group=self._group, async_op=True), timeout_s)
        return [json.loads(buffer.numpy().tobytes()) for buffer in received]

    def _wait(self, start: Callable[[], Any], timeout_s: float) -> None:
        """Start a collective and wait for it in slices, so that signal handlers run in between."""
        deadline_s = time.monotonic() + timeout_s
        is_completed = False
        try:
            work = start()
        except RuntimeError as error:
            raise _process_lost(error) from error
        while True:
            try:
                work.wait(WAIT_SLICE)
                return
            except RuntimeError as error:
                if is_completed:  # the failure of the collective itself, not the end of a slice
                    raise _process_lost(error) from error
            is_completed = work.is_completed()
            if time.monotonic() > deadline_s:
                self._timed_out = True
                raise ProcessLost(f"another process has not answered for {timeout_s / 60:.0f} minutes")


SINGLE_PROCESS = ProcessGroup()
"""A run on one process; never modified."""


def join(on_gpu: bool) -> ProcessGroup:
    """Join the process group that a launcher started, or return a group of one process.

    Blocks until all processes have joined. Install signal handlers later: they could not run during this call.

    Raises:
        ConfigError: a variable of the launcher is missing, or Accelerate's own FSDP is requested.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ConfigError(
            "accelerate launch --use_fsdp is not supported, since this training loop does not let Accelerate wrap the model;"
            " start with --multi_gpu or torchrun, and set hardware.shard_layers true"
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
    group = dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT)
    ranks = ProcessGroup(state.process_index, state.num_processes, backend=str(state.backend), _group=group)
    messages = ranks.all_gather_object("start", {"host": os.uname().nodename[:80]})
    ranks.local_count = [message["host"] for message in messages].count(messages[ranks.index]["host"])
    return ranks


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Split into runs of one dtype and device with at most BUCKET_BYTES; a larger tensor is a bucket of its own."""
    bucket: list[torch.Tensor] = []
    size = 0
    for tensor in tensors:
        matches = not bucket or (tensor.dtype, tensor.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and (not matches or size + tensor.nbytes > BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


def _process_lost(error: RuntimeError) -> ProcessLost:
    return ProcessLost("another process of this run is gone", where=str(error).partition(". ")[0][:200])


def sync_processes(ranks: ProcessGroup, model: nn.Module, values: Mapping[str, str], *, is_new: bool) -> None:
    """Broadcast the initial weights of a new run, then verify that all ranks have the same weights and values.

    Raises:
        ConfigError: they differ; every name is listed with both values.
    """
    if ranks.count == 1:
        return
    if is_new:
        broadcast_tensors(ranks, _replicated_parameters(model))
    messages = ranks.all_gather_object("ready", {**values, "weights": weights_checksum(model)})
    first = messages[0]
    for index, other in enumerate(messages):
        names = [name for name in (*values, "weights") if first[name] != other[name]]
        if names:
            different = "; ".join(f"{name} {first[name]} and {other[name]}" for name in names)
            raise ConfigError(
                f"processes 0 and {index} differ: {different}. All of them need the same text, model files,"
                " settings and kind of card"
            )


@torch.no_grad()
def broadcast_tensors(ranks: ProcessGroup, tensors: Sequence[torch.Tensor]) -> None:
    """Overwrite the tensors of every rank with those of rank 0, bit for bit."""
    if not ranks.is_writer:
        for tensor in tensors:
            tensor.zero_()
    ranks.all_reduce(tensors)


def weights_checksum(model: nn.Module) -> str:
    """Hash of the bits of all replicated parameters, summed on their device: 16 hexadecimal digits."""
    sums = [parameter.detach().view(torch.int32).sum(dtype=torch.int64) for parameter in _replicated_parameters(model)]
    return hashlib.sha256(repr(torch.stack(sums).tolist()).encode()).hexdigest()[:16]


def _replicated_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if not isinstance(parameter, DTensor)]
