"""Every published layout of weights and config.json, against transformers itself.

Run: python -m pytest tests/model/test_weights_layouts.py
"""

import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from safetensors.torch import save_model as save_with_safetensors
from transformers import MT5Config, MT5ForConditionalGeneration, T5Config, T5ForConditionalGeneration

from resilient_t5 import hub
from resilient_t5.config.sections import ModelConfig
from resilient_t5.errors import DataError
from resilient_t5.model.embeddings import is_tied
from resilient_t5.model.load import build_model, load_model, save_model
from resilient_t5.model.shapes import sizes_of_checkpoint
from resilient_t5.model.vocabulary import tables_from
from tests.model.conftest import SPECIAL

SIZES = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 96}
IDS = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
CONFIGS = {
    "t5": {"model_type": "t5"},
    "t5v11": {"model_type": "t5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "mt5": {"model_type": "mt5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}
CLASSES = {"t5": (T5Config, T5ForConditionalGeneration), "mt5": (MT5Config, MT5ForConditionalGeneration)}
SHARED, HEAD = "shared.weight", "lm_head.weight"
ENCODER_ALIAS, DECODER_ALIAS = "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"
BATCH = {"input_ids": torch.tensor([[5, 6, 7, 95, 1]]), "decoder_input_ids": torch.tensor([[0, 9, 8]])}


def tensors_of(kind):
    """The tensors of a small model away from its first weights, each once; the head only where it is untied."""
    config = CONFIGS[kind]
    config_class, model_class = CLASSES[config["model_type"]]
    model = model_class(config_class(**SIZES, **IDS, **config))
    generator = torch.Generator().manual_seed(5)
    once = {name: value for name, value in model.state_dict().items() if "embed_tokens" not in name and name != HEAD}
    tensors = {name: 0.3 * torch.randn(value.shape, generator=generator) for name, value in once.items()}
    if config.get("tie_word_embeddings") is False:
        tensors[HEAD] = 0.3 * torch.randn(96, 16, generator=generator)
    return tensors


def renamed(tensors, *names):
    """The input embedding under other names, sharing its memory, as a state dictionary has it."""
    rest = {name: tensor for name, tensor in tensors.items() if name != SHARED}
    return dict.fromkeys(names, tensors[SHARED]) | rest


def safetensors(directory, tensors):
    save_file({name: value.clone() for name, value in tensors.items()}, directory / "model.safetensors", {"format": "pt"})


def sharded_safetensors(directory, tensors):
    _sharded(directory, tensors, "model", ".safetensors", lambda part, path: save_file(part, path, {"format": "pt"}))


def bin_file(directory, tensors):
    torch.save(tensors, directory / "pytorch_model.bin")


def bin_before_torch_1_6(directory, tensors):
    torch.save(tensors, directory / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def sharded_bin(directory, tensors):
    _sharded(directory, tensors, "pytorch_model", ".bin", torch.save)


def _sharded(directory, tensors, stem, suffix, write):
    names = sorted(tensors)
    parts = {f"{stem}-0000{k + 1}-of-00003{suffix}": names[k::3] for k in range(3)}
    for file, part in parts.items():
        write({name: tensors[name].clone() for name in part}, directory / file)
    index = {"metadata": {"total_size": 1}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (directory / f"{stem}{suffix}.index.json").write_text(json.dumps(index))


FORMATS = {
    "safetensors": safetensors,
    "sharded safetensors": sharded_safetensors,
    "bin": bin_file,
    "bin of before torch 1.6": bin_before_torch_1_6,
    "sharded bin": sharded_bin,
}


@pytest.fixture
def directory(tmp_path):
    """An empty model directory."""
    (tmp_path / "m").mkdir()
    return tmp_path / "m"


def write_config(directory, kind, **changes):
    """config.json; a key whose value is `...` is left out."""
    raw = SIZES | IDS | CONFIGS[kind] | changes
    (directory / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))


def assert_equals_transformers(directory, kind="t5"):
    """Every tensor and the logits of our loading and of `from_pretrained` are equal; returns our model."""
    ours = load_model(str(directory), ModelConfig()).eval()
    theirs, info = CLASSES[CONFIGS[kind]["model_type"]][1].from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    expected = theirs.state_dict()
    assert set(ours.state_dict()) == set(expected)
    for name, value in ours.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, expected[name]), name
    with torch.no_grad():
        assert torch.equal(ours(**BATCH).logits, theirs.eval()(**BATCH).logits)
    return ours


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("file_format", FORMATS)
def test_weights_in_every_format_equal_those_of_transformers(file_format, kind, directory):
    """T5 1.0, T5 1.1 and mT5, whole and sharded; also their tables alone, and their sizes in a plan."""
    write_config(directory, kind)
    FORMATS[file_format](directory, tensors_of(kind))
    model = assert_equals_transformers(directory, kind)
    assert is_tied(model) == (kind == "t5")
    tables = tables_from(str(directory))
    assert torch.equal(tables.shared_VD, model.shared.weight)
    assert (tables.head_VD is None) == (kind == "t5")
    assert sizes_of_checkpoint(directory).parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("file_format", FORMATS)
def test_weights_in_every_precision_equal_those_of_transformers(file_format, dtype, directory):
    """Stored in 16 or 64 bits, read as float32."""
    write_config(directory, "mt5", torch_dtype=str(dtype).removeprefix("torch."))
    FORMATS[file_format](directory, {name: value.to(dtype) for name, value in tensors_of("mt5").items()})
    assert_equals_transformers(directory, "mt5")


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize(
    "names",
    [
        (DECODER_ALIAS,),
        (ENCODER_ALIAS,),
        (HEAD,),
        (ENCODER_ALIAS, DECODER_ALIAS),
        (ENCODER_ALIAS, HEAD),
        (SHARED, ENCODER_ALIAS, DECODER_ALIAS),
        (SHARED, ENCODER_ALIAS, DECODER_ALIAS, HEAD),
    ],
)
def test_the_one_table_of_a_tied_model_is_found_under_any_of_its_names(names, file_format, directory):
    """As state dictionaries and safetensors' save_model leave it."""
    write_config(directory, "t5")
    FORMATS[file_format](directory, renamed(tensors_of("t5"), *names))
    model = assert_equals_transformers(directory)
    assert is_tied(model)
    assert torch.equal(tables_from(str(directory)).shared_VD, model.shared.weight)


@pytest.mark.parametrize("kind", ["t5v11", "mt5"])
@pytest.mark.parametrize("names", [(DECODER_ALIAS,), (ENCODER_ALIAS,), (SHARED, ENCODER_ALIAS, DECODER_ALIAS)])
def test_an_untied_head_stays_apart_whatever_the_embedding_is_called(names, kind, directory):
    """The head is not taken for the embedding, nor the embedding for the head."""
    write_config(directory, kind)
    tensors = tensors_of(kind)
    bin_file(directory, renamed(tensors, *names))
    model = assert_equals_transformers(directory, kind)
    assert torch.equal(model.shared.weight, tensors[SHARED])
    assert torch.equal(model.lm_head.weight, tensors[HEAD])


def test_a_model_that_save_model_of_safetensors_wrote_is_loaded(directory):
    """The writer itself, not its layout by hand."""
    write_config(directory, "t5")
    save_with_safetensors(T5ForConditionalGeneration(T5Config(**SIZES, **IDS)), str(directory / "model.safetensors"))
    assert_equals_transformers(directory)


def test_an_untied_head_alone_is_not_taken_for_the_embedding(directory):
    """transformers would; config.json declares two tables."""
    write_config(directory, "mt5")
    bin_file(directory, {name: value for name, value in tensors_of("mt5").items() if name != SHARED})
    with pytest.raises(DataError, match=r"lack 1 .*shared\.weight"):
        load_model(str(directory), ModelConfig())
    with pytest.raises(DataError, match=r"lack .*shared\.weight"):
        tables_from(str(directory))


@pytest.mark.parametrize("names", [(SHARED, DECODER_ALIAS), (ENCODER_ALIAS, DECODER_ALIAS)])
def test_embeddings_that_differ_between_the_stacks_are_refused(names, directory):
    """There is no single input embedding to train."""
    write_config(directory, "t5")
    tensors = renamed(tensors_of("t5"), names[0])
    bin_file(directory, tensors | {names[1]: tensors[names[0]] + 1})
    with pytest.raises(DataError, match=f"{names[1]} differs from {names[0]}"):
        load_model(str(directory), ModelConfig())


def test_safetensors_win_over_a_bin_beside_them(directory):
    """As in transformers; the .bin is not opened."""
    write_config(directory, "t5")
    safetensors(directory, tensors_of("t5"))
    (directory / "pytorch_model.bin").write_bytes(b"damaged")
    assert_equals_transformers(directory)


OLD = {"n_positions": 512, "output_past": True, "task_specific_params": {"summarization": {"max_length": 200}}}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("t5", {"model_type": ..., "architectures": ["T5WithLMHeadModel"], **OLD}),
        ("t5", {"model_type": ..., "architectures": ["T5ForConditionalGeneration"], **OLD}),
        ("t5", {"architectures": ["T5WithLMHeadModel"], **OLD}),
        ("t5", {"pad_token_id": ..., "eos_token_id": ..., "decoder_start_token_id": ...}),
        ("t5", {"eos_token_id": [1], "pad_token_id": 0}),
        ("t5", {"num_decoder_layers": None, "relative_attention_num_buckets": 32, "torch_dtype": "float16"}),
        ("t5", {"dtype": "bfloat16", "feed_forward_proj": "relu", "dense_act_fn": "relu", "is_gated_act": False}),
        ("t5", {"tie_word_embeddings": True, "scale_decoder_outputs": True}),
        ("t5v11", {"dense_act_fn": "gelu_new", "is_gated_act": True, "relative_attention_max_distance": 128}),
        ("t5v11", {"feed_forward_proj": ..., "dense_act_fn": "gelu_new", "is_gated_act": True}),
        ("t5v11", {"dense_act_fn": "gelu"}),
        ("t5v11", {"tie_word_embeddings": True, "scale_decoder_outputs": False, "transformers_version": "5.0.0"}),
        ("mt5", {"model_type": ..., "architectures": ["MT5ForConditionalGeneration"]}),
        ("mt5", {"feed_forward_proj": ..., "tokenizer_class": "T5Tokenizer", "tokenizer_file": None}),
        ("mt5", {"tie_word_embeddings": ...}),
    ],
)
def test_a_configuration_of_any_age_is_read_as_transformers_reads_it(kind, changes, directory):
    """Without model_type or feed_forward_proj, with null, with lists of one id, with keys that are no longer used."""
    write_config(directory, kind, **changes)
    bin_file(directory, tensors_of(kind))
    model = assert_equals_transformers(directory, kind)
    assert (model.config.eos_token_id, model.config.pad_token_id) == (1, 0)
    assert sizes_of_checkpoint(directory).parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"eos_token_id": [1, 2]}, "eos_token_id"),
        ({"vocab_size": "96"}, "vocab_size"),
        ({"dense_act_fn": "__import__"}, "dense_act_fn"),
        ({"is_gated_act": "yes"}, "is_gated_act"),
        ({"model_type": ...}, "model_type is None"),
        ({"model_type": ..., "architectures": [["T5Model"], None]}, "model_type is None"),
    ],
)
def test_a_configuration_that_no_t5_has_is_refused(changes, expected, directory):
    """The key is named."""
    write_config(directory, "t5", **changes)
    bin_file(directory, tensors_of("t5"))
    with pytest.raises(DataError, match=expected):
        load_model(str(directory), ModelConfig())


def test_fewer_rows_than_the_configuration_promises_are_refused_by_name(directory):
    """The table, its rows and the promised number."""
    write_config(directory, "t5", vocab_size=100)
    bin_file(directory, tensors_of("t5"))
    with pytest.raises(DataError, match=r"shared\.weight has shape \(96, 16\).*fewer rows than the vocab_size 100"):
        load_model(str(directory), ModelConfig())


UNSUPPORTED = {
    "ByT5": ({"tokenizer_class": "ByT5Tokenizer"}, (), "ByT5 reads bytes"),
    "umT5": ({"model_type": "umt5"}, (), "umT5"),
    "umT5, old": ({"model_type": ..., "architectures": ["UMT5ForConditionalGeneration"]}, (), "umT5"),
    "LongT5": ({"model_type": "longt5"}, (), "LongT5"),
    "BERT vocabulary by class": ({"tokenizer_class": "BertTokenizerFast"}, (), "BERT vocabulary"),
    "BERT vocabulary by file": ({}, ("vocab.txt",), "BERT vocabulary"),
    "another model": ({"model_type": "bart"}, (), "model_type is 'bart'"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_supported_is_refused_in_one_sentence_by_loading_and_planning(name, directory):
    """Also if only the configuration of the tokenizer shows it, and also without weights."""
    changes, files, expected = UNSUPPORTED[name]
    write_config(directory, "t5", **changes)
    for file in files:
        (directory / file).write_text("[PAD]\n")
    messages = set()
    for attempt in (lambda: load_model(str(directory), ModelConfig()), lambda: sizes_of_checkpoint(directory)):
        with pytest.raises(DataError, match=expected) as caught:
            attempt()
        messages.add(str(caught.value))
    assert len(messages) == 1


def test_the_tokenizer_configuration_decides_over_that_of_the_model(directory):
    """As in AutoTokenizer: config.json of a fine-tuned copy may name a class that is no longer used."""
    write_config(directory, "t5", tokenizer_class="BertTokenizer")
    (directory / "spiece.model").write_bytes(b"")
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}))
    hub.refuse_unsupported(directory)
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    with pytest.raises(DataError, match="ByT5"):
        hub.refuse_unsupported(directory)


@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b"\xff\xfe", b'{"tokenizer_class": [1], "architectures": 3}'])
def test_a_directory_without_a_readable_configuration_is_left_to_its_readers(content, directory):
    """A tokenizer alone has no config.json."""
    if content is not None:
        (directory / "config.json").write_bytes(content)
        (directory / "tokenizer_config.json").write_bytes(content)
    for place in (directory, directory / "absent"):
        assert hub.refuse_unsupported(place) is None, "nothing is refused for what cannot be read here"


@pytest.mark.parametrize("name", ["config.json", "spiece.model", "tokenizer.json", "model.safetensors", "pytorch_model.bin"])
def test_a_git_lfs_pointer_is_refused_with_the_command_that_fetches_the_file(name, directory):
    """A clone without LFS leaves 130 bytes of text where the file should be."""
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4000\n"
    write_config(directory, "t5")
    (directory / name).write_text(pointer)
    with pytest.raises(DataError, match=rf"{name} is a Git LFS pointer.*git lfs pull"):
        load_model(str(directory), ModelConfig())
    with pytest.raises(DataError, match="pointer"):
        hub.refuse_pointer(directory / name)


def test_a_shard_that_is_a_pointer_is_refused_and_a_bin_that_is_not_needed_is_not(directory):
    """`git lfs pull --include model.safetensors` leaves the other format as a pointer on purpose."""
    write_config(directory, "t5")
    safetensors(directory, tensors_of("t5"))
    (directory / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
    load_model(str(directory), ModelConfig())
    (directory / "model.safetensors").unlink()
    sharded_bin(directory, tensors_of("t5"))
    (directory / "pytorch_model.bin").unlink()
    (directory / "pytorch_model-00002-of-00003.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DataError, match="00002-of-00003.bin is a Git LFS pointer"):
        load_model(str(directory), ModelConfig())


class Command:
    """What a hostile pickle holds: a command that the ordinary unpickler would run."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("is_zip", [False, True])
def test_a_bin_that_runs_a_command_is_refused_and_runs_nothing(is_zip, sharded, directory):
    """In both formats of torch.save, among real tensors; loading, reading the tables and planning."""
    write_config(directory, "t5")
    mark = directory / "was here"
    content = tensors_of("t5") | {"extra.weight": Command(f"touch '{mark}'")}
    name = "pytorch_model-00001-of-00001.bin" if sharded else "pytorch_model.bin"
    torch.save(content, directory / name, _use_new_zipfile_serialization=is_zip)
    if sharded:
        index = {"weight_map": dict.fromkeys(content, name)}
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for attempt in (load_model, lambda path, _: tables_from(path)):
        with pytest.raises(DataError, match=r"wants to run \w+\.system") as caught:
            attempt(str(directory), ModelConfig())
        assert caught.value.exit_code == 65
        assert name in caught.value.where
    sizes_of_checkpoint(directory)
    assert not mark.exists()
    torch.load(directory / name, weights_only=False)
    assert mark.exists(), "the file was not hostile"


@pytest.mark.slow
def test_no_environment_makes_a_bin_an_ordinary_pickle(directory):
    """torch has a variable that turns the restriction off where a call does not ask for it; ours does."""
    write_config(directory, "t5")
    mark = directory / "was here"
    torch.save({"a": Command(f"touch '{mark}'")}, directory / "pytorch_model.bin")
    code = (
        "from resilient_t5.model.load import load_model\nfrom resilient_t5.config.sections import ModelConfig\n"
        f"load_model({str(directory)!r}, ModelConfig())"
    )
    environment = os.environ | {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "wants to run" in done.stderr
    assert not mark.exists()


def rewritten(path, compression=zipfile.ZIP_STORED, change=lambda content: content):
    """A .bin with its records compressed or its pickle changed."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, change(content) if name.endswith("data.pkl") else content)


def without(name, **others):
    """The tensors without one, or with another in its place."""
    return {key: value for key, value in tensors_of("t5").items() if key != name} | others


NORM = "decoder.final_layer_norm.weight"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([torch.ones(2)], "not a dictionary"),
        ({}, "not a dictionary"),
        (torch.ones(2), "not a dictionary"),
        ({"model": tensors_of("t5")}, "model is a dict"),
        (without("", epoch=3), "epoch is a int"),
        (without("", table=torch.ones(3, 3).to_sparse()), "table is a Tensor and no plain tensor"),
        (without("", ids=torch.arange(3)), "ids is stored as int64"),
        (without(NORM, **{NORM: torch.ones(1).expand(16)}), f"all values of {NORM}"),
        (without(NORM, **{NORM: torch.full((16,), float("nan"))}), "NaN"),
        (without(NORM, **{NORM: torch.full((16,), 1e300, dtype=torch.float64)}), "infinity"),
        (without(NORM), NORM),
        (without("", **{"adapter.weight": torch.ones(2)}), "adapter.weight"),
    ],
)
@pytest.mark.parametrize("is_zip", [True, False])
def test_a_bin_with_anything_but_plain_finite_tensors_is_refused(content, expected, is_zip, directory):
    """The entry is named."""
    write_config(directory, "t5")
    torch.save(content, directory / "pytorch_model.bin", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(DataError, match=expected):
        load_model(str(directory), ModelConfig())


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.5, 0.999])
def test_a_bin_that_was_cut_is_refused(share, is_zip, directory):
    """At its start, in its pickle, in its values, at its end."""
    write_config(directory, "t5")
    path = directory / "pytorch_model.bin"
    torch.save(tensors_of("t5"), path, _use_new_zipfile_serialization=is_zip)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(DataError, match=r"pytorch_model\.bin"):
        load_model(str(directory), ModelConfig())


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_bin_that_is_a_bare_pickle_is_refused(protocol, directory):
    """No file of torch.save."""
    write_config(directory, "t5")
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}, protocol))
    with pytest.raises(DataError, match="not readable as weights of PyTorch"):
        load_model(str(directory), ModelConfig())


def test_a_bin_that_was_compressed_is_refused_instead_of_read_as_other_numbers(directory):
    """A map of the file into memory would hold the compressed bytes."""
    write_config(directory, "t5")
    bin_file(directory, tensors_of("t5"))
    rewritten(directory / "pytorch_model.bin")
    assert_equals_transformers(directory)
    rewritten(directory / "pytorch_model.bin", zipfile.ZIP_DEFLATED)
    with pytest.raises(DataError, match="compressed"):
        load_model(str(directory), ModelConfig())


def test_a_bin_that_promises_more_values_than_it_holds_is_refused(directory):
    """The shape in its pickle is not believed: 16 values are there, 24 are promised."""
    write_config(directory, "t5")
    torch.save({"a": torch.ones(16)}, directory / "pytorch_model.bin")
    rewritten(directory / "pytorch_model.bin", change=lambda content: content.replace(b"K\x10", b"J\x00\x00\x00\x7f"))
    with pytest.raises(DataError, match=r"pytorch_model\.bin"):
        load_model(str(directory), ModelConfig())


@pytest.mark.parametrize("name", ["../x.bin", "/etc/passwd", "a/b.bin", "", 3, "x.safetensors", ".bin"])
def test_a_bin_index_that_leads_elsewhere_is_refused(name, directory):
    """Only shards in the directory of the index are opened."""
    write_config(directory, "t5")
    torch.save(tensors_of("t5"), directory.parent / "x.bin")
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors_of("t5"), name)}))
    with pytest.raises(DataError, match="not a shard in its directory"):
        load_model(str(directory), ModelConfig())


def test_a_missing_shard_and_a_missing_tensor_are_named(directory):
    """An interrupted copy."""
    write_config(directory, "t5")
    sharded_bin(directory, tensors_of("t5"))
    index = json.loads((directory / "pytorch_model.bin.index.json").read_text())
    index["weight_map"]["b.weight"] = "pytorch_model-00001-of-00003.bin"
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"b\.weight"):
        load_model(str(directory), ModelConfig())
    (directory / "pytorch_model-00003-of-00003.bin").unlink()
    with pytest.raises(DataError, match="00003-of-00003"):
        load_model(str(directory), ModelConfig())


@pytest.mark.parametrize("name", ["flax_model.msgpack", "tf_model.h5", "model.fp16.safetensors", "last.ckpt"])
def test_weights_under_an_unsupported_name_are_reported(name, directory):
    """The message names the file and the supported names."""
    write_config(directory, "t5")
    (directory / name).write_bytes(b"")
    with pytest.raises(DataError, match=rf"only {name}.*model\.safetensors or pytorch_model\.bin"):
        load_model(str(directory), ModelConfig())


def test_a_tensor_that_is_read_twice_is_the_same_and_has_memory_of_its_own(directory, monkeypatch):
    """Also in the old format, where what was taken is forgotten, and where the map is opened again after every tensor."""
    from resilient_t5.model import weights

    monkeypatch.setattr(weights, "REOPEN_AFTER_BYTES", 0)
    tensors = tensors_of("t5")
    for write in (bin_file, bin_before_torch_1_6):
        write(directory, renamed(tensors, SHARED, ENCODER_ALIAS))
        file = weights.BinFile(directory / "pytorch_model.bin")
        first = file.read(SHARED)
        first.add_(1)
        for name in (ENCODER_ALIAS, SHARED, SHARED):
            assert torch.equal(file.read(name), tensors[SHARED])
    (directory / "pytorch_model.bin").unlink()
    assert torch.equal(first, tensors[SHARED] + 1)


@pytest.mark.slow
def test_loading_a_bin_needs_one_copy_of_the_model(directory):
    """Memory of its own of a fresh process, above what the imports take, in copies of 460 MB: the map does not count."""
    write_config(directory, "t5", d_model=256, vocab_size=250_000, d_ff=4096, num_layers=12)
    config = json.loads((directory / "config.json").read_text())
    with torch.device("meta"):
        shapes = T5ForConditionalGeneration(T5Config(**{key: config[key] for key in (*SIZES, *IDS)})).state_dict()
    once = {name: value for name, value in shapes.items() if "embed_tokens" not in name and name != HEAD}
    bin_file(directory, {name: torch.full(value.shape, 0.1) for name, value in once.items()})
    copy = sum(value.numel() for value in once.values()) * 4
    code = f"""
import threading, time
from resilient_t5.config.sections import ModelConfig
from resilient_t5.model.load import load_model
def own():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024
before, most, going = own(), 0, True
def watch():
    global most
    while going:
        most = max(most, own())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
model = load_model({str(directory)!r}, ModelConfig())
going = False
thread.join()
print((most - before) / {copy})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.9 < float(done.stdout) < 1.3


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_files_of_an_export_follow_the_umask(umask, mode, tmp_path):
    """safetensors alone would write a file that only its owner can read."""
    model = build_model(ModelConfig(preset="tiny"), vocabulary_rows=96, special=SPECIAL, seed=1)
    before = os.umask(umask)
    try:
        save_model(model, tmp_path / "out")
    finally:
        os.umask(before)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in Path(tmp_path / "out").iterdir()}
    assert modes == dict.fromkeys(("config.json", "generation_config.json", "model.safetensors"), oct(mode))
