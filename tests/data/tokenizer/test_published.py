"""Published tokenizer directories: the ids of AutoTokenizer, gaps included, or an error with the reason.

Run: python -m pytest tests/data/tokenizer/test_published.py
"""

import json
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from resilient_t5.data.corpus.sample import generate_notes
from resilient_t5.data.corruption.gap_encoding import build_gap_encoding, reachable_after_gaps
from resilient_t5.data.tokenizer.sentencepiece import SPACE
from resilient_t5.data.tokenizer.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer
from resilient_t5.errors import DataError
from tests.published import LAYOUTS, MT5_CONFIG, random_weights, write_layout

ROOT = Path(__file__).parents[3]
NOTES = [note.text for note in generate_notes(200, 77)]
HARD = [
    "e\u0301 \ufb01ne \uff21\uff22\u3000x \u2460 5\u338e",
    "a\u2581b \u200bc \ufeffd \U0001f469\u200d\u2695\ufe0f e\u00a0f",
    "line\nbreak\r\n\tand tab  two",
    "\u8bca\u65ad\uff1a2\u578b\u7cd6\u5c3f\u75c5\u3002 \u5904\u65b9 \uff1b",
    "hyphen-ated, (brackets) [x] {y} <z> 50%",
    "......  !!!!!  \u2026\u2026\u2026",
]


def gapped(count, seed):
    """Texts with one to six gaps in any place, with and without white space at their sides."""
    draws = random.Random(seed)
    for _ in range(count):
        text = draws.choice([*NOTES, *HARD])
        for _ in range(draws.randint(1, 6)):
            place = draws.choice([0, len(text), draws.randint(0, len(text))])
            sides = [draws.choice(["", "", " ", "  ", "\n", "\u3000"]) for _ in range(2)]
            text = f"{text[:place]}{sides[0]}\ue000{sides[1]}{text[place:]}"
        numbers = iter(range(100))
        yield re.sub("\ue000", lambda _, numbers=numbers: f"<extra_id_{next(numbers)}>", text)


@pytest.fixture(scope="module")
def directory(request, tmp_path_factory):
    """A published layout with random weights."""
    layout = LAYOUTS[request.param]
    return write_layout(layout, random_weights(layout.untied), tmp_path_factory.mktemp("published") / "model")


def assert_same_ids(ours, theirs, texts):
    """AutoTokenizer gives what `encode_marked` gives, and the end mark."""
    for text in texts:
        assert theirs(text)["input_ids"] == [*ours.encode_marked(text).tolist(), ours.eos_id], repr(text)


@pytest.mark.parametrize("directory", ["t5-saved-by-4", "t5-added-tokens", "t5-added-special"], indirect=True)
def test_a_t5_directory_has_the_ids_of_autotokenizer_before_and_after_it_is_saved(directory, tmp_path):
    """Hard characters, gaps at every place, line breaks and wide spaces next to them."""
    ours = load_tokenizer(str(directory))
    ours.save(tmp_path)
    texts = [*gapped(500, 3), "<PATIENT> has {x}<extra_id_0><PATIENT>y <extra_id_1>{", *HARD]
    assert_same_ids(ours, AutoTokenizer.from_pretrained(directory), texts)
    assert_same_ids(ours, AutoTokenizer.from_pretrained(tmp_path), texts)
    again = load_tokenizer(str(tmp_path))
    assert again.fingerprint() == ours.fingerprint()
    assert [again.encode_marked(text).tolist() for text in texts] == [ours.encode_marked(text).tolist() for text in texts]


@pytest.mark.parametrize("directory", ["mt5-spiece-alone", "mt5-hub", "mt5-saved-by-5", "mt5-bytes"], indirect=True)
def test_an_mt5_keeps_its_ids_and_reads_its_sentinels_everywhere(directory, tmp_path):
    """Text without gaps as AutoTokenizer over the published files; gaps on the pieces of the model, also in running text."""
    ours = load_tokenizer(str(directory))
    ours.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(directory)
    assert ours.sentinel_ids.tolist() == [theirs.convert_tokens_to_ids(f"{SPACE}<extra_id_{k}>") for k in range(100)]
    for text in [*NOTES, *HARD]:
        assert theirs(text)["input_ids"] == [*ours.encode_marked(text).tolist(), ours.eos_id]
    assert_same_ids(ours, AutoTokenizer.from_pretrained(tmp_path), gapped(500, 4))
    encoded = ours.encode_marked("hyper<extra_id_0>sion").tolist()
    assert encoded.count(ours.sentinel_ids[0]) == 1 and not ours.gap_starts_word


def test_the_published_japanese_t5_has_the_ids_of_autotokenizer(tmp_path):
    """A vocabulary that is in use, with its own normalisation: 500 texts with gaps."""
    shared = Path(os.environ.get("RESILIENT_T5_SHARED", ROOT.parent / "shared")) / "models" / "ja_t5"
    if not shared.is_dir():
        pytest.skip("no published tokenizer: set RESILIENT_T5_SHARED to a folder with models/ja_t5")
    ours = load_tokenizer(str(shared))
    ours.save(tmp_path)
    for directory in (shared, tmp_path):
        assert_same_ids(ours, AutoTokenizer.from_pretrained(directory), [*gapped(500, 5), *HARD])


def test_an_mt5_with_added_tokens_keeps_the_word_starts_of_its_own_tokenizer(tmp_path):
    """A text goes on after an added token with a new word; then it does after a gap, too, and the ids still agree."""
    directory = write_layout(LAYOUTS["mt5-hub"], random_weights(True), tmp_path / "model")
    size = len(AutoTokenizer.from_pretrained(directory))
    (directory / "added_tokens.json").write_text(json.dumps({"<PATIENT>": size}), encoding="utf-8")
    ours, theirs = load_tokenizer(str(directory)), AutoTokenizer.from_pretrained(directory)
    assert ours.gap_starts_word
    for text in [*NOTES, "a<PATIENT>b <PATIENT> c"]:
        assert theirs(text)["input_ids"] == [*ours.encode_marked(text).tolist(), ours.eos_id]
    ours.save(tmp_path / "saved")
    assert_same_ids(ours, AutoTokenizer.from_pretrained(tmp_path / "saved"), gapped(200, 6))


def test_the_parts_around_gaps_have_the_tokens_of_the_whole_and_their_places():
    """`encode_around_gaps` with sentinels between is `encode_marked`; a token's characters lie in its part."""
    ours = train_tokenizer(NOTES, 700, 0.999)
    for text in gapped(300, 7):
        parts = re.split(r"<extra_id_\d+>", text)
        (encoded,) = ours.encode_around_gaps([parts])
        joined = [list(encoded[0].ids)]
        for number, tokens in enumerate(encoded[1:]):
            joined += [[ours.sentinel_ids[number]], list(tokens.ids)]
        assert sum(joined, []) == ours.encode_marked(text).tolist()
        for part, tokens in zip(parts, encoded, strict=True):
            assert (tokens.starts <= tokens.ends).all() and (np.diff(tokens.starts) >= 0).all()
            assert tokens.starts.min(initial=0) >= 0 and tokens.ends.max(initial=0) <= len(part)


@pytest.mark.parametrize("directory", ["t5-slow-files"], indirect=True)
def test_a_gap_inside_a_word_is_encoded_as_a_reader_would_and_stays_within_the_longest_source(directory):
    """Where a row has no room for the word's beginning it keeps its tokens; no row ever passes the limit."""
    ours = load_tokenizer(str(directory))
    active = np.arange(ours.size, dtype=np.int32)
    encoding = build_gap_encoding(ours, active, ours.sentinel_ids)
    assert encoding is not None and ours.gap_starts_word
    ids = ours.encode_marked("consultationelectrocardiography").tolist()
    grown = 0
    for place in range(2, len(ids) - 1):
        row = np.array([*ids[:place], ours.sentinel_ids[0], *ids[place + 1 :], ours.eos_id], np.int32)
        offsets = np.array([0, len(row)])
        text = "".join(ours.pieces()[i] for i in row[:-1]).replace(SPACE, " ").strip()
        encoded, ends = encoding.encode(row, offsets, longest=100)
        assert encoded.tolist() == [*ours.encode_marked(text).tolist(), ours.eos_id] and ends.tolist() == [0, len(encoded)]
        kept, ends = encoding.encode(row, offsets, longest=len(row))
        assert len(kept) == ends[-1] == min(len(encoded), len(row))
        grown += len(encoded) > len(row) and kept.tolist() == row.tolist()
    assert grown > 2


@pytest.mark.parametrize("directory", ["t5-slow-files"], indirect=True)
def test_every_piece_that_a_gap_brings_about_is_active(directory):
    """Of a small corpus' vocabulary: the tokens after any gap in any of its texts."""
    ours = load_tokenizer(str(directory))
    active = np.zeros(ours.size, bool)
    active[ours.encode_batch(NOTES[:5]).tokens.ids] = True
    reachable = reachable_after_gaps(ours, active)
    for text in NOTES[:5]:
        for place in range(len(text)):
            ids = ours.encode_marked(f"<extra_id_0>{text[place:]}")
            assert reachable[ids[1:]].all()
    assert reachable.sum() < ours.size


def test_a_tokenizer_that_keeps_the_space_before_a_gap_is_asked_with_it():
    """A document of version 0.1 is renewed: text has the ids it had, and nothing is inserted after a gap."""
    new = train_tokenizer(NOTES, 700, 0.999)
    document = json.loads(json.dumps(new._document))
    document["normalizer"]["normalizers"] = [{"type": "Prepend", "prepend": SPACE}]
    document["pre_tokenizer"]["prepend_scheme"] = "never"
    old = TextTokenizer(document)
    assert old.of_an_older_version and not new.of_an_older_version and not old.gap_starts_word
    assert len(old.ignored_before_gap) == 0 < len(new.ignored_before_gap)
    for text in [*NOTES, *gapped(100, 8)]:
        assert old.encode_marked(text).tolist() == new.encode_marked(text).tolist()


def of_the_library(*more):
    """A unigram tokenizer as recipes for T5 from scratch make it with the tokenizers library, with T5's ids and sentinels."""
    trained = train_tokenizer(NOTES, 700, 0.999)._document
    pre = [pre_tokenizers.Metaspace(prepend_scheme="always"), *more]
    backend = Tokenizer.from_str(json.dumps({**trained, "normalizer": None}))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    backend.pre_tokenizer = pre_tokenizers.Sequence(pre)
    backend.decoder = decoders.Metaspace()
    return json.loads(backend.to_str())


@pytest.mark.parametrize("more", [[], [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Punctuation()]])
def test_what_training_reads_is_what_autotokenizer_gives_for_a_tokenizer_of_the_library(tmp_path, more):
    """Which keeps the space before a gap: its export drops it, as training does. Masks of one token at every place."""
    (tmp_path / "tokenizer.json").write_text(json.dumps(of_the_library(*more)), encoding="utf-8")
    ours = load_tokenizer(str(tmp_path))
    ours.save(tmp_path / "saved")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert_same_ids(ours, theirs, gapped(200, 10))
    encoding = build_gap_encoding(ours, np.arange(ours.size, dtype=np.int32), ours.sentinel_ids)
    names = {int(ours.sentinel_ids[0]): "<extra_id_0>"}
    checked = 0
    for text in NOTES[:40]:
        ids = ours.encode_batch([text])[0].ids
        for place in range(len(ids)):
            row = np.array([*ids[:place], ours.sentinel_ids[0], *ids[place + 1 :], ours.eos_id], np.int32)
            read, _ = encoding.encode(row, np.array([0, len(row)]), longest=1000)
            if set(read.tolist()) & {ours.unk_id, *ours.byte_ids.tolist()}:
                continue  # whose text is not that of their pieces
            spelled = "".join(names.get(i, ours.pieces()[i]) for i in read[:-1].tolist()).replace(SPACE, " ")
            assert theirs(spelled)["input_ids"] == read.tolist(), text
            checked += 1
    assert checked > 1000


def test_a_tokenizer_file_that_appends_nothing_gets_the_end_mark_of_the_training(tmp_path):
    """Without a post-processor, or with one that puts something in front: the export appends what training appended."""
    document = of_the_library()
    document["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    ours = load_tokenizer(str(tmp_path))
    ours.save(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")("a b")["input_ids"] == [*ours.encode_marked("a b").tolist(), 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"extra_ids": 10**9}, "extra_ids"), ({"extra_ids": "many"}, "extra_ids"), ({"eos_token": "<eos>"}, "eos_token")],
)
def test_settings_that_no_t5_has_are_refused_before_they_are_followed(tmp_path, settings, message):
    """A thousand million sentinels would fill the memory; another end mark would never be learned."""
    directory = write_layout(LAYOUTS["t5-slow-files"], random_weights(False), tmp_path / "model")
    config = json.loads((directory / "tokenizer_config.json").read_text()) | settings
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=message):
        load_tokenizer(str(directory))


def test_custom_code_of_a_repository_never_runs(tmp_path):
    """`auto_map` names code that AutoTokenizer could import; it is refused without a question."""
    write_layout(LAYOUTS["t5-slow-files"], random_weights(False), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    with pytest.raises(DataError):
        load_tokenizer(str(tmp_path / "model"))
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_without_sentinels_says_how_to_get_them(tmp_path):
    """extra_ids 0 on a T5 vocabulary: there are no sentinels."""
    directory = write_layout(LAYOUTS["t5-oldest"], random_weights(False), tmp_path / "model")
    (directory / "tokenizer_config.json").write_text(json.dumps({**MT5_CONFIG, "tokenizer_class": "T5Tokenizer"}))
    with pytest.raises(DataError, match=r"no sentinels.*extra_ids"):
        load_tokenizer(str(directory))


def test_a_tokenizer_of_the_tokenizers_library_is_taken_as_it_is(tmp_path):
    """PreTrainedTokenizerFast over a unigram model, as the recipes for T5 from scratch save it."""
    trained = train_tokenizer(NOTES, 700, 0.999)
    trained.save(tmp_path / "a")
    fast = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "a" / "tokenizer.json"), eos_token="</s>", pad_token="<pad>")
    fast.save_pretrained(tmp_path / "b")
    ours = load_tokenizer(str(tmp_path / "b"))
    assert_same_ids(ours, AutoTokenizer.from_pretrained(tmp_path / "b"), gapped(200, 9))
    torch.testing.assert_close(ours.sentinel_ids, trained.sentinel_ids)
