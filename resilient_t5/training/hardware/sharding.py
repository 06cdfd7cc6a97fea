"""The layers of a model cut over the processes that train it (`hardware.shard_layers`), by torch's fully_shard (FSDP2).

Cut along its first dimension is every parameter of the blocks and of the last norms. A process holds its rows of them, with
their gradients and optimizer state; FSDP gathers the weights of a block for the time that they are computed with, and after
the backward pass of every micro-batch adds up its gradients into the rows of each process. Whole in every process are the
vocabulary tables: their gradients are added in place (`model/vocabulary_gradients.py`) and summed once an update, as ever.

Accelerate's `prepare` would cut the whole model, tables included, and gather it in the root's forward, which our loss
never calls; so fully_shard, which Accelerate calls for its FSDP version 2, is called here, block by block, under the
processes that Accelerate has joined. The optimizer moves plain tensors: its parameters are the process' rows themselves,
in the memory that FSDP gathers from, so that fused kernels run and the named state is that of a whole model, cut.

A law holds for all of this: nothing that FSDP or a gathering waits for begins but after an exchange in which every process
said that it is there. So a process that failed before is noticed in the exchange, and nobody waits for it.
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

from resilient_t5.checkpoint.snapshot import TensorFiles, take_snapshot
from resilient_t5.config.schema import Config
from resilient_t5.errors import ConfigError
from resilient_t5.model.embeddings import T5Model
from resilient_t5.model.precision import PrecisionName
from resilient_t5.training.hardware.machine import return_freed_memory_to_os
from resilient_t5.training.hardware.process_group import SINGLE_PROCESS, ProcessGroup, follow


@dataclass(eq=False)
class ShardedModel:
    """The model of a run and how its layers lie in the processes; without `blocks` every process holds all of them.

    With whole layers nothing here is told, gathered or copied. `shard_model` makes the other kind.
    """

    model: T5Model
    ranks: ProcessGroup = SINGLE_PROCESS
    blocks: tuple[FSDPModule, ...] = ()
    """What is gathered for a pass, in the order of the forward pass."""
    own: dict[str, nn.Parameter] = field(default_factory=dict)
    """This process' rows of every parameter that is cut, by its name: what the optimizer moves."""
    _are_gathered: bool = False

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds its rows of the layers only."""
        return bool(self.blocks)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What the optimizer of this process moves, by the names and in the order of the model's parameters."""
        return ((name, self.own.get(name, parameter)) for name, parameter in self.model.named_parameters())

    def parameters(self) -> Iterator[nn.Parameter]:
        """The same without names."""
        return (parameter for _, parameter in self.named_parameters())

    def whole_parameters(self) -> list[nn.Parameter]:
        """The trained parameters that every process holds whole, and whose gradients it has to add to those of the others."""
        return [p for name, p in self.model.named_parameters() if p.requires_grad and name not in self.own]

    def take_gradients(self) -> None:
        """Hand the gradients that FSDP has added up to the rows that the optimizer moves."""
        for name, parameter in self.model.named_parameters():
            if name in self.own:
                self.own[name].grad = None if parameter.grad is None else local(parameter.grad)
                parameter.grad = None

    def drop_gradients(self) -> None:
        """Forget all gradients."""
        self.model.zero_grad(set_to_none=True)
        for rows in self.own.values():
            rows.grad = None

    @torch.no_grad()
    def gradient_norm(self, parameters: Sequence[nn.Parameter]) -> torch.Tensor:
        """The global norm of the gradients that the optimizer will see, the same bits in every process.

        Rows of others count by the sum of their squares; one of them that is not finite makes the norm so everywhere.

        Args:
            parameters: of those that it moves here, the ones with a gradient.
        """
        rows = set(self.own.values())
        own = [parameter.grad for parameter in parameters if parameter in rows and parameter.grad is not None]
        whole = [parameter.grad for parameter in parameters if parameter not in rows and parameter.grad is not None]
        if not self.is_sharded:
            return torch.nn.utils.get_total_norm(whole)
        squares, of_whole = (torch.nn.utils.get_total_norm(found).double().square() for found in (own, whole))
        self.ranks.all_reduce([squares])
        return (squares + of_whole).sqrt().float()

    def agreed(self, place: str, value: Any) -> Any:
        """With cut layers what process 0 says at this place of the run, since all take part in what follows from it."""
        return self.ranks.broadcast(place, value) if self.is_sharded else value

    @contextmanager
    def gathered(self, *, patient: bool = False) -> Iterator[None]:
        """Inside, every parameter is whole in every process, and no process waits for another; for reading only.

        Costs the memory of all weights, in every process.

        Args:
            patient: wait without a limit for the others to come here.
        """
        if not self.is_sharded or self._are_gathered:
            yield
            return
        self.ranks.all_gather_object("gather", {}, patient=patient)
        with self.ranks.collective():
            for block in self.blocks:
                block.set_reshard_after_forward(False, recurse=False)
                block.unshard()
        self._are_gathered = True
        try:
            yield
        finally:
            self._are_gathered = False
            for block in self.blocks:
                block.reshard()
                block.set_reshard_after_forward(True, recurse=False)

    def collected(self, files: TensorFiles) -> TensorFiles:
        """For a save: everything whole, copied to the host memory of process 0, one tensor at a time; the others get nothing.

        Args:
            files: the tensors of the model and of the optimizer by their names, as this process holds them, and others.
        """
        if not self.is_sharded:
            return files
        rows_of = {name: parameter.shape[0] for name, parameter in self.model.named_parameters() if name in self.own}
        found: TensorFiles = {stem: {} for stem in files}
        whole: TensorFiles = {stem: {} for stem in files}
        with self.ranks.collective():
            for stem, name, tensor in ((s, n, local(t)) for s, part in sorted(files.items()) for n, t in sorted(part.items())):
                owner = name.partition("/")[0]
                if owner not in self.own or tensor.shape != self.own[owner].shape:
                    whole[stem][name] = tensor
                    continue
                joined = self.ranks.all_gather(tensor, rows_of[owner])
                if self.ranks.is_writer:
                    found[stem][name] = torch.empty(joined.shape, dtype=joined.dtype).copy_(joined)
            copies = take_snapshot(whole) if self.ranks.is_writer else found
        return {stem: {**found[stem], **copies[stem]} for stem in files}

    def own_state(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """This process' rows of an optimizer's named state; what is not of the shape of its parameter stays as it is."""
        if not self.is_sharded:
            return tensors
        parameters = dict(self.model.named_parameters())

        def rows(name: str, tensor: torch.Tensor) -> torch.Tensor:
            parameter = parameters.get(name.partition("/")[0])
            if not isinstance(parameter, DTensor) or parameter.shape != tensor.shape:
                return tensor
            return own_rows(parameter, tensor).clone()  # a view would keep the whole tensor in memory

        return {name: rows(name, tensor) for name, tensor in tensors.items()}


def shard_model(model: T5Model, config: Config, ranks: ProcessGroup, precision: PrecisionName, *, is_new: bool) -> ShardedModel:
    """The layers of `model`, cut over the processes where the configuration says so; with one process nothing is cut.

    Args:
        model: whole, on its device.
        is_new: give all processes the first weights of process 0 before.

    Raises:
        ConfigError: a number format chosen for the user that needs a loss scaler.
    """
    if not config.hardware.shard_layers or ranks.count == 1:
        return ShardedModel(model, ranks)
    if precision == "fp16":
        raise ConfigError(
            "hardware.precision: fp16 was chosen for this card, and its loss scaler knows no cut layers; set fp32"
        )
    if model.shared.weight.device.type == "cpu":
        return_freed_memory_to_os()  # what is gathered and let go is not to be kept by the heap
    tables = {model.shared.weight, model.lm_head.weight}
    if is_new:
        follow(ranks, [parameter for parameter in model.parameters() if parameter not in tables])
    mesh = init_device_mesh(model.shared.weight.device.type, (ranks.count,))
    blocks: list[Any] = [module for stack in (model.encoder, model.decoder) for module in (*stack.block, stack)]
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=tables)
        # The loss is divided by the tokens of the whole update already, and gloo knows sums only.
        block.set_gradient_divide_factor(1.0)
        block.set_force_sum_reduction_for_comms(True)
    # A block hands on the position bias of the first one, which passed through FSDP as a view; nothing is added to it in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    own = {name: nn.Parameter(local(p.detach())) for name, p in model.named_parameters() if isinstance(p, DTensor)}
    return ShardedModel(model, ranks, tuple(blocks), own)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor, in the same memory."""
    held = tensor.detach()
    return held.to_local() if isinstance(held, DTensor) else tensor


def own_rows(parameter: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """The rows of `whole` that this process holds of `parameter`: all of them unless it is cut."""
    if not isinstance(parameter, DTensor):
        return whole
    mesh = parameter.device_mesh
    size = -(-whole.shape[0] // mesh.size())
    return whole[mesh.get_local_rank() * size :][:size]
