"""Tiny real models and batches of examples of unequal length for the tests of `resilient_t5.model`."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from resilient_t5.config.sections import ModelConfig
from resilient_t5.model.embeddings import T5Model
from resilient_t5.model.layers import install_lean_layers
from resilient_t5.model.load import SpecialIds, build_model

SPECIAL = SpecialIds(pad_id=0, eos_id=1, decoder_start_id=0)
SIZES: dict[str, Any] = {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 2}
PRESET = {"t5": "tiny", "mt5": "mt5-small"}
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Several test runs share the machine."""
    torch.set_num_threads(1)


class ExactNorm(torch.nn.Module):
    """T5's norm in the dtype of its input; transformers' takes the mean of squares in float32 even of a float64 model."""

    weight: torch.Tensor
    variance_epsilon: float

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """x / rms(x) * weight."""
        return self.weight * hidden_states * (hidden_states.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()


@pytest.fixture
def make_model() -> Callable[..., T5Model]:
    """(kind t5 tied | mt5 untied, rows, dtype, dropout) -> a model away from its first weights (norms 1, queries 0).

    It has lean layers; its own forward pass is that of transformers, in float64 with exact norms.
    """

    def make(kind: str, *, rows: int = 203, dtype: torch.dtype = torch.float32, dropout: float = 0.0, seed: int = 1) -> T5Model:
        settings = ModelConfig(preset=PRESET[kind], dropout=dropout, **SIZES)  # type: ignore[arg-type]
        model = build_model(settings, vocabulary_rows=rows, special=SPECIAL, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "layer_norm" in name:
                    parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
                elif name.endswith("SelfAttention.q.weight"):
                    parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        install_lean_layers(model)
        for module in model.modules() if dtype == torch.float64 else ():
            if type(module).__name__.endswith("LayerNorm"):
                module.__class__ = ExactNorm
        return model.to(dtype)

    return make


@pytest.fixture
def make_examples() -> Callable[..., list[tuple[list[int], list[int]]]]:
    """(count, rows, seed) -> (source ids, target ids) of 3 to 14 and 1 to 9 tokens."""

    def make(count: int, *, rows: int = 203, seed: int = 0) -> list[tuple[list[int], list[int]]]:
        generator = torch.Generator().manual_seed(seed)

        def ids(least: int, most: int) -> list[int]:
            length = int(torch.randint(least, most + 1, (), generator=generator))
            return [*torch.randint(2, rows, (length,), generator=generator).tolist(), 1]

        return [(ids(2, 13), ids(0, 8)) for _ in range(count)]

    return make


@pytest.fixture
def collate() -> Callable[[list[tuple[list[int], list[int]]]], Batch]:
    """Examples -> (source, mask, labels), padded to the longest of them, labels with -100."""

    def pad(rows: list[list[int]], value: int) -> torch.Tensor:
        width = max(map(len, rows))
        return torch.tensor([row + [value] * (width - len(row)) for row in rows])

    def make(examples: list[tuple[list[int], list[int]]]) -> Batch:
        source_BS = pad([source for source, _ in examples], 0)
        mask_BS = pad([[1] * len(source) for source, _ in examples], 0)
        return source_BS, mask_BS, pad([target for _, target in examples], -100)

    return make


@pytest.fixture
def gradients_of() -> Callable[[T5Model], dict[str, torch.Tensor]]:
    """A model -> copies of all its gradients, which are dropped."""

    def take(model: T5Model) -> dict[str, torch.Tensor]:
        taken = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return taken

    return take


@pytest.fixture
def relative_error() -> Callable[[dict[str, torch.Tensor], dict[str, torch.Tensor]], float]:
    """Two sets of gradients -> relative error of the whole gradient, or a tenth of that of the worst parameter if larger."""

    def worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
        assert found.keys() == expected.keys()
        wrong = {name: float((found[name] - expected[name]).norm()) for name in expected}
        right = {name: float(expected[name].norm()) for name in expected}
        whole = math.hypot(*wrong.values()) / math.hypot(*right.values())
        return max(whole, max(wrong[name] / right[name] for name in expected) / 10)

    return worst
