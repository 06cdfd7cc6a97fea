"""Cutting the vocabulary and writing it back. Run: python -m pytest tests/model/test_vocabulary.py"""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM

from resilient_t5.config.sections import ModelConfig, OptimConfig
from resilient_t5.errors import DataError
from resilient_t5.model.embeddings import is_tied
from resilient_t5.model.layers import install_lean_layers
from resilient_t5.model.load import load_model, save_model
from resilient_t5.model.loss import forward_loss
from resilient_t5.model.optimizer import build_optimizer
from resilient_t5.model.vocabulary import cut_vocabulary, tables_from, tables_of, write_back

KINDS = ["t5", "mt5"]
ROWS = 203
ACTIVE = np.array(sorted({0, 1, *range(3, ROWS, 5), ROWS - 1}), dtype=np.int32)


def trained(model, batch, updates=3):
    """A few AdamW updates, large enough to move every row that takes part."""
    optimizer = build_optimizer(model, OptimConfig(lr=0.01), torch.device("cpu"))
    for _ in range(updates):
        forward_loss(model, *batch, divisor=10.0).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_model_computes_the_softmax_over_the_active_rows(kind, make_model, make_examples, collate):
    """Its logits are those of the full model at the active rows; tied stays tied, untied untied."""
    model = make_model(kind).eval()
    source_BS, mask_BS, labels_BT = collate(make_examples(4, rows=len(ACTIVE)))
    index = torch.from_numpy(ACTIVE).long()
    with torch.no_grad():
        whole = model(input_ids=index[source_BS], attention_mask=mask_BS, decoder_input_ids=index[labels_BT.clamp(min=0)])
        cut_vocabulary(model, ACTIVE)
        cut = model(input_ids=source_BS, attention_mask=mask_BS, decoder_input_ids=labels_BT.clamp(min=0))
    assert torch.allclose(cut.logits, whole.logits[..., index], atol=1e-6)
    assert is_tied(model) == (kind == "t5")
    assert model.config.vocab_size == model.shared.num_embeddings == model.lm_head.out_features == len(ACTIVE)
    assert model.encoder.embed_tokens.weight is model.decoder.embed_tokens.weight is model.shared.weight


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_loss_and_gradient_of_a_cut_model_are_those_of_a_plain_softmax_over_the_active_rows(
    kind, dtype, tolerance, make_model, make_examples, collate, gradients_of, relative_error
):
    """Against autograd through the full model, its logits restricted to the active rows; tables at the active rows."""
    model = make_model(kind, dtype=dtype)
    source_BS, mask_BS, labels_BT = batch = collate(make_examples(5, rows=len(ACTIVE)))
    index = torch.from_numpy(ACTIVE).long()
    full_BT = torch.where(labels_BT == -100, -100, index[labels_BT.clamp(min=0)])
    logits = model(input_ids=index[source_BS], attention_mask=mask_BS, labels=full_BT).logits[..., index]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels_BT.flatten(), ignore_index=-100)
    expected.backward()
    expected_gradients = gradients_of(model)
    for name in {"shared.weight", "lm_head.weight"} & expected_gradients.keys():
        expected_gradients[name] = expected_gradients[name][index]
    cut_vocabulary(model, ACTIVE)
    loss = forward_loss(model, *batch, divisor=float((labels_BT != -100).sum())).loss
    loss.backward()
    assert abs(loss.item() - expected.item()) <= tolerance * expected.item()
    assert relative_error(gradients_of(model), expected_gradients) <= tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_an_embedding_row_that_never_occurs_stays_as_it_is_under_adamw(kind, make_model, make_examples, collate):
    """Untied: training over the active rows is AdamW over them, so cutting leaves the input rows' updates unchanged."""
    full, cut = make_model(kind), make_model(kind)
    cut_vocabulary(cut, ACTIVE)
    source_BS, mask_BS, labels_BT = collate(make_examples(4, rows=len(ACTIVE)))
    before = full.shared.weight.detach().clone()
    index = torch.from_numpy(ACTIVE).long()
    mapped = (index[source_BS], mask_BS, torch.where(labels_BT == -100, -100, index[labels_BT.clamp(min=0)]))
    trained(full, mapped)
    outside = torch.ones(ROWS, dtype=torch.bool)
    outside[index] = False
    assert torch.equal(full.shared.weight[outside], before[outside]) == (kind == "mt5")


@pytest.mark.parametrize("kind", KINDS)
def test_write_back_changes_the_active_rows_only_and_loads_with_equal_logits(
    kind, make_model, make_examples, collate, tmp_path
):
    """All other rows of the file are byte-identical; transformers and we load it tied or untied as it was."""
    save_model(make_model(kind), tmp_path / "original")
    model = load_model(str(tmp_path / "original"), ModelConfig(dropout=0.0))
    cut_vocabulary(model, ACTIVE)
    source_BS, mask_BS, labels_BT = batch = collate(make_examples(4, rows=len(ACTIVE)))
    install_lean_layers(model)
    trained(model, batch).eval()
    write_back(model, tables_from(str(tmp_path / "original")), ACTIVE, tmp_path / "export")

    before, after = (load_file(tmp_path / part / "model.safetensors") for part in ("original", "export"))
    assert before.keys() == after.keys()
    inactive = np.setdiff1d(np.arange(ROWS), ACTIVE)
    for name in {"shared.weight", "lm_head.weight"} & before.keys():
        assert before[name].numpy()[inactive].tobytes() == after[name].numpy()[inactive].tobytes()
        assert not torch.equal(before[name][ACTIVE], after[name][ACTIVE])

    index = torch.from_numpy(ACTIVE).long()
    inputs = {"input_ids": index[source_BS], "attention_mask": mask_BS, "decoder_input_ids": index[labels_BT.clamp(min=0)]}
    theirs = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "export", dtype=torch.float32).eval()
    ours = load_model(str(tmp_path / "export"), ModelConfig()).eval()
    with torch.no_grad():
        expected_gradients = model(input_ids=source_BS, attention_mask=mask_BS, decoder_input_ids=labels_BT.clamp(min=0)).logits
        assert torch.equal(theirs(**inputs).logits, ours(**inputs).logits)
        assert torch.allclose(theirs(**inputs).logits[..., index], expected_gradients, atol=1e-6)
    assert is_tied(ours) == (kind == "t5")
    assert torch.equal(theirs.lm_head.weight, theirs.shared.weight) == (kind == "t5")
    assert (ours.config.vocab_size, ours.config.pad_token_id, ours.config.eos_token_id) == (ROWS, 0, 1)


def test_special_ids_are_renamed_and_renamed_back(make_model, tmp_path):
    """Pad 7 and end 9 become active ids for configuration and generation, and are unchanged in the export."""
    model = make_model("mt5")
    for config in (model.config, model.generation_config):
        config.pad_token_id, config.eos_token_id, config.decoder_start_token_id = 7, 9, 7
    original, active = tables_of(model), np.array([2, 7, 9, 11])
    cut_vocabulary(model, active)
    for config in (model.config, model.decoder.config, model.generation_config):
        assert (config.pad_token_id, config.eos_token_id, config.decoder_start_token_id) == (1, 2, 1)
    write_back(model, original, active, tmp_path / "export")
    theirs = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "export")
    assert (theirs.config.pad_token_id, theirs.config.eos_token_id, theirs.config.decoder_start_token_id) == (7, 9, 7)
    assert (theirs.generation_config.pad_token_id, theirs.generation_config.eos_token_id) == (7, 9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_model_generates_active_ids_only(kind, make_model):
    """Generation runs on the cut model as it is."""
    model = make_model(kind).eval()
    cut_vocabulary(model, ACTIVE)
    ids = model.generate(input_ids=torch.tensor([[3, 4, 1]]), max_new_tokens=6, do_sample=False)
    assert int(ids.max()) < len(ACTIVE)


def test_the_full_set_cuts_nothing(make_model):
    """With every row active the parameters stay the same objects."""
    model = make_model("mt5")
    tables = (model.shared.weight, model.lm_head.weight)
    cut_vocabulary(model, np.arange(ROWS))
    assert (model.shared.weight is tables[0], model.lm_head.weight is tables[1]) == (True, True)


@pytest.mark.parametrize(
    "active", [[0, 1, ROWS], [1, 0, 2], [0, 1, 1], [-1, 0, 1], [], [[0, 1]], [0.0, 1.0], [1, 2, 3], [0, 2, 3]]
)
def test_an_active_set_that_does_not_fit_is_refused(active, make_model):
    """Out of range, not ascending, doubled, negative, empty, not flat, not whole numbers, without pad, without end mark."""
    model = make_model("t5")
    with pytest.raises(DataError, match="active vocabulary"):
        cut_vocabulary(model, np.array(active))
    assert model.config.vocab_size == ROWS


def test_write_back_into_another_model_is_refused(make_model, tmp_path):
    """Tables that are tied where the model is not, or another number of rows, never make an export."""
    model = make_model("mt5")
    cut_vocabulary(model, ACTIVE)
    for original, active in ((tables_of(make_model("t5")), ACTIVE), (tables_of(make_model("mt5")), ACTIVE[:-1])):
        with pytest.raises(DataError):
            write_back(model, original, active, tmp_path / "export")
    assert not (tmp_path / "export").exists()
