"""The pass of a GPU: packed rows, static buffers, no operation that depends on values.

Run: python -m pytest tests/model/test_static_shapes.py
"""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from resilient_t5.data.pass_input import PassInput
from resilient_t5.model import loss as loss_module
from resilient_t5.model.dropout import seed_dropout
from resilient_t5.model.layers import allocate_buffers, install_lean_layers
from resilient_t5.model.loss import forward_loss

KINDS = ["t5", "mt5"]
PRECISION = [(torch.float32, 1e-6), (torch.float64, 1e-12)]
DIVISOR = 10.0


def packed(examples, rows, source_tokens, target_tokens):
    """Examples dealt to `rows` rows in turn, one after the other: ids, segments, labels, target segments."""
    source, segments = torch.zeros(2, rows, source_tokens, dtype=torch.int32)
    labels, target_segments = torch.full((rows, target_tokens), -100, dtype=torch.int32), torch.zeros(rows, target_tokens).int()
    ends = [[0, 0] for _ in range(rows)]
    for number, (of_source, of_target) in enumerate(examples):
        row, segment = number % rows, number // rows + 1
        begin, start = ends[row]
        ends[row] = [begin + len(of_source), start + len(of_target)]
        source[row, begin : ends[row][0]] = torch.tensor(of_source)
        segments[row, begin : ends[row][0]] = segment
        labels[row, start : ends[row][1]] = torch.tensor(of_target)
        target_segments[row, start : ends[row][1]] = segment
    return source, segments, labels, target_segments


def gradients(model, batch, **settings):
    """Loss, loss sum and gradients of one pass."""
    divisor = torch.tensor(DIVISOR, dtype=model.shared.weight.dtype) if settings else DIVISOR
    parts = forward_loss(model, *batch, divisor=divisor, **settings)
    parts.loss.backward()
    taken = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return parts.loss.item(), parts.nll_sum.item(), taken


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISION)
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_packed_rows_give_the_loss_and_the_gradients_of_padded_ones(
    kind, dtype, tolerance, rows, make_model, make_examples, collate, relative_error
):
    """Five examples in one, two or five rows, with padding at the end of the rows."""
    model, examples = make_model(kind, dtype=dtype).train(), make_examples(5)
    expected_loss, expected_sum, expected = gradients(model, collate(examples))
    loss, nll_sum, found = gradients(model, packed(examples, rows, 72, 56), all_positions=True)
    assert loss == pytest.approx(expected_loss, rel=tolerance)
    assert nll_sum == pytest.approx(expected_sum, rel=1e-6)
    assert relative_error(found, expected) < tolerance


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISION)
def test_a_row_without_labels_adds_nothing(kind, dtype, tolerance, make_model, make_examples, collate, relative_error):
    """One example whose labels are all ignored, in a row of its own: the gradients are those of the others."""
    model, examples = make_model(kind, dtype=dtype).train(), make_examples(3)
    expected_loss, _, expected = gradients(model, collate(examples))
    source, segments, labels, target_segments = packed([*examples, make_examples(1, seed=5)[0]], 4, 40, 24)
    labels[3], target_segments[3] = -100, 0
    loss, _, found = gradients(model, (source, segments, labels, target_segments), all_positions=True)
    assert loss == pytest.approx(expected_loss, rel=tolerance)
    assert relative_error(found, expected) < tolerance


@pytest.mark.parametrize("rows", [1, 4])
def test_every_query_of_packed_rows_sees_a_key(rows, make_model, make_examples, monkeypatch):
    """Also padding and rows without an example: attention kernels differ in what they compute for a query without keys."""
    model, seen = make_model("mt5").train(), []

    def watch(stack):
        forward = stack.forward

        def watched(**given):
            seen.extend(value for name, value in given.items() if "visible" in name)
            return forward(**given)

        monkeypatch.setattr(stack, "forward", watched)

    watch(model.encoder)
    watch(model.decoder)
    source, segments, labels, target_segments = packed(make_examples(3), rows, 72, 56)
    segments[0, segments[0] == 0] = 1  # a source without padding
    forward_loss(model, source, segments, labels, target_segments, divisor=torch.tensor(DIVISOR), all_positions=True)
    assert len(seen) == 3
    assert all(bool(visible.any(-1).all()) for visible in seen)


@pytest.mark.parametrize("settings", [{"label_smoothing": 0.1}, {"z_loss": 0.01}])
def test_smoothing_and_z_loss_leave_ignored_positions_out(settings, make_model, make_examples, collate, relative_error):
    """The head computes every position of the packed rows; the terms of those without a label are zero."""
    model, examples = make_model("mt5", dtype=torch.float64).train(), make_examples(5)
    expected = forward_loss(model, *collate(examples), divisor=DIVISOR, **settings)
    expected.loss.backward()
    expected_gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    divisor = torch.tensor(DIVISOR, dtype=torch.float64)
    found = forward_loss(model, *packed(examples, 2, 72, 56), divisor=divisor, all_positions=True, **settings)
    found.loss.backward()
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-12)
    assert relative_error({name: p.grad for name, p in model.named_parameters()}, expected_gradients) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_static_buffers_change_no_gradient(kind, dtype, make_model, make_examples, collate, relative_error):
    """With copies of the weights and without, two micro-batches add up to the same, and the next update begins at 0."""
    model, examples = make_model(kind).train(), make_examples(6)
    batches = [packed(examples[:3], 2, 40, 32), packed(examples[3:], 2, 40, 32)]
    for batch in batches:
        forward_loss(model, *batch, divisor=torch.tensor(DIVISOR), all_positions=True).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    buffers = allocate_buffers(model, dtype)
    addresses = []
    for _ in range(2):
        buffers.begin_update()
        for batch in batches:
            forward_loss(model, *batch, divisor=torch.tensor(DIVISOR), all_positions=True).loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters()}
        assert relative_error(found, expected) < 1e-6
        addresses.append([p.grad.data_ptr() for p in model.parameters()])
        model.zero_grad(set_to_none=True)
    assert addresses[0] == addresses[1]


def test_copies_of_the_weights_follow_the_weights_and_only_training_uses_them(make_model, make_examples):
    """After a step of an optimizer the next update computes with the new weights; evaluation needs no copy."""
    model, batch = make_model("mt5"), packed(make_examples(4), 2, 40, 32)

    def loss():
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            return forward_loss(model, *batch, divisor=torch.tensor(DIVISOR), all_positions=True).loss.item()

    before = loss()
    buffers = allocate_buffers(model, torch.bfloat16)
    with torch.no_grad():
        for parameter in model.encoder.block.parameters():
            parameter *= 1.5
    assert (changed := model.eval() and loss()) != before
    buffers.begin_update()
    model.train()
    assert loss() == changed


@pytest.fixture
def run_fake(make_model):
    """(kind, shape, checkpointing) -> a pass of a GPU over tensors without values: forward, backward and norm."""

    def run(kind, shape, checkpointing=False):
        model = make_model(kind, dropout=0.1).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        fake = copy.deepcopy(model)
        mode = FakeTensorMode(allow_non_fake_inputs=False)
        for module in fake.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    module._parameters[name] = torch.nn.Parameter(mode.from_tensor(parameter.detach()))
        if kind == "t5":
            fake.lm_head.weight = fake.shared.weight
        with mode:
            for stack in (fake.encoder, fake.decoder):
                stack.embed_tokens.weight = fake.shared.weight
            install_lean_layers(fake, by_kernel=True)
            buffers = allocate_buffers(fake, torch.bfloat16)
            rows, source, target = shape
            given = PassInput(torch.zeros(2 * rows * (source + target), dtype=torch.int32), shape)
            buffers.begin_update()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                parts = forward_loss(fake, *given.tensors(), divisor=torch.ones(()), z_loss=0.1, all_positions=True)
            parts.loss.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in fake.parameters()])
            torch.nn.utils.clip_grads_with_norm_(list(fake.parameters()), 1.0, norm)
        return norm

    return run


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 64, 24), (2, 40, 16), (16, 8, 8)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_forward_backward_and_norm_depend_on_no_value(kind, shape, checkpointing, run_fake):
    """Tensors without values go through; an operation that reads one, or whose size depends on one, would raise."""
    assert run_fake(kind, shape, checkpointing).shape == ()


def test_a_pass_that_looks_for_its_labels_is_found(run_fake, monkeypatch):
    """The mutant with `nonzero` raises."""

    def labels_only(model, decoded_BTD, labels_BT, positions_N):
        return plain(model, decoded_BTD, labels_BT, loss_module._label_positions(labels_BT))

    plain = loss_module._at
    monkeypatch.setattr(loss_module, "_at", labels_only)
    with pytest.raises(Exception, match="nonzero|data-dependent|DynamicOutputShape"):
        run_fake("mt5", (2, 40, 16))


@pytest.mark.parametrize("by_kernel", [False, True])
def test_dropout_of_packed_rows_has_the_gradient_of_the_function_that_was_drawn(by_kernel, make_model, make_examples):
    """With the stream fixed, a finite difference along a random direction is the gradient's product with it."""
    model = make_model("mt5", dtype=torch.float64, dropout=0.3).train()
    install_lean_layers(model, by_kernel=by_kernel)
    batch, generator = packed(make_examples(5), 2, 72, 56), torch.Generator().manual_seed(5)
    direction = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in model.named_parameters()}

    def moved(distance):
        seed_dropout(1, 2, 3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter += distance * direction[name]
        loss = forward_loss(model, *batch, divisor=torch.tensor(DIVISOR), all_positions=True).loss
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter -= distance * direction[name]
        return loss

    moved(0.0).backward()
    slope = sum(float((p.grad * direction[name]).sum()) for name, p in model.named_parameters())
    small = 1e-7
    assert (moved(small) - moved(-small)).item() / (2 * small) == pytest.approx(slope, rel=1e-5)
