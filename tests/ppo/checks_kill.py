"""A run killed ten times at random against one left alone: `checks_kill.py DIR SEED`.

Each try is a fork of a process that has imported everything and computed nothing, so that it trains
and saves at once, and is killed there.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from toy_ppo import lines, trainer, weights

from gemma_ext.ppo.history import METRICS

STEPS, KILLS = 30, 10


def train(folder: Path) -> None:
    torch.set_num_threads(1)
    made = trainer(folder, steps=STEPS, save_steps=1, num_ppo_epochs=1)
    made.train()
    torch.save(weights(made), folder / "final.pt")


def forked(run: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        try:
            run()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return child


def main(folder: Path, seed: int) -> None:
    begun = time.perf_counter()
    assert os.waitpid(forked(lambda: train(folder / "whole")), 0)[1] == 0
    each = (time.perf_counter() - begun) / STEPS
    chance, steps = random.Random(seed), []
    for _ in range(KILLS):
        child = forked(lambda: train(folder / "killed"))
        more = chance.randrange(3)  # 10 times 2 steps and a bit leave the run unfinished
        wait_for(folder / "killed", steps[-1] + more if steps else more)
        time.sleep(chance.uniform(0, each if more else 8 * each))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL, "the run ended before it was killed"
        steps.append(saved(folder / "killed"))
    assert os.waitpid(forked(lambda: train(folder / "killed")), 0)[1] == 0
    whole, killed = (torch.load(folder / run / "final.pt") for run in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    found = {
        "steps": steps,
        "weights": all(torch.equal(whole[name], killed[name]) for name in whole),
        "history": lines(folder / "whole" / METRICS) == lines(folder / "killed" / METRICS),
    }
    print(json.dumps(found))


def saved(folder: Path) -> int:
    place = folder / "checkpoint.json"
    return json.loads(place.read_text())["step"] if place.exists() else 0


def wait_for(folder: Path, step: int) -> None:
    begun = time.perf_counter()
    while saved(folder) < step:
        assert time.perf_counter() - begun < 120, f"step {step} does not come"
        time.sleep(0.002)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
