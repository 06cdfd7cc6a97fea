"""Characters without a piece: counted, reported, refused. Run: python -m pytest tests/data/store/test_unknown.py"""

import dataclasses
import io
import json
from collections import Counter

import numpy as np
import pytest
import sentencepiece

from resilient_t5.config.schema import Config, DataConfig, TokenizerConfig
from resilient_t5.data.corpus.sample import generate_notes
from resilient_t5.data.store.corpus_report import (
    Tally,
    check_unknown,
    most_frequent,
    readable,
    unknown_characters,
    unknown_warning,
)
from resilient_t5.data.store.prepare import prepare
from resilient_t5.data.store.store import Store
from resilient_t5.data.tokenizer.tokenizer import Encoded, EncodedBatch, train_tokenizer
from resilient_t5.errors import DataError

KNOWN = "abcdefghijklmnopqrstuvwxyz.,"
ENGLISH = [
    f"the {animal} has {thing}, dose {dose}." for animal in ("cat", "dog") for thing in ("fever", "gout") for dose in "abcdefgh"
]
FIGURES = ("unknown_character_share", "unknown_characters")


@pytest.fixture(scope="module")
def english(tmp_path_factory):
    """A directory with a `spiece.model` without byte pieces, that knows small Latin letters, full stop and comma."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*ENGLISH, KNOWN]),
        model_writer=written,
        vocab_size=80,
        character_coverage=1.0,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece="<pad>",
        eos_piece="</s>",
        unk_piece="<unk>",
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("english")
    (path / "spiece.model").write_bytes(written.getvalue())
    return path


@pytest.fixture
def make(tmp_path, english):
    """Writes lines (and pairs) and returns the configuration over them."""

    def write(lines, pairs=(), **tokenizer):
        folder = tmp_path / "text"
        folder.mkdir(exist_ok=True)
        (folder / "text.txt").write_text("\n".join(lines), encoding="utf-8")
        if pairs:
            rows = [json.dumps({"inputs": source, "targets": target}) for source, target in pairs]
            (folder / "pairs.jsonl").write_text("\n".join(rows), encoding="utf-8")
        data = DataConfig(train=str(folder), document="line", validation_share=0.1, max_source_tokens=60, max_target_tokens=60)
        return Config(data=data, tokenizer=TokenizerConfig(str(english), **tokenizer))

    return write


def mixed(chinese_of_ten):
    """English lines of which so many in ten end in two Chinese words."""
    return [
        f"{line} {chr(97 + number // 26)}{chr(97 + number % 26)}" + (" 发热 痛风" if number % 10 < chinese_of_ten else "")
        for number in range(20)
        for line in ENGLISH
    ]


def counted(texts):
    """Visible characters, and those that the tokenizer has no piece for, counted one by one."""
    visible = [character for text in texts for character in text if not character.isspace()]
    return len(visible), Counter(character for character in visible if character not in KNOWN)


def with_limit(config, share):
    """`config` with another limit."""
    return dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, max_unknown_share=share))


def test_the_report_counts_the_characters_that_unknown_tokens_stand_for(make, tmp_path):
    """Text and pairs: the share of visible characters and the most frequent ones, as a count by hand gives them."""
    pairs = [("dose <extra_id_0> 热<extra_id_1>.", "<extra_id_0> fever, {x} <extra_id_1> 痛")]
    pairs += [(f"the {word} <extra_id_0>", "<extra_id_0> gout") for word in ("cat", "dog", "~~~")]
    lines = [*mixed(1), "¼ CUP, a　b\tc"]
    store = prepare(make(lines, pairs), tmp_path / "store")
    texts = [*lines, *(part.replace("<extra_id_0>", " ").replace("<extra_id_1>", " ") for pair in pairs for part in pair)]
    visible, unknown = counted(texts)
    assert store.report["unknown_character_share"] == sum(unknown.values()) / visible
    order = sorted(unknown.items(), key=lambda item: (-item[1], item[0]))
    assert len(order) > 10 and list(store.report["unknown_characters"].items()) == order[:10]
    assert store.report["unknown_share"] < sum(unknown.values()) / visible  # two neighbours are one token
    assert "发" in readable(store.report)


def test_each_unknown_token_is_looked_up_in_its_own_text():
    """At the beginning of a text, after an empty text, and without the white space of a token."""
    texts = ["热a", "", "痛 风b", "c"]
    ids, starts, ends = np.array([2, 5, 2, 6, 7]), np.array([0, 1, 0, 3, 0]), np.array([1, 2, 3, 4, 1])
    batch = EncodedBatch(Encoded(ids, starts, ends), np.array([0, 2, 2, 4, 5]))
    assert unknown_characters(texts, batch, 2) == Counter("热痛风")


def test_a_tokenizer_with_byte_pieces_has_no_unknown_characters(make, tmp_path):
    """Nothing is lost, so the share is 0, no character is listed and nothing is warned of, at the strictest limit too."""
    config = make([*mixed(5), "😀"])
    train_tokenizer([note.text for note in generate_notes(60, 5)], 600, 0.98).save(tmp_path / "bytes")
    tokenizer = TokenizerConfig(str(tmp_path / "bytes"), max_unknown_share=0.0)
    report = prepare(dataclasses.replace(config, tokenizer=tokenizer), tmp_path / "store").report
    assert report["unknown_character_share"] == 0.0 and report["unknown_characters"] == {}
    assert unknown_warning(report) is None and "every character has a piece" in readable(report)


def test_a_corpus_above_the_limit_is_refused_and_leaves_nothing(make, tmp_path):
    """The message has the share, the characters, the setting and the cures; neither a store nor a temporary directory stays."""
    config = make(["发热痛风" * 3 + line for line in mixed(0)])
    with pytest.raises(DataError) as refused:
        prepare(config, tmp_path / "store")
    for words in ("%", "发", "痛", "tokenizer.max_unknown_share 0.2", "mT5", "tokenizer.train_vocab_size"):
        assert words in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_a_higher_limit_allows_the_corpus_and_a_lower_one_refuses_the_existing_store(make, tmp_path):
    """The limit is no part of what the store is: the same store opens under any limit at or above its share."""
    config = make(mixed(10))
    share = prepare(with_limit(config, 1.0), tmp_path / "store").report["unknown_character_share"]
    assert 0.1 < share < 0.3
    before = (tmp_path / "store" / "meta.json").read_bytes()
    assert prepare(with_limit(config, share), tmp_path / "store").report["unknown_character_share"] == share
    with pytest.raises(DataError, match="have no piece") as refused:
        prepare(with_limit(config, share / 2), tmp_path / "store")
    assert refused.value.where == str(tmp_path / "store")
    assert (tmp_path / "store" / "meta.json").read_bytes() == before


def test_a_store_of_an_older_version_opens(make, tmp_path):
    """Its report lacks the figures: it is opened at every limit, without a warning."""
    config = make(mixed(10))
    store = prepare(with_limit(config, 1.0), tmp_path / "store")
    report = {key: value for key, value in store.report.items() if key not in FIGURES}
    content = json.dumps(report).encode()
    (store.directory / "report.json").write_bytes(content)
    meta = json.loads((store.directory / "meta.json").read_text(encoding="utf-8"))
    meta["files"]["report.json"]["bytes"] = len(content)
    (store.directory / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    assert prepare(with_limit(config, 0.0), tmp_path / "store").report == report
    assert unknown_warning(Store.open(tmp_path / "store").report) is None and "not counted" in readable(report)


def unknown_figures(unknown, visible):
    """Figures of a report over so many visible characters."""
    return Tally(np.zeros(0), visible=visible, unknown_characters=Counter(unknown)).unknown_figures()


def test_a_warning_begins_above_one_per_cent():
    """It names the characters and what to do; at 1 % there is none."""
    assert unknown_warning(unknown_figures({"热": 1}, 100)) is None
    warning = unknown_warning(unknown_figures({"热": 1, "痛": 2}, 100))
    assert warning is not None
    for words in ("3 %", "痛 2, 热 1", "mT5", "tokenizer.train_vocab_size"):
        assert words in warning


def test_a_share_at_the_limit_is_allowed():
    """Refused is what lies above."""
    check_unknown(unknown_figures({"热": 20}, 100), 0.2, "here")
    with pytest.raises(DataError):
        check_unknown(unknown_figures({"热": 21}, 100), 0.2, "here")


def test_characters_that_cannot_be_seen_are_named_by_code_point():
    """A zero-width space, a combining mark and a private-use character; a letter stays a letter."""
    figures = unknown_figures({"\u200b": 4, "\u0301": 3, "\ue000": 2, "ж": 1}, 100)
    assert most_frequent(figures) == "U+200B 4, U+0301 3, U+E000 2, ж 1"
