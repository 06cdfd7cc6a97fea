"""Tokenizers: the ids of SentencePiece, exact positions, T5's and mT5's sentinels, what transformers reads back.

Run: python -m pytest tests/data/tokenizer/test_tokenizer.py
"""

import functools
import io
import json
import re
import tempfile
import time

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from resilient_t5.data.corpus.sample import generate_notes
from resilient_t5.data.tokenizer.sentencepiece import COMMAND, SENTINELS
from resilient_t5.data.tokenizer.tokenizer import load_tokenizer, train_tokenizer
from resilient_t5.errors import DataError, DiskFull

NOTES = [note.text for note in generate_notes(300, 5)]
T5_IDS = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "pad_piece": "<pad>"}
MT5_SENTINELS = [f"\u2581<extra_id_{k}>" for k in reversed(range(SENTINELS))]
# Characters that normalisation doubles, joins or drops, spaces in every place, bytes, emoji, other scripts.
HARD = [
    " two  spaces ",
    "5\u338e \u2026 \ufb01ne\u3000x",
    "5\u338e of  aspirin",  # one character more, one space less: the sums alone would agree
    "e\u0301 a\u030a\u0323 \u1100\u1161\u11a8 \U0001f1e8\U0001f1f3 \U0001f469\u200d\u2695\ufe0f",
    "line one\nline two\n",
    "\u2460\u2461\uff21\uff22 CT\u68c0\u67e5\uff0c\u6b63\u5e38\u3002",
    "\U00020bb7\u91ce \u0131\u0130",
    "\u2121\u2121\u2121",
    "",
    " ",
]
# U+10FFFE and U+10FFFF are noncharacters, reserved for internal use: the tokenizer uses both as marks.
texts = st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="\u2581\U0010fffe\U0010ffff"), max_size=40)
mixed = st.lists(st.sampled_from([*NOTES[0], *NOTES[1], *" ,.\n\u2026\u338e\u00e9\u4e00\u9f98"]), max_size=60).map("".join)


def spiece(**settings):
    """A SentencePiece model of the notes, as bytes."""
    model = io.BytesIO()
    base = {"model_type": "unigram", "hard_vocab_limit": False, "minloglevel": 2, "num_threads": 1, **T5_IDS}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(NOTES), model_writer=model, **{**base, **settings})
    return model.getvalue()


@pytest.fixture(scope="module")
def trained():
    """A tokenizer that we trained."""
    return train_tokenizer(NOTES, 700, 0.999)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Bare spiece.model directories shaped as T5's (no byte pieces) and mT5's (bytes, sentinels of its own)."""
    models = {
        "t5": spiece(vocab_size=600, normalization_rule_name="nmt_nfkc"),
        "mt5": spiece(
            vocab_size=1000,
            normalization_rule_name="nmt_nfkc",
            byte_fallback=True,
            character_coverage=0.99,
            user_defined_symbols=MT5_SENTINELS,
        ),
    }
    root = tmp_path_factory.mktemp("tokenizers")
    for name, content in models.items():
        (root / name).mkdir()
        (root / name / "spiece.model").write_bytes(content)
    return root


@pytest.fixture(scope="module", params=["trained", "t5"])
def with_reference(request, directories, trained, tmp_path_factory):
    """Tokenizers whose ids are SentencePiece's; AutoTokenizer, the reference for a directory, knows no byte pieces."""
    folder = directories / request.param
    if request.param == "trained":
        trained.save(folder)
    ours = trained if request.param == "trained" else load_tokenizer(str(folder))
    return ours, sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))


@pytest.fixture(scope="module", params=["trained", "t5", "mt5"])
def both(request, directories, trained, tmp_path_factory):
    """Our tokenizer and SentencePiece's own processor over the same model."""
    folder = directories / request.param
    if request.param == "trained":
        trained.save(folder)
        return trained, sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    return load_tokenizer(str(folder)), sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))


def visible(text):
    """Positions of the characters that a token must cover."""
    return {i for i, character in enumerate(text) if not character.isspace()}


def test_ids_are_those_of_sentencepiece(with_reference):
    """On the notes and on a plain text with full width signs, every id equals the reference implementation's."""
    ours, reference = with_reference
    for text, encoded in zip(NOTES, ours.encode_batch(NOTES), strict=True):
        assert encoded.ids.tolist() == reference.encode(text)
    texts = ["two  spaces", "a\uff0cb\u3002", "\u2460 \uff21\u68c0\u67e5"]
    for text in [*texts, "\U00020bb7\u91ce"] if ours.byte_ids.size else texts:
        assert ours.encode_batch([text])[0].ids.tolist() == reference.encode(text)


@given(st.one_of(texts, mixed))
@example("two  spaces")
@example("\u3000\uff23\uff34 \ufb01 \n\t x")
@settings(max_examples=150, deadline=None)
def test_a_trained_tokenizer_gives_the_text_back(trained, text):
    """decode(encode(text)) is the text: no lower case, no normalisation, no lost space, whatever the script.

    But for spaces at its two ends, which no document has when it is read.
    """
    text = text.strip(" ")
    encoded = trained.encode_batch([text])[0]
    assert trained.decode(encoded.ids) == text
    assert trained.unk_id not in encoded.ids


@given(st.one_of(texts, mixed, st.sampled_from(HARD)))
@settings(max_examples=200, deadline=None)
def test_positions_cover_the_text_in_order(both, text):
    """Positions never decrease, stay inside the text, and every character that the normaliser keeps has its token."""
    ours, _ = both
    encoded = ours.encode_batch([text])[0]
    starts, ends = encoded.starts, encoded.ends
    assert (np.diff(starts) >= 0).all() and (np.diff(ends) >= 0).all() and (starts <= ends).all()
    assert len(starts) == 0 or (starts[0] >= 0 and ends[-1] <= len(text))
    covered = {i for start, end in zip(starts.tolist(), ends.tolist(), strict=True) for i in range(start, end)}
    kept = {i for i in visible(text) if ours.encode_batch([text[i]])[0].ends.max(initial=0) > 0}
    if text.isascii():
        assert visible(text) <= covered
    elif ours.byte_ids.size and not any(0x300 <= ord(c) < 0x370 for c in text):
        assert len(kept - covered) == 0


def test_positions_name_each_piece_in_the_text(both):
    """Where a character stays one character, the text between a token's positions is the token without its space."""
    ours, _ = both
    pieces = ours.pieces()
    for text, encoded in zip(NOTES, ours.encode_batch(NOTES), strict=True):
        spelled = [pieces[i].lstrip("\u2581") for i in encoded.ids]
        found = [text[a:b] for a, b in zip(encoded.starts, encoded.ends, strict=True)]
        for piece, original in zip(spelled, found, strict=True):
            assert piece.startswith("<") or len(piece) == len(original.strip())
            assert piece.startswith("<") or piece == original.strip() or not original.isascii()


def test_spelled_positions_equal_the_offsets_of_the_backend(both):
    """The running sums and the offsets of the backend agree, except for bytes."""
    ours, _ = both
    cases = [*NOTES[:100], *HARD, *(f"{a}{b}" for a in HARD for b in NOTES[:2])]
    for text, encoded in zip(cases, ours.encode_batch(cases), strict=True):
        backend = ours._backend.encode(text, add_special_tokens=False)
        if set(ours.byte_ids.tolist()) & set(encoded.ids.tolist()):
            continue  # the backend gives a run of unknown characters one common range
        starts, ends = ours._backend_positions(text, encoded.ids, backend.offsets)
        assert encoded.starts.tolist() == starts.tolist(), text
        assert encoded.ends.tolist() == ends.tolist(), text


def test_a_byte_piece_has_its_whole_character(trained):
    """The four bytes of a rare character share its one position, and its neighbours keep theirs."""
    encoded = trained.encode_batch(["a\U00020bb7\U00020bb8b"])[0]
    pairs = list(zip(encoded.starts.tolist(), encoded.ends.tolist(), strict=True))
    assert pairs[-9:] == [*[(1, 2)] * 4, *[(2, 3)] * 4, (3, 4)]


def test_t5_sentinels_are_appended_with_the_first_highest(directories):
    """T5: 100 ids after the pieces, <extra_id_0> the highest."""
    tokenizer = load_tokenizer(str(directories / "t5"))
    pieces = len(sentencepiece.SentencePieceProcessor(model_file=str(directories / "t5" / "spiece.model")))
    assert tokenizer.size == pieces + SENTINELS == len(tokenizer.pieces())
    assert tokenizer.sentinel_ids.tolist() == list(range(pieces + 99, pieces - 1, -1))
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2)


def test_mt5_sentinels_are_its_own_pieces(directories):
    """mT5: nothing is appended; <extra_id_k> is the piece spelled with U+2581, in descending ids."""
    tokenizer = load_tokenizer(str(directories / "mt5"))
    model = sentencepiece.SentencePieceProcessor(model_file=str(directories / "mt5" / "spiece.model"))
    assert tokenizer.size == len(model)
    assert tokenizer.sentinel_ids.tolist() == [model.piece_to_id(f"\u2581<extra_id_{k}>") for k in range(SENTINELS)]
    assert (np.diff(tokenizer.sentinel_ids) == -1).all()


def test_special_tokens_cannot_be_spelled_by_text(both):
    """A text that holds </s> or <extra_id_3> gets pieces for it, never the special id."""
    ours, _ = both
    text = "a</s> <pad><unk> <extra_id_3>\u2581<extra_id_99>b"
    assert not set(ours.encode_batch([text])[0].ids.tolist()) & set(ours.sentinel_ids.tolist() + [0, 1])


def test_marked_text_gets_its_sentinels(both):
    """In a pair masked elsewhere <extra_id_k> is sentinel k, and the text between is encoded as text."""
    ours, _ = both
    ids = ours.encode_marked("patient with <extra_id_0> and mg<extra_id_1>mg").tolist()
    assert [i for i in ids if i in ours.sentinel_ids] == ours.sentinel_ids[:2].tolist()
    words = ours.encode_batch(["patient with"])[0].ids.tolist()
    assert ids[: len(words)] == words and ids[len(words)] == ours.sentinel_ids[0]
    after = ids.index(ours.sentinel_ids[1])
    assert ours.pieces()[ids[after + 1]] != "\u2581" and ours.decode(ids).startswith("patient with and mg")


@pytest.mark.parametrize("model_type", [None, "mt5", "t5"])
def test_transformers_loads_what_is_saved_with_equal_ids(both, tmp_path, model_type):
    """AutoTokenizer over a saved directory, alone or with the config.json of a model, encodes as we do and ends in </s>."""
    from transformers import AutoTokenizer

    ours, _ = both
    ours.save(tmp_path)
    if model_type:
        content = {"model_type": model_type, "tokenizer_class": "T5Tokenizer"}
        (tmp_path / "config.json").write_text(json.dumps(content), encoding="utf-8")
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*NOTES[:20], *HARD[:1], *HARD[4:6]]:
        assert theirs(text)["input_ids"] == [*ours.encode_batch([text])[0].ids.tolist(), ours.eos_id]
    sentinels = [theirs.convert_tokens_to_ids(ours.pieces()[i]) for i in ours.sentinel_ids]
    assert sentinels == ours.sentinel_ids.tolist()
    assert (theirs.pad_token_id, theirs.eos_token_id) == (ours.pad_id, ours.eos_id)


def test_transformers_t5_tokenizer_agrees_on_a_bare_spiece_model(directories):
    """transformers' T5Tokenizer over the same spiece.model gives the same ids and sentinels."""
    from transformers import T5Tokenizer

    ours, theirs = load_tokenizer(str(directories / "t5")), T5Tokenizer.from_pretrained(directories / "t5")
    for text in NOTES[:50]:
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode_batch([text])[0].ids.tolist()
    assert theirs.convert_tokens_to_ids("<extra_id_0>") == ours.sentinel_ids[0]
    theirs.save_pretrained(directories / "again")
    again = load_tokenizer(str(directories / "again"))
    assert again.sentinel_ids.tolist() == ours.sentinel_ids.tolist()
    found = zip(again.encode_batch(NOTES[:50]), ours.encode_batch(NOTES[:50]), strict=True)
    assert all(a.ids.tolist() == b.ids.tolist() and a.starts.tolist() == b.starts.tolist() for a, b in found)


def test_the_same_text_trains_the_same_tokenizer(trained, tmp_path):
    """Training is deterministic, other text gives another fingerprint, and saving changes neither."""
    assert train_tokenizer(NOTES, 700, 0.999).fingerprint() == trained.fingerprint()
    assert train_tokenizer(NOTES[1:], 700, 0.999).fingerprint() != trained.fingerprint()
    trained.save(tmp_path)
    assert load_tokenizer(str(tmp_path)).fingerprint() == trained.fingerprint()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nothing.txt", b"", "tokenizer.json and spiece.model"),
        ("spiece.model", b"no model at all", "SentencePiece"),
        ("tokenizer.json", b"{", "not readable as JSON"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {}}}', "unigram"),
        ("tokenizer.json", b'{"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]]}}', "<pad>"),
    ],
)
def test_what_is_no_t5_tokenizer_is_refused_with_its_place(tmp_path, name, content, message):
    """A directory without a tokenizer, or with a broken one, is a data error that names what was looked for."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_tokenizer(str(tmp_path))


def test_a_name_that_is_nowhere_is_refused_offline(monkeypatch):
    """A path is not asked of the hub; a hub name without a network is a clear error."""
    with pytest.raises(DataError, match="no such tokenizer directory"):
        load_tokenizer("./no/such/place")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="HF_HUB_OFFLINE is set"):
        load_tokenizer("google/no-such-model-here")


def test_too_little_text_is_a_clear_error():
    """A tokenizer cannot be trained on nothing."""
    with pytest.raises(DataError, match="no text"):
        train_tokenizer([], 700, 0.999)


def test_too_few_pieces_for_the_characters_names_how_many_are_needed():
    """In our own settings' names; a few more than the number named are then enough."""
    text = "".join(chr(0x4E00 + k) for k in range(600))
    with pytest.raises(DataError, match=r"characters alone need (\d+).*tokenizer\.character_coverage") as refused:
        train_tokenizer([text] * 50, 400, 1.0)
    needed = int(re.search(r"alone need (\d+)", str(refused.value))[1])
    assert train_tokenizer([text] * 50, needed + 5, 1.0).size >= needed


def test_a_training_whose_process_dies_is_a_clear_error(monkeypatch, tmp_path):
    """As when the system kills it for want of memory: the error names the signal, and nothing waits for the dead."""
    program = tmp_path / "dies.py"
    program.write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", encoding="utf-8")
    monkeypatch.setattr("resilient_t5.data.tokenizer.sentencepiece.COMMAND", [str(program)])
    with pytest.raises(DataError, match="ended by signal 9"):
        train_tokenizer(NOTES, 700, 0.999)


def test_a_text_that_finds_no_room_names_the_folder_of_temporary_files(monkeypatch):
    """And not the store, which may be on another disk; `/dev/full` simulates a full one."""
    monkeypatch.setattr(tempfile, "TemporaryFile", functools.partial(open, "/dev/full", "w+b"))
    with pytest.raises(DiskFull, match="TMPDIR") as full:
        train_tokenizer(NOTES, 700, 0.999)
    assert full.value.where == tempfile.gettempdir()


def test_a_training_that_starts_late_still_gets_its_text(monkeypatch, tmp_path):
    """As on a busy machine: more text than a pipe holds, read only after the program was asked for several times."""
    texts = [f"{number} {note}" for number in range(5) for note in NOTES]
    assert sum(map(len, texts)) > 200_000
    at_once = train_tokenizer(texts, 700, 0.999)
    late = f"import runpy, time; time.sleep(0.5); runpy.run_module({COMMAND[-1]!r}, run_name='__main__')"
    (tmp_path / "late.py").write_text(late, encoding="utf-8")
    monkeypatch.setattr("resilient_t5.data.tokenizer.sentencepiece.COMMAND", [str(tmp_path / "late.py")])
    give_up_s = time.monotonic() + 60

    def poll() -> None:
        assert time.monotonic() < give_up_s, "the program never got its text"

    assert train_tokenizer(texts, 700, 0.999, poll).fingerprint() == at_once.fingerprint()
