"""Generation: equal to the library's greedy one, row by row.

Run: python -m pytest tests/restoration/test_decoder.py
"""

import numpy as np
import pytest
import torch
from transformers import MT5Config, MT5ForConditionalGeneration, T5Config, T5ForConditionalGeneration

from resilient_t5.restoration.decoder import TokenDecoder, generate

VOCABULARY, PAD, EOS = 64, 0, 1
SIZES = {"vocab_size": VOCABULARY, "d_model": 24, "d_kv": 6, "d_ff": 32, "num_layers": 2, "num_heads": 4}
KINDS = ["t5_tied", "t5_gated_untied", "mt5_untied"]


def build(kind: str, seed: int = 0, sharpness: float = 6.0, **sizes: int) -> torch.nn.Module:
    """A tiny random model whose rows end at different lengths."""
    torch.manual_seed(seed)
    marks = {**SIZES, **sizes, "pad_token_id": PAD, "eos_token_id": EOS, "decoder_start_token_id": PAD}
    if kind == "t5_tied":
        model = T5ForConditionalGeneration(T5Config(**marks, dropout_rate=0.1))
    elif kind == "t5_gated_untied":
        model = T5ForConditionalGeneration(
            T5Config(**marks, feed_forward_proj="gated-gelu", tie_word_embeddings=False, dropout_rate=0.1)
        )
    else:
        model = MT5ForConditionalGeneration(MT5Config(**marks, dropout_rate=0.1))
    if kind != "t5_tied":
        model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCABULARY, SIZES["d_model"]))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "Attention" in name:
                weight.mul_(sharpness)  # sharp attention: a wrong mask, bias or position must show in the tokens
            if "relative_attention_bias" in name:
                weight.mul_(sharpness / 2)
    return model.eval()


def rows_of_many_lengths(rows: int = 12, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 40, (rows,), generator=draws)
    lengths[0] = 40
    source = torch.randint(3, VOCABULARY, (rows, 40), generator=draws)
    mask = (torch.arange(40)[None] < lengths[:, None]).long()
    return source * mask, mask


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_greedy_generation_equals_that_of_transformers_token_for_token(kind, seed):
    """Tied and untied heads, gated and plain layers, padded rows, rows that end early: the same ids."""
    model = build(kind, seed)
    source, mask = rows_of_many_lengths(seed=seed)
    theirs = model.generate(source, attention_mask=mask, max_new_tokens=30, do_sample=False, num_beams=1)[:, 1:].numpy()
    ours = generate(model, source, mask, max_new_tokens=30, eos_id=EOS, pad_id=PAD)
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_those_of_a_whole_forward_pass(kind):
    """Token by token, with the head's scale, the logits are those of the library's forward over the same prefix."""
    model, (source, mask) = build(kind), rows_of_many_lengths(rows=5)
    prefix = torch.randint(3, VOCABULARY, (5, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        decoder = TokenDecoder(model, source, mask, limit_tokens=9)
        ours = torch.stack([decoder.logits(token_B) for token_B in prefix.T], dim=1)
        theirs = model(input_ids=source, attention_mask=mask, decoder_input_ids=prefix).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_decoder_deeper_than_its_encoder_generates_what_plain_forwards_would():
    """Greedy ids equal the argmax of whole forward passes over the own prefix, with 1 and 3 layers."""
    model = build("t5_tied", 1, num_layers=1, num_decoder_layers=3)
    source, mask = rows_of_many_lengths(rows=3)
    ids = torch.from_numpy(generate(model, source, mask, max_new_tokens=12, eos_id=EOS, pad_id=PAD))
    prefix = torch.cat([torch.full((3, 1), PAD), ids[:, :-1]], 1)
    with torch.no_grad():
        best = model(input_ids=source, attention_mask=mask, decoder_input_ids=prefix).logits.argmax(-1)
    before_end = torch.cumsum(ids == EOS, 1) - (ids == EOS).long() == 0
    assert torch.equal(torch.where(before_end, best, PAD), ids)


def test_the_models_of_these_tests_end_rows_at_different_lengths():
    """The equality above means something: some rows end early, some late, and rows differ."""
    lengths = set()
    for kind in KINDS:
        for seed in range(4):
            source, mask = rows_of_many_lengths(seed=seed)
            rows = generate(build(kind, seed), source, mask, max_new_tokens=30, eos_id=EOS, pad_id=PAD)
            lengths |= {int((row == EOS).argmax()) for row in rows if (row == EOS).any()}
    assert len(lengths) >= 5


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_in_a_padded_batch_equals_the_row_alone(kind):
    """Padding, neighbours and rows that leave the batch change no token of a row."""
    model = build(kind)
    source, mask = rows_of_many_lengths()
    together = generate(model, source, mask, max_new_tokens=25, eos_id=EOS, pad_id=PAD)
    for row in range(len(source)):
        length = int(mask[row].sum())
        one = source[row : row + 1, :length]
        alone = generate(model, one, torch.ones_like(one), max_new_tokens=25, eos_id=EOS, pad_id=PAD)[0]
        assert together[row, : len(alone)].tolist() == alone.tolist()
        assert (together[row, len(alone) :] == PAD).all()


def test_generation_leaves_no_trace():
    """Random state, module modes (frozen parts too) and weights are what they were."""
    model = build("mt5_untied").train()
    model.encoder.block[0].eval()
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    first = generate(model, *rows_of_many_lengths(), max_new_tokens=10, eos_id=EOS, pad_id=PAD)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    second = generate(model.eval(), *rows_of_many_lengths(), max_new_tokens=10, eos_id=EOS, pad_id=PAD)
    assert np.array_equal(first, second), "dropout was on"


def test_the_stop_callback_is_called_before_every_token_and_modes_are_restored():
    """True ends the generation with None."""
    model, asked = build("t5_tied").train(), []

    def stop_at_the_fourth() -> bool:
        asked.append(1)
        return len(asked) == 4

    ids = generate(model, *rows_of_many_lengths(), max_new_tokens=30, eos_id=EOS, pad_id=PAD, should_stop=stop_at_the_fourth)
    assert ids is None and len(asked) == 4 and model.training


def test_under_autocast_the_logits_stay_in_float32():
    """In the caller's bf16 context layers and caches take that dtype; logits do not, so near tokens stay apart."""
    model, (source, mask) = build("mt5_untied", sharpness=1.0), rows_of_many_lengths()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        logits = TokenDecoder(model, source, mask, limit_tokens=3).logits(torch.zeros(len(source), dtype=torch.long))
        ids = generate(model, source, mask, max_new_tokens=8, eos_id=EOS, pad_id=PAD)
    exact = TokenDecoder(model, source, mask, limit_tokens=3).logits(torch.zeros(len(source), dtype=torch.long))
    assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float())
    assert 0 < (logits - exact).abs().max() < 0.05 * exact.abs().max()
    assert ids[:, 0].tolist() == logits.argmax(-1).tolist()
