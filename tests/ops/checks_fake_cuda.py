"""CUDA tensors without values: shapes, dtypes and devices, and that nobody looks at a value.

Run by tests/simt/test_ops_on_host.py. A torch without CUDA cannot slice even a fake tensor of it:
GEMMA_EXT_TEST_GUARD names a library with the device guard that it lacks. Its autograd engine has no
CUDA queue, so gradients are those of the backward op here.
"""

from __future__ import annotations

import ctypes
import os

import pytest
import torch
import torch.distributed as dist
from test_cce_opcheck import OPS, samples
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from gemma_ext import linear_cross_entropy, linear_logprobs
from gemma_ext.distributed import vocab_parallel_linear_cross_entropy
from gemma_ext.ops.cce import inputs

if not torch.backends.cuda.is_built():
    ctypes.CDLL(os.environ["GEMMA_EXT_TEST_GUARD"])

CUDA = torch.device("cuda:0")
B, T, D, V = 2, 10, 16, 300
FLAGS = {f"return_{name}": True for name in ("lse", "entropy", "argmax", "stats")}


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    monkeypatch.setattr(inputs, "_CUDA_REFUSAL", None)
    with FakeTensorMode() as mode, torch.no_grad():
        yield mode


def to_cuda(mode: FakeTensorMode, values: tuple) -> list:
    return [mode.from_tensor(v).to(CUDA) if isinstance(v, Tensor) else v for v in values]


def tensors(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    e = torch.empty(B, T, D, dtype=dtype, device=CUDA)
    c = torch.empty(V, D, dtype=dtype, device=CUDA)
    return e, c, torch.empty(B, T, dtype=torch.int64, device=CUDA)


def described(t: Tensor) -> tuple:
    return t.shape, t.dtype, t.stride()


@pytest.mark.parametrize("lean", [False, True])
def test_lean_masses_are_bfloat16(fake, lean):
    e, c, targets = tensors(torch.float32)
    out = torch.ops.gemma_ext.cce_forward(
        e.reshape(-1, D), c, targets.reshape(-1), None, None, 0.0, 1.0, 1.0, -100, False, 0.1,
        True, False, lean,
    )  # fmt: skip
    assert out[6].dtype == (torch.bfloat16 if lean else torch.float32)
    assert out[6].shape == (2, 2, B * T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("variant", ["bare", "auto", "full"])
@pytest.mark.parametrize("name", OPS)
def test_outputs_and_gradients_are_those_of_the_kernels(fake, name, variant, dtype):
    op = getattr(torch.ops.gemma_ext, name).default
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        args = samples(name, dtype, variant)[0]
        real = op(*args) or ()
    outputs = op(*to_cuda(fake, args)) or ()
    assert [described(t) for t in outputs] == [described(t) for t in real]
    assert {t.device for t in outputs} <= {CUDA}


def test_every_output_of_the_loss():
    e, c, y = tensors()
    out = linear_cross_entropy(
        *(e, c, y),
        **FLAGS,
        bias=torch.empty(V, device=CUDA),
        weight=torch.empty(V, device=CUDA),
        token_weights=torch.empty(B, T, device=CUDA),
        num_items_in_batch=torch.empty((), dtype=torch.int64),
        label_smoothing=0.1,
        z_loss=0.1,
        softcap=5.0,
        shift=1,
    )
    values = {**out._asdict(), "stats": out.stats.values}
    assert {name: (t.shape, t.dtype) for name, t in values.items()} == {
        "loss": ((), torch.float32),
        "lse": ((B, T - 1), torch.float32),
        "entropy": ((B, T - 1), torch.float32),
        "argmax": ((B, T - 1), torch.int64),
        "accuracy": ((), torch.float32),
        "stats": ((3,), torch.float64),
    }
    assert {t.device for t in values.values()} == {CUDA}


def test_log_probabilities():
    for t in linear_logprobs(*tensors(), shift=1):
        assert (t.shape, t.dtype, t.device) == ((B, T - 1), torch.float32, CUDA)


@pytest.mark.parametrize("name", ["c", "targets", "bias", "weight", "token_weights"])
def test_another_device_is_named(name):
    e, c, y = tensors()
    values = {"c": c, "targets": y}
    values[name] = {
        "c": torch.empty(V, D, dtype=e.dtype),
        "targets": torch.empty(B, T, dtype=torch.int64),
        "token_weights": torch.empty(B, T),
    }.get(name, torch.empty(V))
    with pytest.raises(ValueError, match=f"expected {name} on cuda:0 like e, got cpu"):
        linear_cross_entropy(e, **values)


@pytest.mark.parametrize("impl", ["auto", "exact", "reference"])
def test_one_graph(impl):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(e, c, y):
        return linear_cross_entropy(e, c, y, softcap=5.0, shift=1, impl=impl)

    out = loss(*tensors())
    assert (out.shape, out.dtype, out.device) == ((), torch.float32, CUDA)


def test_vocabulary_parallel():
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    e, c, y = tensors()
    out = vocab_parallel_linear_cross_entropy(
        *(e, c, y),
        **FLAGS,
        weight=torch.empty(2 * V, device=CUDA),
        label_smoothing=0.1,
        vocab_start=V,
        vocab_size=2 * V,
        validate=False,
    )
    dist.destroy_process_group()
    assert {t.device for t in (*out[:5], out.stats.values)} == {CUDA}
