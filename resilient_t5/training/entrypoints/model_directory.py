"""An export: the model with its full vocabulary, its tokenizer and its card, in a directory that transformers loads.

Written beside its place, loaded once through transformers and made to restore one probe, and only then renamed to its
name; an export that differs from the weights it was made of is never seen.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.utils import logging as library_logging

from resilient_t5.config.schema import Config
from resilient_t5.data.store.store import Store
from resilient_t5.data.tokenizer.tokenizer import TextTokenizer
from resilient_t5.errors import DataError
from resilient_t5.model.embeddings import T5Model
from resilient_t5.model.vocabulary import FullTables, write_back
from resilient_t5.restoration.decoder import generate
from resilient_t5.restoration.restoration_config import RestorationConfig

PROBE_TOKENS = 48
PROBE_ANSWER_TOKENS = 24
GENERATION_FILE = "generation_config.json"
PROBE_TEXTS = (
    "<extra_id_0> 2 mg <extra_id_1>, then <extra_id_2>",
    "hyper<extra_id_0>sion; dose:<extra_id_1>.",
    "\u8bca\u65ad\uff1a<extra_id_0>\u3002\u5904\u65b9\uff1a <extra_id_1> \uff1b<extra_id_2><extra_id_3>",
)
# Two kernels may order tokens anew whose logits lie this near to one another.
TIE = 1e-3


@dataclass(frozen=True, eq=False)
class Exported:
    """What an export is made of.

    model: live, with the rows that were trained; it is read only.
    trained_ids: full ids of these rows, ascending.
    original: the vocabulary tables from before training, for all other rows.
    probe: full ids of a source that the check restores, end mark included.
    """

    model: T5Model
    trained_ids: np.ndarray
    original: FullTables
    tokenizer: TextTokenizer
    usage: RestorationConfig
    probe: np.ndarray


def exported(config: Config, store: Store, model: T5Model, trained_ids: np.ndarray, original: FullTables) -> Exported:
    """The parts of an export of a run over `store`."""
    usage = usage_of(config, trained_ids, len(original.shared_VD))
    return Exported(model, trained_ids, original, store.tokenizer, usage, probe_of(store, usage))


def usage_of(config: Config, trained_ids: np.ndarray, rows: int) -> RestorationConfig:
    """How a model of this run is to be used; the notes of the built-in corpus are lines."""
    builtin = any(name.startswith("builtin:") for name in config.data.train_inputs())
    return RestorationConfig(
        task=config.corruption.task,
        max_source_tokens=config.data.max_source_tokens,
        max_target_tokens=config.data.max_target_tokens,
        max_sentinels=config.corruption.max_sentinels,
        document="line" if builtin else config.data.document,
        trained_ids=None if len(trained_ids) == rows else trained_ids.astype(np.int64),
    )


def probe_of(store: Store, usage: RestorationConfig) -> np.ndarray:
    """The beginning of the first held-out example, with one gap for a model that fills gaps; full ids."""
    split = store.validation
    tokens = np.asarray(split.tokens[: int(split.offsets[1])][: min(PROBE_TOKENS, usage.max_source_tokens - 1)])
    ids = store.active_to_full[tokens.astype(np.int64)].astype(np.int64)
    if usage.task == "restore" and len(ids) > 2:
        middle = len(ids) // 2
        ids = np.concatenate([ids[:middle], store.tokenizer.sentinel_ids[:1], ids[middle + 1 :]])
    return np.append(ids, store.tokenizer.eos_id)


def write_export(parts: Exported, card: str, directory: Path) -> None:
    """Write an export to `directory`, whole and checked or not at all; what stood there is replaced.

    Raises:
        DataError: transformers does not read back what was written, or answers otherwise than the run's own decoder.
        DiskFull, StorageError: the file system refuses. In all cases the former export is still there.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.with_name(f".tmp-{directory.name}")
    former = directory.with_name(f".trash-{directory.name}")
    for left_over in (temporary, former):
        shutil.rmtree(left_over, ignore_errors=True)
    try:
        write_back(parts.model, parts.original, parts.trained_ids, temporary)
        parts.tokenizer.save(temporary)
        parts.usage.write(temporary)
        _extend_generation(temporary, parts.usage, len(parts.original.shared_VD))
        (temporary / "README.md").write_text(card, encoding="utf-8")
        check_export(parts, temporary)
        for path in temporary.iterdir():
            _fsync(path)
        _fsync(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if directory.exists():
        os.rename(directory, former)
    os.rename(temporary, directory)
    _fsync(directory.parent)
    shutil.rmtree(former, ignore_errors=True)


def check_export(parts: Exported, directory: Path) -> None:
    """Load `directory` as a user of transformers does and restore the probe.

    Raises:
        DataError: tokenizer ids, or an answer, differ.
    """
    ours = _own_answer(parts)
    _check_tokenizer(parts.tokenizer, directory)
    with _without_trace():
        model = AutoModelForSeq2SeqLM.from_pretrained(str(directory), local_files_only=True, dtype=torch.float32)
        source_1S = torch.from_numpy(parts.probe)[None]
        with torch.no_grad():
            theirs = model.generate(source_1S, max_new_tokens=PROBE_ANSWER_TOKENS, num_beams=1, do_sample=False)[0, 1:]
        answer = theirs[: len(ours)].tolist()
        if answer != ours and not _is_tie(model, source_1S, ours, parts):
            raise _refused(f"transformers answers {answer} to the probe, the run's own decoder {ours}", directory)


def _check_tokenizer(ours: TextTokenizer, directory: Path) -> None:
    """Compare AutoTokenizer over `directory` with the tokenizer of the training: special ids, and texts with gaps."""
    theirs = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    special = (theirs.pad_token_id, theirs.eos_token_id)
    if special != (ours.pad_id, ours.eos_id):
        raise _refused(f"its tokenizer has padding and end mark {special}, not {(ours.pad_id, ours.eos_id)}", directory)
    for text in PROBE_TEXTS:
        wanted = [*ours.encode_marked(text).tolist(), ours.eos_id]
        found = theirs(text)["input_ids"]
        if found != wanted:
            raise _refused(f"its tokenizer gives {found} for {text!r}, where training saw {wanted}", directory)


def _own_answer(parts: Exported) -> list[int]:
    """Greedy answer of the live model to the probe, in full ids."""
    model, device = parts.model, parts.model.shared.weight.device
    place = np.searchsorted(parts.trained_ids, parts.probe)
    source_1S = torch.from_numpy(place)[None].to(device)
    places = np.searchsorted(parts.trained_ids, [parts.tokenizer.eos_id, parts.tokenizer.pad_id]).tolist()
    limit = PROBE_ANSWER_TOKENS
    ids = generate(model, source_1S, torch.ones_like(source_1S), max_new_tokens=limit, eos_id=places[0], pad_id=places[1])
    assert ids is not None, "nothing asks this generation to stop"
    return parts.trained_ids[ids[0]].tolist()


def _is_tie(model: Any, source_1S: torch.Tensor, ours: list[int], parts: Exported) -> bool:
    """Whether every token of our answer is, up to rounding, the best trained one for transformers too."""
    start = int(model.config.decoder_start_token_id)
    with torch.no_grad():
        logits_TV = model(input_ids=source_1S, decoder_input_ids=torch.tensor([[start, *ours[:-1]]])).logits[0]
    best_T = logits_TV[:, torch.from_numpy(parts.trained_ids.astype(np.int64))].max(-1).values
    chosen_T = logits_TV.gather(1, torch.tensor(ours)[:, None])[:, 0]
    return bool((chosen_T >= best_T - TIE * best_T.abs().clamp_min(1.0)).all())


def _extend_generation(directory: Path, usage: RestorationConfig, rows: int) -> None:
    """Let plain `generate` write answers of the trained length, and never an id whose row was not trained."""
    path = directory / GENERATION_FILE
    # The last token of the longest target is its end mark, which need not be written where the length ends the answer.
    content = json.loads(path.read_text(encoding="utf-8")) | {"max_new_tokens": usage.max_target_tokens - 1}
    if usage.trained_ids is not None:
        content["suppress_tokens"] = np.setdiff1d(np.arange(rows), usage.trained_ids).tolist()
    path.write_text(json.dumps(content, sort_keys=True) + "\n", encoding="utf-8")


def _refused(why: str, directory: Path) -> DataError:
    return DataError(
        f"the export does not read back as it should: {why}",
        where=str(directory),
        hint="The checkpoints are untouched; check the versions of transformers and tokenizers, then run bin/export",
    )


@contextmanager
def _without_trace() -> Iterator[None]:
    """Loading a model draws from torch's global stream and draws a bar; neither may show in a run."""
    state, shown = torch.get_rng_state(), library_logging.is_progress_bar_enabled()
    library_logging.disable_progress_bar()
    try:
        yield
    finally:
        torch.set_rng_state(state)
        if shown:
            library_logging.enable_progress_bar()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
