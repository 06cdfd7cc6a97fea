"""Export a run: a directory with the full-vocabulary model, tokenizer and model card, for transformers.

`export_run` exports from a checkpoint, also of a run that was interrupted or is still training, and does not modify the run.
A directory is written under a temporary name, loaded once with transformers, tested on one probe example, and then renamed.
"""

import json
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.utils import logging as library_logging

from resilient_t5.checkpoint.manager import CheckpointManager, Loaded
from resilient_t5.checkpoint.reader import load_checkpoint
from resilient_t5.checkpoint.retention import find_best
from resilient_t5.config.schema import Config, non_default_settings
from resilient_t5.data.dataset import Dataset
from resilient_t5.data.store.corpus_report import SHARE
from resilient_t5.data.store.prepare import store_directory
from resilient_t5.data.store.store import Store
from resilient_t5.data.tokenizer.tokenizer import TextTokenizer
from resilient_t5.errors import DataError, NoValidCheckpoint, RunDirectoryError
from resilient_t5.files import fsync_path, fsync_tree
from resilient_t5.hub import GENERATION_FILE
from resilient_t5.model.embeddings import T5Model
from resilient_t5.model.precision import Precision
from resilient_t5.model.vocabulary import FullTables, write_back
from resilient_t5.restoration.decoder import generate
from resilient_t5.restoration.restoration_config import RestorationConfig
from resilient_t5.training.build import build_trained_model, original_tables, trained_ids
from resilient_t5.training.entrypoints.summary import percent
from resilient_t5.training.run_directory import ENVIRONMENT
from resilient_t5.training.saver import load_model_tensors
from resilient_t5.training.telemetry.metrics_log import read_rows

Which = Literal["best", "last"]

PROBE_TOKENS = 48
PROBE_ANSWER_TOKENS = 24
PROBE_TEXTS = (
    "<extra_id_0> 2 mg <extra_id_1>, then <extra_id_2>",
    "hyper<extra_id_0>sion; dose:<extra_id_1>.",
    "\u8bca\u65ad\uff1a<extra_id_0>\u3002\u5904\u65b9\uff1a <extra_id_1> \uff1b<extra_id_2><extra_id_3>",
)
TIE = 1e-3
"""Relative difference of logits below which two kernels may rank tokens differently."""
FIGURES = (
    ("term restoration rate, exact", "term_rate"),
    ("term restoration rate, normalised (NFKC, case, spaces)", "term_rate_normalised"),
    ("term restoration rate, near (similarity of at least 0.8)", "term_rate_near"),
    ("term restoration rate, terms seen in training", "term_rate_seen"),
    ("term restoration rate, terms not seen in training", "term_rate_unseen"),
    ("majority guess (baseline)", "majority_rate"),
    ("copy of a visible term (baseline)", "copy_rate"),
    ("spans restored exactly", "span_match"),
    ("character error rate in the gaps", "cer_masked"),
    ("malformed outputs", "format_error_share"),
)
LOADING_CODE = """\
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

directory = {directory}
text = {text}
model = AutoModelForSeq2SeqLM.from_pretrained(directory)
tokenizer = AutoTokenizer.from_pretrained(directory)
source = tokenizer(text, return_tensors="pt").input_ids
"""
FILLING_CODE = """\
output = tokenizer.decode(model.generate(source)[0]).split("</s>")[0]
_, *answered = re.split(r"<extra_id_(\\d+)>", output)
answers = dict(zip(answered[::2], answered[1::2]))
filled, *gaps = re.split(r"<extra_id_(\\d+)>", text)
for number, after in zip(gaps[::2], gaps[1::2]):
    answer = answers.get(number, "").rstrip()
    if not filled or filled[-1].isspace():
        answer = answer.lstrip()
    filled += (answer or f"<extra_id_{{number}}>") + after
print(filled)
"""
CORRECTING_CODE = "print(tokenizer.decode(model.generate(source)[0], skip_special_tokens=True))\n"
CHINESE_EXAMPLE = "诊断：2型糖尿病。处方：<extra_id_0>；疗程：共3个月。"
ENGLISH_EXAMPLE = "Diagnosis: type 2 diabetes. Prescription: <extra_id_0>; duration: 3 months."
WIDE_BYTES = 2.2
"""UTF-8 bytes per character above which the example is Chinese, since most of the text is CJK."""
LIMITS = """## Limits

A fill is a prediction from the context, and its probability is the model's own estimate. In medical text a person must check
every fill against the source. The metrics above apply to text similar to the training data.
"""


@dataclass(frozen=True, eq=False)
class ExportParts:
    """The inputs of an export.

    model: the live model with the trained vocabulary rows; not modified.
    trained_ids: full ids of these rows, ascending.
    original: the vocabulary tables before training, for all other rows.
    probe: full ids of a source for the check, including the end token.
    """

    model: T5Model
    trained_ids: np.ndarray
    original: FullTables
    tokenizer: TextTokenizer
    usage: RestorationConfig
    probe: np.ndarray


@dataclass(frozen=True)
class CardFacts:
    """Contents of a model card.

    which: `best` or `last`.
    record: update, loss and term restoration of these weights, as in summary.json; None if they were not evaluated.
    before: the same before training.
    figures: restoration row of these weights; empty if not measured.
    report: report.json of the store.
    """

    which: str
    record: Mapping[str, Any] | None
    before: Mapping[str, Any] | None
    figures: Mapping[str, Any]
    report: Mapping[str, Any]
    update: int
    target_tokens: int
    command: str
    license: str | None


def export_run(config: Config, which: Which, directory: Path, license: str | None) -> str:
    """Export the run in `config.run.dir` to `directory`; returns the name of the checkpoint.

    Raises:
        RunDirectoryError: the directory contains no run.
        NoValidCheckpoint: the run has no intact checkpoint.
        DataError: the store or the pretrained model is missing, or the export fails its check.
        DiskFull, StorageError: a write failed.
    """
    run_directory = Path(config.run.dir)
    loaded = find_checkpoint(config, run_directory, which)
    store = Store.open(store_directory(config))
    corpus = Dataset.over(store, config)
    model = build_trained_model(config, corpus, torch.device("cpu"), Precision("fp32", "an export"), checkpointing=False)
    with torch.no_grad():
        load_model_tensors(model, loaded.tensors["model"])
    facts = facts_of(store, run_directory, which, loaded.state["run"], license)
    parts = export_parts(config, store, model, trained_ids(corpus, model), original_tables(config, store))
    write_export(parts, model_card(facts, config, parts.usage), directory)
    return loaded.name


def find_checkpoint(config: Config, run_directory: Path, which: Which) -> Loaded:
    """The best or newest intact checkpoint; damaged checkpoints are skipped and not moved."""
    environment = run_directory / ENVIRONMENT
    try:
        run_id = str(json.loads(environment.read_text(encoding="utf-8"))["run_id"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunDirectoryError(
            f"{run_directory} is not a run directory", where=str(environment), hint="Give the run.dir of bin/train"
        ) from error
    manager = CheckpointManager(run_directory, run_id=run_id, settings=config.checkpoint, audit=lambda event, fields: None)
    candidates = list(manager.committed())
    while candidates:
        # Before the first evaluation there is no best checkpoint; export the newest one.
        candidate = (find_best(candidates, None) if which == "best" else None) or candidates[0]
        try:
            return load_checkpoint(manager.directory / candidate.name)
        except NoValidCheckpoint:
            candidates.remove(candidate)
    raise NoValidCheckpoint(
        f"{run_directory} has no intact checkpoint", where=str(manager.directory), hint="Continue training, then export again"
    )


def facts_of(store: Store, run_directory: Path, which: str, state: Mapping[str, Any], license: str | None = None) -> CardFacts:
    """Contents of the model card for the weights at `state`, the counters in the format of state.json.

    Reads only what the card needs, so that checkpoints of other versions can be exported.
    """
    try:
        command = str(json.loads((run_directory / ENVIRONMENT).read_text(encoding="utf-8"))["command"])
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{ENVIRONMENT} cannot be read: {error}", where=str(run_directory)) from error
    record = state["last"] if state["last"] is not None and state["last"]["update"] == state["update"] else None
    return CardFacts(
        which=which,
        record=record,
        before=state["before"],
        figures=restoration_row(run_directory, state["update"]),
        report=store.report,
        update=state["update"],
        target_tokens=state["target_tokens"],
        command=command,
        license=license,
    )


def restoration_row(run_directory: Path, update: int) -> dict[str, Any]:
    """The newest restoration row of metrics.jsonl for this update; empty if there is none."""
    rows = [row for row in read_rows(run_directory / "metrics.jsonl") if row["kind"] == "restoration"]
    return next((row for row in reversed(rows) if row["update"] == update), {})


def export_parts(config: Config, store: Store, model: T5Model, trained_ids: np.ndarray, original: FullTables) -> ExportParts:
    """The inputs of an export of a run over `store`."""
    builtin = any(name.startswith("builtin:") for name in config.data.train_inputs())  # each of its notes is a line
    usage = RestorationConfig(
        task=config.corruption.task,
        max_source_tokens=config.data.max_source_tokens,
        max_target_tokens=config.data.max_target_tokens,
        max_sentinels=config.corruption.max_sentinels,
        document="line" if builtin else config.data.document,
        trained_ids=None if len(trained_ids) == len(original.shared_VD) else trained_ids.astype(np.int64),
    )
    return ExportParts(model, trained_ids, original, store.tokenizer, usage, _probe(store, usage))


def _probe(store: Store, usage: RestorationConfig) -> np.ndarray:
    """Full ids of the beginning of the first validation example, with one gap if the task is `restore`."""
    split = store.validation
    tokens = np.asarray(split.tokens[: int(split.offsets[1])][: min(PROBE_TOKENS, usage.max_source_tokens - 1)])
    ids = store.active_to_full[tokens.astype(np.int64)].astype(np.int64)
    if usage.task == "restore" and len(ids) > 2:
        middle = len(ids) // 2
        ids = np.concatenate([ids[:middle], store.tokenizer.sentinel_ids[:1], ids[middle + 1 :]])
    return np.append(ids, store.tokenizer.eos_id)


def write_export(parts: ExportParts, card: str, directory: Path) -> None:
    """Write and check an export, then replace `directory` by it. After an error the previous export is unchanged.

    Raises:
        DataError: transformers cannot load the export, or its answer differs from the answer of the run's own decoder.
        DiskFull, StorageError: a write failed.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.with_name(f".tmp-{directory.name}")
    previous = directory.with_name(f".trash-{directory.name}")
    for leftover in (temporary, previous):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        write_back(parts.model, parts.original, parts.trained_ids, temporary)
        parts.tokenizer.save(temporary)
        parts.usage.write(temporary)
        _extend_generation(temporary, parts.usage, len(parts.original.shared_VD))
        (temporary / "README.md").write_text(card, encoding="utf-8")
        check_export(parts, temporary)
        fsync_tree(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if directory.exists():
        os.rename(directory, previous)
    os.rename(temporary, directory)
    fsync_path(directory.parent)
    shutil.rmtree(previous, ignore_errors=True)


def check_export(parts: ExportParts, directory: Path) -> None:
    """Load `directory` with transformers and compare token ids and the answer to the probe with the run's own.

    Raises:
        DataError: they differ.
    """
    ours = _own_answer(parts)
    _check_tokenizer(parts.tokenizer, directory)
    with _without_side_effects():
        model = AutoModelForSeq2SeqLM.from_pretrained(str(directory), local_files_only=True, dtype=torch.float32)
        source_1S = torch.from_numpy(parts.probe)[None]
        with torch.no_grad():
            theirs = model.generate(source_1S, max_new_tokens=PROBE_ANSWER_TOKENS, num_beams=1, do_sample=False)[0, 1:]
        answer = theirs[: len(ours)].tolist()
        if answer != ours and not _is_tie(model, source_1S, ours, parts):
            raise _export_error(f"transformers answers {answer} to the probe, the run's own decoder {ours}", directory)


def _check_tokenizer(ours: TextTokenizer, directory: Path) -> None:
    """Compare AutoTokenizer with the tokenizer of the training: special ids, and texts with gaps."""
    theirs = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    special = (theirs.pad_token_id, theirs.eos_token_id)
    if special != (ours.pad_id, ours.eos_id):
        raise _export_error(f"padding and end token ids are {special}, not {(ours.pad_id, ours.eos_id)}", directory)
    for text in PROBE_TEXTS:
        expected = [*ours.encode_marked(text).tolist(), ours.eos_id]
        actual = theirs(text)["input_ids"]
        if actual != expected:
            raise _export_error(f"the tokenizer gives {actual} for {text!r}, the training used {expected}", directory)


def _own_answer(parts: ExportParts) -> list[int]:
    """Greedy answer of the live model to the probe, as full ids."""
    model, device = parts.model, parts.model.shared.weight.device
    source_1S = torch.from_numpy(np.searchsorted(parts.trained_ids, parts.probe))[None].to(device)
    eos_id, pad_id = np.searchsorted(parts.trained_ids, [parts.tokenizer.eos_id, parts.tokenizer.pad_id]).tolist()
    limit = PROBE_ANSWER_TOKENS
    ids = generate(model, source_1S, torch.ones_like(source_1S), max_new_tokens=limit, eos_id=eos_id, pad_id=pad_id)
    assert ids is not None, "generation without a stop signal"
    return parts.trained_ids[ids[0]].tolist()


def _is_tie(model: Any, source_1S: torch.Tensor, ours: list[int], parts: ExportParts) -> bool:
    """Whether each token of our answer also has, up to rounding, the highest logit of all trained tokens in transformers."""
    start = int(model.config.decoder_start_token_id)
    with torch.no_grad():
        logits_TV = model(input_ids=source_1S, decoder_input_ids=torch.tensor([[start, *ours[:-1]]])).logits[0]
    best_T = logits_TV[:, torch.from_numpy(parts.trained_ids.astype(np.int64))].max(-1).values
    chosen_T = logits_TV.gather(1, torch.tensor(ours)[:, None])[:, 0]
    return bool((chosen_T >= best_T - TIE * best_T.abs().clamp_min(1.0)).all())


def _extend_generation(directory: Path, usage: RestorationConfig, rows: int) -> None:
    """Limit `generate` to the trained target length and to trained token ids."""
    path = directory / GENERATION_FILE
    # The longest target includes its end token, which is not needed where the length limit ends the answer.
    content = json.loads(path.read_text(encoding="utf-8")) | {"max_new_tokens": usage.max_target_tokens - 1}
    if usage.trained_ids is not None:
        content["suppress_tokens"] = np.setdiff1d(np.arange(rows), usage.trained_ids).tolist()
    path.write_text(json.dumps(content, sort_keys=True) + "\n", encoding="utf-8")


def _export_error(reason: str, directory: Path) -> DataError:
    return DataError(
        f"the export failed its check: {reason}",
        where=str(directory),
        hint="The checkpoints are intact; check the versions of transformers and tokenizers, then run bin/export",
    )


@contextmanager
def _without_side_effects() -> Iterator[None]:
    """Restore torch's global random state, which loading a model changes, and hide its progress bar."""
    state, is_enabled = torch.get_rng_state(), library_logging.is_progress_bar_enabled()
    library_logging.disable_progress_bar()
    try:
        yield
    finally:
        torch.set_rng_state(state)
        if is_enabled:
            library_logging.enable_progress_bar()


def model_card(facts: CardFacts, config: Config, usage: RestorationConfig) -> str:
    """The model card (README.md) as Markdown with front matter for model hubs."""
    parts = [
        _front(facts, config),
        f"# T5 that {'corrects' if usage.task == 'correct' else 'restores'} damaged text\n",
        _what(facts, config, usage),
        _use(facts.report, usage),
        _figures(facts, config),
        _data(facts.report),
        "## Training\n\n```\n" + facts.command.replace("```", "'''") + "\n```\n\n" + _settings(config),
        LIMITS,
    ]
    return "\n".join(parts)


def _front(facts: CardFacts, config: Config) -> str:
    lines = ["library_name: transformers", "tags: [t5, span-restoration]"]
    if facts.license is not None:
        lines.insert(0, f"license: {json.dumps(facts.license)}")
    if config.model.name_or_path is not None:
        lines.append(f"base_model: {json.dumps(config.model.name_or_path, ensure_ascii=False)}")
    return "---\n" + "\n".join(lines) + "\n---\n"


def _what(facts: CardFacts, config: Config, usage: RestorationConfig) -> str:
    base = config.model.name_or_path
    origin = f"fine-tuned from `{base}`" if base else f"trained from scratch (preset {config.model.preset})"
    licence = f"Licence: {facts.license}." if facts.license else "Licence: not specified; `bin/export --license NAME` adds it."
    rows = "the whole vocabulary" if usage.trained_ids is None else f"{len(usage.trained_ids):,} vocabulary rows"
    return (
        f"The {facts.which} weights of a run of resilient_t5, {origin}: update {facts.update:,}, "
        f"{facts.target_tokens:,} target tokens, {rows} trained. {licence}\n"
    )


def snippet(directory: str, text: str) -> str:
    """Python code that fills the gaps `<extra_id_k>` of `text` with transformers alone and prints the result.

    A gap without an answer stays as it is. White space of an answer is dropped next to white space of the text.
    """
    return _format_code("import re\n\n" + LOADING_CODE + FILLING_CODE, directory, text)


def _format_code(template: str, directory: str, text: str) -> str:
    return template.format(directory=json.dumps(directory, ensure_ascii=False), text=json.dumps(text, ensure_ascii=False))


def _use(report: Mapping[str, Any], usage: RestorationConfig) -> str:
    is_wide = report.get("bytes", 0) > WIDE_BYTES * report.get("characters", 0)
    text = CHINESE_EXAMPLE if is_wide else ENGLISH_EXAMPLE
    if usage.task == "correct":
        damaged = text.replace("<extra_id_0>", "")
        code = _format_code(LOADING_CODE + CORRECTING_CODE, ".", damaged)
        shell = "bin/restore DIRECTORY text.txt"
        note = f"The model rewrites the whole text, up to {usage.max_source_tokens} tokens at a time."
    else:
        code = snippet(".", text)
        shell = "bin/restore DIRECTORY text.txt --mark '[?]' --json"
        note = (
            f"The model was trained on inputs of up to {usage.max_source_tokens} tokens with up to {usage.max_sentinels} gaps, "
            "numbered from `<extra_id_0>` in text order."
        )
    return (
        "## Use\n\nWith `transformers`, in this directory or with its path as `directory`:\n\n"
        f"```python\n{code}```\n\n{note}\n\n"
        "With `resilient_t5`, for texts of any length and with the probability of each answer:\n\n"
        f"```\n{shell}\n```\n\n`restoration.json` contains the trained lengths and token ids.\n"
    )


def _figures(facts: CardFacts, config: Config) -> str:
    row, lines = facts.figures, ["## Evaluation\n"]
    if facts.record is not None:
        before = f" (before training {facts.before['loss']:.4f})" if facts.before else ""
        lines.append(f"Evaluation loss {facts.record['loss']:.4f} nats per target token{before}.\n")
    if not row or not row.get("n"):
        return "\n".join([*lines, "No term restoration was measured for these weights.\n"])
    rate, low, high = (percent(row.get(key)) for key in ("term_rate", "term_rate_low", "term_rate_high"))
    lines += [
        f"On {row['n']:,} masked terms of {row.get('n_documents', 0):,} held-out documents: **{rate}** restored exactly, "
        f"95 % interval {low} to {high} (bootstrap over documents)"
        + (f"; before training {percent(facts.before['term_restoration'])}" if facts.before else "")
        + ".\n",
        "| metric | value |",
        "| --- | --- |",
        *(f"| {name} | {percent(row[key])} |" for name, key in FIGURES if row.get(key) is not None),
    ]
    examples = config.evaluation.restore_examples
    return "\n".join(lines) + (
        f"\n\nMeasured at update {facts.update:,} by the command under *Training*, on up to {examples:,} held-out examples. "
        "To reproduce, in the working directory of the run:\n\n"
        f"```\nbin/evaluate {shlex.quote(config.run.dir)} --which {facts.which} --examples {examples}\n```\n"
    )


def _data(report: Mapping[str, Any]) -> str:
    terms, vocabulary = report.get("terms", {}), report.get("active_vocabulary", {})
    rows = [
        ("bytes", report.get("bytes")),
        ("characters", report.get("characters")),
        ("tokens", report.get("tokens")),
        ("tokens per character", report.get("tokens_per_character")),
        ("unknown tokens, share", report.get("unknown_share")),
        ("characters without a piece, share", report.get(SHARE)),
        ("examples", report.get("examples")),
        ("terms listed", terms.get("listed")),
        ("terms found", terms.get("found")),
        ("term occurrences", terms.get("occurrences")),
        ("vocabulary rows in use", vocabulary.get("size")),
        ("vocabulary rows", vocabulary.get("full_size")),
    ]
    lines = [
        f"| {name} | {f'{value:,}' if isinstance(value, int) else f'{value:.4g}'} |"
        for name, value in rows
        if value is not None
    ]
    return "## Data\n\n| of the corpus | |\n| --- | --- |\n" + "\n".join(lines) + "\n"


def _settings(config: Config) -> str:
    changed = "\n".join(f"{key}: {value!r}" for key, value in non_default_settings(config).items())
    return "Settings that differ from the defaults:\n\n```\n" + changed.replace("```", "'''") + "\n```\n"
