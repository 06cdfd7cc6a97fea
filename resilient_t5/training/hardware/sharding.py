"""Layers sharded over the processes of a run (`hardware.shard_layers`), by torch's fully_shard (FSDP2).

Every parameter of the blocks and of the final norms is sharded along dim 0. A rank holds its shard with its gradient and
optimizer state. FSDP all-gathers the weights of a block while it is computed, and reduce-scatters its gradients after the
backward pass of every micro-batch. The vocabulary tables stay replicated: their gradients are added in place
(`model/vocabulary_gradients.py`) and all-reduced once per update.

Accelerate's `prepare` would shard the whole model, tables included, and gather it in the root's forward, which the loss
here never calls. Therefore fully_shard, which Accelerate uses for its FSDP version 2, is applied block by block. The
optimizer's parameters are plain tensors that share memory with the local shards, so fused kernels run, and the named
optimizer state is that of an unsharded model, split by rank.

Rule: a collective starts only after an exchange in which every rank has confirmed that it is ready. A process that failed
earlier is thus detected in the exchange, and no rank waits for it inside of FSDP.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from resilient_t5.checkpoint.tensors import TensorFiles, take_snapshot
from resilient_t5.config.schema import Config
from resilient_t5.errors import ConfigError
from resilient_t5.model.embeddings import T5Model
from resilient_t5.model.precision import PrecisionName
from resilient_t5.training.hardware.machine import return_freed_memory_to_os
from resilient_t5.training.hardware.process_group import SINGLE_PROCESS, ProcessGroup, broadcast_tensors


@dataclass(eq=False)
class ShardedModel:
    """A model with sharded or, without `blocks`, fully replicated layers; `shard_model` creates it.

    With replicated layers no method exchanges or copies anything.
    """

    model: T5Model
    ranks: ProcessGroup = SINGLE_PROCESS
    blocks: tuple[FSDPModule, ...] = ()
    """FSDP modules in the order of the forward pass."""
    shards: dict[str, nn.Parameter] = field(default_factory=dict)
    """This rank's shard of every sharded parameter, by name; updated by the optimizer."""
    _is_unsharded: bool = False

    @property
    def is_sharded(self) -> bool:
        """Whether the layers are sharded over several processes."""
        return bool(self.blocks)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that this rank's optimizer updates, with the names and in the order of the model."""
        return ((name, self.shards.get(name, parameter)) for name, parameter in self.model.named_parameters())

    def parameters(self) -> Iterator[nn.Parameter]:
        """`named_parameters` without names."""
        return (parameter for _, parameter in self.named_parameters())

    def replicated_parameters(self) -> list[nn.Parameter]:
        """The trained parameters whose gradients have to be all-reduced."""
        return [p for name, p in self.model.named_parameters() if p.requires_grad and name not in self.shards]

    def assign_shard_gradients(self) -> None:
        """Move the gradients that FSDP reduced to the parameters of the optimizer."""
        for name, parameter in self.model.named_parameters():
            if name in self.shards:
                self.shards[name].grad = None if parameter.grad is None else local_tensor(parameter.grad)
                parameter.grad = None

    def zero_grad(self) -> None:
        """Set all gradients to None."""
        self.model.zero_grad(set_to_none=True)
        for shard in self.shards.values():
            shard.grad = None

    @torch.no_grad()
    def gradient_norm(self, parameters: Sequence[nn.Parameter]) -> torch.Tensor:
        """Global gradient norm, with the same bits on every rank; not finite if any shard of any rank is not finite.

        Args:
            parameters: this rank's parameters with a gradient.
        """
        shards = set(self.shards.values())
        local = [parameter.grad for parameter in parameters if parameter in shards and parameter.grad is not None]
        replicated = [parameter.grad for parameter in parameters if parameter not in shards and parameter.grad is not None]
        if not self.is_sharded:
            return torch.nn.utils.get_total_norm(replicated)
        sum_local, sum_replicated = (torch.nn.utils.get_total_norm(g).double().square() for g in (local, replicated))
        self.ranks.all_reduce([sum_local])
        return (sum_local + sum_replicated).sqrt().float()

    def broadcast_if_sharded(self, place: str, value: Any) -> Any:
        """Return rank 0's value if the layers are sharded, since all ranks take part in what depends on it."""
        return self.ranks.broadcast(place, value) if self.is_sharded else value

    @contextmanager
    def unsharded(self, *, no_timeout: bool = False) -> Iterator[None]:
        """Gather all parameters on every rank, for reading without further collectives; reshard at the end.

        Needs memory for the whole model on every rank.

        Args:
            no_timeout: wait for the other ranks without a limit.
        """
        if not self.is_sharded or self._is_unsharded:
            yield
            return
        self.ranks.all_gather_object("gather", {}, no_timeout=no_timeout)
        with self.ranks.collective():
            for block in self.blocks:
                block.set_reshard_after_forward(False, recurse=False)
                block.unshard()
        self._is_unsharded = True
        try:
            yield
        finally:
            self._is_unsharded = False
            for block in self.blocks:
                block.reshard()
                block.set_reshard_after_forward(True, recurse=False)

    def gather_state(self, files: TensorFiles) -> TensorFiles:
        """Gather sharded tensors for a save: full copies in the host memory of rank 0, nothing on the other ranks.

        Args:
            files: live tensors of the model, of the optimizer and others, by name, as this rank holds them.
        """
        if not self.is_sharded:
            return files
        rows = {name: parameter.shape[0] for name, parameter in self.model.named_parameters() if name in self.shards}
        gathered: TensorFiles = {stem: {} for stem in files}
        replicated: TensorFiles = {stem: {} for stem in files}
        with self.ranks.collective():
            for stem, tensors in sorted(files.items()):
                for name in sorted(tensors):
                    tensor, owner = local_tensor(tensors[name]), name.partition("/")[0]
                    if owner not in self.shards or tensor.shape != self.shards[owner].shape:
                        replicated[stem][name] = tensor
                        continue
                    full = self.ranks.all_gather(tensor, rows[owner])
                    if self.ranks.is_writer:
                        gathered[stem][name] = torch.empty(full.shape, dtype=full.dtype).copy_(full)
            copies = take_snapshot(replicated) if self.ranks.is_writer else gathered
        return {stem: {**gathered[stem], **copies[stem]} for stem in files}

    def shard_state(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """This rank's shard of a full named optimizer state; tensors not shaped like their parameter stay as they are."""
        if not self.is_sharded:
            return tensors
        parameters = dict(self.model.named_parameters())

        def shard(name: str, tensor: torch.Tensor) -> torch.Tensor:
            parameter = parameters.get(name.partition("/")[0])
            if not isinstance(parameter, DTensor) or parameter.shape != tensor.shape:
                return tensor
            return local_rows(parameter, tensor).clone()  # a view would keep the full tensor in memory

        return {name: shard(name, tensor) for name, tensor in tensors.items()}


def shard_model(model: T5Model, config: Config, ranks: ProcessGroup, precision: PrecisionName, *, is_new: bool) -> ShardedModel:
    """Shard the layers of `model` if `hardware.shard_layers` is set and the run has several processes.

    Args:
        model: the full model on its device.
        is_new: broadcast the initial weights of rank 0 first.

    Raises:
        ConfigError: `hardware.precision: auto` chose fp16, whose loss scaler does not support sharded layers.
    """
    if not config.hardware.shard_layers or ranks.count == 1:
        return ShardedModel(model, ranks)
    if precision == "fp16":
        raise ConfigError(
            "hardware.precision: fp16 was chosen for this card, but its loss scaler does not support sharded layers; set fp32"
        )
    if model.shared.weight.device.type == "cpu":
        return_freed_memory_to_os()  # otherwise the heap keeps the blocks of gathered weights
    tables = {model.shared.weight, model.lm_head.weight}
    if is_new:
        broadcast_tensors(ranks, [parameter for parameter in model.parameters() if parameter not in tables])
    mesh = init_device_mesh(model.shared.weight.device.type, (ranks.count,))
    blocks: list[Any] = [module for stack in (model.encoder, model.decoder) for module in (*stack.block, stack)]
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=tables)
        # The loss is already divided by the tokens of the whole update, and gloo supports sums only.
        block.set_gradient_divide_factor(1.0)
        block.set_force_sum_reduction_for_comms(True)
    # Blocks pass on the position bias of the first block, which FSDP returns as a view; nothing modifies it in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    shards = {name: nn.Parameter(local_tensor(p.detach())) for name, p in model.named_parameters() if isinstance(p, DTensor)}
    return ShardedModel(model, ranks, tuple(blocks), shards)


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The local shard of a DTensor, in the same memory; any other tensor unchanged."""
    detached = tensor.detach()
    return detached.to_local() if isinstance(detached, DTensor) else tensor


def local_rows(parameter: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    """The rows of `full` that correspond to this rank's shard of `parameter`; all rows if it is not sharded."""
    if not isinstance(parameter, DTensor):
        return full
    mesh = parameter.device_mesh
    size = -(-full.shape[0] // mesh.size())
    return full[mesh.get_local_rank() * size :][:size]
