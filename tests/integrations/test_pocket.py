"""The pocket Gemma-2, its logits stretched past the cap, trains as in eager torch."""

from __future__ import annotations

import pytest
import torch
from tiny_models import assert_same_training, clone, loss_and_gradients
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gemma_ext.integrations.transformers import patch
from gemma_ext.pocket import SIZES, build_model

SIZE = SIZES["nano"]


@pytest.fixture(scope="module")
def stretched():
    """Random weights with the spread of logits of a trained model, and beyond the cap."""
    model = build_model(SIZE, seed=3)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(
            std=0.05, generator=torch.Generator().manual_seed(4)
        )
        model.model.norm.weight.fill_(24.0)
    return model


def sequences() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, SIZE.vocab_size, (2, 64), generator=generator)
    labels = ids.clone()
    labels[:, :20] = -100
    return {"input_ids": ids, "labels": labels}


def test_the_logits_exceed_the_cap(stretched):
    model = clone(stretched)
    model.config.final_logit_softcapping = None
    with torch.no_grad():
        assert model(**sequences()).logits.abs().max() > 40


@pytest.mark.parametrize("impl", ["exact", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_loss_and_gradients(stretched, impl, dtype):
    model = clone(stretched).to(dtype)
    expected = loss_and_gradients(clone(model), **sequences())
    patch(model, impl=impl)
    # the filter may keep its error near the rounding of bfloat16 in either dtype
    tight = impl == "exact" and dtype == torch.float32
    for _ in range(2):
        got = loss_and_gradients(model, **sequences())
        assert_same_training(got, expected, tolerance=2e-5 if tight else 3e-2)


class LargestOutput(TorchDispatchMode):
    """Rows of the largest tensor over the vocabulary that any operator returned."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for value in tree_leaves(output):
            if isinstance(value, torch.Tensor) and value.shape[-1:] == (SIZE.vocab_size,):
                self.rows = max(self.rows, value.numel() // SIZE.vocab_size)
        return output


@pytest.mark.parametrize("impl", ["exact", "auto"])
def test_no_operator_returns_the_logits(stretched, impl):
    inputs = sequences()
    with LargestOutput() as eager:
        loss_and_gradients(clone(stretched), **inputs)
    patched = patch(clone(stretched), impl=impl)
    with LargestOutput() as ours:
        loss_and_gradients(patched, **inputs)
    assert eager.rows >= inputs["labels"].numel()
    # vectors over the vocabulary remain
    assert ours.rows <= 1


def test_bf16_is_no_further_from_the_truth_than_eager(stretched):
    """Against float32 of the same rounded weights; backbone rounding is common to both."""
    model = clone(stretched).bfloat16()
    true = loss_and_gradients(clone(model).float(), **sequences())[1]
    eager = loss_and_gradients(clone(model), **sequences())[1]
    ours = loss_and_gradients(patch(model), **sequences())[1]

    def error(gradients):
        return sum((gradients[n].float() - true[n]).square().sum() for n in true).sqrt()

    assert error(ours) <= 1.05 * error(eager)


def test_training_follows_eager(stretched):
    def losses(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        found = []
        for _ in range(8):
            loss = model(**sequences()).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    eager = losses(clone(stretched))
    assert eager[-1] < eager[0] - 1
    assert losses(patch(clone(stretched), impl="exact")) == pytest.approx(eager, rel=1e-3)
    assert losses(patch(clone(stretched))) == pytest.approx(eager, rel=1e-2)
