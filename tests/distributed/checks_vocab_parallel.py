"""Checks of the vocabulary-parallel loss, run on every rank; see `ranks.py`."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from problem import (
    Problem,
    assert_equal_to_one_process,
    assert_same_bits_on_every_rank,
    solve,
)
from ranks import worlds
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import gemma_ext
from gemma_ext.distributed import (
    vocab_parallel_linear_cross_entropy,
    vocab_parallel_linear_logprobs,
)
from gemma_ext.integrations.verl import linear_cross_entropy

EXACT = {"rtol": 1e-10, "atol": 1e-12, "impl": "reference"}


def check_plain_loss(rank, world):
    for reduction in ("mean", "sum", "none"):
        assert_equal_to_one_process(Problem(), reduction=reduction, **EXACT)


def check_softcap_bias_scale_temperature(rank, world):
    assert_equal_to_one_process(
        Problem(bias=True, scale=4.0),
        softcap=5.0,
        logit_scale=0.7,
        temperature=1.3,
        **EXACT,
    )


def check_shift(rank, world):
    assert_equal_to_one_process(Problem(), shift=True, reduction="none", **EXACT)
    assert_equal_to_one_process(Problem(), shift=3, return_lse=True, **EXACT)


def check_z_loss_lse_and_entropy(rank, world):
    assert_equal_to_one_process(
        Problem(bias=True),
        softcap=20.0,
        z_loss=0.1,
        return_lse=True,
        return_entropy=True,
        **EXACT,
    )


def check_label_smoothing_and_weights(rank, world):
    problem = Problem(bias=True)
    g = torch.Generator().manual_seed(1)
    weight = torch.rand(problem.vocab, generator=g)
    token_weights = torch.rand(problem.shape, generator=g)
    assert_equal_to_one_process(problem, label_smoothing=0.1, softcap=20.0, **EXACT)
    assert_equal_to_one_process(
        problem,
        label_smoothing=0.2,
        weight=weight,
        token_weights=token_weights,
        z_loss=1e-2,
        **EXACT,
    )
    assert_equal_to_one_process(problem, weight=weight, reduction="none", **EXACT)


def check_num_items_in_batch(rank, world):
    assert_equal_to_one_process(Problem(), num_items_in_batch=11, **EXACT)
    assert_equal_to_one_process(Problem(), num_items_in_batch=torch.tensor(13), **EXACT)


def check_ignored_rows_may_hold_nan(rank, world):
    many = assert_equal_to_one_process(
        Problem(poison=True, bias=True),
        return_lse=True,
        return_entropy=True,
        label_smoothing=0.1,
        **EXACT,
    )
    assert torch.isfinite(many.de).all()
    # an id as ignore_index: that column still takes part in every softmax
    assert_equal_to_one_process(Problem(ignored=0.0), ignore_index=2, **EXACT)


def check_all_ignored(rank, world):
    many = assert_equal_to_one_process(
        Problem(bias=True, ignored=1.0, poison=True), z_loss=0.1, return_lse=True, **EXACT
    )
    for tensor in (*many.outputs, many.de, many.dc, many.db):
        assert not tensor.any()


def check_fewer_columns_than_ranks(rank, world):
    for vocab in (1, 3, 5):
        assert_equal_to_one_process(
            Problem(vocab=vocab, bias=True),
            label_smoothing=0.1,
            return_entropy=True,
            return_argmax=True,
            **EXACT,
        )


def check_uneven_shards(rank, world):
    bounds = {2: [0, 1, 37], 4: [0, 0, 20, 21, 37]}[world]
    assert_equal_to_one_process(
        Problem(bias=True, bounds=bounds), return_entropy=True, return_argmax=True, **EXACT
    )


def check_no_tokens(rank, world):
    assert_equal_to_one_process(Problem(shape=(0,), bias=True), reduction="sum", **EXACT)


def check_argmax_ties_take_the_lowest_id(rank, world):
    problem = Problem(vocab=16, ignored=0.1)
    problem.c[8:] = problem.c[:8]
    output = vocab_parallel_linear_cross_entropy(
        problem.e,
        problem.mine(problem.c),
        problem.targets,
        impl="reference",
        softcap=3.0,
        return_argmax=True,
    )
    expected = gemma_ext.linear_cross_entropy(
        problem.e, problem.c, problem.targets, impl="reference", softcap=3.0, return_argmax=True
    )
    assert (output.argmax < 8).all()
    assert torch.equal(output.argmax, expected.argmax)
    assert torch.equal(output.accuracy, expected.accuracy)


def check_logprobs(rank, world):
    problem = Problem(bias=True)

    def sharded(e, c, targets, bias, **options):
        return vocab_parallel_linear_logprobs(
            e, problem.mine(c), targets, bias=problem.mine(bias), **options
        )

    options = {"softcap": 9.0, "shift": 1, "temperature": 0.8, "impl": "reference"}
    one = solve(
        gemma_ext.linear_logprobs, problem.e, problem.c, problem.b, problem.targets, **options
    )
    many = solve(sharded, problem.e, problem.c, problem.b, problem.targets, **options)
    torch.testing.assert_close(many.outputs, one.outputs)
    torch.testing.assert_close(many.de, one.de)
    torch.testing.assert_close(problem.mine(many.dc), problem.mine(one.dc))
    torch.testing.assert_close(problem.mine(many.db), problem.mine(one.db))


def check_the_head_of_verl(rank, world):
    """With its process group, reductions and gradients of both results."""
    problem = Problem(ignored=0.0)
    options = {"temperature": 0.7, "softcap": 3.0, "impl": "reference"}
    given = problem.e, problem.c, problem.targets
    for reduction in ("none", "sum", "mean"):
        found = []
        for group in (None, dist.group.WORLD):
            e, c = (x.clone().requires_grad_() for x in given[:2])
            own = c if group is None else problem.mine(c)
            logp, entropy = linear_cross_entropy(
                e, own, problem.targets, 0.7, reduction, group, softcap=3.0, impl="reference"
            )
            (logp.square().sum() - 0.3 * entropy.square().sum()).backward()
            found.append((logp.detach(), entropy.detach(), e.grad, problem.mine(c.grad)))
        torch.testing.assert_close(found[1], found[0])
    plain, _ = gemma_ext.linear_logprobs(*given, **options)
    torch.testing.assert_close(found[1][0], plain.mean())


def check_every_field_of_logprobs(rank, world):
    """Also of shards without columns, and of one that a bias masks."""
    fields = {"return_moments": True, "return_top1": True, "softcap": 9.0, "temperature": 0.8}
    for vocab in (3, 5, 37, 900):
        for impl, dtype in (("reference", torch.float64), ("exact", torch.float32)):
            problem = Problem(vocab=vocab, bias=True, dtype=dtype)
            ref = torch.rand(problem.shape, generator=torch.Generator().manual_seed(3), dtype=dtype)

            def sharded(e, c, targets, bias, problem=problem, **options):
                return vocab_parallel_linear_logprobs(
                    e, problem.mine(c), targets, bias=problem.mine(bias), **options
                )

            options = {**fields, "impl": impl, "kl": "k2", "ref_logprobs": ref}
            given = (problem.e, problem.c, problem.b, problem.targets)
            one = solve(gemma_ext.linear_logprobs, *given, **options)
            many = solve(sharded, *given, **options)
            assert len(one.outputs) == len(many.outputs) == 7
            near = 1e-10 if impl == "reference" else 2e-5
            near = {"rtol": near, "atol": near}
            torch.testing.assert_close(many.outputs, one.outputs, **near)
            torch.testing.assert_close(many.de, one.de, **near)
            torch.testing.assert_close(problem.mine(many.dc), problem.mine(one.dc), **near)
    with pytest.raises(ValueError, match="expected kl to be None or one of k1, k2, k3, got 'full'"):
        vocab_parallel_linear_logprobs(
            problem.e, problem.mine(problem.c), problem.targets, kl="full"
        )


def check_dtensor_head(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    for vocab in (37, 5, 3):
        problem = Problem(vocab=vocab, bias=True)
        one = solve(
            gemma_ext.linear_cross_entropy,
            problem.e,
            problem.c,
            problem.b,
            problem.targets,
            impl="reference",
            softcap=10.0,
        )
        c = torch.nn.Parameter(distribute_tensor(problem.c, mesh, [Shard(0)]))
        b = torch.nn.Parameter(distribute_tensor(problem.b, mesh, [Shard(0)]))
        e = torch.nn.Parameter(distribute_tensor(problem.e, mesh, [Replicate()]))
        for validate in (True, False):
            c.grad = b.grad = e.grad = None
            loss = vocab_parallel_linear_cross_entropy(
                e,
                c,
                distribute_tensor(problem.targets, mesh, [Replicate()]),
                bias=b,
                impl="reference",
                softcap=10.0,
                validate=validate,
            )
            assert type(loss) is torch.Tensor
            (loss * 1.37).backward()  # solve() sends 0.37 + cos 0 into a scalar
            torch.testing.assert_close(loss.detach(), one.outputs[0])
            for got, expected in ((c.grad, one.dc), (b.grad, one.db), (e.grad, one.de)):
                assert isinstance(got, DTensor)
                torch.testing.assert_close(got.full_tensor(), expected)


@worlds(4)
def check_tensor_parallel_inside_data_parallel(rank, world):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    problem = Problem(seed=10 + mesh.get_local_rank("dp"))
    c = torch.nn.Parameter(distribute_tensor(problem.c, mesh["tp"], [Shard(0)]))
    e = problem.e.requires_grad_()
    loss = vocab_parallel_linear_cross_entropy(e, c, problem.targets, impl="reference")
    loss.backward()
    c_one = problem.c.clone().requires_grad_()
    e_one = problem.e.detach().clone().requires_grad_()
    gemma_ext.linear_cross_entropy(e_one, c_one, problem.targets, impl="reference").backward()
    torch.testing.assert_close(e.grad, e_one.grad)
    torch.testing.assert_close(c.grad.full_tensor(), c_one.grad)


def check_partial_e_gradient(rank, world):
    problem = Problem()
    options = {"impl": "reference", "reduction": "sum"}
    whole = solve(
        vocab_parallel_linear_cross_entropy,
        problem.e,
        problem.mine(problem.c),
        None,
        problem.targets,
        **options,
    )
    part = solve(
        vocab_parallel_linear_cross_entropy,
        problem.e,
        problem.mine(problem.c),
        None,
        problem.targets,
        reduce_e_grad=False,
        **options,
    )
    dist.all_reduce(part.de)
    torch.testing.assert_close(part.de, whole.de)


def check_frozen_inputs(rank, world):
    problem = Problem()
    c = problem.mine(problem.c).clone()
    for frozen in ("c", "e", "both"):
        e = problem.e.clone().requires_grad_(frozen == "c")
        c = problem.mine(problem.c).clone().requires_grad_(frozen == "e")
        loss = vocab_parallel_linear_cross_entropy(e, c, problem.targets, impl="reference")
        assert loss.requires_grad == (frozen != "both")
        if loss.requires_grad:
            loss.backward()
    with torch.no_grad():
        e = problem.e.clone().requires_grad_()
        assert not vocab_parallel_linear_cross_entropy(
            e, c, problem.targets, impl="reference"
        ).requires_grad


def check_deterministic_and_equal_on_every_rank(rank, world):
    problem = Problem(dtype=torch.float32, bias=True, vocab=301, shape=(50,))
    runs = [
        solve(
            vocab_parallel_linear_cross_entropy,
            problem.e,
            problem.mine(problem.c),
            problem.mine(problem.b),
            problem.targets,
            impl="reference",
            return_lse=True,
            return_entropy=True,
        )
        for _ in range(3)
    ]
    for run in runs[1:]:
        assert all(map(torch.equal, run.outputs, runs[0].outputs))
        assert torch.equal(run.de, runs[0].de)
        assert torch.equal(run.dc, runs[0].dc)
    for tensor in (*runs[0].outputs, runs[0].de):
        assert_same_bits_on_every_rank(tensor)


def check_shard_masked_by_its_bias(rank, world):
    # padding of the vocabulary: one rank's columns all have probability 0
    problem = Problem(dtype=torch.float32, bias=True, ignored=0.2, scale=0.5)
    start = problem.bounds[-2]
    problem.b[start:] = -torch.inf
    problem.targets[problem.targets >= start] = 0
    many = assert_equal_to_one_process(
        problem, rtol=1e-5, atol=1e-5, impl="exact", return_entropy=True, return_argmax=True
    )
    assert torch.isfinite(many.de).all()


def check_exact_kernels(rank, world):
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        problem = Problem(
            dtype=dtype, vocab=1500, width=48, shape=(65,), bias=True, poison=True, scale=1.0
        )
        assert_equal_to_one_process(
            problem,
            rtol=tolerance,
            atol=tolerance,
            impl="exact",
            softcap=8.0,
            label_smoothing=0.1,
            z_loss=1e-3,
            return_lse=True,
            return_entropy=True,
            return_argmax=True,
        )


def sampling_problem() -> Problem:
    """Peaked rows: every shard has strips to leave out."""
    problem = Problem(
        dtype=torch.float32, vocab=8192, width=16, shape=(48,), bias=True, scale=2.0, ignored=0.1
    )
    ranks = torch.arange(1, problem.vocab + 1).double()
    g = torch.Generator().manual_seed(5)
    problem.b = (-1.3 * ranks.log())[torch.randperm(problem.vocab, generator=g)].float()
    return problem


def check_sampled_kernels(rank, world):
    """The mean over seeds is the gradient of one process, dE, dC and dbias, entropy included."""
    problem = sampling_problem()
    args = problem.e, problem.mine(problem.c), problem.mine(problem.b), problem.targets
    options = {"return_lse": True, "return_entropy": True}
    one = solve(
        gemma_ext.linear_cross_entropy,
        problem.e,
        problem.c,
        problem.b,
        problem.targets,
        impl="exact",
        **options,
    )
    truth = one.de, problem.mine(one.dc), problem.mine(one.db)
    sampled = {"impl": "cce", "filter_eps": 2.0**-6, **options}
    draws = []
    for seed in range(48):
        many = solve(vocab_parallel_linear_cross_entropy, *args, filter_seed=seed, **sampled)
        torch.testing.assert_close(many.outputs, one.outputs, rtol=1e-5, atol=1e-4)
        draws.append((many.de, many.dc, many.db))
    again = solve(vocab_parallel_linear_cross_entropy, *args, filter_seed=47, **sampled)
    assert torch.equal(again.dc, draws[-1][1])
    for samples, want in zip(zip(*draws, strict=True), truth, strict=True):
        samples = torch.stack(samples).double()
        error = (samples - want).norm() / want.norm() / len(samples) ** 0.5
        assert 1e-3 < error < 0.2
        mean = samples.mean(0)
        # the error of a mean of 48 is a 48th of that of one, squared
        assert (mean - want).norm() / want.norm() < 1.6 * error / len(samples) ** 0.5


def check_sampled_stats(rank, world):
    problem = sampling_problem()
    output = vocab_parallel_linear_cross_entropy(
        problem.e.requires_grad_(),
        problem.mine(problem.c),
        problem.targets,
        bias=problem.mine(problem.b),
        filter_eps=2.0**-6,
        return_stats=True,
    )
    assert 0.0 < output.stats.kept_fraction < 0.9
    assert output.stats.relative_error > 0
    assert output.stats.eps == 2.0**-6


def check_ranks_draw_differently(rank, world):
    """Shards of equal columns keep other strips."""
    problem = Problem(dtype=torch.float32, vocab=4096 * world, width=8, shape=(32,), ignored=0.0)
    problem.c = problem.c[:4096].repeat(world, 1)
    problem.targets %= 4096
    many = solve(
        vocab_parallel_linear_cross_entropy,
        problem.e,
        problem.mine(problem.c),
        None,
        problem.targets,
        impl="cce",
        filter_eps=0.5,
    )
    copies = [torch.empty_like(many.dc) for _ in range(world)]
    dist.all_gather(copies, many.dc)
    assert not any(torch.equal(copy, copies[1]) for copy in copies[2:])
    assert (copies[1] == 0).all(1).any()


def check_derivatives_of_other_kinds_are_refused(rank, world):
    for impl in ("exact", "reference"):
        problem = Problem(dtype=torch.float32)

        def loss(e, c, p=problem, impl=impl):
            return vocab_parallel_linear_cross_entropy(e, c, p.targets, impl=impl)

        e, c = problem.e.requires_grad_(), problem.mine(problem.c).requires_grad_()
        for leaf in (e, c):
            (grad,) = torch.autograd.grad(loss(e, c), leaf, create_graph=True)
            with pytest.raises(NotImplementedError, match="impl='reference'"):
                grad.square().sum().backward()
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(e.detach(), torch.ones_like(e))
            with pytest.raises(NotImplementedError, match="impl='reference'"):
                loss(dual, c)


def check_confident_rows_keep_their_gradient(rank, world):
    """A loss of 1e-7 whose label one rank owns, and a number common to all logits."""
    problem = Problem(dtype=torch.float32, bias=True, ignored=0.0, scale=1.0)
    flat = problem.targets.reshape(-1)
    problem.c[:, 0] = torch.linspace(-1, 1, problem.vocab)
    problem.e[..., 0] += 0.5
    problem.b += 16384.0
    args = (problem.e.double(), problem.c.double(), problem.b.double(), problem.targets)
    truth = solve(gemma_ext.linear_cross_entropy, *args, impl="reference")
    many = solve(
        vocab_parallel_linear_cross_entropy,
        problem.e,
        problem.mine(problem.c),
        problem.mine(problem.b),
        problem.targets,
        impl="exact",
    )
    assert flat.numel() == many.de.reshape(-1, problem.width).shape[0]
    assert (many.de - truth.de).norm() <= 1e-3 * truth.de.norm()


@worlds(2)
def check_compiled_in_one_graph(rank, world):
    problem = Problem(dtype=torch.float32, vocab=600, shape=(30,), bias=True, scale=1.0)

    def loss(e, c, targets, bias):
        return vocab_parallel_linear_cross_entropy(
            e,
            c,
            targets,
            bias=bias,
            impl="exact",
            vocab_start=problem.bounds[rank],
            vocab_size=problem.vocab,
            validate=False,
        )

    args = problem.e, problem.mine(problem.c), problem.mine(problem.b), problem.targets
    eager = solve(loss, *args)
    compiled = solve(torch.compile(loss, fullgraph=True, backend="aot_eager"), *args)
    torch.testing.assert_close(compiled.outputs, eager.outputs)
    torch.testing.assert_close(compiled.de, eager.de)
    torch.testing.assert_close(compiled.dc, eager.dc)


@worlds(2)
def check_autocast(rank, world):
    problem = Problem(dtype=torch.float32, vocab=600, shape=(30,), scale=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        many = assert_equal_to_one_process(problem, rtol=2e-2, atol=2e-3, impl="exact")
    assert many.de.dtype == many.dc.dtype == torch.float32


def check_shard_with_a_vanishing_share(rank, world):
    # the last rank's columns carry e^-60 of every softmax: its gradient must still be relative to
    # its own size, which rounding 1 + (e^-60 - 1) would turn into 0
    problem = Problem(dtype=torch.float32, bias=True, ignored=0.0)
    start = problem.bounds[-2]
    problem.b[start:] -= 60.0
    problem.targets %= start
    many = solve(
        vocab_parallel_linear_cross_entropy,
        problem.e,
        problem.mine(problem.c),
        problem.mine(problem.b),
        problem.targets,
        impl="reference",
    )
    oracle = solve(
        gemma_ext.linear_cross_entropy,
        problem.e.double(),
        problem.c.double(),
        problem.b.double(),
        problem.targets,
        impl="reference",
    )
    if rank == world - 1:
        assert many.db.abs().max() > 0
        torch.testing.assert_close(many.db.double(), problem.mine(oracle.db), rtol=1e-3, atol=0.0)


def check_bad_label_is_named_on_every_rank(rank, world):
    problem = Problem(ignored=0.0)
    problem.targets[1, 2] = problem.vocab
    with pytest.raises(ValueError, match=r"got 37 at flat position 9"):
        vocab_parallel_linear_cross_entropy(
            problem.e, problem.mine(problem.c), problem.targets, impl="reference"
        )


def check_data_parallel_targets_are_refused(rank, world):
    problem = Problem(seed=rank, bounds=[10 * k for k in range(world + 1)], vocab=10 * world)
    with pytest.raises(ValueError, match=r"same targets on every rank.*gather_head"):
        vocab_parallel_linear_cross_entropy(
            problem.e, problem.mine(problem.c), problem.targets, impl="reference"
        )
    tokens = 4 + rank
    with pytest.raises(ValueError, match=r"token counts \[4, 5"):
        vocab_parallel_linear_cross_entropy(
            problem.e[0, :1].expand(tokens, -1),
            problem.mine(problem.c),
            problem.targets[0, :1].expand(tokens),
            impl="reference",
        )


def check_bad_label_without_validation_is_nan(rank, world):
    problem = Problem()
    problem.targets[1, 2] = 4242
    loss = vocab_parallel_linear_cross_entropy(
        problem.e,
        problem.mine(problem.c),
        problem.targets,
        vocab_start=problem.bounds[rank],
        vocab_size=37,
        validate=False,
        impl="reference",
        reduction="none",
    )
    assert loss.isnan().nonzero().tolist() == [[1, 2]]


def check_wrong_columns_are_refused(rank, world):
    problem = Problem()
    args = problem.e, problem.mine(problem.c), problem.targets
    with pytest.raises(ValueError, match=r"expected vocab_size 37, .* got \[38"):
        vocab_parallel_linear_cross_entropy(*args, vocab_size=38, impl="reference")
    with pytest.raises(ValueError, match=r"expected vocab_start \[0, "):
        vocab_parallel_linear_cross_entropy(*args, vocab_start=5, impl="reference")
    with pytest.raises(ValueError, match=r"expected vocab_start and vocab_size with validate"):
        vocab_parallel_linear_cross_entropy(*args, validate=False, impl="reference")
    vocab_parallel_linear_cross_entropy(
        *args,
        vocab_start=problem.bounds[rank],
        vocab_size=37,
        validate=False,
        impl="reference",
    )


def check_wrong_placements_are_refused(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    problem = Problem()
    c = distribute_tensor(problem.c, mesh, [Shard(0)])
    call = vocab_parallel_linear_cross_entropy
    with pytest.raises(ValueError, match=r"c_local with placement Shard\(0\), got R"):
        call(problem.e, distribute_tensor(problem.c, mesh, [Replicate()]), problem.targets)
    with pytest.raises(ValueError, match=r"c_local with placement Shard\(0\), got S\(1\)"):
        call(problem.e, distribute_tensor(problem.c, mesh, [Shard(1)]), problem.targets)
    with pytest.raises(ValueError, match=r"e\.redistribute"):
        call(distribute_tensor(problem.e, mesh, [Shard(0)]), c, problem.targets)
    with pytest.raises(ValueError, match=r"expected vocab_size 37 like c_local, got 36"):
        call(problem.e, c, problem.targets, vocab_size=36)
    with pytest.raises(TypeError, match=r"DTensor.*gemma_ext\.distributed"):
        gemma_ext.linear_cross_entropy(problem.e, c, problem.targets, impl="reference")
