"""Sparse dictionaries against dense float64 formulas: reconstructions, losses, all gradients."""

import dataclasses

import pytest
import torch
from sae_oracle import Dense, best, total_loss
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from gemma_ext.nn.sparse_autoencoder import (
    AbsTopK,
    Activation,
    BatchTopK,
    Gated,
    GroupMax,
    JumpReLU,
    Objective,
    ReLU,
    SparseAutoencoder,
    TopK,
    default_objective,
)

N, D, F = 29, 14, 40
ACTIVATIONS = (
    ReLU(),
    TopK(5),
    TopK(5, relu=False),
    AbsTopK(5),
    GroupMax(5),
    BatchTopK(4.5),
    JumpReLU(bandwidth=0.6, initial=0.4),
    JumpReLU(bandwidth=0.6, initial=0.4, to_input=True),
    Gated(),
)
LOSSES = (
    (TopK(5), {"error": "fvu"}),
    (TopK(5), {"auxiliary": 0.5}),
    (TopK(5), {"auxiliary": 0.5, "auxiliary_form": "saelens"}),
    (TopK(5), {"auxiliary": 0.5, "auxiliary_form": "sparsify", "auxiliary_k": 3}),
    (TopK(5, multi=4), {"error": "fvu", "multi": 0.125}),
    (TopK(5, multi=4), {"multi": 0.125}),
    (TopK(5), {"ranks": True}),
    (TopK(5), {"widths": (7, 20, F), "level_weights": (0.5, 2.0, 1.0)}),
    (BatchTopK(4.5), {"widths": (7, 20, F), "auxiliary": 0.1}),
    (BatchTopK(4.5), {"error": "norm", "auxiliary": 1 / 32}),
    (ReLU(), {"l1": 0.3, "pre_activation": 0.2}),
    (ReLU(), {"l0": 0.3, "l0_form": "tanh"}),
    (Gated(), {"l1": 0.3}),
    (JumpReLU(0.6, 0.4), {"l0": 0.3, "pre_activation": 0.2}),
    (JumpReLU(0.6, 0.4, to_input=True), {"l0": 0.3}),
    (JumpReLU(0.6, 0.4), {"l0": 0.3, "l0_form": "quadratic", "target_l0": 6.0}),
    (JumpReLU(0.6, 0.4), {"l0": 0.3, "l0_form": "tanh", "auxiliary": 0.1}),
    (AbsTopK(5), {"auxiliary": 0.3}),
)


def made(activation, **options):
    """A dictionary with random weights everywhere."""
    sae = SparseAutoencoder(D, F, activation, **options)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name == "threshold":
                parameter.copy_(torch.rand(F) + 0.1)
            else:
                parameter.copy_(torch.randn_like(parameter) * (0.4 if "bias" in name else 0.35))
    return sae


def drawn(sae):
    return torch.randn(N, sae.sources, D) if sae.sources > 1 else torch.randn(N, D)


def check_gradients(sae, dense, loss, expected):
    for parameter in sae.parameters():
        parameter.grad = None
    loss.backward()
    for name, theirs in dense.gradients(expected).items():
        ours = getattr(sae, name).grad
        if theirs is None:
            assert ours is None or not ours.any(), name
            continue
        scale = float(theirs.abs().max()) + 1e-6
        torch.testing.assert_close(
            ours.double(), theirs, rtol=1e-3, atol=2e-5 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
@pytest.mark.parametrize("sources", [1, 3])
@pytest.mark.parametrize("options", [{}, {"subtract_bias": False, "score_norm": "sum"}], ids=str)
def test_latents_reconstruction_and_gradients(activation, sources, options):
    elementwise = isinstance(activation, ReLU | JumpReLU | Gated | GroupMax)
    options = {k: v for k, v in options.items() if k != "score_norm" or not elementwise}
    sae = made(activation, sources=sources, **options).train()
    x = drawn(sae)
    dense = Dense(sae, x)
    loss = Objective()(sae, x)
    torch.testing.assert_close(loss.latents.codes.dense().double(), dense.f, rtol=1e-4, atol=1e-5)
    expected = total_loss(dense, Objective())
    torch.testing.assert_close(loss.total.double(), expected, rtol=1e-5, atol=1e-6)
    error = dense.x - dense.decode(dense.f)
    torch.testing.assert_close(
        loss.squared.double(), error.square().sum(-1).detach(), rtol=1e-4, atol=1e-5
    )
    check_gradients(sae, dense, loss.total, expected)
    sae.eval()
    still = Dense(sae, x, training=False)
    torch.testing.assert_close(sae.encode(x).dense().double(), still.f, rtol=1e-4, atol=1e-5)
    out = still.decode(still.f).view(x.shape)
    torch.testing.assert_close(sae(x).double(), out, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("activation", "terms"), LOSSES, ids=str)
@pytest.mark.parametrize("sources", [1, 2])
def test_losses_and_gradients(activation, terms, sources):
    chosen_by = "joint" if isinstance(activation, BatchTopK | AbsTopK) else None
    sae = made(activation, sources=sources, score_norm=chosen_by).train()
    x = drawn(sae)
    dead = torch.rand(F) < 0.4
    objective = Objective(**terms)
    dense = Dense(sae, x)
    loss = objective(sae, x, dead=dead, warmth=0.7)
    expected = total_loss(dense, objective, dead, warmth=0.7)
    torch.testing.assert_close(loss.total.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sum(loss.terms.values()), loss.total.detach())
    check_gradients(sae, dense, loss.total, expected)


def test_gradient_of_the_input_and_a_target_of_its_own():
    sae = made(TopK(5), output_width=9, skip=True)
    with torch.no_grad():
        sae.skip.normal_()
    x, y = torch.randn(N, D, requires_grad=True), torch.randn(N, 9)
    loss = Objective()(sae, x, y).total
    (ours,) = torch.autograd.grad(loss, x)
    z = x.detach().double().requires_grad_()
    p = z @ sae.encoder.double().T + sae.encoder_bias.double()
    f = (p * best(p.detach(), 5)).relu()
    out = f @ sae.decoder.double() + sae.decoder_bias.double() + z @ sae.skip.double().T
    (theirs,) = torch.autograd.grad((y - out).square().sum(-1).mean(), z)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae(x).double(), out, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="z: expected the input of a dictionary with a skip"):
        sae.decode(sae.encode(x))


def test_selection_is_by_scores_and_values_are_not():
    sae = made(TopK(1), sources=2, score_norm="sum", subtract_bias=False)
    with torch.no_grad():
        sae.encoder_bias.zero_()
        sae.encoder.zero_()
        sae.encoder[0, 0], sae.encoder[1, 0] = 2.0, 1.0
        sae.decoder.zero_()
        sae.decoder[0, 0], sae.decoder[1, 0], sae.decoder[1, D] = 1.0, 2.0, 2.0
    x = torch.zeros(1, 2, D)
    x[0, 0, 0] = 1.0
    codes = sae.encode(x)  # scores 2 and 4, values 2 and 1
    assert (codes.indices.item(), codes.values.item()) == (1, 1.0)
    plain = made(TopK(1), sources=2, subtract_bias=False)
    plain.load_state_dict(sae.state_dict())
    assert plain.encode(x).indices.item() == 0


def test_a_token_of_nan_is_seen_and_poisons_no_other():
    for activation in ACTIVATIONS:
        sae = made(activation).eval()
        x = drawn(sae)
        expected = sae(x)
        x[3, 2] = torch.nan
        found = sae(x)
        assert found[3].isnan().any(), activation
        keep = torch.arange(N) != 3
        torch.testing.assert_close(found[keep], expected[keep])


def test_leading_dimensions_and_no_tokens():
    for activation in ACTIVATIONS:
        sae = made(activation).eval()
        x = torch.randn(3, 5, D)
        torch.testing.assert_close(sae(x), sae(x.flatten(0, 1)).view(3, 5, D))
        assert sae(x[:0]).shape == (0, 5, D)


@pytest.mark.parametrize("activation", [TopK(5), BatchTopK(5), JumpReLU(0.6, 0.4)], ids=repr)
def test_unit_rows_stay_unit_rows(activation):
    sae = SparseAutoencoder(D, F, activation, unit_norm=True)
    x = drawn(sae)
    objective = default_objective(sae)
    optimiser = torch.optim.SGD(sae.parameters(), lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        dead = torch.arange(F) < 10
        objective(sae, x, dead=dead).total.backward()
        parallel = (sae.decoder.grad * sae.decoder).sum(-1)
        assert parallel.abs().max() < 1e-5 * sae.decoder.grad.abs().max() * D + 1e-6
        optimiser.step()
        assert (sae.decoder.norm(dim=-1) > 1).any()
        sae.constrain()
        torch.testing.assert_close(sae.decoder.norm(dim=-1), torch.ones(F))


def test_matryoshka_of_one_level_is_the_plain_loss():
    sae = made(BatchTopK(4)).train()
    x = drawn(sae)
    one, plain = Objective(widths=(F,))(sae, x), Objective()(sae, x)
    torch.testing.assert_close(one.total, plain.total)


def test_hierarchical_with_one_entry_is_topk():
    sae = made(TopK(1)).train()
    x = drawn(sae)
    torch.testing.assert_close(Objective(ranks=True)(sae, x).total, Objective()(sae, x).total)


def test_gated_without_a_ratio_is_relu():
    gated, relu = made(Gated()), made(ReLU())
    shared = {k: v for k, v in gated.state_dict().items() if k in relu.state_dict()}
    relu.load_state_dict(shared)
    with torch.no_grad():
        gated.r_mag.zero_()
        gated.magnitude_bias.copy_(gated.encoder_bias)
    x = drawn(gated)
    torch.testing.assert_close(gated(x), relu(x), rtol=1e-4, atol=1e-5)


def test_topk_ignores_a_common_scale_of_the_decoder():
    sae = made(TopK(5), score_norm="joint")
    x = drawn(sae)
    before = sae.encode(x)
    with torch.no_grad():
        sae.decoder *= 7.0
    assert torch.equal(sae.encode(x).indices, before.indices)


def test_batch_topk_is_topk_where_rows_are_alike():
    torch.manual_seed(0)
    batch, rows = made(BatchTopK(5)).train(), made(TopK(5))
    rows.load_state_dict({k: v for k, v in batch.state_dict().items() if k != "threshold"})
    row = torch.randn(1, D)
    with torch.no_grad():
        for sae in (batch, rows):
            sae.encoder_bias.add_(2.0)
    x = row.repeat(N, 1)
    torch.testing.assert_close(
        batch.latents(x).codes.dense(), rows.latents(x).codes.dense(), rtol=1e-4, atol=1e-5
    )


def test_batch_topk_learns_the_mean_of_its_smallest_score():
    sae = made(BatchTopK(3, decay=0.75), score_norm="joint").train()
    assert sae.threshold == -1
    least = []
    for _ in range(4):
        latents = sae.latents(drawn(sae))
        scores = latents.codes.values * sae.score_scale()[latents.codes.indices.long()]
        least.append(scores[scores > 0].min().item())
        torch.testing.assert_close(latents.min_positive, torch.tensor(least[-1]))
        sae.observe(latents)
    mean = least[0]
    for value in least[1:]:
        mean = 0.75 * mean + 0.25 * value
    torch.testing.assert_close(sae.threshold, torch.tensor(mean))
    silent = sae.latents(torch.zeros(2, D) + sae.decoder_bias.detach() - 1e4 * sae.encoder.sum(0))
    silent = dataclasses.replace(silent, min_positive=torch.tensor(torch.inf))
    sae.observe(silent)  # nothing was active: nothing is learnt
    torch.testing.assert_close(sae.threshold, torch.tensor(mean))


def test_batch_topk_with_fewer_positives_than_places():
    sae = made(BatchTopK(F)).train()
    x = drawn(sae)
    codes = sae.latents(x).codes
    dense = Dense(sae, x)
    torch.testing.assert_close(codes.dense().double(), dense.p.relu(), rtol=1e-4, atol=1e-5)
    assert (codes.values[codes.mask] > 0).all()


def test_thresholds_and_statistics_stay_exact_in_half_precision():
    sae = SparseAutoencoder(D, F, JumpReLU(initial=0.0123456), standardise="affine")
    sae.input_mean.fill_(0.0123456)
    narrow = sae.to(torch.bfloat16)
    assert narrow.encoder.dtype == torch.bfloat16
    assert narrow.threshold.dtype == torch.float32
    assert isinstance(narrow.threshold, torch.nn.Parameter)
    assert (narrow.threshold == 0.0123456).all()
    assert (narrow.input_mean == 0.0123456).all()
    assert narrow.double().threshold.dtype == torch.float64


@pytest.mark.parametrize("activation", [TopK(5), BatchTopK(5), ReLU(), Gated()], ids=repr)
def test_products_in_bfloat16_under_autocast(activation):
    sae = made(activation).train()
    x = drawn(sae)
    exact = Objective()(sae, x).total
    with torch.autocast("cpu", torch.bfloat16):
        loss = Objective()(sae, x).total
    torch.testing.assert_close(loss.float(), exact, rtol=0.1, atol=0.1)
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in sae.parameters())


def test_second_derivatives_are_refused():
    sae = made(JumpReLU(0.6, 0.4)).train()
    (gradient,) = torch.autograd.grad(
        Objective(l0=1.0)(sae, drawn(sae)).total, sae.threshold, create_graph=True
    )
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


def test_initial_weights():
    generator = torch.Generator().manual_seed(3)
    sae = SparseAutoencoder(D, F, TopK(3), sources=2)
    sae.reset_parameters(generator, norm=0.3)
    torch.testing.assert_close(sae.decoder_norms(), torch.full((F, 2), 0.3))
    assert torch.equal(sae.encoder, sae.decoder)
    assert torch.equal(sae.decoder[:, :D], sae.decoder[:, D:])
    sae.reset_parameters(generator, equal_sources=False)
    assert not torch.equal(sae.decoder[:, :D], sae.decoder[:, D:])
    assert not SparseAutoencoder(D, F, TopK(3), output_width=5).decoder.any()
    assert "TopK" in repr(sae)


def test_norms_of_zero_rows_have_no_gradient():
    sae = made(ReLU())
    with torch.no_grad():
        sae.decoder[3] = 0.0
    sae.decoder_norms().sum().backward()
    assert not sae.decoder.grad[3].any()
    assert sae.decoder.grad.isfinite().all()


BAD = [
    ({"width": 0}, "width: expected at least 1, got 0"),
    ({"features": 0}, "features: expected at least 1, got 0"),
    ({"sources": 0}, "sources: expected at least 1, got 0"),
    ({"activation": TopK(F + 1)}, f"k: expected at most the {F} features, got {F + 1}"),
    ({"score_norm": "max"}, "score_norm: expected one of .*got 'max'"),
    ({"standardise": "whiten"}, "standardise: expected one of .*got 'whiten'"),
    ({"output_width": 4, "subtract_bias": True}, "subtract_bias: expected False"),
    ({"output_width": 4, "standardise": "affine"}, "standardise: expected none"),
]


@pytest.mark.parametrize(("options", "sentence"), BAD, ids=str)
def test_bad_dictionaries_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        SparseAutoencoder(**({"width": D, "features": F, "activation": ReLU()} | options))


def test_bad_activations_and_inputs_are_refused():
    with pytest.raises(TypeError, match="activation: expected an Activation, got str"):
        SparseAutoencoder(D, F, "topk")
    for activation in (
        lambda: TopK(0),
        lambda: AbsTopK(0),
        lambda: GroupMax(0),
        lambda: TopK(1, 0),
    ):
        with pytest.raises(ValueError, match="expected at least 1, got 0"):
            activation()
    with pytest.raises(TypeError, match="k: expected an int, got str"):
        TopK("64")
    with pytest.raises(TypeError, match="k: expected a number, got str"):
        BatchTopK("64")
    with pytest.raises(TypeError, match="l1: expected a number, got str"):
        Objective(l1="0.1")
    with pytest.raises(TypeError, match="x: expected a tensor, got list"):
        SparseAutoencoder(D, F, ReLU()).encode([0.0] * D)
    with pytest.raises(ValueError, match="k: expected a positive number, got 0"):
        BatchTopK(0)
    with pytest.raises(ValueError, match=r"decay: expected a number in \[0, 1\), got 1"):
        BatchTopK(1, decay=1)
    with pytest.raises(ValueError, match="bandwidth: expected a positive number, got 0"):
        JumpReLU(0)
    with pytest.raises(ValueError, match=r"x: expected a last dimension 14, got shape \[2, 3\]"):
        SparseAutoencoder(D, F, ReLU())(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"x: expected a last dimension \[\.\.\., 2, 14\]"):
        SparseAutoencoder(D, F, ReLU(), sources=2)(torch.zeros(3, D))
    with pytest.raises(ValueError, match="second: expected None with GroupMax"):
        made(GroupMax(5)).latents(torch.zeros(1, D), second=(torch.ones(F).bool(), 2))
    with pytest.raises(TypeError, match="abstract method"):
        Activation()


BAD_OBJECTIVES = [
    ({"error": "l2"}, "error: expected one of"),
    ({"l0_form": "l2"}, "l0_form: expected one of"),
    ({"auxiliary_form": "l2"}, "auxiliary_form: expected one of"),
    ({"l0": 1.0, "l0_form": "quadratic"}, "target_l0: expected a positive number, got None"),
    ({"widths": (2, F), "ranks": True}, "ranks: expected False with widths"),
    ({"widths": (2, F), "error": "fvu"}, "error: expected squared with nested"),
    ({"widths": (2, F), "level_weights": (1.0,)}, "level_weights: expected one for each of 2"),
]


@pytest.mark.parametrize(("options", "sentence"), BAD_OBJECTIVES, ids=str)
def test_bad_objectives_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Objective(**options)


MISMATCHED = [
    (TopK(3), {"l0": 1.0}, "l0: expected JumpReLU or the tanh form, got TopK"),
    (TopK(3), {"multi": 1.0}, "multi: expected TopK with multi above 1"),
    (TopK(3), {"pre_activation": 1.0}, "pre_activation: expected ReLU, JumpReLU or Gated"),
    (ReLU(), {"ranks": True}, "ranks: expected TopK, got ReLU"),
    (GroupMax(4), {"auxiliary": 1.0}, "auxiliary: GroupMax has no second list"),
    (TopK(3), {"widths": (2, F - 1)}, "widths: expected the last to be the 40 latents"),
]


@pytest.mark.parametrize(("activation", "options", "sentence"), MISMATCHED, ids=str)
def test_terms_that_do_not_fit_are_refused(activation, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Objective(**options)(made(activation), torch.zeros(2, D))


def test_usual_objectives_fit_their_activations():
    for activation in (*ACTIVATIONS, TopK(5, multi=2)):
        sae = made(activation).train()
        assert default_objective(sae, 0.1)(sae, drawn(sae)).total.isfinite()
    assert default_objective(made(ReLU())) == Objective(l1=1.0)
    assert default_objective(made(JumpReLU()), 2.0) == Objective(l0=2.0)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any op gives."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in tree_flatten(out)[0]:
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return out


STEPS = [
    (TopK(4), {"auxiliary": 0.1}),
    (TopK(4, multi=4), {"multi": 0.1}),
    (TopK(4), {"ranks": True}),
    (AbsTopK(4), {}),
    (GroupMax(4), {}),
    (BatchTopK(4), {"widths": (64, 2048), "auxiliary": 0.1}),
    (JumpReLU(0.6, 1.2), {"l0": 0.1, "pre_activation": 0.1}),
    (ReLU(), {"l1": 0.1}),
    (Gated(), {"l1": 0.1}),
]


@pytest.mark.parametrize(("activation", "terms"), STEPS, ids=str)
def test_a_step_of_training_holds_no_matrix_of_tokens_and_latents(activation, terms):
    tokens, features = 512, 2048
    sae = SparseAutoencoder(D, features, activation).train()
    with torch.no_grad():
        sae.encoder_bias.fill_(-1.5)  # short lists for those without a k
    dead = torch.arange(features) % 3 == 0
    with Largest() as largest:
        Objective(**terms)(sae, torch.randn(tokens, D), dead=dead).total.backward()
    assert features * D <= largest.elements < tokens * features / 4
