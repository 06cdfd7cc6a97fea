"""The four global random states (python, numpy, torch on the CPU, torch on each CUDA device) as tensors and JSON.

The data pipeline does not draw from them. They are saved so that any other draw is the same after a resume.
"""

import random
from typing import Any

import numpy as np
import torch

from resilient_t5.errors import ResumeMismatch

PYTHON, NUMPY, TORCH = "python", "numpy", "torch"
CUDA_PREFIX = "cuda:"


def start(seed: int) -> None:
    """Seed all global random states, so that two runs with the same seed have the same ones."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def capture() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """All global random states as (tensors, JSON).

    Tensors: `python` int64 (625,), `numpy` int64 (624,), `torch` uint8, and `cuda:i` uint8 for each device, if CUDA is in
    use. The JSON holds the rest, such as the cached second value of a pair of normal draws.

    Raises:
        TypeError: numpy's global generator is not MT19937.
    """
    version, words, pending = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)
    if numpy_state["bit_generator"] != "MT19937":
        raise TypeError(f"numpy's global generator is {numpy_state['bit_generator']}, not MT19937")
    tensors = {
        PYTHON: torch.tensor(words, dtype=torch.int64),
        NUMPY: torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
        TORCH: torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():
        tensors |= {f"{CUDA_PREFIX}{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    rest = {
        "python_version": version,
        "python_pending": pending,
        "numpy_position": int(numpy_state["state"]["pos"]),
        "numpy_has_pending": int(numpy_state["has_gauss"]),
        "numpy_pending": float(numpy_state["gauss"]),
    }
    return tensors, rest


def restore(tensors: dict[str, torch.Tensor], rest: dict[str, Any]) -> list[str]:
    """Restore the states that `capture` returned.

    Returns:
        Names of states that exist only in the checkpoint or only on this machine, such as `cuda:1`; the run is then not
        bitwise the same.

    Raises:
        ResumeMismatch: a state is missing, or does not fit the generator of this version of python, numpy or torch.
    """
    present = {f"{CUDA_PREFIX}{index}" for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)}
    saved = {name for name in tensors if name.startswith(CUDA_PREFIX)}
    try:
        words = tuple(tensors[PYTHON].tolist())
        if tensors[NUMPY].shape != (624,):
            raise ValueError(f"numpy's state has shape {tuple(tensors[NUMPY].shape)}, not (624,)")
        random.setstate((rest["python_version"], words, rest["python_pending"]))
        np.random.set_state(
            {
                "bit_generator": "MT19937",
                "state": {"key": tensors[NUMPY].numpy().astype(np.uint32), "pos": rest["numpy_position"]},
                "has_gauss": rest["numpy_has_pending"],
                "gauss": rest["numpy_pending"],
            }
        )
        torch.set_rng_state(tensors[TORCH])
        for name in sorted(saved & present):
            torch.cuda.set_rng_state(tensors[name], int(name.removeprefix(CUDA_PREFIX)))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ResumeMismatch(
            f"a saved random state does not fit this version of python, numpy or torch ({error})",
            hint="Continue the run with the versions in its environment.json",
        ) from error
    return sorted(saved ^ present)
