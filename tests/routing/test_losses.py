"""Router losses against loops, and their gradient through whatever the loop does with the main loss."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from symphony_hf.routing.losses import AttachLoss, RecordGradientScale, load_balancing_loss, z_loss

from . import naive


def normal(*shape, seed=0, scale=1.0, dtype=torch.float32):
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def batch(num_tokens=6, num_experts=5, top_k=2, seed=0, scale=1.5):
    """(logits, the experts chosen): not the top ones, which the loss does not ask for."""
    indices = torch.tensor(naive.choose(num_tokens, num_experts, top_k, seed))
    return normal(num_tokens, num_experts, seed=seed, scale=scale), indices


@st.composite
def masked_batches(draw):
    """(logits, indices, mask): one token or more that counts."""
    num_experts = draw(st.integers(1, 8))
    num_tokens = draw(st.integers(1, 10))
    logits, indices = batch(num_tokens, num_experts, draw(st.integers(1, num_experts)), draw(st.integers(0, 10**6)))
    mask = draw(st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens).filter(any))
    return logits, indices, torch.tensor(mask)


def losses_of(logits, indices, mask=None):
    return {"load_balancing": load_balancing_loss(logits, indices, mask), "z": z_loss(logits, mask)}


every_loss = pytest.mark.parametrize("name", ["load_balancing", "z"])

# Logits of 8 at most and up to 10 tokens: sums of some twenty positive float32 terms, each off by a few roundings
# that exp makes relative ones (8 * 2**-24).
RTOL = 40 * naive.EPS32


# Values


@naive.many
@given(masked_batches(), st.booleans())
def test_load_balancing_loss_is_that_of_a_loop(batch, masked):
    logits, indices, mask = batch
    mask = mask if masked else None
    loss = load_balancing_loss(logits, indices, mask)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    expected = naive.load_balancing(logits.tolist(), indices.tolist(), None if mask is None else mask.tolist())
    naive.assert_near(loss, expected, rtol=RTOL)


@naive.many
@given(masked_batches(), st.booleans())
def test_z_loss_is_that_of_a_loop(batch, masked):
    logits, _, mask = batch
    mask = mask if masked else None
    loss = z_loss(logits, mask)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    # A partition near 1 has a logarithm near 0: an absolute error of the logits' roundings.
    naive.assert_near(loss, naive.z(logits.tolist(), None if mask is None else mask.tolist()), rtol=RTOL, atol=1e-6)


@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (4, 2), (7, 3), (60, 4), (128, 8)])
@pytest.mark.parametrize("constant", [0.0, 5.0])
def test_load_balancing_loss_is_k_at_perfect_balance(num_experts, top_k, constant):
    indices = torch.tensor([[(token + i) % num_experts for i in range(top_k)] for token in range(num_experts)])
    loss = load_balancing_loss(torch.full((num_experts, num_experts), constant), indices)
    naive.assert_near(loss, top_k, rtol=4 * num_experts * naive.EPS32)  # sums over E tokens and E experts


def test_load_balancing_loss_is_e_where_one_expert_gets_all():
    logits = torch.tensor([[60.0, 0.0, 0.0, 0.0]]).expand(9, 4)
    naive.assert_near(load_balancing_loss(logits, torch.zeros(9, 1, dtype=torch.int64)), 4.0, rtol=RTOL)


@pytest.mark.parametrize("num_experts", [1, 7, 128])
def test_z_loss_of_even_logits_is_the_squared_logarithm_of_e(num_experts):
    loss = z_loss(torch.full((3, num_experts), 2.0))
    naive.assert_near(loss, naive.z([[2.0] * num_experts]), rtol=RTOL)


@every_loss
@pytest.mark.parametrize("extreme", [200.0, -200.0])
def test_extreme_logits_give_a_finite_loss_and_gradient(name, extreme):
    logits, indices = batch()
    logits[0, 0] = logits[1] = extreme
    logits.requires_grad_()
    loss = losses_of(logits, indices)[name]
    expected = {
        "load_balancing": naive.load_balancing(logits.tolist(), indices.tolist()),
        "z": naive.z(logits.tolist()),
    }
    naive.assert_near(loss, expected[name], rtol=RTOL)
    loss.backward()
    assert torch.isfinite(logits.grad).all()


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_loss_is_computed_in_float32_whatever_the_logits_type(name, dtype):
    logits, indices = batch(50)
    logits = logits.to(dtype).requires_grad_()
    loss = losses_of(logits, indices)[name]
    assert loss.dtype == torch.float32
    # In bfloat16 the loss would be off by 2**-8.
    expected = {
        "load_balancing": naive.load_balancing(logits.tolist(), indices.tolist()),
        "z": naive.z(logits.tolist()),
    }
    naive.assert_near(loss, expected[name], rtol=2 * RTOL)
    loss.backward()
    assert logits.grad.dtype == dtype


@every_loss
def test_loss_under_autocast_is_that_without(name):
    logits, indices = batch(700)  # more tokens than bfloat16 can count
    mask = torch.arange(700) % 3 > 0
    expected = losses_of(logits, indices, mask)[name]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = losses_of(logits, indices, mask)[name]
    naive.assert_same_bits(loss, expected)


# Masks


@every_loss
@naive.few
@given(masked_batches(), st.sampled_from([3.0, -50.0, 1e4]))
def test_masked_tokens_change_neither_value_nor_gradient(name, batch, other):
    logits, indices, mask = batch
    changed = torch.where(mask[:, None], logits, other * torch.arange(logits.shape[1]))
    others = torch.where(mask[:, None], indices, indices.flip(0))
    logits.requires_grad_()
    changed.requires_grad_()
    alone = logits.detach()[mask].requires_grad_()
    loss = losses_of(logits, indices, mask)[name]
    loss_changed = losses_of(changed, others, mask)[name]
    loss_alone = losses_of(alone, indices[mask])[name]
    naive.assert_same_bits(loss_changed, loss)
    naive.assert_near(loss, loss_alone.item(), rtol=RTOL, atol=1e-6)  # the sums may run in another order
    (loss + loss_changed + loss_alone).backward()
    assert (logits.grad[~mask] == 0).all()
    assert (changed.grad[~mask] == 0).all()
    naive.assert_same_bits(changed.grad[mask], logits.grad[mask])
    naive.assert_near(logits.grad[mask], alone.grad.tolist(), rtol=RTOL, atol=1e-6)


@every_loss
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_masked_tokens_may_hold_anything(name, poison):
    """Attention over nothing but padding gives NaN at padded tokens in some implementations."""
    logits, indices = batch()
    mask = torch.tensor([True, True, False, True, False, True])
    expected = losses_of(logits, indices, mask)[name]
    logits[2] = logits[4, 1] = poison
    logits.requires_grad_()
    loss = losses_of(logits, indices, mask)[name]
    naive.assert_same_bits(loss, expected)
    loss.backward()
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[~mask] == 0).all()


@every_loss
def test_batch_of_padding_alone_costs_nothing(name):
    logits, indices = batch()
    logits.requires_grad_()
    loss = losses_of(logits, indices, torch.zeros(6, dtype=torch.bool))[name]
    assert loss.item() == 0.0
    loss.backward()
    assert logits.grad.tolist() == torch.zeros(6, 5).tolist()


@every_loss
def test_mask_of_ones_is_no_mask(name):
    logits, indices = batch()
    loss = losses_of(logits, indices, torch.ones(6, dtype=torch.bool))[name]
    naive.assert_near(loss, losses_of(logits, indices)[name].item(), rtol=RTOL)


# Gradients


@every_loss
@pytest.mark.parametrize("masked", [False, True])
def test_gradient_is_that_of_finite_differences(name, masked):
    logits, indices = batch()
    mask = torch.tensor([True, False, True, True, True, False]) if masked else None
    logits = logits.double().requires_grad_()
    losses_of(logits, indices, mask)[name].backward()

    # Of the loop, which is in double precision throughout: off by about 1e-9, so what is left is float32's error in
    # a gradient of size 0.1 to 1, made of terms of that size.
    def loop(rows):
        if name == "z":
            return naive.z(rows, None if mask is None else mask.tolist())
        return naive.load_balancing(rows, indices.tolist(), None if mask is None else mask.tolist())

    naive.assert_near(logits.grad, naive.slope(loop, logits.tolist()), rtol=RTOL, atol=1e-6)

    # Of the function itself, which casts float64 to float32 inside: a step of 1e-5 would drown in the rounding of
    # the loss (2**-24 of about 5, over the step). At 1e-2 that is off by 10 * 2**-24 / 1e-2 = 6e-5, and the third
    # derivative (of size 5 at most) times step**2 / 6 by 8e-5.
    def itself(rows):
        return losses_of(torch.tensor(rows, dtype=torch.float64), indices, mask)[name].item()

    naive.assert_near(logits.grad, naive.slope(itself, logits.tolist(), eps=1e-2), rtol=0, atol=1.5e-4)


# The gradient's scale


class Toy:
    """Layers of a carrier and a router each, one main loss, and the router losses attached or not."""

    def __init__(self, num_layers=1):
        self.x = normal(6, 4)
        self.carriers = [normal(4, 4, seed=2 * i + 1).requires_grad_() for i in range(num_layers)]
        self.routers = [normal(4, 5, seed=2 * i + 2).requires_grad_() for i in range(num_layers)]
        self.scale = torch.zeros(())

    def layer(self, x, carrier, router):
        hidden = x @ carrier
        return AttachLoss.apply(hidden, z_loss(x @ router), self.scale)

    def main_loss(self, layer=None):
        x = self.x
        for carrier, router in zip(self.carriers, self.routers, strict=True):
            x = torch.tanh((layer or self.layer)(x, carrier, router))
        return x.square().mean()

    def recorded(self, share=1.0, layer=None):
        return RecordGradientScale.apply(self.main_loss(layer), torch.tensor(share), self.scale)

    def gradients(self):
        found = [tensor.grad for tensor in self.carriers + self.routers]
        for tensor in self.carriers + self.routers:
            tensor.grad = None
        return found

    def expected(self, factor, share):
        """Gradients of factor * (main + share * router losses), all in one plain sum."""
        losses = []

        def layer(x, carrier, router):
            losses.append(z_loss(x @ router))
            return x @ carrier

        main = self.main_loss(layer)
        (factor * (main + share * sum(losses))).backward()
        return self.gradients()


def assert_gradients_near(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        # The same float32 sums, scaled before or after, and some in another order. The entries cancel in part, so
        # the bound is relative to the largest.
        naive.assert_near(one, other.tolist(), rtol=0, atol=32 * naive.EPS32 * other.abs().max().item())


def test_forward_changes_no_bit():
    carrier, scale = normal(3, 4, dtype=torch.bfloat16).requires_grad_(), torch.zeros(())
    out = AttachLoss.apply(carrier, z_loss(normal(3, 5).requires_grad_()), scale)
    naive.assert_same_bits(out, carrier)
    main = normal(1)[0].requires_grad_()
    naive.assert_same_bits(RecordGradientScale.apply(main, torch.tensor(0.25), scale), main)
    assert scale == 0.0  # written by the backward alone


def test_outputs_may_be_written_in_place():
    """Models add to their loss, and blocks renormalize the weights of experts, in place."""
    carrier, loss, scale = normal(3, 4).requires_grad_(), torch.tensor(1.5, requires_grad=True), torch.zeros(())
    hidden, before = carrier * 1.0, carrier.detach().clone()
    out = AttachLoss.apply(hidden, loss, scale)
    out *= 3.0
    main = out.sum()
    recorded = RecordGradientScale.apply(main, torch.tensor(0.5), scale)
    recorded += 7.0
    recorded.backward()
    naive.assert_same_bits(hidden, before)
    assert recorded == main + 7.0
    assert carrier.grad.tolist() == [[3.0] * 4] * 3
    assert loss.grad == 0.5


@pytest.mark.parametrize("factor", [1.0, 1 / 7, 2.0**16, -3.0])
@pytest.mark.parametrize("share", [1.0, 0.3])
def test_backward_writes_the_scale_in_place_and_passes_the_gradient_on(factor, share):
    main, scale = torch.tensor(2.5, requires_grad=True), torch.tensor(9.0)
    (RecordGradientScale.apply(main, torch.tensor(share), scale) * factor).backward()
    naive.assert_near(scale, factor * share, rtol=4 * naive.EPS32)
    naive.assert_near(main.grad, factor, rtol=4 * naive.EPS32)


@pytest.mark.parametrize("scale", [0.0, 1.0, 0.125, 2.0**16])
def test_attached_loss_starts_with_the_scale_whatever_the_carriers_gradient(scale):
    carrier, loss = normal(3, 4).requires_grad_(), torch.tensor(1.5, requires_grad=True)
    outer = normal(3, 4, seed=1)
    out = AttachLoss.apply(carrier, loss, torch.tensor(scale))
    (out * outer).sum().backward()
    naive.assert_same_bits(carrier.grad, outer)
    assert loss.grad == scale
    carrier.grad = loss.grad = None
    (AttachLoss.apply(carrier, loss, torch.tensor(scale)) * 0.0).sum().backward()
    assert loss.grad == scale


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("divisor", [1, 7])
@pytest.mark.parametrize("share", [1.0, 0.3])
@pytest.mark.parametrize("scaler", [1.0, 2.0**16])
def test_router_losses_are_scaled_as_the_main_loss(num_layers, divisor, share, scaler):
    toy = Toy(num_layers)
    (toy.recorded(share) / divisor * scaler).backward()
    assert_gradients_near(toy.gradients(), toy.expected(scaler / divisor, share))


def test_gradients_of_micro_batches_add_up():
    """Each backward writes its own scale: the sum of two is not twice the last."""
    toy = Toy(2)
    (toy.recorded(0.5) / 4).backward()
    (toy.recorded(1.0) / 8).backward()
    summed = toy.gradients()
    first, second = toy.expected(1 / 4, 0.5), toy.expected(1 / 8, 1.0)
    assert_gradients_near(summed, [one + other for one, other in zip(first, second, strict=True)])


def test_two_losses_on_one_carrier_both_start():
    toy = Toy()

    def layer(x, carrier, router):
        hidden = AttachLoss.apply(x @ carrier, z_loss(x @ router), toy.scale)
        return AttachLoss.apply(hidden, 2 * z_loss(x @ router), toy.scale)

    (toy.recorded(0.5, layer) / 3).backward()
    assert_gradients_near(toy.gradients(), toy.expected(1 / 3, 3 * 0.5))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_is_the_same_under_checkpointing(use_reentrant):
    toy = Toy(2)
    toy.x.requires_grad_()

    def layer(*inputs):
        return checkpoint(toy.layer, *inputs, use_reentrant=use_reentrant)

    (toy.recorded(0.3, layer) / 7).backward()
    assert_gradients_near(toy.gradients(), toy.expected(1 / 7, 0.3))


# What PyTorch 2.13's compiler does itself: it instantiates `torch.autograd.Function`, and reads `.grad` of its inputs.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("whole", [True, False])
def test_gradient_is_the_same_when_compiled(whole):
    """In one graph with the main loss, or a layer's graph by itself, which reads what another one wrote."""
    toy = Toy(2)
    torch._dynamo.reset()
    if whole:
        share = torch.tensor(0.3)

        def step(x, scale, carriers, routers):
            for carrier, router in zip(carriers, routers, strict=True):
                x = torch.tanh(AttachLoss.apply(x @ carrier, z_loss(x @ router), scale))
            return RecordGradientScale.apply(x.square().mean(), share, scale)

        compiled = torch.compile(step, backend="aot_eager", fullgraph=True)

        def run():
            return compiled(toy.x, toy.scale, toy.carriers, toy.routers)
    else:
        layer = torch.compile(toy.layer, backend="aot_eager", fullgraph=True)

        def run():
            return toy.recorded(0.3, layer)

    for factor in (1 / 7, 2.0**16):  # compiled once, with the scale a value and not a constant
        (run() * factor).backward()
        assert_gradients_near(toy.gradients(), toy.expected(factor, 0.3))
