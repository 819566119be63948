"""Norm differences and Latent Scaling, against dense float64 regressions and known answers."""

import math

import pytest
import torch

from gemma_ext.nn.sparse_autoencoder import BatchTopK, ReLU, SparseAutoencoder
from gemma_ext.ops.sae import Codes
from gemma_ext.papers import crosscoder
from gemma_ext.papers.crosscoder.discovery import halves, leaning, mass_by_role


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def codes_of(f):
    """CSR codes of a dense [N, F] matrix, in its dtype."""
    rows, columns = f.nonzero(as_tuple=True)
    offsets = torch.nn.functional.pad((f != 0).sum(1).cumsum(0), (1, 0))
    return Codes(f[rows, columns], columns.int(), offsets, torch.Size([len(f)]), f.shape[1])


def sparse(tokens, features, share=0.3):
    return normal(tokens, features).abs() * (torch.rand(tokens, features) < share)


def beta(f, v, y):
    """argmin_b ||b f v' - y||^2 by a solver that knows nothing of the formula."""
    design = torch.outer(f, v).reshape(-1, 1)
    return torch.linalg.lstsq(design, y.reshape(-1, 1)).solution.item()


def scaled(f, decoder, x, rebuilt, parts=1, **options):
    scaling = crosscoder.LatentScaling(decoder, impl="reference", **options)
    for at in torch.arange(len(f)).tensor_split(parts):
        scaling.add(codes_of(f[at]), x[at], rebuilt[at])
    return scaling.betas()


def test_norm_difference_and_tags():
    norms = torch.tensor([[1.0, 1], [0, 2], [3, 0], [1, 3], [0, 0], [2.0, 1.6]])
    delta = crosscoder.difference(norms)
    torch.testing.assert_close(
        delta[[0, 1, 2, 3, 5]], torch.tensor([0.5, 1, 0, 5 / 6, 0.4]).double()
    )
    assert delta[4].isnan()
    names = [crosscoder.TAGS[n] for n in crosscoder.tags(delta)]
    assert names == ["shared", "chat only", "base only", "other", "other", "shared"]
    ratio = norms[:, 1] / norms.sum(1)  # agrees at 0, 1/2 and 1 alone
    torch.testing.assert_close(delta[:3], ratio[:3].double())
    assert abs(delta[3] - ratio[3]) > 0.05
    edges = torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=torch.float64)
    assert [crosscoder.TAGS[n] for n in crosscoder.tags(edges)] == [
        "base only",
        "shared",
        "other",
        "chat only",
    ]


@pytest.mark.parametrize("parts", [1, 3])
def test_betas_are_the_regressions(parts):
    n, features, d = 50, 7, 5
    f, decoder, x = sparse(n, features), normal(features, 2, d), normal(n, 2, d)
    f[:, 4] = 0  # dead
    rebuilt = torch.einsum("nf,fmd->nmd", f, decoder) + normal(2, d)
    found = scaled(f, decoder, x, rebuilt, parts)
    for j in range(features):
        v = decoder[j, 1]
        for m in range(2):
            without = rebuilt[:, m] - torch.outer(f[:, j], decoder[j, m])
            targets = {
                "error": x[:, m] - without,
                "reconstruction": rebuilt[:, m],
                "activation": x[:, m],
            }
            for name, y in targets.items():
                got = getattr(found, name)[j, m].item()
                if j == 4:
                    assert math.isnan(got)
                else:
                    assert got == pytest.approx(beta(f[:, j], v, y), rel=1e-10, abs=1e-11)
    own = (
        torch.einsum("fd,fmd->fm", decoder[:, 1], decoder) / decoder[:, 1].square().sum(1)[:, None]
    )
    live = found.fired > 0
    identity = found.activation - found.reconstruction + own
    torch.testing.assert_close(found.error[live], identity[live], rtol=1e-12, atol=1e-12)
    assert found.fired.tolist() == (f != 0).sum(0).tolist()
    torch.testing.assert_close(found.energy, f.square().sum(0))
    assert not found.specific()[4]
    assert not found.plausible()[4]


def test_planted_betas_come_back():
    """Orthonormal latents, and noise that is orthogonal to them."""
    n, features, d = 400, 6, 16
    basis = torch.linalg.qr(normal(d, d)).Q.T
    f, strength = sparse(n, features), torch.rand(features).double()
    directions, rest = basis[:features], basis[features:]
    chat = f @ directions + normal(n, d - features) @ rest
    base = (f * strength) @ directions + normal(n, d - features) @ rest
    decoder = torch.stack([torch.zeros(features, d).double(), directions], 1)  # fully shrunk
    rebuilt = torch.einsum("nf,fmd->nmd", f, decoder) + rest[0]  # bias orthogonal to all v
    found = scaled(f, decoder, torch.stack([base, chat], 1), rebuilt)
    torch.testing.assert_close(found.nu_error, strength, rtol=0, atol=1e-12)
    ones, zeros = torch.ones(features).double(), torch.zeros(features).double()
    torch.testing.assert_close(found.reconstruction[:, 1], ones, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.nu_reconstruction, zeros, rtol=0, atol=1e-12)


def test_a_decoupled_latent_is_seen_in_the_reconstruction():
    """A chat-only and a base-only copy of one concept: the base writes it, by another latent."""
    f = sparse(200, 1)
    u = torch.nn.functional.normalize(normal(8), dim=0)
    zero = torch.zeros(8).double()
    decoder = torch.stack([torch.stack([zero, u]), torch.stack([u, zero])])
    both = f.expand(-1, 2).contiguous()
    x = torch.stack([f * u, f * u], 1)
    found = scaled(both, decoder, x, torch.einsum("nf,fmd->nmd", both, decoder))
    assert crosscoder.difference(decoder.norm(dim=-1)).tolist() == [1, 0]
    assert found.nu_reconstruction[0].item() == pytest.approx(1)
    assert found.nu_error[0].item() == pytest.approx(0)
    assert not found.specific()[0]


def test_float32_through_the_ops_agrees():
    f, decoder, x = sparse(300, 40, 0.1), normal(40, 2, 12), normal(300, 2, 12)
    rebuilt = torch.einsum("nf,fmd->nmd", f, decoder)
    exact = scaled(f, decoder, x, rebuilt)
    scaling = crosscoder.LatentScaling(decoder.float())
    scaling.add(codes_of(f.float()), x.float(), rebuilt.float())
    got = scaling.betas()
    for name in ("error", "reconstruction", "activation"):
        torch.testing.assert_close(getattr(got, name), getattr(exact, name), rtol=1e-4, atol=1e-4)


def test_other_directions():
    f, decoder, x = sparse(60, 5), normal(5, 2, 4), normal(60, 2, 4)
    rebuilt = torch.einsum("nf,fmd->nmd", f, decoder)
    drawn = crosscoder.random_directions(decoder, 3)
    torch.testing.assert_close(drawn.norm(dim=1), decoder[:, 1].norm(dim=1))
    found = scaled(f, decoder, x, rebuilt, directions=drawn)
    y = x[:, 0] - rebuilt[:, 0] + torch.outer(f[:, 2], decoder[2, 0])
    assert found.error[2, 0].item() == pytest.approx(beta(f[:, 2], drawn[2], y))
    assert torch.equal(drawn, crosscoder.random_directions(decoder, 3))


def test_ranks_and_criteria():
    zeros = torch.zeros(4, dtype=torch.float64)
    found = crosscoder.Betas(
        error=torch.tensor([[0.1, 1], [0.6, 2], [0.0, 1], [3.0, 1]]),
        reconstruction=torch.tensor([[0.1, 1], [0.4, 1], [0.9, 1], [0.2, 1]]),
        activation=torch.zeros(4, 2),
        energy=zeros,
        fired=zeros.long(),
    )
    assert found.specific().tolist() == [True, False, False, False]
    assert found.specific(0.31, 0.5).tolist() == [True, True, False, False]
    assert found.plausible().tolist() == [True, True, True, False]
    assert found.rank_sum(torch.tensor([0, 1, 2])).tolist() == [1, 3, 2]


@pytest.fixture
def crossed():
    """A BatchTopK crosscoder in evaluation mode with unequal scales, and activations."""
    torch.manual_seed(torch.seed() % 2**31)
    made = SparseAutoencoder(
        6, 20, BatchTopK(3), sources=2, subtract_bias=False, score_norm="sum", standardise="affine"
    )
    with torch.no_grad():
        made.decoder.copy_(torch.randn(20, 12))
        made.encoder.copy_(torch.randn(20, 12))
        made.threshold.fill_(2.0)
        made.input_mean.copy_(torch.randn(12))
        made.input_factor.copy_(torch.tensor([0.5, 2.0]))
    return made.eval(), torch.randn(300, 2, 6)


def test_discovery_is_in_the_units_of_the_models(crossed):
    made, x = crossed
    found = crosscoder.discover(made, x.split(70))
    raw = made.decoder.view(20, 2, 6) / torch.tensor([0.5, 2.0])[:, None]
    torch.testing.assert_close(found.delta, crosscoder.difference(raw.detach().norm(dim=-1)))
    z = made.split(made.standardised(x)[0])
    rebuilt = made.split(made.standardised(made(x))[0]).detach()
    codes = made.encode(x).dense().detach()
    exact = scaled(
        codes.double(), made.decoder.detach().double().view(20, 2, 6), z.double(), rebuilt.double()
    )
    live = found.alive
    torch.testing.assert_close(found.betas.error[live], exact.error[live], rtol=1e-3, atol=1e-3)
    assert found.tokens == 300
    assert found.active == pytest.approx(float((codes != 0).sum() / 300))
    spread = (z - z.mean(0)).square().sum((0, 2))
    expected = 1 - (z - rebuilt).square().sum((0, 2)) / spread
    torch.testing.assert_close(found.explained, expected.double(), rtol=1e-4, atol=1e-4)
    assert sum(found.record()[name] for name in crosscoder.TAGS) + found.record()["dead"] == 20
    assert (found.chat_only() | ~found.flagged()).all()


def test_halves_of_the_leaning_latents(crossed):
    made, x = crossed
    found = crosscoder.discover(made, [x])
    chosen = leaning(found, 10)
    assert found.delta[chosen].diff().max() <= 0
    assert found.alive[chosen].all()
    made_halves = halves(found, 10)
    for name in ("norms", "ratios"):
        top, bottom = made_halves[f"top half by {name}"], made_halves[f"bottom half by {name}"]
        assert not (top & bottom).any()
        assert 0 <= int(top.sum()) - int(bottom.sum()) <= 1
    top, bottom = made_halves["top half by norms"], made_halves["bottom half by norms"]
    assert found.delta[top].min() >= found.delta[bottom].max()


def test_mass_by_role(crossed):
    made, x = crossed
    roles = torch.randint(3, (300,))
    mass = mass_by_role(made, x.split(128), roles.split(128), 3)
    f = made.encode(x).dense().detach()
    expected = torch.stack([f[roles == r].sum(0) for r in range(3)], 1)
    expected = expected / expected.sum(1, keepdim=True).clamp(min=1e-30)
    torch.testing.assert_close(mass, expected, rtol=1e-4, atol=1e-5)


def test_bad_input_is_named(crossed):
    made, x = crossed
    with pytest.raises(ValueError, match=r"norms: expected \[F, 2\], got \[4, 3\]"):
        crosscoder.difference(torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"decoder: expected \[F, M, D\]"):
        crosscoder.LatentScaling(torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"directions: expected \[4, 3\], got \[4, 2\]"):
        crosscoder.LatentScaling(torch.ones(4, 2, 3), torch.ones(4, 2))
    scaling = crosscoder.LatentScaling(torch.ones(4, 2, 3))
    with pytest.raises(ValueError, match=r"to be \[5, 2, 3\], got \[5, 2, 3\] and \[5, 6\]"):
        scaling.add(codes_of(torch.ones(5, 4)), torch.ones(5, 2, 3), torch.ones(5, 6))
    with pytest.raises(ValueError, match="expected two sources in evaluation mode, got 2 in train"):
        crosscoder.discover(made.train(), [x])
    with pytest.raises(ValueError, match="got 1 in evaluation mode"):
        crosscoder.discover(SparseAutoencoder(6, 4, ReLU()).eval(), [x])
    with pytest.raises(ValueError, match="batches: expected at least one token"):
        crosscoder.discover(made.eval(), [])
