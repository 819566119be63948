"""Linear layers of rows at different loops: values, bits, shapes, refusals (oracle 7)."""

from __future__ import annotations

import itertools

import pytest
import torch
from depth_rows import (
    DEVICES,
    DTYPES,
    IDS,
    IMPLS,
    by_hand,
    close,
    moved,
    offsets,
    projection,
    randn,
)
from torch.nn import functional

from gemma_ext.ops.depth_batching.gates import gate_exit
from gemma_ext.ops.depth_batching.head import head_exit
from gemma_ext.ops.depth_batching.linear import Projection, seg_depth_gated, seg_depth_lora

# popularity of loops: identical, distinct, uniform, zipf, skewed; empty and one-row segments
POPULARITY = ((9,), (1, 1, 1), (4, 4, 4), (7, 3, 2, 1), (1, 0, 12), (0, 5, 0), (0, 0, 3), (70, 61))
RANKS = (0, 1, 8, 16, 33, 64, 130)


def terms(x, p):
    """A bound of sum |x w| of every output."""
    size = x.double().norm(dim=-1, keepdim=True) * p.weight.double().norm(dim=-1)
    return size * (4 if p.lora_a is not None else 1) + 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("sizes", POPULARITY, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_every_popularity(impl, sizes, dtype, device):
    """Each of q, k and v with a rank of its own, against rows one by one."""
    n, width, loops = sum(sizes), 67, len(sizes)
    x = randn(n, width, seed=n, dtype=dtype).to(device)
    ps = [
        projection(f, width, loops, r, bias=f == 70, seed=f, dtype=dtype, device=device)
        for f, r in ((70, 16), (33, 5), (5, 0))
    ]
    got = seg_depth_lora(x, ps, offsets(*sizes).to(device), scale=0.5, impl=impl)
    for p, y in zip(ps, got, strict=True):
        assert y.dtype == dtype
        cpu = moved(p)
        want = by_hand(x.cpu(), cpu, sizes, 0.5)
        # what is rounded between A and B may fall to the other side
        close(y, want, terms(x.cpu(), cpu) * (1 if dtype == torch.float32 else 3000))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("width", [1, 16, 31, 32, 100, 2050])
def test_every_rank_and_width(rank, width, device):
    sizes = (3, 4)
    x = randn(7, width, seed=rank).to(device)
    p = projection(65, width, 2, rank, seed=width, device=device)
    (got,) = seg_depth_lora(x, [p], offsets(*sizes).to(device))
    close(got, by_hand(x.cpu(), moved(p), sizes), terms(x.cpu(), moved(p)))


def test_the_hidden_sizes_of_real_models():
    for width, rank in ((2048, 512), (2304, 64), (9216, 8), (16384, 16)):
        x = randn(5, width, seed=1)
        p = projection(33, width, 2, rank, seed=2)
        (got,) = seg_depth_lora(x, [p], offsets(2, 3))
        close(got, by_hand(x, p, (2, 3)), terms(x, p))


@pytest.mark.parametrize("impl", IMPLS)
def test_segments_are_the_concatenation_with_a_mask(impl):
    """One LoRA of B r columns with a one-hot mask of depths, as the paper computes it."""
    sizes, rank = (3, 0, 5, 2), 6
    x, p = randn(10, 40), projection(21, 40, 4, rank, seed=5)
    (got,) = seg_depth_lora(x, [p], offsets(*sizes), impl=impl)
    loop = torch.tensor([j for j, size in enumerate(sizes) for _ in range(size)])
    mask = functional.one_hot(loop, 4).repeat_interleave(rank, -1)
    low = (x @ p.lora_a.flatten(0, 1).T) * mask
    wide = x @ p.weight.T + low @ p.lora_b.transpose(1, 2).flatten(0, 1)
    close(got, wide.double(), 4 * x.norm(dim=-1, keepdim=True) + 1)


@pytest.mark.parametrize("activation", ["gelu_tanh", "silu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
def test_gated(impl, device, dtype, activation):
    sizes = (4, 0, 7)
    x = 3 * randn(11, 50, dtype=dtype)
    gate = projection(75, 50, 3, 4, bias=True, seed=1, dtype=dtype)
    up = projection(75, 50, 3, 9, seed=7, dtype=dtype)
    got = seg_depth_gated(
        x.to(device),
        moved(gate, device=device),
        moved(up, device=device),
        offsets(*sizes).to(device),
        activation=activation,
        impl=impl,
    )
    a, b = (by_hand(x, p, sizes) for p in (gate, up))
    act = (
        functional.gelu(a, approximate="tanh") if activation == "gelu_tanh" else functional.silu(a)
    )
    size = (terms(x, gate) * (1 + b.abs()) + a.abs() * terms(x, up)) * 4
    close(got, act * b, size * (1 if dtype == torch.float32 else 3000))


def test_gates_far_out_are_zero_or_the_number():
    eye = Projection(torch.eye(4))
    x = torch.tensor([[-200.0, 200.0, -30.0, 0.0]])
    for activation in ("gelu_tanh", "silu"):
        y = seg_depth_gated(x, eye, Projection(torch.eye(4).sign()), activation=activation)
        want = torch.tensor([[0.0, 4e4, 0.0, 0.0]])
        torch.testing.assert_close(y, want, rtol=1e-6, atol=1e-9)


def bits(rows, ps, sizes, **options):
    """[n, sum of F] of a batch."""
    return torch.cat(seg_depth_lora(rows, ps, offsets(*sizes), **options), -1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("width", [1, 33, 64, 257, 700])
def test_a_row_of_the_reference_has_its_bits_alone(width, dtype):
    """float64 is served by the reference, under the same promise."""
    n, loops = 21, 3
    x = randn(2 * n, width + 1, dtype=dtype)[::2, 1:]
    loop = torch.arange(n) * loops // n
    ps = [
        projection(f, width, loops, r, bias=True, seed=f, dtype=dtype)
        for f, r in ((70, 20), (5, 1), (33, 0))
    ]
    head = randn(403, width, seed=8, dtype=dtype)
    gate = randn(width, seed=9, dtype=dtype)

    def run(rows):
        sizes = [int((loop[rows] == j).sum()) for j in range(loops)]
        y = bits(x[rows], ps, sizes, impl="reference")
        keys = torch.stack([rows, rows, rows], -1)
        read = head_exit(
            x[rows], head, softcap=9.0, temperature=0.7, keys=keys, candidates=4, impl="reference"
        )
        score = gate_exit(x[rows], "gate", 0.5, weight=gate, impl="reference").scores
        cut = offsets(*sizes)
        gated = [
            seg_depth_gated(x[rows], *ps[:1] * 2, cut, activation=act, impl="reference")
            for act in ("gelu_tanh", "silu")
        ]
        return [y, *gated, *(t for t in read if t is not None), score]

    whole = run(torch.arange(n))
    for rows in (torch.arange(5, 18), torch.arange(0, n, 4), *torch.arange(n).split(1)):
        for mine, of_all in zip(run(rows), whole, strict=True):
            assert torch.equal(mine, of_all[rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_a_row_has_its_bits_alone(dtype):
    """Whatever n, the neighbours, the sizes of segments and the threads."""
    width, loops = 2100, 3
    ps = [
        projection(f, width, loops, r, bias=True, seed=f, dtype=dtype)
        for f, r in ((70, 20), (9, 0))
    ]
    x = randn(150, width, dtype=dtype)
    loop = torch.arange(150) % loops
    alone = {}
    for i in (0, 1, 2, 77, 149):
        sizes = [int(loop[i] == j) for j in range(loops)]
        alone[i] = bits(x[i : i + 1], ps, sizes)[0]
    for n, threads in itertools.product((2, 4, 5, 7, 33, 62, 65, 150), (1, 2)):
        torch.set_num_threads(threads)
        keep = sorted({0, 1, 2, 77, 149} | set(range(3, min(n, 147))))
        keep = sorted(keep, key=lambda i: (int(loop[i]), -i))
        sizes = [sum(int(loop[i]) == j for i in keep) for j in range(loops)]
        y = bits(x[keep], ps, sizes)
        for at, i in enumerate(keep):
            if i in alone:
                assert torch.equal(y[at], alone[i]), (n, threads, i)


def test_projections_together_are_projections_alone():
    x = randn(13, 96)
    ps = [projection(f, 96, 2, r, seed=f) for f, r in ((64, 8), (128, 0), (17, 30))]
    together = seg_depth_lora(x, ps, offsets(5, 8))
    for p, y in zip(ps, together, strict=True):
        assert torch.equal(seg_depth_lora(x, [p], offsets(5, 8))[0], y)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_behind_the_segments_have_no_adapter(impl):
    x, p = randn(9, 20), projection(11, 20, 2, 4)
    (got,) = seg_depth_lora(x, [p], offsets(2, 3), impl=impl)
    bare = Projection(p.weight)
    torch.testing.assert_close(got[5:], seg_depth_lora(x, [bare], impl=impl)[0][5:])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_any_layout(dtype, device):
    """Strided rows, columns of a larger tensor, transposed weights."""
    wide = randn(8, 90, dtype=dtype).to(device)
    p = projection(30, 33, 2, 5, bias=True, dtype=dtype, device=device)
    for x in (wide[:, 3:36], wide[::2, 3:36], wide.T[3:36, :].contiguous().T):
        cut = offsets(1, len(x) - 1).to(device)
        want = seg_depth_lora(x.contiguous(), [p], cut)[0]
        assert torch.equal(seg_depth_lora(x, [p], cut)[0], want)
        other = Projection(p.weight.T.contiguous().T, p.bias, p.lora_a.mT.contiguous().mT, p.lora_b)
        assert torch.equal(seg_depth_lora(x, [other], cut)[0], want)


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_to_do(device):
    p = projection(6, 5, 2, 3, device=device)
    none = offsets(0, 0).to(device)
    assert seg_depth_lora(torch.randn(0, 5, device=device), [p], none)[0].shape == (0, 6)
    assert seg_depth_gated(torch.randn(0, 5, device=device), p, p, none).shape == (0, 6)
    empty = Projection(torch.empty(0, 5, device=device))
    assert seg_depth_lora(torch.randn(3, 5, device=device), [empty])[0].shape == (3, 0)
    bare = Projection(torch.empty(4, 0, device=device), torch.ones(4, device=device))
    assert torch.equal(
        seg_depth_lora(torch.empty(3, 0, device=device), [bare])[0].cpu(), torch.ones(3, 4)
    )


def test_nan_and_inf_stay_in_their_rows():
    x = randn(4, 40)
    x[1, 7], x[2, 39] = torch.nan, torch.inf
    (y,) = seg_depth_lora(x, [projection(9, 40)])
    assert y[1].isnan().all()
    assert not y[2].isfinite().any()
    assert y[[0, 3]].isfinite().all()


def test_float64_takes_the_formulas():
    x, p = randn(5, 12).double(), moved(projection(7, 12, 2, 3), torch.float64)
    (got,) = seg_depth_lora(x, [p], offsets(2, 3))
    torch.testing.assert_close(got, by_hand(x, p, (2, 3)), rtol=1e-12, atol=1e-12)


X = torch.randn(4, 8)
P = projection(6, 8, 2, 3)
MESSAGES = {
    "expected x to be [n, D], got [8]": lambda: seg_depth_lora(X[0], [P], offsets(2, 2)),
    "expected at least one projection, got none": lambda: seg_depth_lora(X, []),
    "expected 1 to 4 projections, got 5": lambda: seg_depth_lora(X, [P] * 5, offsets(2, 2)),
    "expected a projection's weight to be [F, 7], got [6, 8]": lambda: seg_depth_lora(
        X[:, 1:], [P], offsets(2, 2)
    ),
    "expected a projection's weight on meta, got it on cpu": lambda: seg_depth_lora(
        X.to("meta"), [P], offsets(2, 2)
    ),
    "expected projections of one number of loops, got [2, 3]": lambda: seg_depth_lora(
        X, [P, projection(6, 8, 3, 3)], offsets(2, 2)
    ),
    "expected seg_offsets with adapters, got None": lambda: seg_depth_lora(X, [P]),
    "expected seg_offsets to be [3], got [4]": lambda: seg_depth_lora(X, [P], offsets(2, 2, 0)),
    "expected activation to be 'gelu_tanh' or 'silu', got 'relu'": lambda: seg_depth_gated(
        X, P, P, offsets(2, 2), activation="relu"
    ),
    "expected the weight of up to be [6, D], got [5, 8]": lambda: seg_depth_gated(
        X, P, projection(5, 8), offsets(2, 2)
    ),
    "expected impl to be 'auto' or 'reference', got 'fast'": lambda: seg_depth_lora(
        X, [P], offsets(2, 2), impl="fast"
    ),
    "expected weight to be [F, D], got [8]": lambda: Projection(P.weight[0]),
    "expected bias to be [6], got [5]": lambda: Projection(P.weight, torch.ones(5)),
    "expected lora_a and lora_b together, got one of them": lambda: Projection(
        P.weight, lora_a=P.lora_a
    ),
    "expected lora_a to be [B, r, 8], got [2, 3, 7]": lambda: Projection(
        P.weight, None, P.lora_a[..., 1:], P.lora_b
    ),
    "expected lora_b to be [2, 6, 3], got [2, 5, 3]": lambda: Projection(
        P.weight, None, P.lora_a, P.lora_b[:, 1:]
    ),
}


@pytest.mark.parametrize("message", MESSAGES)
def test_what_does_not_fit(message):
    with pytest.raises(ValueError) as caught:
        MESSAGES[message]()
    assert message in str(caught.value)


def test_types_that_do_not_fit():
    with pytest.raises(TypeError, match=r"expected x to be float32, .* got torch\.int64"):
        seg_depth_lora(X.long(), [P], offsets(2, 2))
    with pytest.raises(TypeError, match="expected projections of type Projection, got Tensor"):
        seg_depth_lora(X, [P.weight])
    with pytest.raises(TypeError, match=r"expected a projection's weight in torch\.float16"):
        seg_depth_lora(X.half(), [P], offsets(2, 2))
    with pytest.raises(TypeError, match=r"expected bias in torch\.float32"):
        Projection(P.weight, torch.ones(6).half())
    with pytest.raises(TypeError, match=r"expected seg_offsets in torch\.int32"):
        seg_depth_lora(X, [P], offsets(2, 2).long())


@pytest.mark.cpu
@pytest.mark.parametrize("bounds", [(1, 2, 4), (0, 3, 2), (0, 2, 5)])
def test_offsets_that_do_not_fit(bounds):
    with pytest.raises(RuntimeError, match=r"depth_linear: expected ascending seg_offsets"):
        seg_depth_lora(X, [P], torch.tensor(bounds, dtype=torch.int32))


def test_no_derivatives():
    with pytest.raises(NotImplementedError, match="impl='reference' have derivatives"):
        seg_depth_lora(X.clone().requires_grad_(), [Projection(P.weight)])[0].sum().backward()
    x = X.double().requires_grad_()
    p = moved(P, torch.float64)
    assert torch.autograd.gradcheck(lambda x: seg_depth_lora(x, [p], offsets(2, 2))[0], (x,))
