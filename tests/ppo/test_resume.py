"""A run that was interrupted anywhere goes on to the bits of one that was not."""

from __future__ import annotations

import json

import pytest
import torch
from toy_ppo import lines, tiny, trainer, weights

from gemma_ext.nn.ppo import AdapterCritic, FrozenReference
from gemma_ext.nn.ppo.adapters import with_adapters
from gemma_ext.ppo.checkpoint import POINTER
from gemma_ext.ppo.history import METRICS


class Interrupted(Exception):
    pass


def stop_at(wanted: int):
    def callback(made, step, line):
        if step == wanted:
            raise Interrupted

    return callback


def parts_of(kind: str) -> dict:
    if kind == "separate critic":
        return {"value": tiny(seed=3)}
    if kind == "adapters":
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"])
        torch.manual_seed(5)
        policy = with_adapters(tiny(), config, "value")
        return {"policy": policy, "value": AdapterCritic(policy)}
    return {}


OPTIONS = {
    "shared critic": {},
    "separate critic": {"num_mini_batches": 2, "lr_scheduler_type": "cosine", "warmup_ratio": 0.3},
    "adapters": {"kl_in": "loss", "kl_estimator": "full"},
    "rloo": {"advantage": "rloo", "num_generations": 4},
    "remax": {"advantage": "remax", "importance_cap": 2.0},
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_as_if_nothing_had_happened(kind, tmp_path):
    whole = trainer(tmp_path / "whole", parts=parts_of(kind), **OPTIONS[kind])
    history = whole.train()
    assert len(history) == 6

    folder = tmp_path / "pieces"
    for stop in (1, 5):  # before the first checkpoint, and between two
        made = trainer(
            folder, parts={**parts_of(kind), "callbacks": [stop_at(stop)]}, **OPTIONS[kind]
        )
        with pytest.raises(Interrupted):
            made.train()
        torch.randn(3)  # what another program draws
    assert json.loads((folder / POINTER).read_text())["step"] == 4
    last = trainer(folder, parts=parts_of(kind), **OPTIONS[kind])
    assert lines(last.train()) == lines(history) == lines(folder / METRICS)
    expected = weights(whole)
    found = weights(last)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    start = weights(trainer(tmp_path / "start", parts=parts_of(kind), **OPTIONS[kind]))
    assert any(not torch.equal(start[n], t) for n, t in expected.items() if "policy" in n)
    assert last.before == whole.before


def test_a_finished_run_is_not_run_again(tmp_path):
    first = trainer(tmp_path, steps=2)
    history = lines(first.train())
    again = trainer(tmp_path, steps=2)
    again.train_step = None
    assert lines(again.train()) == history
    for name, tensor in weights(first).items():
        assert torch.equal(weights(again)[name], tensor), name


def test_leftovers_of_a_killed_run_do_no_harm(tmp_path):
    whole = trainer(tmp_path / "whole").train()
    folder = tmp_path / "killed"
    with pytest.raises(Interrupted):
        trainer(folder, parts={"callbacks": [stop_at(3)]}).train()
    (folder / "checkpoint-4-0.pt").write_bytes(b"half of a checkpoint")
    with (folder / METRICS).open("a") as file:
        file.write('{"step": 4, "objective/kl": 0.1')  # half of a line
    assert lines(trainer(folder).train()) == lines(whole) == lines(folder / METRICS)
    assert [p.name for p in folder.glob("checkpoint-*.pt")] == ["checkpoint-6-0.pt"]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"learning_rate": 1e-4}, "learning_rate"),
        ({"seed": 7, "cliprange": 0.1}, "cliprange, seed"),
        ({"parts": {"policy": tiny(num_hidden_layers=1)}}, "reference, weights"),
        ({"parts": {"reference": FrozenReference(tiny(seed=5))}}, "reference"),
    ],
)
def test_another_run_is_refused(changed, named, tmp_path):
    trainer(tmp_path, steps=2).train()
    with pytest.raises(ValueError, match=rf"is of another run \({named} differ\); expected"):
        trainer(tmp_path, steps=2, **changed).train()


def test_what_may_differ(tmp_path):
    """How often is logged and saved, and how far the run goes."""
    trainer(tmp_path, steps=2).train()
    more = trainer(tmp_path, steps=3, save_steps=1, logging_steps=3, sample_prompts=0)
    assert [line["step"] for line in more.train()] == [1, 2, 3]


def test_what_a_callback_draws_is_in_the_checkpoint(tmp_path):
    """The rewards of its samples draw from torch's own stream."""

    def look(made, step, line):
        made.samples()

    whole = trainer(tmp_path / "whole", parts={"callbacks": [look]})
    history = whole.train()
    folder = tmp_path / "pieces"
    with pytest.raises(Interrupted):
        trainer(folder, parts={"callbacks": [look, stop_at(5)]}).train()
    torch.randn(3)
    last = trainer(folder, parts={"callbacks": [look]})
    assert lines(last.train()) == lines(history)
    assert all(torch.equal(weights(last)[n], t) for n, t in weights(whole).items())


def test_another_base_below_the_adapters_is_another_run(tmp_path):
    peft = pytest.importorskip("peft")

    def made(seed):
        config = peft.LoraConfig(r=2, target_modules=["q_proj"])
        return trainer(tmp_path, steps=1, parts={"policy": with_adapters(tiny(seed), config)})

    made(0).train()
    made(0).train()
    with pytest.raises(ValueError, match=r"is of another run \(reference differ\)"):
        made(1).train()
