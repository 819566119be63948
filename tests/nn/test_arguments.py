"""Bad arguments: one sentence with the name, what was expected and what came."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from gemma_ext import linear_cross_entropy, linear_logprobs

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
        ({"shift": 6}, r"expected shift in \[0, 6\), got 6"),
        ({"shift": -1}, r"expected shift in \[0, 6\), got -1"),
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
    ],
)
def test_loss_options(change, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(E, C, T, **change)


def test_float64_is_for_the_reference():
    loss = linear_cross_entropy(E.double(), C.double(), T, impl="reference")
    assert loss.dtype == torch.float64


def test_device_without_a_kernel_is_refused_not_materialised():
    class Elsewhere(torch.Tensor):
        @property
        def device(self):
            return torch.device("cuda:0")

    e, c, targets = (x.as_subclass(Elsewhere) for x in (E, C, T))
    with pytest.raises(ValueError, match=r"expected e on cpu .*got cuda:0; impl='reference'"):
        linear_cross_entropy(e, c, targets)


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
    remedy = rf"expected {name} to be a plain tensor, got DTensor; .*gemma_ext.distributed"
    for function in (linear_cross_entropy, linear_logprobs):
        with pytest.raises(TypeError, match=remedy):
            function(**arguments)
