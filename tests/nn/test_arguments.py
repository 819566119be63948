"""Bad arguments: one sentence with the name, what was expected and what came."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from gemma_ext import LinearCrossEntropy, linear_cross_entropy, linear_logprobs

IMPLS = ("auto", "exact", "reference")
E, C = torch.randn(6, 8), torch.randn(30, 8)
T = torch.arange(6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"e": E.double()}, r"expected e to be float32.*got torch.float64"),
        ({"e": E.long()}, r"expected e to be float32.*got torch.int64"),
        ({"e": [1.0]}, r"expected e to be a tensor, got list"),
        ({"c": C.bfloat16()}, r"expected c to be torch.float32 like e, got torch.bfloat16"),
        ({"targets": T.short()}, r"expected targets to be int32 or int64, got torch.int16"),
        ({"bias": torch.zeros(30).int()}, r"expected bias to be floating, got torch.int32"),
        (
            {"filter_eps": "tight"},
            r"expected filter_eps to be 'auto', None or a float, got 'tight'",
        ),
        ({"filter_eps": True}, r"expected filter_eps to be 'auto', None or a float, got True"),
        ({"shift": 1.0}, r"expected shift to be an int or bool, got float"),
        ({"softcap": "30"}, r"expected softcap to be None or a number, got str"),
        ({"softcap": True}, r"expected softcap to be None or a number, got bool"),
        ({"temperature": None}, r"expected temperature to be a number, got NoneType"),
        ({"logit_scale": torch.tensor(2.0)}, r"expected logit_scale to be a number, got Tensor"),
        ({"ignore_index": None}, r"expected ignore_index to be an int, got NoneType"),
        ({"filter_seed": 1.0}, r"expected filter_seed to be an int, got float"),
        ({"filter_seed": True}, r"expected filter_seed to be an int, got bool"),
    ],
)
def test_types(change, message):
    arguments = {"e": E, "c": C, "targets": T, **change}
    for function in (linear_cross_entropy, linear_logprobs):
        with pytest.raises(TypeError, match=message):
            function(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"e": torch.randn(())}, r"expected e to be \[\.\.\., D\], got a 0-d tensor"),
        ({"c": C[:, :7]}, r"expected c to be \[V, 8\], got \[30, 7\]"),
        ({"c": C[:0]}, r"expected c to have at least one row, got 0"),
        ({"targets": T[:5]}, r"expected targets to be \[6\], got \[5\]"),
        ({"bias": torch.zeros(31)}, r"expected bias to be \[30\], got \[31\]"),
        ({"targets": T.to("meta")}, r"expected targets on cpu like e, got meta"),
        ({"softcap": 0.0}, r"expected softcap to be None or positive, got 0.0"),
        ({"temperature": 0.0}, r"expected temperature to be positive, got 0.0"),
        ({"filter_eps": 1.0}, r"expected filter_eps in \[0, 1\), got 1.0"),
        ({"filter_eps": float("nan")}, r"expected filter_eps in \[0, 1\), got nan"),
        (
            {"impl": "triton"},
            r"expected impl to be one of auto, cce, exact, reference, got 'triton'",
        ),
        ({"shift": -1}, r"expected shift to be 0 or more, got -1"),
        ({"targets": T + 25}, r"expected targets in \[0, 30\).* got 30 at flat position 5"),
    ],
)
def test_values(change, message):
    arguments = {"e": E, "c": C, "targets": T, **change}
    for function in (linear_cross_entropy, linear_logprobs):
        with pytest.raises(ValueError, match=message):
            function(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduction": "avg"}, r"expected reduction to be one of mean, sum, none, got 'avg'"),
        ({"label_smoothing": 1.5}, r"expected label_smoothing in \[0, 1\], got 1.5"),
        ({"weight": torch.ones(29)}, r"expected weight to be \[30\], got \[29\]"),
        ({"token_weights": torch.ones(5)}, r"expected token_weights to be \[6\], got \[5\]"),
        (
            {"num_items_in_batch": 3, "reduction": "sum"},
            r"expected reduction 'mean' with num_items_in_batch, got 'sum'",
        ),
        ({"num_items_in_batch": -1}, r"expected num_items_in_batch to be 0 or more, got -1"),
        (
            {"num_items_in_batch": torch.tensor([3, 4])},
            r"expected num_items_in_batch to hold one number, got \[2\]",
        ),
    ],
)
def test_loss_options(change, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(E, C, T, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_smoothing": None}, r"expected label_smoothing to be a number, got NoneType"),
        ({"z_loss": "1e-4"}, r"expected z_loss to be a number, got str"),
        (
            {"num_items_in_batch": "3"},
            r"expected num_items_in_batch to be a number or a tensor, got str",
        ),
        ({"weight": [1.0] * 30}, r"expected weight to be a tensor, got list"),
    ],
)
def test_loss_option_types(change, message):
    with pytest.raises(TypeError, match=message):
        linear_cross_entropy(E, C, T, **change)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("shift", "position"), [(0, 7), (1, 7), (3, 9)])
def test_bad_label_is_named_where_the_caller_put_it(impl, shift, position):
    """Three sequences of five: the shift never crosses from one into the next."""
    targets = torch.zeros(3, 5, dtype=torch.int64)
    targets.view(-1)[position] = 30
    e = torch.randn(3, 5, 8).requires_grad_()
    message = rf"^expected targets in \[0, 30\) or ignore_index -100, got 30 at .* {position}$"
    for function in (linear_cross_entropy, linear_logprobs):
        with pytest.raises(ValueError, match=message):
            function(e, C, targets, shift=shift, impl=impl)


def test_label_before_the_first_scored_one_is_not_looked_at():
    targets = torch.tensor([[31, 1, 2], [99, 4, 5]])
    linear_cross_entropy(torch.randn(2, 3, 8), C, targets, shift=True)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("length", "shift"), [(1, True), (2, 2), (2, 5), (0, 1)])
def test_sequence_too_short_for_the_shift_has_no_loss(impl, reduction, length, shift):
    e = torch.randn(2, length, 8, requires_grad=True)
    c, bias = C.clone().requires_grad_(), torch.zeros(30, requires_grad=True)
    targets = torch.ones(2, length, dtype=torch.int64)
    out = linear_cross_entropy(
        e, c, targets, bias=bias, shift=shift, impl=impl, reduction=reduction, return_lse=True
    )
    assert out.loss.shape == ((2, 0) if reduction == "none" else ())
    assert out.lse.shape == (2, 0)
    assert out.loss.sum() == 0
    out.loss.sum().backward()
    for leaf in (e, c, bias):
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))
    logprobs, entropy = linear_logprobs(e, c, targets, shift=shift, impl=impl)
    assert logprobs.shape == entropy.shape == (2, 0)


def test_no_items_is_an_empty_batch():
    targets = torch.full_like(T, -100)
    for items in (0, torch.tensor(0), torch.tensor([0])):
        assert linear_cross_entropy(E, C, targets, num_items_in_batch=items) == 0


@pytest.mark.parametrize("impl", IMPLS)
def test_meta_tensors_give_shapes(impl):
    e, c, targets = (x.to("meta") for x in (E, C, T))
    loss = linear_cross_entropy(e.requires_grad_(), c, targets, impl=impl, reduction="none")
    assert loss.is_meta
    assert loss.shape == (6,)
    assert linear_cross_entropy(e, c, targets, impl=impl).shape == ()


def test_float64_is_for_the_reference():
    loss = linear_cross_entropy(E.double(), C.double(), T, impl="reference")
    assert loss.dtype == torch.float64


def test_device_without_a_kernel_is_refused_not_materialised():
    class Elsewhere(torch.Tensor):
        @property
        def device(self):
            return torch.device("xpu:0")

    e, c, targets = (x.as_subclass(Elsewhere) for x in (E, C, T))
    with pytest.raises(ValueError, match=r"expected e on cpu .*got xpu:0; impl='reference'"):
        linear_cross_entropy(e, c, targets)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"impl": "nope"}, ValueError, "expected impl to be one of .* got 'nope'"),
        ({"reduction": "avg"}, ValueError, "expected reduction to be one of .* got 'avg'"),
        ({"softcap": "30"}, TypeError, "expected softcap to be None or a number, got str"),
        ({"filter_eps": 2.0}, ValueError, r"expected filter_eps in \[0, 1\), got 2.0"),
        ({"label_smoothing": 2}, ValueError, r"expected label_smoothing in \[0, 1\], got 2"),
        ({"shift": -1}, ValueError, "expected shift to be 0 or more, got -1"),
        ({"weight": [1.0]}, TypeError, "expected weight to be a tensor, got list"),
    ],
)
def test_module_checks_its_options_when_built(options, error, message):
    with pytest.raises(error, match=message):
        LinearCrossEntropy(**options)


@pytest.fixture
def one_rank(tmp_path):
    if dist.is_initialized():
        pytest.fail("a process group is left over from another test")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["e", "c", "targets", "bias"])
def test_distributed_tensor_is_refused_with_the_remedy(one_rank, name):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    arguments = {"e": E, "c": C, "targets": T, "bias": torch.zeros(30)}
    mesh = init_device_mesh("cpu", (1,))
    arguments[name] = distribute_tensor(arguments[name], mesh, [Shard(0)])
    remedy = (
        rf"expected {name} to be a plain tensor, got DTensor; use gemma_ext.distributed: "
        r"vocab_parallel_linear_cross_entropy .* same tokens, gather_head\(c\) if not"
    )
    for function in (linear_cross_entropy, linear_logprobs):
        with pytest.raises(TypeError, match=remedy):
            function(**arguments)
