"""The optimizers, their parameter groups, and their state as named tensors.

AdamW is torch's fused one, on the CPU too. With its two moments in 8 bits it is bitsandbytes' (extra `lowmem`), which is
imported only when it is chosen: moments of matrices of 4,096 values and more take one byte each, with a float32 scale for
every 256 of them; smaller ones stay in float32. Its state has a plain number and two tables that are the same for all
parameters: the number is kept as a tensor, the tables are made anew. Adafactor is our own (`model/adafactor.py`), with an
absolute learning rate, stepped after the backward pass or inside it. Muon is AdamW but for the matrices inside the layers
(`model/muon.py`).
The learning rate of every group is set from outside at each update.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from resilient_t5.config.training import OptimConfig
from resilient_t5.errors import ConfigError, ResumeMismatch
from resilient_t5.model.adafactor import Adafactor, AdafactorInBackward
from resilient_t5.model.muon import Muon

BLOCK_VALUES = 256
COUNT = "step"
TABLES = {"qmap1": "dynamic", "qmap2": "udynamic"}


def build_adamw8bit(groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW8bit over these groups.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ConfigError(
            f"optim.name: adamw8bit needs bitsandbytes ({error}); install it with python -m pip install -e '.[lowmem]'"
        ) from None
    optimizer: torch.optim.Optimizer = AdamW8bit(groups, lr=lr, betas=betas, eps=eps)
    return optimizer


def is_adamw8bit(optimizer: torch.optim.Optimizer) -> bool:
    """Whether this is bitsandbytes' optimizer."""
    return type(optimizer).__name__ == "AdamW8bit"


def as_tensors(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The state of one parameter as tensors, without the tables."""
    plain = {key: value for key, value in state.items() if key not in TABLES}
    return {key: value if torch.is_tensor(value) else torch.tensor(value, dtype=torch.int64) for key, value in plain.items()}


def from_tensors(optimizer: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What `as_tensors` gave, as bitsandbytes wants it, on the device of its own tensors."""
    state: dict[str, Any] = dict(tensors)
    state[COUNT] = int(tensors[COUNT])
    if "absmax1" in tensors:
        if not optimizer.name2qmap:
            optimizer.fill_qmap()
        for key, table in TABLES.items():
            optimizer.name2qmap[table] = optimizer.name2qmap[table].to(tensors["absmax1"].device)
            state[key] = optimizer.name2qmap[table]
    return state


FUSED_DEVICES = ("cpu", "cuda")


class Named(Protocol):
    """A model, or the part of one that this process moves."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters with their names, each once and always in the same order."""


def build_optimizer(
    model: Named, settings: OptimConfig, device: torch.device, product_dtype: torch.dtype = torch.float32
) -> torch.optim.Optimizer:
    """The optimizer over all trainable parameters, in the model's own order; a tied table stands in it once.

    Two groups: matrices, which `weight_decay` shrinks, and norms and position biases, which it never does. With a decay
    above 0 the rows of vocabulary that a corpus never uses shrink too.

    Args:
        model: after `cut_vocabulary`, on its device.
        settings: name, peak learning rate, decay, betas, eps.
        device: where the parameters lie; decides whether the fused kernel exists.
        product_dtype: number format of Muon's own matrix products.

    Raises:
        ConfigError: adamw8bit without bitsandbytes.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in trained if is_decayed(name, p)], "weight_decay": settings.weight_decay},
        {"params": [p for name, p in trained if not is_decayed(name, p)], "weight_decay": 0.0},
    ]
    if settings.name in ("adafactor", "adafactor_in_backward"):
        kind = Adafactor if settings.name == "adafactor" else AdafactorInBackward
        return kind([{"params": group["params"]} for group in groups], lr=settings.lr)
    betas = (settings.beta1, settings.beta2)
    if settings.name == "adamw8bit":
        return build_adamw8bit(groups, settings.lr, betas, settings.eps)
    matrices: list[torch.Tensor] = []
    if settings.name == "muon":
        matrices = [p for name, p in trained if is_inside_a_layer(name, p)]
        groups[0]["params"] = [p for name, p in trained if is_decayed(name, p) and not is_inside_a_layer(name, p)]
    adamw = torch.optim.AdamW(groups, lr=settings.lr, betas=betas, eps=settings.eps, fused=device.type in FUSED_DEVICES)
    if settings.name != "muon":
        return adamw
    return Muon({"params": matrices, "weight_decay": settings.weight_decay}, adamw, product_dtype)


def is_decayed(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay may shrink the parameter: a matrix that is no relative position bias."""
    return parameter.ndim >= 2 and "relative_attention_bias" not in name


def is_inside_a_layer(name: str, parameter: torch.Tensor) -> bool:
    """Whether the parameter is a matrix of an attention or a feed-forward: neither a vocabulary table nor a bias."""
    return is_decayed(name, parameter) and ".block." in name


def named_state(optimizer: torch.optim.Optimizer, model: Named) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The state as {"<parameter>/<key>": tensor}, and what it belongs to as plain JSON values.

    The tensors are those of the optimizer, not copies. A parameter without an update yet has none.
    """
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors = {
        f"{name_of[id(parameter)]}/{key}": value
        for group in optimizer.param_groups
        for parameter in group["params"]
        for key, value in as_tensors(optimizer.state.get(parameter, {})).items()
    }
    return tensors, _description(optimizer, model)


def load_named_state(
    optimizer: torch.optim.Optimizer, model: Named, tensors: Mapping[str, torch.Tensor], description: dict[str, Any]
) -> None:
    """Put a state from `named_state` into an optimizer that was built the same way; every dtype stays as it was saved.

    torch's own loading casts the state to the dtype of the parameter; this does not. A tensor that lies where the optimizer
    wants it becomes the optimizer's own, without a copy. The learning rate is not restored: it is a function of the update.

    Raises:
        ResumeMismatch: another optimizer, other groups or parameters, or a tensor of the wrong shape.
    """
    own = _description(optimizer, model)
    hint = "resume with the configuration of the checkpoint, or start a new run with run.fork"
    for key in own:
        if description.get(key) != own[key]:
            shown = "its groups hold other parameters" if key == "groups" else f"{description.get(key)!r}, now {own[key]!r}"
            raise ResumeMismatch(f"the optimizer state belongs to another optimizer: {shown}", where=key, hint=hint)
    parameter_of = dict(model.named_parameters())
    state: dict[torch.Tensor, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition("/")
        parameter = parameter_of.get(owner)
        if parameter is None or not key or tuple(tensor.shape) not in _possible_shapes(parameter):
            raise ResumeMismatch("the optimizer state does not fit the model", where=name, hint=hint)
        # A scalar lies where its optimizer wants it: fused kernels count on the device, everything else on the CPU.
        stays = tensor.ndim == 0 and not _is_fused(optimizer)
        state.setdefault(parameter, {})[key] = tensor.detach().to("cpu" if stays else parameter.device)
    optimizer.state.clear()
    for holder, loaded in state.items():
        optimizer.state[holder] = from_tensors(optimizer, loaded) if is_adamw8bit(optimizer) else loaded


def _is_fused(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer.param_groups[0].get("fused"))


def _description(optimizer: torch.optim.Optimizer, model: Named) -> dict[str, Any]:
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        "optimizer": type(optimizer).__name__.lower(),
        "groups": [[name_of[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups],
    }


def _possible_shapes(parameter: torch.Tensor) -> set[tuple[int, ...]]:
    shape = tuple(parameter.shape)
    factored = {shape[:-1], (*shape[:-2], shape[-1])} if parameter.ndim >= 2 else set()
    return {(), shape, (-(-parameter.numel() // BLOCK_VALUES),)} | factored
