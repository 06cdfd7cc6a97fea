"""The active vocabulary: reduce a model to the rows that a corpus can use, and merge them back into the full model.

mT5 has 250,112 rows, a corpus uses 15 to 30 thousand. An embedding row that never occurs has no gradient, so training the
active rows is equivalent, except that the softmax is over the active rows. An export has the full vocabulary again: trained
rows replaced, all others unchanged.

Shapes: V rows of the full vocabulary, A active rows, D model width.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from resilient_t5 import hub
from resilient_t5.errors import DataError
from resilient_t5.hub import CONFIG_FILE, read_json
from resilient_t5.model.embeddings import HEAD, SHARED, T5Model, is_tied, set_tables
from resilient_t5.model.load import SPECIAL_IDS, config_of, generation_of, read_tables
from resilient_t5.model.weights import find_weights, write_directory


@dataclass(frozen=True)
class FullTables:
    """Both vocabulary tables of the model before training, float32; `head_VD` is None when tied."""

    shared_VD: torch.Tensor
    head_VD: torch.Tensor | None


def tables_of(model: T5Model) -> FullTables:
    """The tables of a full model, copied."""
    head_VD = None if is_tied(model) else model.lm_head.weight.detach().clone()
    return FullTables(model.shared.weight.detach().clone(), head_VD)


def tables_from(name_or_path: str) -> FullTables:
    """The tables of a checkpoint, without loading the rest of it.

    Raises:
        DataError: not a complete checkpoint.
    """
    directory = hub.resolve(name_or_path, "model", setting="model.name_or_path")
    return FullTables(
        *read_tables(find_weights(directory), read_json(directory / CONFIG_FILE).get("tie_word_embeddings") is False)
    )


def cut_vocabulary(model: T5Model, active_to_full: np.ndarray) -> None:
    """Reduce both tables to the active rows, in place; afterwards the model uses active ids.

    Tied stays tied and untied stays untied. Pad, end and decoder start are renumbered in the configuration. The tables are new
    parameters: build the optimizer afterwards. If all rows are active nothing is changed.

    Args:
        model: with its full vocabulary.
        active_to_full: (A,) ascending full ids; position k is active id k.

    Raises:
        DataError: the ids are not ascending, exceed the model's rows, or lack a special id of the model.
    """
    rows = model.shared.weight.shape[0]
    _check_active(active_to_full, rows)
    if len(active_to_full) == rows:
        return
    special_ids = {key: _active_id(active_to_full, key, getattr(model.config, key)) for key in SPECIAL_IDS}
    index_A = torch.from_numpy(np.asarray(active_to_full, dtype=np.int64)).to(model.shared.weight.device)
    head_AD = None if is_tied(model) else nn.Parameter(model.lm_head.weight.detach()[index_A])
    set_tables(model, nn.Parameter(model.shared.weight.detach()[index_A]), head_AD)
    # transformers generates from generation_config, and computes from the configurations.
    for config in (model.config, model.encoder.config, model.decoder.config, model.generation_config):
        for key, value in special_ids.items():
            setattr(config, key, value)


def write_back(model: T5Model, original: FullTables, active_to_full: np.ndarray, directory: Path) -> None:
    """Write an export with the full vocabulary: trained rows replaced, all others as in `original`.

    Rows that were not active are bitwise unchanged if the original is stored in float32, and equal in value if in 16 bits.
    The model itself is not changed. Needs memory for one more pair of full tables.

    Args:
        model: after `cut_vocabulary` with the same `active_to_full`, or full.
        original: tables of the model before the cut, from `tables_from` or `tables_of`.
        active_to_full: (A,) ascending full ids.
        directory: has no model yet; the caller publishes it by a rename.

    Raises:
        DataError: model, original and ids do not match.
        RunDirectoryError, DiskFull, StorageError: as in `load.save_model`.
    """
    rows = original.shared_VD.shape[0]
    _check_active(active_to_full, rows)
    if len(active_to_full) != model.shared.weight.shape[0] or is_tied(model) != (original.head_VD is None):
        raise DataError(
            f"the model has {model.shared.weight.shape[0]} rows and is {'tied' if is_tied(model) else 'untied'}; "
            f"{len(active_to_full)} active ids and {'tied' if original.head_VD is None else 'untied'} tables were given",
            hint="Use the checkpoint that the run started from",
        )
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    tensors[SHARED] = _merge(original.shared_VD, tensors[SHARED], active_to_full)
    if original.head_VD is not None:
        tensors[HEAD] = _merge(original.head_VD, tensors[HEAD], active_to_full)
    full = {"vocab_size": rows}
    if len(active_to_full) != rows:
        full |= {key: int(active_to_full[getattr(model.config, key)]) for key in SPECIAL_IDS}
    ids = {key: full[key] for key in SPECIAL_IDS if key in full}
    write_directory(directory, config_of(model) | full, generation_of(model) | ids, tensors)


def _merge(original_VD: torch.Tensor, trained_AD: torch.Tensor, active_to_full: np.ndarray) -> torch.Tensor:
    merged_VD = original_VD.detach().cpu().clone()
    merged_VD[torch.from_numpy(np.asarray(active_to_full, dtype=np.int64))] = trained_AD.cpu().to(merged_VD.dtype)
    return merged_VD


def _check_active(active_to_full: np.ndarray, rows: int) -> None:
    ids = np.asarray(active_to_full)
    usable = ids.ndim == 1 and len(ids) > 0 and np.issubdtype(ids.dtype, np.integer)
    if not usable or bool((np.diff(ids.astype(np.int64)) <= 0).any()) or int(ids[0]) < 0 or int(ids[-1]) >= rows:
        raise DataError(
            f"the active vocabulary does not fit a model of {rows} rows",
            hint="Prepare the corpus again with the tokenizer of this model",
        )


def _active_id(active_to_full: np.ndarray, key: str, full_id: int) -> int:
    position = int(np.searchsorted(active_to_full, full_id))
    if position == len(active_to_full) or int(active_to_full[position]) != full_id:
        raise DataError(f"the active vocabulary lacks the {key} {full_id}", hint="Prepare the corpus again")
    return position
