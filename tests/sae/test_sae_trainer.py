"""Training resumes with the same bits, learns, keeps its books, and agrees over ranks."""

import json
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tiny_gemma2 import D, tiny_model, tiny_rows

from gemma_ext.nn.sparse_autoencoder import (
    BatchTopK,
    Gated,
    JumpReLU,
    Objective,
    ReLU,
    SparseAutoencoder,
    TopK,
    default_objective,
)
from gemma_ext.sae import Activations, TrainConfig, Trainer
from gemma_ext.sae.trainer import CHECKPOINT, METRICS

F = 48
ACTIVATIONS = [TopK(4), TopK(3, multi=4), BatchTopK(4), ReLU(), JumpReLU(), Gated()]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def trainer(model, out, activation=TopK(4), objective=None, sources=1, **config):  # noqa: B008
    torch.manual_seed(3)
    sae = SparseAutoencoder(
        D, F, activation, sources=sources, standardise="affine", unit_norm=sources == 1
    )
    stream = Activations([model], ["1"] * sources, tiny_rows(40), batch=64, buffer=200, rows=8)
    config = {"steps": 30, "log_every": 5, "save_every": 10, "dead_after": 300} | config
    return Trainer(sae, objective or default_objective(sae), stream, TrainConfig(**config), out)


def interrupted(run, step):
    def progress(at, metrics):
        if at == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.run(progress)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_an_interrupted_run_gives_the_weights_of_a_whole_one(activation, model, tmp_path):
    whole = trainer(model, tmp_path / "whole", activation)
    whole.run()
    interrupted(trainer(model, tmp_path / "parts", activation), 17)
    again = trainer(model, tmp_path / "parts", activation)
    again.run()
    for name, value in whole.sae.state_dict().items():
        assert torch.equal(value, again.sae.state_dict()[name]), name
    for name, value in whole.dead.state_dict().items():
        assert torch.equal(value, again.dead.state_dict()[name]), name
    lines = [
        [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in t.history()]
        for t in (whole, again)
    ]
    assert lines[0] == lines[1]
    assert [line["step"] for line in lines[0]] == [5, 10, 15, 20, 25, 30]
    assert not whole.sae.training


def test_training_learns(model, tmp_path):
    run = trainer(model, tmp_path, steps=150, log_every=10)
    run.run()
    history = run.history()
    assert history[-1]["fvu"] < 0.6 * history[0]["fvu"]
    assert all(line["l0"] <= 4 for line in history)
    torch.testing.assert_close(run.sae.decoder.norm(dim=-1), torch.ones(F))
    assert run.dead.tokens == 150 * 64
    assert run.dead.fired.sum() <= 150 * 64 * 4


def test_a_finished_run_is_left_alone(model, tmp_path):
    run = trainer(model, tmp_path)
    run.run()
    steps = []
    again = trainer(model, tmp_path)
    again.run(lambda step, metrics: steps.append(step))
    assert steps == []
    assert torch.equal(again.sae.decoder, run.sae.decoder)
    longer = trainer(model, tmp_path, learning_rate=1.0)
    with pytest.raises(ValueError, match=r"out: .* is of another run \(config differ\)"):
        longer.run()


def test_a_torn_line_of_metrics_is_dropped(model, tmp_path):
    interrupted(trainer(model, tmp_path), 17)
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 16, "lo')
    run = trainer(model, tmp_path)
    run.run()
    assert [line["step"] for line in run.history()] == [5, 10, 15, 20, 25, 30]
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".tmp")] == []


def test_metrics_that_are_not_finite_are_json(model, tmp_path):
    run = trainer(model, tmp_path)
    run._write({"explained": math.nan, "mse": 0.5})

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    text = (tmp_path / METRICS).read_text()
    assert json.loads(text, parse_constant=refuse) == {"step": 0, "explained": None, "mse": 0.5}
    (line,) = run.history()
    assert math.isnan(line["explained"])


def test_initialisation_from_the_data(model, tmp_path):
    run = trainer(model, tmp_path)
    run.initialise()
    x = next(run.stream.batches())
    z, _ = run.sae.standardised(x)
    torch.testing.assert_close(z.norm(dim=-1).mean(), torch.tensor(D**0.5))
    distance = (z - run.sae.decoder_bias).norm(dim=-1).sum()
    assert distance <= (z - z.mean(0)).norm(dim=-1).sum() + 1e-3


def test_crosscoders_are_trained_too(model, tmp_path):
    objective = Objective("norm", auxiliary=1 / 32)
    run = trainer(model, tmp_path, BatchTopK(4), objective, sources=2, k_from=20, steps=20)
    seen = []
    run.run(lambda step, metrics: seen.append(run.sae.activation.k))
    assert (seen[0], seen[-1]) == (12, 4)  # 20 to 4 over the first two of 20 steps
    assert run.sae.activation == BatchTopK(4)
    assert run.sae.threshold > 0
    with pytest.raises(ValueError, match="stream: expected 2 sources, got 1"):
        Trainer(run.sae, objective, trainer(model, tmp_path).stream, run.config, tmp_path)


def test_dead_latents_come_back_by_the_second_list(model, tmp_path):
    dead = []
    for weight in (0.0, 1.0):
        run = trainer(
            model, tmp_path / str(weight), TopK(2), Objective(auxiliary=weight), steps=120
        )
        with torch.no_grad():
            run.sae.encoder_bias[20:] = -1.5
        run.run()
        dead.append(int(run.dead.mask().sum()))
    assert dead[1] < dead[0]


def test_products_in_bfloat16(model, tmp_path):
    run = trainer(model, tmp_path, bfloat16=True, steps=60)
    run.run()
    assert run.sae.encoder.dtype == torch.float32
    assert run.history()[-1]["fvu"] < run.history()[0]["fvu"]


def test_tensorboard_events(model, tmp_path):
    sae = trainer(model, tmp_path).sae
    stream = trainer(model, tmp_path).stream
    config = TrainConfig(steps=4, log_every=2)
    if "tensorboard" not in sys.modules and not _installed("tensorboard"):
        with pytest.raises(ImportError, match="live metrics needs tensorboard"):
            Trainer(sae, Objective(), stream, config, tmp_path, tensorboard=tmp_path / "events")
        return
    Trainer(sae, Objective(), stream, config, tmp_path, tensorboard=tmp_path / "events").run()
    assert list((tmp_path / "events").glob("events*"))


def _installed(name):
    from importlib.util import find_spec

    return find_spec(name) is not None


def test_a_checkpoint_is_plain_data(model, tmp_path):
    trainer(model, tmp_path, steps=10).run()
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert state["step"] == 10
    assert set(state) == {"step", "run", "sae", "dead", "optimiser"}


def test_schedule():
    config = TrainConfig(steps=100, warmup=0.1, decay=0.2, sparsity_warmup=0.05)
    factors = [config.factor(step) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:80] == pytest.approx([1.0] * 71)
    assert factors[99] == pytest.approx(1 / 20)
    assert all(a >= b for a, b in pairwise(factors[80:]))
    assert [config.warmth(s) for s in (0, 4, 50)] == pytest.approx([0.2, 1.0, 1.0])
    assert TrainConfig(steps=9, warmup=0, decay=0, sparsity_warmup=0).factor(0) == 1.0
    assert config.rate(2**14) == pytest.approx(2e-4)
    assert config.rate(2**16) == pytest.approx(1e-4)
    assert TrainConfig(steps=1, learning_rate=0.3).rate(7) == 0.3
    assert TrainConfig(steps=10**6).window(10**4) == 10_000_000
    assert TrainConfig(steps=100).window(64) == 640
    for options, sentence in (
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"steps": 1, "log_every": 0}, "log_every: expected at least 1"),
        ({"steps": 1, "decay": 2}, r"decay: expected a share in \[0, 1\], got 2"),
    ):
        with pytest.raises(ValueError, match=sentence):
            TrainConfig(**options)


def test_ranks_agree_with_one_process_on_their_joint_batches(tmp_path):
    script = Path(__file__).with_name("checks_ranks.py")
    done = subprocess.run(
        [sys.executable, script, tmp_path], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "done.json").read_text()) == "ok"
