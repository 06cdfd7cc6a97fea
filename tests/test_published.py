"""A published model from end to end: loaded, trained, exported, and the same ids and answers in plain transformers.

Run: python -m pytest tests/test_published.py
"""

import dataclasses
import json
import os
import random
import re
import subprocess

import numpy as np
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5ForConditionalGeneration, T5Tokenizer

from resilient_t5.config.schema import CorruptionConfig, DataConfig
from resilient_t5.data.corpus.sample import generate_notes
from resilient_t5.data.corruption.corruption import corrupt
from resilient_t5.data.corruption.token_table import build_token_table
from resilient_t5.data.store.store import Store
from resilient_t5.data.tokenizer.sentencepiece import SPACE
from resilient_t5.data.tokenizer.tokenizer import load_tokenizer
from resilient_t5.restoration.beam_search import DecodeSettings
from resilient_t5.restoration.filler import open_filler
from resilient_t5.restoration.gaps import find_gaps
from tests.published import LAYOUTS, SPARE_ROWS, Weights, piece_count, random_weights, write_layout

pytestmark = pytest.mark.slow

UPDATES = 8
LIMIT_S = 300.0
SETTINGS = """
data: {train: "builtin:clinical", sample_notes: 1200, max_source_tokens: 160, max_target_tokens: 64, validation_share: 0.05}
corruption: {noise_ratio: 0.0, max_sentinels: 10}
batch: {examples_per_update: 16, window_updates: 10}
convergence: {preset: short}
evaluation: {every: 2000, examples: 24, restore_examples: 8}
checkpoint: {every_minutes: null}
telemetry: {log_every: 100, progress: plain, samples: 1}
hardware: {threads: 1}
run: {seed: 3}
"""
UNSEEN = list(generate_notes(400, 991))


def weights_of(directory) -> Weights:
    """The weights of an export over the shared pieces."""
    tensors = AutoModelForSeq2SeqLM.from_pretrained(directory, dtype=torch.float32).state_dict()
    places = load_tokenizer(str(directory)).sentinel_ids[:100].tolist()
    tables = [tensors["shared.weight"], tensors["lm_head.weight"]]
    tied = torch.equal(*tables)
    kept = {
        name: value
        for name, value in tensors.items()
        if "embed_tokens" not in name and name not in ("shared.weight", "lm_head.weight")
    }
    pieces = [table[: piece_count()].clone() for table in tables]
    sentinels = [table[places].clone() for table in tables]
    if tied:
        return Weights(kept, (pieces[0], None), (sentinels[0], None))
    return Weights(kept, tuple(pieces), tuple(sentinels))


def train(fork_server, model, run, *more):
    """Train a model directory; the run directory."""
    (run.parent / "settings.yaml").write_text(SETTINGS, encoding="utf-8")
    output = run.with_suffix(".txt")
    arguments = ["--config", run.parent / "settings.yaml", "--run.dir", run, "--model.name_or_path", model, *more]
    assert fork_server.run(arguments, output, seconds=LIMIT_S) == 0, output.read_text()
    return run


@pytest.fixture(scope="module")
def able(fork_server, tmp_path_factory):
    """Weights of a tied and of an untied model that answer in the form of T5, each trained in a layout of its kind."""
    found = {}
    for untied, name in ((False, "t5-slow-files"), (True, "mt5-hub")):
        folder = tmp_path_factory.mktemp("able")
        layout = dataclasses.replace(LAYOUTS[name], dtype=torch.float32)
        model = write_layout(layout, random_weights(untied), folder / "model")
        run = train(
            fork_server, model, folder / "run", "--optim.lr", "4e-3", "--schedule.max_updates", "500", "--schedule.warmup", "40"
        )
        found[untied] = weights_of(run / "export" / "best")
    return found


@pytest.fixture(scope="module", params=sorted(LAYOUTS))
def published(request, able, fork_server, tmp_path_factory):
    """A layout, its directory, and a run that trained it a little and exported it."""
    layout = LAYOUTS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    model = write_layout(layout, able[layout.untied], folder / "model")
    run = train(fork_server, model, folder / "run", "--optim.lr", "1e-4", "--schedule.max_updates", str(UPDATES))
    return layout, model, run


def with_gaps(text, draws, mark):
    """The text with one to five gaps in any place, with and without spaces at their sides, numbered in order."""
    for _ in range(draws.randint(1, 5)):
        start = draws.choice([0, len(text), draws.randint(0, len(text))])
        end = min(len(text), start + draws.choice([0, 1, 2, 3, 8]))
        text = f"{text[:start]}{draws.choice(['', ' ', '  '])}\ue000{draws.choice(['', ' '])}{text[end:]}"
    numbers = iter(range(100))
    return re.sub("\ue000", lambda _: mark.format(next(numbers)), text)


def test_a_thousand_texts_with_gaps_have_the_ids_of_the_training(published):
    """In AutoTokenizer over the export, in AutoTokenizer over the published directory where it reads sentinels, and in ours."""
    layout, model, run = published
    draws = random.Random(1)
    texts = [with_gaps(draws.choice(UNSEEN).text, draws, "<extra_id_{}>") for _ in range(1000)]
    trained_on = Store.open(run / "store").tokenizer
    expected = [[*trained_on.encode_marked(text).tolist(), trained_on.eos_id] for text in texts]
    for directory in (run / "export" / "best", run / "export" / "last"):
        assert AutoTokenizer.from_pretrained(directory)(texts)["input_ids"] == expected
    # A configuration of 2019 names no kind of model, which AutoTokenizer asks for.
    own = (T5Tokenizer if "model_type" not in layout.config else AutoTokenizer).from_pretrained(model)
    if not layout.mt5:
        assert own(texts)["input_ids"] == expected
    spaced = [re.sub(r"\s*(<extra_id_\d>)", r" \1", text) for text in texts]
    if own("<extra_id_0>")["input_ids"][0] == trained_on.sentinel_ids[0]:  # it knows no second set of sentinels
        assert own(spaced)["input_ids"] == [[*trained_on.encode_marked(text).tolist(), trained_on.eos_id] for text in spaced]
    plain = [re.sub(r"<extra_id_\d>", "", text) for text in texts]
    assert own(plain)["input_ids"] == [[*trained_on.encode_batch([text])[0].ids.tolist(), 1] for text in plain]


def test_what_the_encoder_reads_in_training_is_what_autotokenizer_gives_for_that_text(published):
    """Every training example under several masks, written as a text with gaps."""
    _, _, run = published
    store = Store.open(run / "store")
    tokenizer, pieces = AutoTokenizer.from_pretrained(run / "export" / "best"), store.tokenizer.pieces()
    table = build_token_table(store.tokenizer, store.active_to_full, None)
    settings = CorruptionConfig(noise_ratio=0.0, max_sentinels=10, mask_ratio=0.3)
    data = DataConfig(max_source_tokens=160, max_target_tokens=64)
    names = {number: f"<extra_id_{k}>" for k, number in enumerate(store.tokenizer.sentinel_ids.tolist())}
    checked = 0
    for epoch in range(3):
        ids = np.arange(len(store.train))
        corrupted = corrupt(store.train, ids, np.full(len(ids), epoch), seed=1, settings=settings, data=data, table=table)
        full = store.active_to_full[corrupted.encoder_ids]
        rows = [full[a:b].tolist() for a, b in zip(corrupted.encoder_offsets[:-1], corrupted.encoder_offsets[1:], strict=True)]
        rows = [row for row in rows if store.tokenizer.unk_id not in row]  # whose text is lost
        texts = ["".join(names.get(i, pieces[i]) for i in row[:-1]).replace(SPACE, " ") for row in rows]
        assert tokenizer(texts)["input_ids"] == rows
        checked += len(rows)
    assert checked > 2000


def plain_answer(model, tokenizer, text):
    """What a plain script of transformers makes of a text with sentinels: the answer to each, by number."""
    written = tokenizer.decode(model.generate(**tokenizer(text, return_tensors="pt"), do_sample=False, num_beams=1)[0])
    parts = re.split(r"<extra_id_(\d+)>", written.split("</s>")[0])
    answers = {}
    for number, answer in zip(parts[1::2], parts[2::2], strict=True):
        answers.setdefault(int(number), answer.strip())
    return answers


def test_a_hundred_gaps_are_filled_as_plain_transformers_fills_them(published):
    """Greedy `generate` over the export against bin/restore's filler: texts of both languages, gaps where facts stood."""
    _, _, run = published
    export = run / "export" / "best"
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(export), AutoTokenizer.from_pretrained(export)
    filler, _ = open_filler(str(export))
    draws, texts = random.Random(2), []
    for note in UNSEEN[:100]:
        fact = draws.choice([fact for fact in note.facts if fact in note.text])
        texts.append(note.text.replace(fact, draws.choice(["[?]", "[?]", " [?] "]), 1))
    fills = filler.fill([(text, find_gaps(text, ["[?]"])) for text in texts], DecodeSettings())
    assert fills is not None
    ours = [found[0].text.strip() for found in fills]
    theirs = [plain_answer(model, tokenizer, text.replace("[?]", "<extra_id_0>")).get(0) for text in texts]
    assert theirs == ours
    assert len(set(ours)) > 10, "a model that says the same everywhere would show nothing"


READ_BY_VERSION_4 = """
import json, sys, torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, __version__
assert __version__.startswith("4."), __version__
request = json.load(sys.stdin)
tokenizer = AutoTokenizer.from_pretrained(request["export"])
model = AutoModelForSeq2SeqLM.from_pretrained(request["export"], torch_dtype=torch.float32).eval()
ids = tokenizer(request["texts"])["input_ids"]
with torch.no_grad():
    pairs = [(torch.tensor([row]), torch.tensor([row[::-1]])) for row in ids[:4]]
    logits = [model(input_ids=source, decoder_input_ids=target).logits[0].tolist() for source, target in pairs]
json.dump({"ids": ids, "logits": logits}, sys.stdout)
"""


@pytest.mark.parametrize("published", ["flan", "mt5-hub", "t5-added-tokens"], indirect=True)
def test_transformers_4_reads_the_export_with_the_same_ids_and_logits(published):
    """In a process of its own, with the interpreter that RESILIENT_T5_TRANSFORMERS_4 names."""
    python = os.environ.get("RESILIENT_T5_TRANSFORMERS_4")
    if python is None:
        pytest.skip("no transformers 4: set RESILIENT_T5_TRANSFORMERS_4 to a Python that has it")
    export, draws = str(published[2] / "export" / "best"), random.Random(4)
    texts = [with_gaps(draws.choice(UNSEEN).text, draws, "<extra_id_{}>") for _ in range(200)]
    request = json.dumps({"export": export, "texts": texts})
    done = subprocess.run([python, "-c", READ_BY_VERSION_4], input=request, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout)
    ids = AutoTokenizer.from_pretrained(export)(texts)["input_ids"]
    assert theirs["ids"] == ids
    model = AutoModelForSeq2SeqLM.from_pretrained(export, dtype=torch.float32).eval()
    for row, found in zip(ids, theirs["logits"], strict=False):
        with torch.no_grad():
            ours = model(input_ids=torch.tensor([row]), decoder_input_ids=torch.tensor([row[::-1]])).logits[0]
        assert torch.allclose(ours, torch.tensor(found), rtol=1e-5, atol=1e-4)


def test_rows_that_were_not_trained_keep_every_bit(published):
    """The export's tables hold the published rows, as float32, wherever the corpus had no use for them."""
    layout, model, run = published
    kind = AutoModelForSeq2SeqLM if "model_type" in layout.config else T5ForConditionalGeneration
    before = kind.from_pretrained(model, dtype=torch.float32).state_dict()
    after = AutoModelForSeq2SeqLM.from_pretrained(run / "export" / "last", dtype=torch.float32).state_dict()
    untouched = np.setdiff1d(np.arange(len(before["shared.weight"])), Store.open(run / "store").active_to_full)
    assert len(untouched) >= SPARE_ROWS
    for name in ("shared.weight", "lm_head.weight"):
        assert torch.equal(before[name][untouched], after[name][untouched])
    assert layout.untied == (not torch.equal(after["shared.weight"], after["lm_head.weight"]))
    assert not torch.equal(before["shared.weight"], after["shared.weight"]), "nothing was trained"
    assert json.loads((run / "export" / "best" / "config.json").read_text())["tie_word_embeddings"] == (not layout.untied)
