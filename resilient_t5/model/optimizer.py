"""The optimizers, their parameter groups, and their state as named tensors.

* AdamW is torch's fused one, on the CPU too.
* AdamW with 8-bit moments is bitsandbytes' (extra `lowmem`), imported only if it is chosen: moments of matrices of 4,096
  values and more take one byte each, with a float32 scale for every 256 of them; smaller ones are float32. Of its state,
  the update count is saved as a tensor, and the two lookup tables, which are the same for all parameters, are rebuilt.
* Adafactor (Shazeer and Stern 2018, as T5 was trained with) has an absolute learning rate here. torch.optim.Adafactor
  multiplies the learning rate by the parameter's size and syncs with the device once per tensor; that of transformers
  allocates two more tensors of the size of the parameter. This one processes a matrix by blocks of rows, so an mT5
  embedding costs a buffer of 16 MiB and no sync.
* Muon (Jordan et al. 2024) updates the matrices inside the layers, AdamW everything else. For models from scratch.

The learning rate of every group is set from outside at each update.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from resilient_t5.config.sections import OptimConfig
from resilient_t5.errors import ConfigError, ResumeMismatch

FUSED_DEVICES = ("cpu", "cuda")
BLOCK_VALUES = 2**22
"""Values of a matrix, or of several small ones, that Adafactor and Muon process at once; bounds their memory."""


class NamedParameters(Protocol):
    """A model, or the part of one that this process updates."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters with their names, each once and always in the same order."""


def build_optimizer(
    model: NamedParameters, settings: OptimConfig, device: torch.device, product_dtype: torch.dtype = torch.float32
) -> torch.optim.Optimizer:
    """The optimizer over all trainable parameters, in the order of the model; a tied table is in it once.

    Two groups: matrices, with `weight_decay`, and norms and position biases, without. With weight decay the vocabulary
    rows that a corpus never uses shrink too.

    Args:
        model: after `cut_vocabulary`, on its device.
        settings: name, peak learning rate, decay, betas, eps.
        device: device of the parameters; decides whether the fused kernel exists.
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
    """Whether weight decay applies: to matrices that are not a relative position bias."""
    return parameter.ndim >= 2 and "relative_attention_bias" not in name


def is_inside_a_layer(name: str, parameter: torch.Tensor) -> bool:
    """Whether the parameter is a matrix of an attention or a feed-forward: neither a vocabulary table nor a bias."""
    return is_decayed(name, parameter) and ".block." in name


# State as named tensors


def named_state(optimizer: torch.optim.Optimizer, model: NamedParameters) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The state as {"<parameter>/<key>": tensor}, and its description as plain JSON values.

    The tensors are those of the optimizer, not copies. A parameter that was never updated has none.
    """
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors = {
        f"{name_of[id(parameter)]}/{key}": value if torch.is_tensor(value) else torch.tensor(value, dtype=torch.int64)
        for group in optimizer.param_groups
        for parameter in group["params"]
        for key, value in optimizer.state.get(parameter, {}).items()
        if key not in EIGHT_BIT_TABLES
    }
    return tensors, _description(optimizer, model)


def load_named_state(
    optimizer: torch.optim.Optimizer, model: NamedParameters, tensors: Mapping[str, torch.Tensor], description: dict[str, Any]
) -> None:
    """Load a state from `named_state` into an optimizer that was built the same way; dtypes stay as saved.

    torch's own loading casts the state to the dtype of the parameter; this does not. A tensor that is already on the right
    device is used without a copy. The learning rate is not restored: it is a function of the update.

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
    fused = bool(optimizer.param_groups[0].get("fused"))
    state: dict[torch.Tensor, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition("/")
        parameter = parameter_of.get(owner)
        if parameter is None or not key or tuple(tensor.shape) not in _possible_shapes(parameter):
            raise ResumeMismatch("the optimizer state does not fit the model", where=name, hint=hint)
        # Fused kernels count on the device, all other optimizers on the CPU.
        on_cpu = tensor.ndim == 0 and not fused
        state.setdefault(parameter, {})[key] = tensor.detach().to("cpu" if on_cpu else parameter.device)
    optimizer.state.clear()
    is_eight_bit = type(optimizer).__name__ == "AdamW8bit"
    for owner_parameter, loaded in state.items():
        optimizer.state[owner_parameter] = _eight_bit_state(optimizer, loaded) if is_eight_bit else loaded


def _description(optimizer: torch.optim.Optimizer, model: NamedParameters) -> dict[str, Any]:
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        "optimizer": type(optimizer).__name__.lower(),
        "groups": [[name_of[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups],
    }


def _possible_shapes(parameter: torch.Tensor) -> set[tuple[int, ...]]:
    shape = tuple(parameter.shape)
    factored = {shape[:-1], (*shape[:-2], shape[-1])} if parameter.ndim >= 2 else set()
    return {(), shape, (-(-parameter.numel() // EIGHT_BIT_BLOCK_VALUES),)} | factored


# AdamW with 8-bit moments

EIGHT_BIT_BLOCK_VALUES = 256
EIGHT_BIT_TABLES = {"qmap1": "dynamic", "qmap2": "udynamic"}


def build_adamw8bit(groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    """AdamW8bit of bitsandbytes over these groups.

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


def _eight_bit_state(optimizer: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Add the lookup tables to a loaded state, on the device of its tensors."""
    state: dict[str, Any] = dict(tensors)
    state["step"] = int(tensors["step"])
    if "absmax1" in tensors:
        if not optimizer.name2qmap:
            optimizer.fill_qmap()
        for key, table in EIGHT_BIT_TABLES.items():
            optimizer.name2qmap[table] = optimizer.name2qmap[table].to(tensors["absmax1"].device)
            state[key] = optimizer.name2qmap[table]
    return state


# Adafactor

MIN_SQUARE = 1e-30
CLIP_RMS = 1.0
DECAY_POWER = -0.8


class Adafactor(torch.optim.Optimizer):
    """Adafactor with an absolute learning rate, no first moment and no parameter scaling.

    The second moment of a matrix is kept as the means of its rows and columns, in float32. Its decay is 1 - t**-0.8, and the
    update is clipped to a root mean square of 1. State per parameter: see `adafactor_update`.
    """

    def __init__(self, params: Iterable[Any], lr: float):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. A closure is refused: the loop owns forward and backward."""
        if closure is not None:
            raise ValueError("Adafactor does not support a closure")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    adafactor_update(parameter, parameter.grad, self.state[parameter], group["lr"])


class AdafactorInBackward(Adafactor):
    """Adafactor that updates each parameter as soon as the backward pass has its gradient, and then frees the gradient.

    Only the gradients of the vocabulary tables are kept longer, so memory is little more than weights and optimizer state.
    In return one backward pass is one update: no accumulation over micro-batches, no clipping by the global norm, which is
    known only at the end (Adafactor clips the update of each tensor), no loss scaler, and one process.

    After a non-finite gradient no further parameter is updated, but those before it were: the weights are then unusable,
    and the run must go back to a checkpoint.
    """

    def __init__(self, params: Iterable[Any], lr: float):
        super().__init__(params, lr)
        self.moved = 0
        self.failed: tuple[int, ...] | None = None
        self._squares: list[torch.Tensor] = []
        self._lr = lr
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(self._update)

    def begin(self, lr: float) -> None:
        """Prepare for one backward pass at this learning rate."""
        self.moved, self.failed, self._squares, self._lr = 0, None, [], lr
        for group in self.param_groups:
            group["lr"] = lr

    def end(self) -> float:
        """The global gradient norm of the pass."""
        return float(torch.stack(self._squares).sum().sqrt()) if self._squares else math.nan

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Refused: the backward pass is the update."""
        raise RuntimeError("AdafactorInBackward updates in the backward pass; step must not be called")

    @torch.no_grad()
    def _update(self, parameter: torch.Tensor) -> None:
        grad = parameter.grad
        if grad is None:
            return
        square = torch.linalg.vector_norm(grad, dtype=torch.float32).square()
        self._squares.append(square)
        if self.failed is None and math.isfinite(float(square)):  # a host sync for every tensor
            adafactor_update(parameter, grad, self.state[parameter], self._lr)
            self.moved += 1
        elif self.failed is None:
            self.failed = tuple(parameter.shape)
        parameter.grad = None


@torch.no_grad()
def adafactor_update(parameter: torch.Tensor, grad: torch.Tensor, state: dict[str, torch.Tensor], lr: float) -> None:
    """Update one parameter in place; the gradient is not changed.

    Args:
        parameter: of any shape; matrices are factored over their last two dimensions.
        grad: of the same shape.
        state: `count` (int64 scalar on the CPU) and `row`, `column` (float32 means of squares) or, for a vector,
            `square` (float32); empty before the first update.
        lr: absolute learning rate.
    """
    if not state:
        shape = tuple(grad.shape)
        shapes = {"row": shape[:-1], "column": (*shape[:-2], shape[-1])} if grad.ndim >= 2 else {"square": shape}
        state["count"] = torch.zeros((), dtype=torch.int64)
        for name, state_shape in shapes.items():
            state[name] = torch.zeros(state_shape, dtype=torch.float32, device=grad.device)
    state["count"] += 1
    decay = 1.0 - math.pow(int(state["count"]), DECAY_POWER)
    if grad.ndim < 2:
        square = grad.float().square().add_(MIN_SQUARE)
        scaled = state["square"].lerp_(square, 1.0 - decay).rsqrt().mul_(grad)
        clip = (scaled.square().mean().sqrt() / CLIP_RMS).clamp_(min=1.0)
        parameter.sub_((scaled / clip * lr).to(parameter.dtype))
        return
    _update_matrices(parameter, grad, state, decay, lr)


def _update_matrices(
    parameter: torch.Tensor, grad: torch.Tensor, state: dict[str, torch.Tensor], decay: float, lr: float
) -> None:
    rows, columns = grad.shape[-2:]
    block_rows = max(1, BLOCK_VALUES // columns)
    blocks = [slice(first, min(first + block_rows, rows)) for first in range(0, rows, block_rows)]
    column_sum = torch.zeros_like(state["column"])
    for block in blocks:
        square = grad[..., block, :].float().square().add_(MIN_SQUARE)
        state["row"][..., block].lerp_(square.mean(-1), 1.0 - decay)
        column_sum += square.sum(-2)
    state["column"].lerp_(column_sum / rows, 1.0 - decay)
    row_factor = (state["row"] / state["row"].mean(-1, keepdim=True)).rsqrt_()[..., None]
    column_factor = state["column"].rsqrt()[..., None, :]

    def scaled(block: slice) -> torch.Tensor:
        return (grad[..., block, :].float() * row_factor[..., block, :]).mul_(column_factor)

    total = torch.zeros((), dtype=torch.float32, device=grad.device)
    for block in blocks:
        total += scaled(block).square_().sum()
    factor = lr / ((total / grad.numel()).sqrt() / CLIP_RMS).clamp_(min=1.0)
    for block in blocks:
        parameter[..., block, :].sub_(scaled(block).mul_(factor).to(parameter.dtype))


# Muon

MUON_MOMENTUM = 0.95
MUON_QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of Jordan et al.: five iterations bring singular values from 0.002 up into 0.7 to 1.2."""
MUON_ITERATIONS = 5
"""Three cost two fifths less and did as well in 500 updates of the Chinese run, but learned the facts of the built-in notes
later: 0.31 of the terms after 400 updates, 0.95 with five."""
MUON_RMS = 0.2
MUON_STEP_BYTES = 20
"""Workspace per value of a block in float32 for square matrices; less for others."""


class Muon(torch.optim.Optimizer):
    """Muon for the matrices inside the layers, AdamW for the other parameters. State of a matrix: `momentum`, float32.

    The update of a matrix is its momentum with all singular values brought near 1, so directions that few examples need are
    learned as fast as the others (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"). It is
    scaled to the root mean square of AdamW's, so `optim.lr` keeps its meaning (Liu et al. 2025, "Muon is scalable for LLM
    training"). On the Chinese run it needs two thirds of AdamW's updates for the same loss (docs/results.md). It degrades
    models that were pretrained with Adam (arXiv 2605.10468), so the configuration refuses it for a checkpoint.

    Equal to torch.optim.Muon with adjust_lr_fn="match_rms_adamw" up to rounding. That one is not used, since its products are
    always bfloat16, also on hardware without bfloat16 instructions. CPU ms of a step on one thread, 6 + 6 layers:

    | d_model, d_ff | torch 2.13 | this, bf16 | this, fp32 |
    | --- | --- | --- | --- |
    | 128, 384 | 92 | 52 | 112 |
    | 256, 1024 | 490 | 245 | 740 |
    | 512, 1024 | 1,570 | 1,860 | 5,430 |
    | 128, 384, restricted to AVX2 | 6,500 | 6,100 | 440 |

    Matrices of the same shape are processed in one batch, which needs up to 80 MiB of workspace.

    Args:
        matrices: the parameter group that Muon updates; two-dimensional parameters.
        rest: AdamW over everything else; its groups come first.
        product_dtype: number format of the products; bfloat16 suffices and is faster where the device supports it.
    """

    def __init__(self, matrices: dict[str, Any], rest: torch.optim.AdamW, product_dtype: torch.dtype = torch.float32) -> None:
        super().__init__([matrices], {"lr": rest.defaults["lr"]})
        rest.state = self.state
        self.param_groups = [*rest.param_groups, *self.param_groups]
        self._rest, self._product_dtype = rest, product_dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. A closure is refused: the loop owns forward and backward."""
        if closure is not None:
            raise ValueError("Muon does not support a closure")
        self._rest.step()
        group = self.param_groups[-1]
        for block in _blocks([parameter for parameter in group["params"] if parameter.grad is not None]):
            self._update(block, group["lr"], group["weight_decay"])

    def _update(self, block: list[torch.Tensor], lr: float, weight_decay: float) -> None:
        momentum_KRC = torch.stack([_oriented(self._momentum(parameter)) for parameter in block])
        rate = lr * MUON_RMS * math.sqrt(momentum_KRC.shape[-1])
        for parameter, update_RC in zip(block, orthogonal(momentum_KRC, self._product_dtype), strict=True):
            parameter.mul_(1.0 - lr * weight_decay)
            _oriented(parameter).sub_(update_RC, alpha=rate)

    def _momentum(self, parameter: torch.Tensor) -> torch.Tensor:
        """Add the gradient to the momentum; return the Nesterov momentum."""
        grad, state = parameter.grad, self.state[parameter]
        assert grad is not None
        if not state:
            state["momentum"] = torch.zeros_like(grad, dtype=torch.float32)
        momentum = state["momentum"].mul_(MUON_MOMENTUM).add_(grad)
        return torch.add(grad, momentum, alpha=MUON_MOMENTUM)


def orthogonal(matrices_KRC: torch.Tensor, product_dtype: torch.dtype) -> torch.Tensor:
    """K matrices of R rows and C >= R columns with all singular values brought near 1, in float32; zeros stay zeros.

    Newton-Schulz iteration. Operations: MUON_ITERATIONS * (4 R C + 2 R R) R for each matrix.
    """
    norm_K11 = torch.linalg.vector_norm(matrices_KRC, dim=(1, 2), keepdim=True)
    x_KRC = (matrices_KRC / norm_K11.clamp_min(torch.finfo(torch.float32).tiny)).to(product_dtype)
    a, b, c = MUON_QUINTIC
    for _ in range(MUON_ITERATIONS):
        square_KRR = x_KRC @ x_KRC.mT
        polynomial_KRR = torch.baddbmm(square_KRR, square_KRR, square_KRR, beta=b, alpha=c)
        x_KRC = torch.baddbmm(x_KRC, polynomial_KRR, x_KRC, beta=a)
    return x_KRC.float()


def _oriented(matrix: torch.Tensor) -> torch.Tensor:
    """A view with at most as many rows as columns."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


def _blocks(parameters: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Group parameters of the same oriented shape, at most BLOCK_VALUES values or one matrix per block."""
    of_shape: dict[torch.Size, list[torch.Tensor]] = {}
    for parameter in parameters:
        of_shape.setdefault(_oriented(parameter).shape, []).append(parameter)
    for shape, alike in of_shape.items():
        size = max(1, BLOCK_VALUES // shape.numel())
        yield from (alike[first : first + size] for first in range(0, len(alike), size))
