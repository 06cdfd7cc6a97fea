"""Compiled layers (`hardware.compile`): each block by itself, for all lengths at once.

A stack of equal blocks gives one graph for the first and one for the others, so four in all, and lengths that change
bring no new ones. The in-place vocabulary gradients stay outside. Checkpointing breaks the graphs and is excluded.
Compiled dropout draws other numbers from the same seed, and products may round otherwise: the run is another draw.
"""

import importlib.util
import os
import shutil

import torch

from resilient_t5.errors import ConfigError
from resilient_t5.model.embeddings import T5Model

COMPILERS = ("c++", "g++", "clang++", "cl")


def compile_layers(model: T5Model, device: torch.device) -> None:
    """Compile every block of both stacks when it first runs, which takes about a minute; names and parameters stay.

    Raises:
        ConfigError: this machine has no C++ compiler, or on a GPU no triton.
    """
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else list(COMPILERS)
    if not any(shutil.which(name) for name in wanted):
        raise ConfigError(f"hardware.compile: no C++ compiler here ({', '.join(wanted)}); install one, or set it to false")
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ConfigError("hardware.compile: triton is not installed, and a GPU's kernels need it; set it to false")
    for block in (*model.encoder.block, *model.decoder.block):
        block.compile(dynamic=True)
