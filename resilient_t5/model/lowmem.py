"""AdamW with its two moments in 8 bits, from bitsandbytes (extra `lowmem`), which is imported only when it is chosen.

Moments of matrices of 4,096 values and more take one byte each, with a float32 scale for every 256 of them; smaller ones
stay in float32. Its state has a plain number and two tables that are the same for all parameters: the number is kept as a
tensor, the tables are made anew.
"""

from typing import Any

import torch

from resilient_t5.errors import ConfigError

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
