"""Merges that are killed and taken up again: python killed_merges.py FOLDER ROUNDS SEED.

Prints a JSON line: how many were killed while they ran, how many went on from tensors that a killed
one had written, and the rounds whose output is not byte for byte that of a merge left alone. A
round is a fork, so that torch is loaded once; no thread is left when it does.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from stream_models import SHAPES, Deltas, Shrunk, files_of, rising, save_models

from gemma_ext.souping.engine.files.journal import NAME
from gemma_ext.souping.engine.stream import merge_files

LAYERS = 12
METHODS = (Deltas(), Shrunk(), Shrunk("row"), Shrunk(model_wide=True))


def main(root: Path, rounds: int, seed: int) -> None:
    torch.set_num_threads(2)  # two lanes
    draw = random.Random(seed)
    shapes = {
        name.replace(".1.", f".{layer}."): shape
        for layer in range(LAYERS)
        for name, shape in SHAPES.items()
    }
    models, base = save_models(root, 2, shapes=shapes)

    options = {"shard_bytes": 4000, "memory_bytes": 6000}

    def merge(method, out: Path, die_at: int = -1, chunk_bytes: int = 200) -> int:
        """In a process of its own, which kills itself at a step of its progress."""

        def progress(done: int, total: int) -> None:
            nonlocal die_at
            if die_at == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            die_at -= 1

        child = os.fork()
        if child == 0:
            more = {**options, "chunk_bytes": chunk_bytes, "progress": progress}
            merge_files(method, models, base, rising(2), out, **more)
            os._exit(0)
        return child

    wholes, seconds, steps = {}, {}, {}
    for i, method in enumerate(METHODS):
        seen, started = [], time.monotonic()
        more = {
            **options,
            "chunk_bytes": 200,
            "progress": lambda *step, seen=seen: seen.append(step),
        }
        whole = merge_files(method, models, base, rising(2), root / f"whole{i}", **more)
        seconds[method], steps[method] = time.monotonic() - started, len(seen)
        wholes[method] = files_of(whole)

    killed = resumed = 0
    wrong = []
    for i in range(rounds):
        method, out = METHODS[i % len(METHODS)], root / f"out{i}"
        for _ in range(draw.choice([1, 1, 2])):
            if i % 2:
                child = merge(method, out, draw.randrange(steps[method]))
            else:
                child = merge(method, out)
                time.sleep(draw.uniform(0, seconds[method]))
                os.kill(child, signal.SIGKILL)
            died = os.waitpid(child, 0)[1] == signal.SIGKILL
            killed += died
            if not died:
                break
            assert not out.exists() or files_of(out) == wholes[method]
        journal = out.with_name(f"{out.name}.partial") / NAME
        resumed += journal.exists() and len(journal.read_text().splitlines()) > 1
        if not out.exists():
            child = merge(method, out, chunk_bytes=draw.choice([200, 1 << 20]))
            assert os.waitpid(child, 0)[1] == 0
        if files_of(out) != wholes[method] or out.with_name(f"{out.name}.partial").exists():
            wrong.append(i)
    print(json.dumps({"killed": killed, "resumed": resumed, "wrong": wrong}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
