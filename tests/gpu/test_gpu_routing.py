"""Tokens that route themselves on a card, by graphs: what its host would have drawn."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gpu_problem import DEVICE

pytest.importorskip("transformers")
pytest.importorskip("gemma_ext._host", reason="the scheduler is built where pybind11 is")
sys.path.append(str(Path(__file__).parents[1] / "serve"))
from routing_tools import engines  # isort: skip
from serve_tiny import tiny  # isort: skip
from test_gpu_serve import EXITS, requests  # isort: skip
from toy_models import collect  # isort: skip

from gemma_ext.serve.exits import ExitTest
from gemma_ext.serve.protocol import Request, SamplingParams


@pytest.fixture(autouse=True)
def allow_waiting_again() -> Iterator[None]:
    yield
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("default")


def served(engine, asked: list[Request] | None = None) -> dict[int, tuple]:
    """Tokens, depths and reason of every request."""
    found = {}
    for request in asked or requests():
        engine.submit(request)
    while engine.has_work():
        collect(found, engine.step())
    return found


@pytest.mark.parametrize("exits", EXITS, ids=lambda test: test.name)
def test_a_card_routes_tokens_as_its_host_does(exits):
    """Ticks of every reading and of several sizes, prompts between them."""
    model = tiny("Gemma2", loops=3, rank=3, layers=6, seed=5, dtype=torch.float32)
    host, device = engines(model.to(DEVICE), exits, backlog=4)
    assert served(device) == served(host)
    assert served(device) == served(host)  # by the graphs of the first time


@pytest.mark.parametrize("policy", ["exact_eager", "propagate", "copy", "modulo", "single"])
def test_a_card_routes_under_every_policy(policy):
    model = tiny("Gemma2", loops=2, rank=3, dtype=torch.bfloat16).to(DEVICE)
    given = {"kv_policy": policy, "keep": 2, "backlog": 4}
    host, device = engines(model, ExitTest("max_prob", threshold=0.3), **given)
    assert served(device) == served(host)


def test_a_card_routes_with_a_shortlist():
    model = tiny("Gemma2", loops=2, rank=3, dtype=torch.bfloat16).to(DEVICE)
    asked = [Request((3, 1, 4), SamplingParams(max_tokens=12, temperature=0.0))]
    host, device = engines(model, ExitTest("latent_diff", threshold=0.6), shortlist=True)
    assert served(device, asked) == served(host, asked)


@pytest.mark.card
def test_a_request_opens_and_ends_without_waiting():
    model = tiny("Gemma2", loops=2, rank=3, dtype=torch.float32).to(DEVICE)
    _, device = engines(model, ExitTest("max_prob", threshold=0.3))
    served(device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    request = requests()[2]
    device.runner.open(0, request)
    device.router.start(0, 99, request, len(request.prompt) - 1, -1, 0)
    device.router.stop(0)


@pytest.mark.card
def test_a_second_card():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two cards")
    model = tiny("Gemma2", loops=2, rank=3, dtype=torch.float32)
    exits = ExitTest("max_prob", threshold=0.3)
    told = []
    for card in ("cuda:0", "cuda:1"):
        told += [served(engine) for engine in engines(model.to(card), exits)]
    assert all(found == told[0] for found in told)
