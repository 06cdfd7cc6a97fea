"""Where attention looks before the first update. Run: python -m pytest tests/model/test_initial_weights.py"""

import pytest
import torch

from resilient_t5.config.sections import ModelConfig
from resilient_t5.model.initial_weights import neighbour_of
from resilient_t5.model.load import SpecialIds, build_model

SPECIAL = SpecialIds(0, 1, 0)
PRESETS = ("mini", "small", "mt5-small")


def attentions(preset, source_BS, target_BT):
    """Attention weights of a model from scratch, from transformers' own forward: encoder, decoder, cross; (B, h, T, S)."""
    model = build_model(ModelConfig(preset=preset, dropout=0.0), vocabulary_rows=400, special=SPECIAL, seed=3).eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(input_ids=source_BS, decoder_input_ids=target_BT, output_attentions=True)
    return out.encoder_attentions, out.decoder_attentions, out.cross_attentions


def distinct_ids(length):
    """One row of ids of which none occurs twice."""
    return 2 + torch.randperm(398, generator=torch.Generator().manual_seed(0))[:length][None]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_decoder_looks_first_at_its_own_token_in_the_source(preset):
    """So a sentinel finds its gap among 60 tokens without a single update."""
    source_BS = distinct_ids(60)
    asked = torch.tensor([5, 20, 40])
    cross_hTS = attentions(preset, source_BS, source_BS[:, asked])[2][0][0]
    assert (cross_hTS.mean(0).argmax(-1) == asked).all()
    assert cross_hTS[:, range(3), asked].mean() > 0.5


@pytest.mark.parametrize("preset", PRESETS)
def test_some_heads_see_one_neighbour_and_the_others_everything(preset):
    """In both stacks, in every layer; the heads of the encoder look both ways."""
    source_BS = distinct_ids(40)
    encoder, decoder, _ = attentions(preset, source_BS, source_BS)
    for layers, in_decoder in ((encoder, False), (decoder, True)):
        heads = layers[0].shape[1]
        distances = [neighbour_of(head, heads, in_decoder=in_decoder) for head in range(heads)]
        assert None in distances
        assert -1 in distances
        assert (1 in distances) != in_decoder
        for weights_BhTS in layers:
            for head, distance in enumerate(distances):
                row = weights_BhTS[0, head, 20]
                seen = row[20 + (distance or 0)]
                assert seen > 0.7 if distance is not None else seen < 0.06, (in_decoder, head, distance)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_token_knows_its_neighbours_from_the_start(preset):
    """The encoder writes what it sees: its output is nearest to the token itself, then to its neighbours."""
    model = build_model(ModelConfig(preset=preset, dropout=0.0), vocabulary_rows=400, special=SPECIAL, seed=3).eval()
    source_BS = distinct_ids(40)
    with torch.no_grad():
        found_SD = model.encoder(input_ids=source_BS).last_hidden_state[0]
        seen_SS = torch.cosine_similarity(found_SD[:, None], model.shared.weight[source_BS[0]][None], dim=-1)
    inside = torch.arange(10, 30)
    itself, neighbours = seen_SS[inside, inside].mean(), (seen_SS[inside, inside - 1] + seen_SS[inside, inside + 1]).mean() / 2
    apart = seen_SS[inside][:, [0, 1, 2, 37, 38, 39]].mean()
    assert itself > neighbours + 0.1
    assert neighbours > apart + 0.1
