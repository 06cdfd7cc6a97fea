"""Building, loading and saving, and the traps of transformers on the way. Run: python -m pytest tests/model/test_load.py"""

import json
import math
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, MT5Config, MT5ForConditionalGeneration, T5Config, T5ForConditionalGeneration

from resilient_t5.config.sections import ModelConfig
from resilient_t5.errors import ConfigError, DataError, RunDirectoryError
from resilient_t5.model.embeddings import is_tied, scales_decoder_output
from resilient_t5.model.load import PRESETS, SpecialIds, build_model, load_model, save_model

SPECIAL = SpecialIds(0, 1, 0)
ANY = ModelConfig()
SIZES = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 96}
BATCH = {"input_ids": torch.tensor([[5, 6, 7, 1]]), "labels": torch.tensor([[9, 8, 1]])}


def write(directory, config, tensors):
    """A model directory by hand, as a hub repository would have it."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if tensors is not None:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return str(directory)


def untied_checkpoint(directory, kind="mt5", dtype=torch.float32, **changes):
    """An untied checkpoint as Google published them: both matrices, tie_word_embeddings false."""
    classes = {"mt5": (MT5Config, MT5ForConditionalGeneration), "t5": (T5Config, T5ForConditionalGeneration)}
    config_class, model_class = classes[kind]
    torch.manual_seed(0)
    extra = {"tie_word_embeddings": False, "decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu"}
    model = model_class(config_class(**SIZES, **extra))
    tensors = {name: p.detach().clone().to(dtype) for name, p in model.named_parameters()}
    tensors["lm_head.weight"] = torch.randn(96, 16).to(dtype)
    raw = {"model_type": kind, **SIZES, **extra, "dropout_rate": 0.1, "pad_token_id": 0, "eos_token_id": 1} | changes
    return write(directory, raw, tensors), tensors


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("rows", [256, 5000])
def test_a_model_from_scratch_starts_near_the_loss_of_a_uniform_guess(preset, rows):
    """|loss - ln V| < 0.5 nats, T5 tied and mT5 untied, at reduced depth; a tied model first guesses the token it reads,
    which costs up to another 0.7 where only 256 others share the rest."""
    model = build_model(ModelConfig(preset=preset, num_layers=2), vocabulary_rows=rows, special=SPECIAL, seed=3).eval()
    generator = torch.Generator().manual_seed(0)
    source_BS, labels_BT = (torch.randint(2, rows, shape, generator=generator) for shape in ((2, 30), (2, 12)))
    with torch.no_grad():
        loss = model(input_ids=source_BS, labels=labels_BT).loss.item()
    assert abs(loss - math.log(rows)) < (1.2 if rows == 256 else 0.5)
    assert is_tied(model) == (not preset.startswith("mt5"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [("small", 60_506_624), ("mt5-small", 300_176_768), ("mt5-base", 582_401_280), ("mt5-large", 1_229_581_312)],
)
def test_presets_have_the_published_number_of_parameters(preset, parameters, monkeypatch):
    """Untied mT5 counts both tables; counted without allocating them."""
    monkeypatch.setattr("resilient_t5.model.load.fill_with_first_weights", lambda *_: None)
    rows = 32_128 if preset == "small" else 250_112
    model = build_model(ModelConfig(preset=preset), vocabulary_rows=rows, special=SPECIAL, seed=0)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_weights_are_a_function_of_the_seed_and_leave_the_global_stream_alone():
    """Two builds agree bit for bit whatever ran before, another seed differs where it draws, torch's stream stays."""
    settings = ModelConfig(preset="tiny")
    before = torch.random.get_rng_state()
    first = build_model(settings, vocabulary_rows=64, special=SPECIAL, seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.randn(7)
    second = build_model(settings, vocabulary_rows=64, special=SPECIAL, seed=5)
    other = build_model(settings, vocabulary_rows=64, special=SPECIAL, seed=6)
    for (name, a), b, c in zip(first.named_parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        set_by_hand = "layer_norm" in name or "relative_attention_bias" in name or name.endswith("SelfAttention.q.weight")
        assert set_by_hand or not torch.equal(a, c), name


def test_a_model_without_a_preset_is_refused():
    """From scratch needs a shape; the message names the key."""
    with pytest.raises(ConfigError, match="model.preset"):
        build_model(ANY, vocabulary_rows=64, special=SPECIAL, seed=0)


@pytest.mark.parametrize("kind", ["mt5", "t5"])
def test_an_untied_checkpoint_stays_untied_and_both_tables_equal_the_file(kind, tmp_path):
    """X2: neither table overwrites the other, in either loading order, and a later tie_weights does not tie them."""
    path, tensors = untied_checkpoint(tmp_path / "m", kind)
    model = load_model(path, ANY)
    model.tie_weights()
    assert not is_tied(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, tensors[name]), name
    assert model.encoder.embed_tokens.weight is model.decoder.embed_tokens.weight is model.shared.weight


@pytest.mark.parametrize("kind", ["mt5", "t5"])
def test_an_export_loads_untied_and_gives_equal_logits_in_transformers(kind, tmp_path):
    """X3, X13: config.json has tie_word_embeddings false, both tables are in the file, T5 1.1 is not scaled."""
    path, _ = untied_checkpoint(tmp_path / "m", kind)
    model = load_model(path, ANY).eval()
    save_model(model, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    assert {"shared.weight", "lm_head.weight"} <= set(load_file(tmp_path / "out/model.safetensors"))
    theirs, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not torch.equal(theirs.lm_head.weight, theirs.shared.weight)
    with torch.no_grad():
        assert torch.equal(theirs.eval()(**BATCH).logits, model(**BATCH).logits)
    assert not scales_decoder_output(model)


def test_a_tied_model_is_exported_tied_and_scaled(tmp_path):
    """X13: T5 1.0 multiplies by d**-0.5 before the head, and its export does so in both transformers versions."""
    model = build_model(ModelConfig(preset="tiny"), vocabulary_rows=96, special=SPECIAL, seed=1).eval()
    save_model(model, tmp_path / "out")
    raw = json.loads((tmp_path / "out/config.json").read_text())
    assert (raw["tie_word_embeddings"], raw["scale_decoder_outputs"]) == (True, True)
    theirs = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    again = load_model(str(tmp_path / "out"), ANY).eval()
    assert is_tied(again)
    with torch.no_grad():
        assert torch.equal(theirs(**BATCH).logits, model(**BATCH).logits)
        assert torch.equal(again(**BATCH).logits, model(**BATCH).logits)


def test_a_file_that_transformers_5_wrote_is_believed_over_its_own_configuration(tmp_path):
    """save_pretrained writes tied although the file is untied: the file counts, and T5 1.1 stays unscaled."""
    path, tensors = untied_checkpoint(tmp_path / "m", "t5")
    T5ForConditionalGeneration.from_pretrained(path, dtype=torch.float32).save_pretrained(tmp_path / "resaved")
    assert json.loads((tmp_path / "resaved/config.json").read_text())["tie_word_embeddings"] is True
    model = load_model(str(tmp_path / "resaved"), ANY)
    assert not is_tied(model)
    assert not scales_decoder_output(model)
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_are_float32_whatever_the_file_holds(dtype, tmp_path):
    """X7: the dtype of a file is never taken over."""
    path, tensors = untied_checkpoint(tmp_path / "m", dtype=dtype)
    model = load_model(path, ANY)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.shared.weight, tensors["shared.weight"].float())


def test_dropout_of_the_settings_replaces_the_checkpoints(tmp_path):
    """Every dropout module and the configuration follow; without a setting the checkpoint's own stays."""
    path, _ = untied_checkpoint(tmp_path / "m")
    rates = [m.p for m in load_model(path, ModelConfig(dropout=0.25)).modules() if isinstance(m, torch.nn.Dropout)]
    assert set(rates) == {0.25}
    assert load_model(path, ANY).config.dropout_rate == 0.1


def test_shards_load_as_one_file_does(tmp_path):
    """An index and two shards give the same weights."""
    path, tensors = untied_checkpoint(tmp_path / "m")
    names = sorted(tensors)
    (tmp_path / "m/model.safetensors").unlink()
    shards = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, tmp_path / "m" / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (tmp_path / "m/model.safetensors.index.json").write_text(json.dumps(index))
    for name, parameter in load_model(path, ANY).named_parameters():
        assert torch.equal(parameter, tensors[name]), name
    (tmp_path / "m/b.safetensors").unlink()
    with pytest.raises(DataError, match=r"b\.safetensors"):
        load_model(path, ANY)


def test_an_index_that_leads_outside_the_directory_is_refused(tmp_path):
    """No path of an index is followed out of the checkpoint."""
    path, tensors = untied_checkpoint(tmp_path / "m")
    (tmp_path / "m/model.safetensors").rename(tmp_path / "x.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "../x.safetensors")}
    (tmp_path / "m/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="not a shard in its directory"):
        load_model(path, ANY)


def test_a_pickle_that_runs_code_is_refused_and_runs_none(tmp_path):
    """A hostile .bin runs nothing; the message names the file."""
    path, _ = untied_checkpoint(tmp_path / "m")
    (tmp_path / "m/model.safetensors").unlink()

    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "was here"), "w"))

    (tmp_path / "m/pytorch_model.bin").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(DataError, match=r"pytorch_model\.bin") as caught:
        load_model(path, ANY)
    assert caught.value.exit_code == 65
    assert not (tmp_path / "was here").exists()


def drop(name):
    """A damage: the file without one tensor."""
    return lambda raw, tensors: (raw, {key: value for key, value in tensors.items() if key != name})


def change(**keys):
    """A damage: config.json with other values."""
    return lambda raw, tensors: (raw | keys, tensors)


def spoil(raw, tensors):
    """A damage: one NaN."""
    tensors["decoder.final_layer_norm.weight"][3] = float("nan")
    return raw, tensors


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda raw, tensors: (raw, None), "no weights"),
        (drop("shared.weight"), "shared.weight"),
        (drop("lm_head.weight"), "lm_head.weight"),
        (drop("decoder.final_layer_norm.weight"), "decoder.final_layer_norm.weight"),
        (change(model_type="bert"), "not t5 or mt5"),
        (change(num_layers=3), "3 encoder layers"),
        (change(num_layers=1), "1 encoder layers"),
        (change(num_layers=1000), "1000 encoder layers"),
        (change(num_decoder_layers=1000), "1000 decoder layers"),
        (change(num_layers=10**7), "num_layers"),
        (change(d_model=32), "has shape"),
        (change(vocab_size=97), "has shape"),
        (change(d_ff="24"), "d_ff"),
        (change(d_kv=-8), "d_kv"),
        (change(num_heads=True), "num_heads"),
        (change(dropout_rate=float("nan")), "dropout_rate"),
        (change(pad_token_id=96), "pad_token_id"),
        (change(feed_forward_proj="gated-__import__"), "feed_forward_proj"),
        (lambda raw, tensors: (raw, tensors | {"adapter.weight": torch.ones(2)}), "adapter.weight"),
        (lambda raw, tensors: (raw, tensors | {"encoder.embed_tokens.weight": torch.ones(96, 16)}), "differs"),
        (lambda raw, tensors: (raw, tensors | {"shared.weight": torch.ones(96, 16, dtype=torch.int8)}), "I8"),
        (spoil, "NaN"),
    ],
)
def test_a_damaged_or_foreign_checkpoint_is_refused_with_what_it_lacks(damage, expected, tmp_path):
    """X4 among them: exit 65, the culprit in the message, and a way to fix it."""
    path, tensors = untied_checkpoint(tmp_path / "m")
    raw = json.loads((tmp_path / "m/config.json").read_text())
    raw, tensors = damage(raw, {name: tensor.clone() for name, tensor in tensors.items()})
    (tmp_path / "m/model.safetensors").unlink()
    write(tmp_path / "m", raw, tensors)
    with pytest.raises(DataError) as caught:
        load_model(path, ANY)
    assert expected in caught.value.what
    assert str(tmp_path / "m") in caught.value.where
    assert caught.value.hint
    assert caught.value.exit_code == 65


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe{}", b"[" * 100_000])
def test_a_configuration_that_is_no_json_object_is_refused(content, tmp_path):
    """Empty, cut, a list, not UTF-8, nested without end."""
    path, _ = untied_checkpoint(tmp_path / "m")
    (tmp_path / "m/config.json").write_bytes(content)
    with pytest.raises(DataError, match="JSON"):
        load_model(path, ANY)


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b'\x08\x00\x00\x00\x00\x00\x00\x00{"a":1}x'])
def test_a_safetensors_file_that_is_none_is_refused(content, tmp_path):
    """Empty, a header length without end, a header that describes nothing."""
    path, _ = untied_checkpoint(tmp_path / "m")
    (tmp_path / "m/model.safetensors").write_bytes(content)
    with pytest.raises(DataError, match=r"safetensors|lack"):
        load_model(path, ANY)


@pytest.mark.parametrize("name", ["./missing", "/no/such/place", "a/b/c", "~/missing", "with space"])
def test_a_path_that_does_not_exist_is_never_looked_up_on_the_hub(name):
    """Only what looks like a hub name may reach the network."""
    with pytest.raises(DataError, match="no such model directory"):
        load_model(name, ANY)


def test_a_file_or_a_directory_without_configuration_is_refused(tmp_path):
    """A model is a directory with config.json."""
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match="is a file"):
        load_model(str(tmp_path / "model.safetensors"), ANY)
    with pytest.raises(DataError, match=r"no config\.json"):
        load_model(str(tmp_path), ANY)


def test_an_old_tied_file_with_four_copies_of_one_table_loads_tied(tmp_path):
    """Files of 2020 hold the embedding under every name."""
    model = build_model(ModelConfig(preset="tiny"), vocabulary_rows=96, special=SPECIAL, seed=1)
    save_model(model, tmp_path / "m")
    tensors = load_file(tmp_path / "m/model.safetensors")
    for alias in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"):
        tensors[alias] = tensors["shared.weight"].clone()
    tensors["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.ones(32, 4)
    save_file(tensors, tmp_path / "m/model.safetensors")
    assert is_tied(load_model(str(tmp_path / "m"), ANY))


def test_an_export_never_overwrites_a_model(tmp_path):
    """A second export into one directory is refused, and the first stays as it was."""
    path, _ = untied_checkpoint(tmp_path / "m")
    content = (tmp_path / "m/model.safetensors").read_bytes()
    with pytest.raises(RunDirectoryError, match="already"):
        save_model(build_model(ModelConfig(preset="tiny"), vocabulary_rows=96, special=SPECIAL, seed=1), tmp_path / "m")
    assert (tmp_path / "m/model.safetensors").read_bytes() == content
