"""A captured step replays on new inputs."""

from __future__ import annotations

import pytest
import torch
from gpu_problem import DTYPES, FORMS, Outcome, Problem, assert_same_bits, ours, problem

import gemma_ext

pytestmark = pytest.mark.card
SHAPE = (257, 136, 1500)


class Captured:
    """Forward and backward of a problem as one graph, on memory of its own."""

    def __init__(self, p: Problem, **options: object) -> None:
        self.targets = p.targets.clone()
        self.leaves = {name: t.clone().detach() for name, t in p.leaves().items()}
        for leaf in self.leaves.values():
            leaf.requires_grad_()
        self.options = {"reduction": "sum"} | options
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.step()
        torch.cuda.current_stream().wait_stream(side)
        self.forget()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = self.step()

    def step(self) -> torch.Tensor:
        loss = gemma_ext.linear_cross_entropy(targets=self.targets, **self.leaves, **self.options)
        loss.sum().backward()
        return loss.detach()

    def forget(self) -> None:
        for leaf in self.leaves.values():
            leaf.grad = None

    def replay(self, p: Problem) -> Outcome:
        """Loss and gradients for another problem of the same sizes."""
        with torch.no_grad():
            self.targets.copy_(p.targets)
            for name, value in p.leaves().items():
                self.leaves[name].copy_(value)
        self.graph.replay()
        grads = {f"d{name}": leaf.grad.clone() for name, leaf in self.leaves.items()}
        return {"loss": self.loss.clone()} | grads


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_backward(dtype, form):
    options = FORMS[form] | {"softcap": 30.0}
    captured = Captured(problem(*SHAPE, dtype, bias=True), **options)
    for seed, ignored in ((1, 0.1), (2, 0.9), (3, 0.0)):
        p = problem(*SHAPE, dtype, bias=True, seed=seed, ignored=ignored)
        assert_same_bits(captured.replay(p), ours(p, **options))


def test_the_filter_decides_in_the_graph():
    """Sharp rows keep little, flat ones much: both from one capture."""
    options = {"impl": "cce", "filter_eps": "auto", "softcap": 30.0}
    captured = Captured(problem(*SHAPE, torch.bfloat16, spread=8.0), **options)
    for spread in (0.5, 2.0, 8.0):
        p = problem(*SHAPE, torch.bfloat16, spread=spread, seed=5)
        assert_same_bits(captured.replay(p), ours(p, **options))


def test_forward_alone():
    p = problem(*SHAPE, torch.bfloat16)
    captured = torch.cuda.CUDAGraph()
    with torch.no_grad():
        want = gemma_ext.linear_cross_entropy(p.e, p.c, p.targets)
        with torch.cuda.graph(captured):
            got = gemma_ext.linear_cross_entropy(p.e, p.c, p.targets)
    got.zero_()
    captured.replay()
    assert torch.equal(got, want)
