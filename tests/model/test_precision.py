"""Precision, islands, probe, keyed dropout. Run: python -m pytest tests/model/test_precision.py"""

import math

import pytest
import torch
from torch.nn import functional

from resilient_t5.errors import ConfigError
from resilient_t5.model.dropout import seed_dropout
from resilient_t5.model.loss import forward_loss, token_nll
from resilient_t5.model.precision import (
    Precision,
    attention_backward_offset,
    choose_precision,
    cpu_supports_bf16,
    install_float32_islands,
    probe_overflow,
)

CPU = torch.device("cpu")
FP16 = Precision("fp16", "asked for")


@pytest.fixture(params=["t5", "mt5"])
def overflowing(request, make_model):
    """A model whose second feed-forward product passes 65,504 in every layer, and whose loss in float32 is sane."""
    model = make_model(request.param)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("wo.weight"):
                parameter *= 4e6
    return model.eval()


def mean_nll(model, batch, precision):
    """Nats per token of one batch in a number format."""
    with precision.autocast(CPU):
        found = token_nll(model, *batch)
    return float(found.nll_sum_B.sum() / found.tokens_B.sum())


def plain_nll(model, batch, precision):
    """The same by the forward pass of transformers."""
    with precision.autocast(CPU), torch.no_grad():
        logits_BTV = model(input_ids=batch[0], attention_mask=batch[1], labels=batch[2]).logits
    return functional.cross_entropy(logits_BTV.float().flatten(0, 1), batch[2].flatten(), ignore_index=-100).item()


def test_islands_keep_weights_that_overflow_float16_finite_and_close(overflowing, make_examples, collate):
    """200 inputs: transformers' layers give no finite loss; lean ones all, median offset below 0.05 %, gradients too."""
    batches = [collate(make_examples(1, seed=seed)) for seed in range(200)]
    exact = [mean_nll(overflowing, batch, Precision("fp32", "")) for batch in batches]
    assert all(math.isfinite(loss) for loss in exact)
    broken = [plain_nll(overflowing, batch, FP16) for batch in batches]
    assert sum(math.isfinite(loss) for loss in broken) < 4
    found = [mean_nll(overflowing, batch, FP16) for batch in batches]
    assert all(math.isfinite(loss) for loss in found)
    offsets = sorted(abs(a - b) / b for a, b in zip(found, exact, strict=True))
    assert offsets[len(offsets) // 2] < 0.0005
    with FP16.autocast(CPU):
        loss = forward_loss(overflowing, *batches[0], divisor=10.0).loss
    loss.backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in overflowing.parameters())


def test_a_gate_whose_product_overflows_stays_finite_inside_the_island(make_model, make_examples, collate):
    """Both factors fit into float16, their product does not: it is taken in float32."""
    model, batch = make_model("mt5").eval(), collate(make_examples(3))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("wi_0.weight", "wi_1.weight")):
                parameter *= 500.0
            elif name.endswith("wo.weight"):
                parameter /= 500.0**2
    assert not math.isfinite(plain_nll(model, batch, FP16))
    expected = pytest.approx(plain_nll(model, batch, Precision("fp32", "")), rel=0.01)
    assert mean_nll(model, batch, FP16) == expected
    assert install_float32_islands(model) == 4  # the forward pass of transformers, which generation uses
    assert plain_nll(model, batch, FP16) == expected


def test_islands_change_no_name_no_parameter_and_nothing_in_float32(make_model, make_examples, collate):
    """The state dict, the parameter objects and the float32 loss stay; installing twice is installing once."""
    model, batch = make_model("mt5").eval(), collate(make_examples(3))
    before, parameters = mean_nll(model, batch, Precision("fp32", "")), dict(model.named_parameters())
    install_float32_islands(model)
    install_float32_islands(model)
    after = dict(model.named_parameters())
    assert after.keys() == parameters.keys()
    assert all(after[name] is parameters[name] for name in after)
    assert mean_nll(model, batch, Precision("fp32", "")) == before


def test_the_probe_keeps_a_format_that_works_and_says_how_close_it_is(make_model, make_examples, collate):
    """An ordinary model keeps bf16; mode and random streams are as before."""
    model = make_model("t5", dropout=0.5).train()
    stream = torch.random.get_rng_state()
    found = probe_overflow(model, [collate(make_examples(3))], Precision("bf16", "native"), CPU)
    assert found.name == "bf16"
    assert "probe" in found.why
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), stream)


def test_the_probe_falls_back_to_float32_when_a_format_overflows(overflowing, make_examples, collate):
    """fp16 is kept while only the second feed-forward product overflows, and given up if the first one does."""
    batches = [collate(make_examples(3, seed=seed)) for seed in range(3)]
    assert probe_overflow(overflowing, batches, FP16, CPU).name == "fp16"
    with torch.no_grad():
        for name, parameter in overflowing.named_parameters():
            if name.endswith(("wi.weight", "wi_0.weight")):
                parameter *= 1e6
            elif name.endswith("wo.weight"):
                parameter /= 1e12
    found = probe_overflow(overflowing, batches, FP16, CPU)
    assert (found.name, "overflow" in found.why) == ("fp32", True)


def test_a_cpu_runs_in_float32_unless_told_otherwise():
    """auto is fp32 on a CPU, with a reason; an explicit format is used."""
    assert choose_precision("auto", CPU).name == "fp32"
    assert choose_precision("auto", CPU).why
    assert [choose_precision(name, CPU).name for name in ("fp32", "bf16", "fp16")] == ["fp32", "bf16", "fp16"]


@pytest.mark.parametrize(
    ("flags", "native"),
    [
        ("fpu avx512f avx512_bf16 avx512_vnni", True),
        ("fpu amx_bf16", True),
        ("fp asimd bf16", True),
        ("fpu avx2 avx512f", False),
    ],
)
def test_what_a_cpu_can_do_in_bf16_is_said_and_not_done_unasked(flags, native, tmp_path, monkeypatch):
    """The processor's own words decide the advice; where there are none, none is given."""
    facts = tmp_path / "cpuinfo"
    facts.write_text(f"processor\t: 0\nflags\t\t: {flags}\n", encoding="ascii")
    assert cpu_supports_bf16(facts) is native
    assert cpu_supports_bf16(tmp_path / "nowhere") is None
    monkeypatch.setattr("resilient_t5.model.precision.cpu_supports_bf16", lambda: native)
    assert choose_precision("auto", CPU).name == "fp32"
    assert ("hardware.precision" in choose_precision("auto", CPU).why) is native
    assert ("emulates" in choose_precision("bf16", CPU).why) is not native
    monkeypatch.setattr("resilient_t5.model.precision.cpu_supports_bf16", lambda: None)
    assert choose_precision("bf16", CPU).why == "as configured"


@pytest.mark.parametrize(("capability", "chosen"), [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp16"), ((6, 1), "fp32")])
def test_a_gpu_runs_in_the_best_format_it_does_natively(capability, chosen, monkeypatch):
    """Ampere and later bf16, Turing and Volta fp16, Pascal fp32; emulated bf16 is refused."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    device = torch.device("cuda")
    assert choose_precision("auto", device).name == chosen
    if chosen != "bf16":
        with pytest.raises(ConfigError, match="no bf16"):
            choose_precision("bf16", device)


def test_dropout_is_a_function_of_seed_update_and_micro_batch(make_model, make_examples, collate):
    """The same three numbers give the same dropout whatever ran before; changing any one changes it."""
    model = make_model("t5", dropout=0.3)
    batch = collate(make_examples(3))

    def loss(*key):
        seed_dropout(*key)
        return forward_loss(model.train(), *batch, divisor=1.0).loss.item()

    first = loss(42, 7, 1)
    torch.randn(5)
    assert loss(42, 7, 1) == first
    others = [
        loss(43, 7, 1),
        loss(42, 8, 1),
        loss(42, 7, 2),
        loss(42, 1, 7),
        loss(2**63 - 1, 7, 1),
    ]
    assert len({first, *others}) == 6


def test_the_attention_in_use_agrees_with_the_plain_one():
    """The start-up probe passes on a healthy machine, far below its limit."""
    assert attention_backward_offset(CPU) < 1e-4
