"""Estimators, AuxK, folding, dead latents, median: each against what it has to be."""

import copy

import pytest
import torch

from gemma_ext.nn.sparse_autoencoder import (
    AbsTopK,
    BatchTopK,
    DeadLatents,
    Gated,
    JumpReLU,
    Objective,
    ReLU,
    SparseAutoencoder,
    TopK,
    as_jumprelu,
    fold_centre,
    fold_norms,
    fold_standardise,
    fold_whitening,
    geometric_median,
    jump,
    step,
)
from gemma_ext.nn.sparse_autoencoder.losses import variance
from gemma_ext.nn.sparse_autoencoder.sums import row_sums
from gemma_ext.ops.sae import Codes

N, D, F = 31, 9, 26


def made(activation, **options):
    sae = SparseAutoencoder(D, F, activation, **options).eval()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn_like(parameter))
        if isinstance(activation, JumpReLU):
            sae.threshold.abs_()
        if isinstance(activation, BatchTopK):
            sae.threshold.fill_(2.0)
        if sae.standardise_kind == "affine":
            sae.input_mean.normal_()
            sae.input_factor.fill_(0.4)
    return sae


def same(found, expected):
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * scale)


def test_estimators_are_the_published_formulas():
    p, theta, bandwidth = torch.linspace(-1, 2, 61), torch.full((61,), 0.5), 0.4
    for to_input in (False, True):
        a, b = p.clone().requires_grad_(), theta.clone().requires_grad_()
        f = jump(a, b, bandwidth, to_input=to_input)
        assert torch.equal(f, torch.where(p > 0.5, p, 0))
        g = torch.randn(61)
        dp, dtheta = torch.autograd.grad(f, (a, b), g)
        window = ((p - theta).abs() < bandwidth / 2).float()
        torch.testing.assert_close(dtheta, -(theta / bandwidth) * window * g)
        extra = -dtheta if to_input else 0
        torch.testing.assert_close(dp, g * (p > 0.5) + extra)
        h = step(a, b, bandwidth, to_input=to_input)
        assert torch.equal(h, (p > 0.5).float())
        dtheta = torch.autograd.grad(h, b, g, retain_graph=True)[0]
        torch.testing.assert_close(dtheta, -window / bandwidth * g)
        if to_input:
            torch.testing.assert_close(torch.autograd.grad(h, a, g)[0], -dtheta)
        else:
            assert torch.autograd.grad(h, a, g, allow_unused=True)[0] is None


def test_estimators_at_the_threshold_itself():
    p, theta = torch.tensor([0.5]), torch.tensor([0.5])
    assert jump(p, theta, 0.1) == 0
    assert jump(p, theta, 0.1, inclusive=True) == 0.5
    assert step(p, theta, 0.1) == 0
    assert step(p, theta, 0.1, inclusive=True) == 1
    assert jump(torch.tensor([torch.nan]), theta, 0.1).isnan()


def test_threshold_gradient_is_that_of_the_expected_count():
    """p ~ U(0, 1): dE[1[p > θ]] / dθ = -1, whereas f in place of p gives half of it."""
    p = torch.rand(400_000)
    theta = torch.full((), 0.5, requires_grad=True)
    each = theta.expand(p.shape)
    (gradient,) = torch.autograd.grad(step(p, each, 0.1).mean(), theta)
    assert abs(gradient + 1) < 0.02
    f = torch.where(p > 0.5, p, 0)
    (halved,) = torch.autograd.grad(step(f, each, 0.1).mean(), theta)
    assert abs(halved + 0.5) < 0.02


def test_the_window_reaches_below_the_threshold_in_a_dictionary():
    """Tokens whose p is in the window, but does not pass, move the threshold all the same."""
    sae = SparseAutoencoder(1, 1, JumpReLU(bandwidth=0.1), subtract_bias=False).train()
    with torch.no_grad():
        sae.encoder.fill_(1.0)
        sae.decoder.fill_(1.0)
        sae.threshold.fill_(0.5)
    x = torch.tensor([[0.46], [0.54], [0.44], [0.56]])
    loss = Objective(l0=1.0)(sae, x)
    (whole,) = torch.autograd.grad(loss.total, sae.threshold)
    # error: -(θ/ε) of dL/df = -2 (x - f) at the two in the window; count: -1/ε of both, over N
    error = -(0.5 / 0.1) * (-2 * 0.46 + 0.0) / 4
    torch.testing.assert_close(whole, torch.tensor([error - 2 / 0.1 / 4]), rtol=1e-4, atol=1e-4)


def planted():
    """One dead latent, whose decoder is where the residual points."""
    sae = SparseAutoencoder(D, F, TopK(2), subtract_bias=True).train()
    direction = torch.nn.functional.normalize(torch.randn(D), dim=0)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.zero_()
        sae.encoder[7], sae.decoder[7] = direction, direction
    x = direction * (torch.rand(N, 1) + 1)
    dead = torch.arange(F) == 7
    return sae, x, dead


@pytest.mark.parametrize("form", ["openai", "saelens", "sparsify"])
def test_a_dead_latent_that_is_the_residual_costs_nothing(form):
    sae, x, dead = planted()
    with torch.no_grad():
        sae.encoder_bias[7] = -100.0  # not among the best two of a token
        sae.encoder_bias[:2] = 1.0
    objective = Objective(auxiliary=1.0, auxiliary_form=form)
    loss = objective(sae, x, dead=dead)
    assert loss.terms["auxiliary"] > 0
    with torch.no_grad():
        sae.encoder_bias[7] = 0.0
        sae.encoder_bias[:2] = 50.0
    loss = objective(sae, x, dead=dead)
    assert loss.terms["auxiliary"] < 1e-9


def test_auxiliary_gradients_go_to_dead_latents_alone_and_reach_the_encoder():
    sae, x, dead = planted()
    with torch.no_grad():
        sae.encoder_bias[:2] = 50.0
        sae.decoder[7] *= 0.5
    with_term = Objective(auxiliary=1.0)(sae, x, dead=dead).total
    without = Objective()(sae, x, dead=dead).total
    names = ["encoder", "encoder_bias", "decoder", "decoder_bias"]
    parts = [getattr(sae, name) for name in names]
    a, b = torch.autograd.grad(with_term, parts), torch.autograd.grad(without, parts)
    found = {name: u - v for name, u, v in zip(names, a, b, strict=True)}
    for name in ("encoder", "encoder_bias", "decoder"):
        assert found[name][7].abs().sum() > 0, name
        assert not found[name][~dead].any(), name
    # the bias is in the residual, which is constant, and the second list is decoded without it;
    # what is left is its part in the input of the encoder
    expected = -(found["encoder_bias"] @ sae.encoder)
    torch.testing.assert_close(found["decoder_bias"], expected, rtol=1e-4, atol=1e-5)


def test_no_dead_latents_no_term():
    sae, x, _ = planted()
    for dead in (None, torch.zeros(F, dtype=torch.bool)):
        assert set(Objective(auxiliary=1.0)(sae, x, dead=dead).terms) == {"reconstruction"}


def test_auxiliary_of_a_perfect_reconstruction_is_zero_and_not_nan():
    sae, x, dead = planted()
    loss = Objective(auxiliary=1.0)(sae, x * 0, dead=dead)
    assert loss.terms["auxiliary"] == 0
    loss.total.backward()
    assert all(p.grad.isfinite().all() for p in sae.parameters())


NORMED = [
    (ReLU(), None),
    (JumpReLU(), None),
    (Gated(), None),
    (TopK(4), "joint"),
    (AbsTopK(4), "joint"),
    (BatchTopK(4), "joint"),
]


@pytest.mark.parametrize(("activation", "norm"), NORMED, ids=str)
@pytest.mark.parametrize("subtract", [True, False])
def test_folding_norms_changes_no_output(activation, norm, subtract):
    sae = made(activation, score_norm=norm, subtract_bias=subtract)
    x = torch.randn(N, D)
    folded = fold_norms(copy.deepcopy(sae))
    torch.testing.assert_close(folded.decoder.norm(dim=-1), torch.ones(F))
    same(folded(x), sae(x))
    norms = sae.decoder.norm(dim=-1)
    same(folded.encode(x).dense(), sae.encode(x).dense() * norms)


def test_folding_norms_of_a_crosscoder():
    sae = made(BatchTopK(4), sources=3, score_norm="sum")
    x = torch.randn(N, 3, D)
    folded = fold_norms(copy.deepcopy(sae))
    torch.testing.assert_close(folded.decoder_norms().sum(-1), torch.ones(F))
    same(folded(x), sae(x))


def test_folding_norms_that_decide_is_refused():
    with pytest.raises(ValueError, match="score_norm: expected a norm, without which TopK"):
        fold_norms(made(TopK(4)))


@pytest.mark.parametrize(("activation", "norm"), NORMED, ids=str)
@pytest.mark.parametrize("subtract", [True, False])
def test_folding_the_scale_of_the_input_changes_no_output(activation, norm, subtract):
    sae = made(activation, score_norm=norm, subtract_bias=subtract, standardise="affine")
    x = torch.randn(N, D)
    folded = fold_standardise(copy.deepcopy(sae))
    assert folded.standardise_kind == "none"
    same(folded(x), sae(x))
    same(folded.encode(x).dense(), sae.encode(x).dense())


def test_folding_scales_of_sources():
    sae = made(ReLU(), sources=2, standardise="affine")
    sae.input_factor.copy_(torch.tensor([0.3, 2.0]))
    x = torch.randn(N, 2, D)
    same(fold_standardise(copy.deepcopy(sae))(x), sae(x))
    sae = made(BatchTopK(3), sources=2, standardise="affine", score_norm="sum")
    sae.input_factor.copy_(torch.tensor([0.3, 2.0]))
    with pytest.raises(ValueError, match="score_norm: expected None with sources of different"):
        fold_standardise(sae)
    with pytest.raises(ValueError, match="standardise: expected affine, got none"):
        fold_standardise(made(ReLU()))


@pytest.mark.parametrize("activation", [ReLU(), JumpReLU(), Gated(), TopK(4)], ids=str)
@pytest.mark.parametrize("subtract", [True, False])
def test_folding_a_whitening(activation, subtract):
    sae = made(activation, subtract_bias=subtract)
    x, mean = torch.randn(N, D), torch.randn(D)
    whiten = torch.randn(D, D, dtype=torch.float64) + 3 * torch.eye(D, dtype=torch.float64)
    back = torch.linalg.inv(whiten)
    folded = fold_whitening(copy.deepcopy(sae), mean, whiten, back)
    z = ((x.double() - mean) @ whiten).float()
    same(folded.encode(x).dense(), sae.encode(z).dense())
    same(folded(x), (sae(z).double() @ back + mean).float())
    with pytest.raises(ValueError, match="expected one source and scores without norms"):
        fold_whitening(made(TopK(4), score_norm="joint"), mean, whiten, back)


@pytest.mark.parametrize("activation", [ReLU(), JumpReLU(), Gated(), TopK(4)], ids=str)
def test_folding_the_centre(activation):
    sae = made(activation)
    x = torch.randn(N, D)
    folded = fold_centre(copy.deepcopy(sae))
    assert not folded.subtract_bias
    same(folded(x), sae(x))
    same(fold_centre(folded)(x), sae(x))


@pytest.mark.parametrize("activation", [ReLU(), JumpReLU(), BatchTopK(4)], ids=str)
def test_as_jumprelu(activation):
    norm = "joint" if isinstance(activation, BatchTopK) else None
    sae = made(activation, score_norm=norm)
    x = torch.randn(N, D)
    written = as_jumprelu(copy.deepcopy(sae))
    assert isinstance(written.activation, JumpReLU)
    same(written(x), sae(x))
    assert "threshold" in dict(written.named_parameters())
    with pytest.raises(ValueError, match="activation: expected ReLU, BatchTopK or JumpReLU"):
        as_jumprelu(made(TopK(4)))


@pytest.mark.parametrize("kind", ["none", "layer_norm", "unit_norm", "affine"])
@pytest.mark.parametrize("sources", [1, 2])
def test_standardised_inputs_and_the_way_back(kind, sources):
    sae = made(ReLU(), standardise=kind, sources=sources)
    x = torch.randn(N, sources, D) * 5 + 2 if sources > 1 else torch.randn(N, D) * 5 + 2
    z, back = sae.standardised(x)
    assert z.shape == (N, sources * D)
    each = z.view(N, sources, D)
    if kind == "layer_norm":
        torch.testing.assert_close(each.mean(-1), torch.zeros(N, sources), atol=1e-5, rtol=0)
        torch.testing.assert_close(each.std(-1), torch.ones(N, sources), atol=1e-4, rtol=0)
        torch.testing.assert_close(back(sae.split(z)), x, rtol=1e-3, atol=1e-3)
    else:
        torch.testing.assert_close(back(sae.split(z)), x, rtol=1e-4, atol=1e-4)
    if kind == "unit_norm":
        torch.testing.assert_close(each.norm(dim=-1), torch.full((N, sources), D**0.5))


def test_scaled_inputs_give_scaled_latents():
    """x -> c x with biases and thresholds scaled: f -> c f."""
    sae = made(JumpReLU())
    x, c = torch.randn(N, D), 3.7
    scaled = copy.deepcopy(sae)
    with torch.no_grad():
        for name in ("encoder_bias", "decoder_bias", "threshold"):
            getattr(scaled, name).mul_(c)
    same(scaled.encode(c * x).dense(), c * sae.encode(x).dense())


def test_dead_latents_are_counted_in_tokens():
    dead = DeadLatents(4, window=25)
    indices = torch.tensor([[0, 1], [0, 2]], dtype=torch.int32)
    for step_number in range(5):
        values = torch.tensor([[1.0, 0.0], [1.0, -1.0 if step_number < 2 else 0.0]])
        codes = Codes(values, indices, None, torch.Size([2]), 4)
        for _ in range(3):
            dead.update(codes)
    assert dead.since.tolist() == [0, 30, 18, 30]  # a value of 0 has not fired, a negative one has
    assert dead.mask().tolist() == [False, True, False, True]
    assert dead.fired.tolist() == [30, 0, 6, 0]
    assert dead.tokens == 30


def test_entries_behind_the_last_count_nowhere():
    values = torch.tensor([1.0, 2.0, 4.0, 0.0], requires_grad=True)
    codes = Codes(
        values,
        torch.tensor([3, 1, 1, 0], dtype=torch.int32),
        torch.tensor([0, 2, 2, 3]),
        torch.Size([3]),
        5,
    )
    sums = row_sums(codes, codes.values)
    assert sums.tolist() == [3.0, 0.0, 4.0]
    sums.sum().backward()
    assert values.grad.tolist() == [1.0, 1.0, 1.0, 0.0]
    dead = DeadLatents(5)
    dead.update(codes)
    assert dead.fired.tolist() == [0, 2, 0, 1, 0]


def test_geometric_median_has_the_least_sum_of_distances():
    points = torch.randn(60, 3)
    points[:5] += 100.0
    median = geometric_median(points)
    best = (points - median).norm(dim=-1).sum()
    for _ in range(50):
        other = median + 0.05 * torch.randn(3)
        assert (points - other).norm(dim=-1).sum() >= best - 1e-3
    torch.testing.assert_close(geometric_median(points[:1]), points[0])
    three = torch.tensor([[0.0], [1.0], [10.0]])
    torch.testing.assert_close(geometric_median(three), torch.tensor([1.0]), atol=1e-2, rtol=0)


def test_variance_is_around_the_mean_of_the_tokens():
    y = torch.randn(4, 5, D) + 3
    expected = (y.view(20, D) - y.view(20, D).mean(0)).square().sum()
    torch.testing.assert_close(variance(y), expected)
