"""That the processes of a run hold the same: given to all at the start, compared there and at every evaluation.

Of layers that are cut (`sharding.py`) there is one copy in all the processes together, so nothing of them can differ.
"""

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from resilient_t5.errors import ConfigError
from resilient_t5.training.ranks import Ranks


def begin_equal(ranks: Ranks, model: nn.Module, values: Mapping[str, str], *, is_new: bool) -> None:
    """Give a new run the first weights of process 0 everywhere, and make sure that all hold the same weights and values.

    Raises:
        ConfigError: they do not; every name and both values are told.
    """
    if ranks.count == 1:
        return
    if is_new:
        follow(ranks, _whole(model))
    notes = ranks.exchange("ready", {**values, "weights": weights_mark(model)})
    for index, told in enumerate(notes):
        odd = [f"{name} {notes[0][name]} and {told[name]}" for name in (*values, "weights") if notes[0][name] != told[name]]
        if odd:
            raise ConfigError(
                f"processes 0 and {index} differ: {'; '.join(odd)}. All of them need the same text, model files, settings"
                " and kind of card"
            )


@torch.no_grad()
def follow(ranks: Ranks, tensors: Sequence[torch.Tensor]) -> None:
    """Give every process the tensors of process 0; afterwards their bits are the same in each of them."""
    if not ranks.is_writer:
        for tensor in tensors:
            tensor.zero_()
    ranks.add_up(tensors)


def weights_mark(model: nn.Module) -> str:
    """A hash of the bits of all parameters that are not cut, summed where they lie: 16 hexadecimal digits."""
    sums = [parameter.detach().view(torch.int32).sum(dtype=torch.int64) for parameter in _whole(model)]
    return hashlib.sha256(repr(torch.stack(sums).tolist()).encode()).hexdigest()[:16]


def _whole(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if not isinstance(parameter, DTensor)]
