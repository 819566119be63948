"""A patched model inside DDP and FSDP2, on one process of gloo."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from tiny_models import assert_same_training, batch, clone, gemma2, loss_and_gradients
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from gemma_ext.integrations.transformers import patch, unpatch


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def named(result, prefix: str):
    loss, gradients = result
    return loss, {
        name.removeprefix(prefix): getattr(g, "full_tensor", lambda g=g: g)()
        for name, g in gradients.items()
    }


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_ddp(group, tied, impl):
    model = gemma2(tie_word_embeddings=tied)
    expected = loss_and_gradients(clone(model), **batch())
    wrapped = patch(DistributedDataParallel(model), impl=impl)
    assert wrapped(**batch()).logits is None
    assert_same_training(named(loss_and_gradients(wrapped, **batch()), "module."), expected)
    assert unpatch(wrapped)(**batch()).logits is not None


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_fsdp2(group, tied, impl):
    model = gemma2(tie_word_embeddings=tied)
    expected = loss_and_gradients(clone(model), **batch())
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    patch(model, impl=impl)
    assert_same_training(named(loss_and_gradients(model, **batch()), ""), expected)


def test_a_head_that_is_its_own_fsdp_unit_is_refused(group, impl):
    model = gemma2(tie_word_embeddings=False)
    mesh = init_device_mesh("cpu", (1,))
    fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    patch(model, impl=impl)
    with pytest.raises(RuntimeError, match="was resharded; leave the head in the root FSDP unit"):
        model(**batch())


@pytest.mark.parametrize("style", [ColwiseParallel, RowwiseParallel])
def test_a_tensor_parallel_head_is_refused(group, style, impl):
    model = gemma2(tie_word_embeddings=False)
    layouts = {"input_layouts": Replicate(), "output_layouts": Replicate()}
    parallelize_module(model.lm_head, init_device_mesh("cpu", (1,)), style(**layouts))
    expected = model(**batch()).loss
    with pytest.raises(TypeError, match=r"got a DTensor.*gemma_ext\.distributed\.vocab_parallel"):
        patch(model, impl=impl)(**batch())
    torch.testing.assert_close(unpatch(model)(**batch()).loss, expected)


def test_all_ignored_does_not_hang_ddp(group, impl):
    model = patch(DistributedDataParallel(gemma2()), impl=impl)
    inputs = batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    loss, gradients = loss_and_gradients(model, **inputs)
    assert loss == 0
    assert all((gradient == 0).all() for gradient in gradients.values())
