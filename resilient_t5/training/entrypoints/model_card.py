"""README.md of an export: what the model is, what it was trained on, what it restores, how to use it."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from resilient_t5.config.schema import Config, flat
from resilient_t5.data.store.corpus_report import SHARE
from resilient_t5.restoration.restoration_config import RestorationConfig

FIGURES = (
    ("term restoration rate, exact", "term_rate"),
    ("the same, normalised (NFKC, case, spaces)", "term_rate_normalised"),
    ("the same, near (similarity 0.8 or more)", "term_rate_near"),
    ("terms seen in training", "term_rate_seen"),
    ("terms not seen in training", "term_rate_unseen"),
    ("majority guess (baseline)", "majority_rate"),
    ("copy of a visible term (baseline)", "copy_rate"),
    ("spans written exactly", "span_match"),
    ("character error rate in the gaps", "cer_masked"),
    ("malformed outputs", "format_error_share"),
)
SNIPPET = """\
import re

from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

directory = {directory}
text = {text}
model = AutoModelForSeq2SeqLM.from_pretrained(directory)
tokenizer = AutoTokenizer.from_pretrained(directory)
source = tokenizer(text, return_tensors="pt").input_ids
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
CORRECTING_SNIPPET = """\
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

directory = {directory}
text = {text}
model = AutoModelForSeq2SeqLM.from_pretrained(directory)
tokenizer = AutoTokenizer.from_pretrained(directory)
source = tokenizer(text, return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(source)[0], skip_special_tokens=True))
"""
CHINESE_EXAMPLE = "诊断：2型糖尿病。处方：<extra_id_0>；疗程：共3个月。"
ENGLISH_EXAMPLE = "Diagnosis: type 2 diabetes. Prescription: <extra_id_0>; duration: 3 months."
WIDE_BYTES = 2.2
"""Bytes of UTF-8 a character, above which most of a text is Chinese, Japanese or the like."""
LIMITS = """## Limits

A fill is a guess from its surroundings, and its probability is the model's own. In medical text a person must check every
one against the source. The figures above hold for text like that of the training.
"""


@dataclass(frozen=True)
class CardFacts:
    """What the card tells."""

    which: str
    """`best` or `last`."""
    record: Mapping[str, Any] | None
    """Update, loss and term restoration of these weights, as in summary.json; None when they were never evaluated."""
    before: Mapping[str, Any] | None
    """The same of the model before training."""
    figures: Mapping[str, Any]
    """The restoration row of these weights; empty when none was measured."""
    report: Mapping[str, Any]
    """report.json of the store."""
    update: int
    target_tokens: int
    command: str
    license: str | None


def model_card(facts: CardFacts, config: Config, usage: RestorationConfig) -> str:
    """The card as Markdown with the front matter that model hubs read."""
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
    return "\n".join(part for part in parts if part)


def _front(facts: CardFacts, config: Config) -> str:
    lines = ["library_name: transformers", "tags: [t5, span-restoration]"]
    if facts.license is not None:
        lines.insert(0, f"license: {json.dumps(facts.license)}")
    base = config.model.name_or_path
    if base is not None:
        lines.append(f"base_model: {json.dumps(base, ensure_ascii=False)}")
    return "---\n" + "\n".join(lines) + "\n---\n"


def _what(facts: CardFacts, config: Config, usage: RestorationConfig) -> str:
    base = config.model.name_or_path
    origin = f"fine-tuned from `{base}`" if base else f"trained from scratch (preset {config.model.preset})"
    licence = (
        f"Licence: {facts.license}." if facts.license else "Licence: not stated; `bin/export --license NAME` writes it here."
    )
    rows = "the whole vocabulary" if usage.trained_ids is None else f"{len(usage.trained_ids):,} vocabulary rows"
    return (
        f"The {facts.which} weights of a run of resilient_t5, {origin}: update {facts.update:,}, "
        f"{facts.target_tokens:,} target tokens, {rows} trained. {licence}\n"
    )


def snippet(directory: str, text: str) -> str:
    """Python code that fills the gaps `<extra_id_k>` of `text` with an export, by transformers alone, and prints the text.

    A gap that the model gives no answer to stays as it is. Of the white space at the border of an answer that is left out
    which would stand beside white space of the text.
    """
    return SNIPPET.format(directory=_literal(directory), text=_literal(text))


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _use(report: Mapping[str, Any], usage: RestorationConfig) -> str:
    is_wide = report.get("bytes", 0) > WIDE_BYTES * report.get("characters", 0)
    text = CHINESE_EXAMPLE if is_wide else ENGLISH_EXAMPLE
    if usage.task == "correct":
        damaged = text.replace("<extra_id_0>", "")
        code = CORRECTING_SNIPPET.format(directory=_literal("."), text=_literal(damaged))
        shell = "bin/restore DIRECTORY text.txt"
        habit = f"The model writes the whole text anew, up to {usage.max_source_tokens} tokens at a time."
    else:
        code = snippet(".", text)
        shell = "bin/restore DIRECTORY text.txt --mark '[?]' --json"
        habit = (
            f"The model was trained on inputs of up to {usage.max_source_tokens} tokens with up to {usage.max_sentinels} gaps, "
            "numbered from `<extra_id_0>` in the order of the text."
        )
    return (
        "## Use\n\nWith `transformers`, in this directory or with its path as `directory`:\n\n"
        f"```python\n{code}```\n\n{habit}\n\n"
        "With `resilient_t5`, which takes texts of any length and gives the probability of each answer:\n\n"
        f"```\n{shell}\n```\n\n`restoration.json` holds the lengths and the ids that were trained.\n"
    )


def _figures(facts: CardFacts, config: Config) -> str:
    row, lines = facts.figures, ["## What it restores\n"]
    if facts.record is not None:
        before = f" (before training {facts.before['loss']:.4f})" if facts.before else ""
        lines.append(f"Evaluation loss {facts.record['loss']:.4f} nats per target token{before}.\n")
    if not row or not row.get("n"):
        return "\n".join([*lines, "No term restoration was measured for these weights.\n"])
    rate, low, high = (_percent(row.get(key)) for key in ("term_rate", "term_rate_low", "term_rate_high"))
    lines += [
        f"On {row['n']:,} masked terms of {row.get('n_documents', 0):,} held-out documents: **{rate}** written back exactly, "
        f"95 % interval {low} to {high} (bootstrap over documents)"
        + (f"; before training {_percent(facts.before['term_restoration'])}" if facts.before else "")
        + ".\n",
        "| figure | value |",
        "| --- | --- |",
        *(f"| {name} | {_percent(row[key])} |" for name, key in FIGURES if row.get(key) is not None),
    ]
    return "\n".join(lines) + "\n\n" + _measuring(facts, config)


def _measuring(facts: CardFacts, config: Config) -> str:
    """Where the figures come from, and how to measure them again."""
    examples = config.evaluation.restore_examples
    return (
        f"Measured at update {facts.update:,} by the command under *Training*, on up to {examples:,} held-out examples. "
        "To measure again, where the run directory is:\n\n"
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
    lines = [f"| {name} | {_number(value)} |" for name, value in rows if value is not None]
    return "## Data\n\n| of the corpus | |\n| --- | --- |\n" + "\n".join(lines) + "\n"


def _settings(config: Config) -> str:
    defaults = flat(Config())
    changed = [f"{key}: {value!r}" for key, value in flat(config).items() if value != defaults[key]]
    return "Settings that differ from the defaults:\n\n```\n" + "\n".join(changed).replace("```", "'''") + "\n```\n"


def _percent(value: Any) -> str:
    return f"{100 * value:.1f} %" if isinstance(value, (int, float)) else "not measured"


def _number(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_number(item)}" for key, item in value.items())
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)
