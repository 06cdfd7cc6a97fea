"""Report of a prepared corpus: input, result, whether its size is sufficient, and characters unknown to the tokenizer.

Characters without a piece are counted, reported, warned about, and refused where they are too many. The share is one of
characters, not of tokens: adjacent unknown characters become one `<unk>`, so the share of tokens does not show how much text is
lost. White space is not counted.
"""

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from resilient_t5.data.terms import TermList
from resilient_t5.data.tokenizer.tokenizer import EncodedBatch
from resilient_t5.errors import DataError
from resilient_t5.host_memory import peak_mib

SHARE = "unknown_character_share"
UNKNOWN_CHARACTERS = "unknown_characters"
LISTED = 10
WORTH_SHOWING = 1e-4
WORTH_A_WARNING = 0.01


@dataclass
class Tally:
    """Counters of a pass over the corpus."""

    term_counts: np.ndarray
    characters: int = 0
    tokens: int = 0
    unknown: int = 0
    pairs: int = 0
    empty_pairs: int = 0
    truncated: int = 0
    chunked: int = 0
    widened: int = 0
    cut_terms: int = 0
    visible: int = 0
    """Characters that are not white space."""
    unknown_characters: Counter[str] = field(default_factory=Counter)
    """Characters without a piece, with how often each occurs."""

    def count_characters(self, texts: Sequence[str], encoded: EncodedBatch | None, unk_id: int) -> None:
        """Count visible and unknown characters of `texts`; `encoded` is None when no character is unknown."""
        self.visible += sum(len("".join(text.split())) for text in texts)
        if encoded is not None:
            self.unknown_characters.update(unknown_characters(texts, encoded, unk_id))

    def unknown_figures(self) -> dict[str, Any]:
        """Entries of `report.json`: the share of unknown characters, and the most frequent ones."""
        order = sorted(self.unknown_characters.items(), key=lambda item: (-item[1], item[0]))
        share = self.unknown_characters.total() / max(self.visible, 1)
        return {SHARE: share, UNKNOWN_CHARACTERS: dict(order[:LISTED])}


def unknown_characters(texts: Sequence[str], batch: EncodedBatch, unk_id: int) -> Counter[str]:
    """Count the characters that unknown tokens replace."""
    tokens = batch.tokens
    unknown = np.flatnonzero(tokens.ids == unk_id)
    owners = np.searchsorted(batch.offsets, unknown, side="right") - 1
    spans = zip(owners.tolist(), tokens.starts[unknown].tolist(), tokens.ends[unknown].tolist(), strict=True)
    found = Counter("".join(texts[owner][start:end] for owner, start, end in spans))
    return Counter({character: count for character, count in found.items() if not character.isspace()})


def most_frequent(report: Mapping[str, Any]) -> str:
    """Most frequent unknown characters with their counts; invisible ones as code points."""
    return ", ".join(f"{_shown(character)} {count:,}" for character, count in report[UNKNOWN_CHARACTERS].items())


def unknown_warning(report: Mapping[str, Any]) -> str | None:
    """Warning when more than 1 % of the characters have no piece, else None; also None for a report without the figure."""
    share = report.get(SHARE, 0.0)
    if share <= WORTH_A_WARNING:
        return None
    return (
        f"{percent(share)} of the corpus' characters have no piece in this tokenizer, so the model can neither read nor write"
        f" them (most frequent: {most_frequent(report)}); take a model with a tokenizer for this script, such as mT5, or train"
        " a tokenizer for a model from scratch (tokenizer.train_vocab_size)"
    )


def check_unknown(report: Mapping[str, Any], max_share: float, where: str) -> None:
    """Refuse a corpus with too many unknown characters; a report without the figure, of an older version, passes.

    Args:
        report: the content of `report.json`, or its figures from `Tally.unknown_figures`.
        max_share: `tokenizer.max_unknown_share`.
        where: the corpus or store, for the message.
    """
    share = report.get(SHARE, 0.0)
    if share > max_share:
        raise DataError(
            f"{percent(share)} of the corpus' characters have no piece in this tokenizer, which is above"
            f" tokenizer.max_unknown_share {max_share:g}; most frequent: {most_frequent(report)}",
            where=where,
            hint="Take a model with a tokenizer for this script, such as mT5, train a tokenizer for a model from scratch"
            " (tokenizer.train_vocab_size), or raise tokenizer.max_unknown_share.",
        )


def percent(share: float) -> str:
    """A share in per cent, with three digits."""
    return f"{100 * share:.3g} %"


def _shown(character: str) -> str:
    # A combining mark would be drawn on the character before it.
    seen = character.isprintable() and not unicodedata.category(character).startswith("M")
    return character if seen else f"U+{ord(character):04X}"


TOP_TERMS = 20
# Million bytes of Chinese medical text from which span restoration worked, and worked reliably.
ALIGNED_MEGABYTES = 25
STABLE_MEGABYTES = 256


def build_report(
    tally: Tally,
    corpus: dict[str, Any],
    counts: dict[str, dict[str, int]],
    listed: TermList,
    *,
    vocabulary: tuple[int, int],
    examples_per_update: int,
    seconds: tuple[float, float],
) -> dict[str, Any]:
    """The content of `report.json`.

    Args:
        corpus: `CorpusCounts` as a dict.
        counts: examples, documents, tokens, terms and with_term of each split.
        listed: the terms by id, and what was dropped from their list.
        vocabulary: active ids, and all ids.
        seconds: of the preparation, and of training the tokenizer.
    """
    terms = listed.terms
    train, validation = counts["train"], counts["validation"]
    examples = train["examples"] + validation["examples"]
    occurrences = tally.term_counts
    order = [i for i in np.argsort(-occurrences, kind="stable").tolist() if occurrences[i] > 0]
    return {
        "bytes": corpus["bytes"],
        "characters": tally.characters,
        "tokens": tally.tokens,
        "tokens_per_character": tally.tokens / max(tally.characters, 1),
        "unknown_share": tally.unknown / max(tally.tokens, 1),
        **tally.unknown_figures(),
        "documents": train["documents"] + validation["documents"],
        "examples": train["examples"],
        "validation_examples": validation["examples"],
        "validation_documents": validation["documents"],
        "pairs": tally.pairs,
        "empty_pairs_dropped": tally.empty_pairs,
        "truncated_share": tally.truncated / max(examples, 1),
        "chunked_documents_share": tally.chunked / max(train["documents"] + validation["documents"], 1),
        "terms": {
            "listed": len(terms),
            "found": len(order),
            "occurrences": train["terms"] + validation["terms"],
            "examples_with_term_share": (train["with_term"] + validation["with_term"]) / max(examples, 1),
            "blanks_dropped": listed.blanks_dropped,
            "duplicates_dropped": listed.duplicates_dropped,
            "widened": tally.widened,
            "cut_by_chunks": tally.cut_terms,
            "per_term": {terms[i]: int(occurrences[i]) for i in order},
        },
        "active_vocabulary": {"size": vocabulary[0], "full_size": vocabulary[1]},
        "updates_per_epoch": train["examples"] / examples_per_update,
        "scale": scale_reading(corpus["bytes"]),
        "corpus": corpus,
        "seconds": seconds[0],
        "tokenizer_seconds": seconds[1],
        "megabytes_per_s": corpus["bytes"] / 1e6 / max(seconds[0], 1e-9),
        "peak_memory_mib": peak_mib(include_children=True),
    }


def scale_reading(size_bytes: int) -> str:
    """Describe what a corpus of this size is sufficient for."""
    megabytes = size_bytes / 1e6
    size = f"{megabytes:.1f} MB"
    rule = (
        f"about {ALIGNED_MEGABYTES} MB of Chinese align terminology, about {STABLE_MEGABYTES} MB give stable domain restoration"
    )
    if megabytes < ALIGNED_MEGABYTES * 0.9:
        return (
            f"{size}: {megabytes / ALIGNED_MEGABYTES:.0%} of what aligns terminology ({rule}); take it as a trial, or add text"
        )
    if megabytes < STABLE_MEGABYTES * 0.9:
        times, share = megabytes / ALIGNED_MEGABYTES, megabytes / STABLE_MEGABYTES
        return f"{size}: enough to align terminology ({times:.1f} times), {share:.0%} of stable domain restoration ({rule})"
    return f"{size}: enough for stable domain restoration ({rule})"


def readable(report: dict[str, Any]) -> str:
    """Format the report for the console."""
    terms, vocabulary, corpus = report["terms"], report["active_vocabulary"], report["corpus"]
    top = ", ".join(f"{term} {count:,}" for term, count in list(terms["per_term"].items())[:TOP_TERMS])
    rows = [
        ("text", f"{report['bytes']:,} bytes, {report['characters']:,} characters, {report['documents']:,} documents"),
        ("dropped", _dropped(corpus)),
        ("tokens", f"{report['tokens']:,}, {report['tokens_per_character']:.3f} a character, "
                   f"unknown {report['unknown_share']:.4%}"),
        ("unknown", _unknown(report)),
        ("examples", f"{report['examples']:,} to train on, {report['validation_examples']:,} to evaluate on "
                     f"({report['validation_documents']:,} documents); truncated {report['truncated_share']:.2%}; "
                     f"documents cut into chunks {report['chunked_documents_share']:.2%}"),
        ("terms", f"{terms['listed']:,} listed ({terms['duplicates_dropped']:,} duplicates dropped), {terms['found']:,} found, "
                  f"{terms['occurrences']:,} occurrences; in "
                  f"{terms['examples_with_term_share']:.1%} of the examples; widened to whole tokens {terms['widened']:,}, "
                  f"lost at cuts {terms['cut_by_chunks']:,}"),
        ("most frequent", top or "none"),
        ("vocabulary", f"{vocabulary['size']:,} of {vocabulary['full_size']:,} ids active"),
        ("epoch", f"{report['updates_per_epoch']:,.1f} updates"),
        ("scale", report["scale"]),
        ("time", f"{report['seconds']:.1f} s, {report['megabytes_per_s']:.2f} MB/s, tokenizer "
                 f"{report['tokenizer_seconds']:.1f} s in addition; peak memory {report['peak_memory_mib']:,.0f} MiB"),
    ]  # fmt: skip
    return "\n".join(f"{name:>14}  {text}" for name, text in rows)


def _unknown(report: dict[str, Any]) -> str:
    if SHARE not in report:
        return "not counted by the version that prepared this store"
    if not report[UNKNOWN_CHARACTERS]:
        return "none; every character has a piece"
    return f"{report[SHARE]:.4%} of the characters that are not white space; most frequent: {most_frequent(report)}"


def _dropped(corpus: dict[str, Any]) -> str:
    named = ", ".join(f"{name} {count:,}" for name, count in sorted(corpus.get("control_characters", {}).items()))
    parts = [
        f"{count:,} {key.removesuffix('_dropped').replace('_', ' ')}"
        + (f" ({named})" if key == "control_characters_dropped" else "")
        for key, count in corpus.items()
        if key.endswith("_dropped") and count
    ]
    columns = [f"{path}: {', '.join(names)}" for path, names in corpus.get("columns_taken", {}).items()]
    return ("; ".join(parts) or "nothing") + "".join(f"; columns taken of {entry}" for entry in columns)
