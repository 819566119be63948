"""Checks of the plain loss under DDP and FSDP2, run on every rank; see `ranks.py`."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from problem import assert_same_bits_on_every_rank
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Gemma2Config, Gemma2ForCausalLM

import gemma_ext
from gemma_ext.distributed import gather_head, vocab_parallel_linear_cross_entropy
from gemma_ext.integrations.transformers import patch

VOCAB = 83


class Head(nn.Module):
    """Embedding, one layer, and a classifier whose loss is ours."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, 16)
        self.layer = nn.Linear(16, 16)
        self.lm_head = nn.Linear(16, VOCAB)
        self.options = options

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        hidden = self.layer(self.embed(ids))
        return gemma_ext.linear_cross_entropy(
            hidden, self.lm_head.weight, labels, bias=self.lm_head.bias, shift=1, **self.options
        )


def tiny_gemma2(tied: bool = True) -> Gemma2ForCausalLM:
    """Logits beyond the cap of 5."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=5.0,
        sliding_window=8,
        attn_implementation="eager",
        tie_word_embeddings=tied,
    )
    model = Gemma2ForCausalLM(config)
    model.get_output_embeddings().weight.data.mul_(40.0)
    return model.train()


def batch(rank: int, ignored: float = 0.3) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(100 + rank)
    ids = torch.randint(1, VOCAB, (2, 11), generator=g)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=g) < ignored, -100)
    return ids, labels


def mean_gradients(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Gradients in one process of the batches' mean loss; a batch without labels has loss 0."""
    model = copy.deepcopy(model)
    for ids, labels in batches:
        if (labels[:, 1:] != -100).any():
            out = model(ids, labels=labels)
            (getattr(out, "loss", out) / len(batches)).backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
    }


def assert_gradients(model: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
        wanted = expected[name.removeprefix("module.")]
        tolerance = 2e-5 * float(wanted.abs().max().clamp(min=1e-3))
        torch.testing.assert_close(
            grad, wanted, rtol=2e-4, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


def check_ddp_rank_without_labels(rank, world):
    batches = [batch(r, ignored=1.0 if r == world - 1 else 0.3) for r in range(world)]
    for options in (
        {"impl": "reference", "label_smoothing": 0.1},
        {"impl": "exact", "z_loss": 0.1},
        {"impl": "exact", "label_smoothing": 0.1},
        {"impl": "auto", "softcap": 2.0},
    ):
        model = Head(**options)
        expected = mean_gradients(model, batches)
        wrapped = DistributedDataParallel(model)
        loss = wrapped(*batches[rank])
        loss.backward()
        if rank == world - 1:
            assert loss.item() == 0.0
        assert_gradients(wrapped, expected)
        assert_same_bits_on_every_rank(model.lm_head.weight.grad)


def check_ddp_no_rank_with_labels(rank, world):
    for impl in ("reference", "exact", "auto"):
        wrapped = DistributedDataParallel(Head(impl=impl))
        wrapped(*batch(rank, ignored=1.0)).backward()
        assert all(not parameter.grad.any() for parameter in wrapped.parameters())


def check_ddp_global_mean(rank, world):
    # num_items_in_batch makes the mean over all ranks' tokens; DDP averages, hence the factor
    batches = [batch(r, ignored=0.2 * r) for r in range(world)]
    items = torch.tensor(sum(int((labels[:, 1:] != -100).sum()) for _, labels in batches))
    model = Head(impl="exact")
    ids, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    expected = mean_gradients(model, [(ids, labels)])
    model.options["num_items_in_batch"] = items
    wrapped = DistributedDataParallel(model)
    (wrapped(*batches[rank]) * world).backward()
    assert_gradients(wrapped, expected)


def check_ddp_patched_gemma2_rank_without_labels(rank, world):
    batches = [batch(r, ignored=1.0 if r == 0 else 0.3) for r in range(world)]
    model = tiny_gemma2()
    expected = mean_gradients(model, batches)
    wrapped = DistributedDataParallel(patch(model))
    ids, labels = batches[rank]
    wrapped(ids, labels=labels).loss.backward()
    assert_gradients(wrapped, expected)


def check_fsdp2_patched_gemma2(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    for ignored, tied, head_unit, reshard_root in (
        (0.3, True, False, None),
        (1.0, True, False, True),
        (0.3, False, True, None),
    ):
        batches = [batch(r, ignored if r == 0 else 0.3) for r in range(world)]
        model = tiny_gemma2(tied)
        expected = mean_gradients(model, batches)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        if head_unit:
            fully_shard(model.lm_head, mesh=mesh, reshard_after_forward=False)
        fully_shard(model, mesh=mesh, reshard_after_forward=reshard_root)
        patch(model)
        assert isinstance(model.lm_head.weight, DTensor)
        ids, labels = batches[rank]
        output = model(ids, labels=labels)
        assert output.logits is None
        output.loss.backward()
        assert_gradients(model, expected)


def check_fsdp2_head_resharded_before_the_loss_is_refused(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    model = tiny_gemma2(tied=False)
    fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    patch(model)
    ids, labels = batch(rank)
    with pytest.raises(RuntimeError, match="it was resharded; leave the head in the root"):
        model(ids, labels=labels)


def check_fsdp2_head_outside_the_forward(rank, world):
    model = Head(impl="exact")
    batches = [batch(r) for r in range(world)]
    expected = mean_gradients(model, batches)
    fully_shard(model.lm_head, mesh=init_device_mesh("cpu", (world,)))
    weight, bias = model.lm_head.weight, model.lm_head.bias
    ids, labels = batches[rank]
    hidden = model.layer(model.embed(ids))
    with pytest.raises(TypeError, match="DTensor"):
        gemma_ext.linear_cross_entropy(hidden, weight, labels, shift=1, impl="reference")
    with pytest.raises(ValueError, match="gather_head"):
        vocab_parallel_linear_cross_entropy(
            hidden, weight, labels, bias=bias, shift=1, impl="exact"
        )
    loss = gemma_ext.linear_cross_entropy(
        hidden, gather_head(weight), labels, bias=gather_head(bias), shift=1, impl="exact"
    )
    loss.backward()
    for layer in (model.embed, model.layer):  # these two are not wrapped by anything
        for parameter in layer.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= world
    assert weight.grad.placements == weight.placements
    assert_gradients(model, expected)
    assert gather_head(hidden) is hidden
