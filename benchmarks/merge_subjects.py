"""What bench_merge runs, each in a process of its own: python merge_subjects.py SUBJECT JOB OUT.

JOB is a JSON file: recipe (mergekit's YAML), sources (folders), threads. The last line printed is
JSON: wall (seconds of the merge itself, without imports), cpu (of the process up to there), peak
(resident bytes, likewise), wrong (tensors of ours that are not what memory gives).
"""

from __future__ import annotations

import json
import mmap
import os
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CHUNK = 4 << 20
OURS = "gemma_ext"


def raw(job: dict, out: Path, flags: int = 0) -> Callable[[], None]:
    """Reads every byte of the sources and writes as many as one of them has, and syncs."""
    files = [sorted(Path(source).glob("*.safetensors")) for source in job["sources"]]
    sizes = [path.stat().st_size for path in files[0]]
    assert all([path.stat().st_size for path in own] == sizes for own in files)

    def move(item: tuple[int, int]) -> None:
        shard, at = item
        buffer = memoryview(buffers.pop())
        size = min(CHUNK, sizes[shard] - at)
        whole = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE if flags else size
        for source in inputs:
            if os.preadv(source[shard], [buffer[:whole]], at) != size:
                raise OSError("a source ends early")
        if os.pwrite(outputs[shard], buffer[:whole], at) != whole:
            raise OSError("the disk is full")
        buffers.append(buffer.obj)

    inputs: list[list[int]] = []
    outputs: list[int] = []
    buffers = [mmap.mmap(-1, CHUNK) for _ in range(job["threads"])]

    def run() -> None:
        out.mkdir()
        inputs.extend([os.open(path, os.O_RDONLY | flags) for path in own] for own in files)
        for path, size in zip(files[0], sizes, strict=True):
            outputs.append(os.open(out / path.name, os.O_WRONLY | os.O_CREAT | flags))
            os.posix_fallocate(outputs[-1], 0, size)
        items = [(i, at) for i, size in enumerate(sizes) for at in range(0, size, CHUNK)]
        with ThreadPoolExecutor(job["threads"]) as pool:
            list(pool.map(move, items))
        for file, size in zip(outputs, sizes, strict=True):
            os.ftruncate(file, size)
            os.fsync(file)

    return run


def raw_direct(job: dict, out: Path) -> Callable[[], None]:
    """The same past the page cache."""
    return raw(job, out, os.O_DIRECT)


def gemma_ext(job: dict, out: Path) -> Callable[[], None]:
    from gemma_ext.souping.recipes.recipe import parse_recipe
    from gemma_ext.souping.recipes.run import Options, run_recipe

    recipe = parse_recipe(job["recipe"])
    options = Options(copy_tokenizer=False, card=False, threads=job["threads"])
    return lambda: run_recipe(recipe, out, options) and None


def differing(job: dict, out: Path) -> list[str]:
    """Some tensors of our output that are not, to the bit, what the method gives in memory."""
    import torch
    from safetensors import safe_open

    from gemma_ext.souping.engine.files.checkpoint import open_checkpoint
    from gemma_ext.souping.engine.memory import merge_tensors
    from gemma_ext.souping.recipes.recipe import parse_recipe
    from gemma_ext.souping.recipes.run import open_recipe

    def read(path: Path, name: str) -> dict[str, torch.Tensor]:
        with safe_open(open_checkpoint(path).tensors[name].path, "pt") as file:
            return {name: file.get_tensor(name)}

    prepared = open_recipe(parse_recipe(job["recipe"]))
    wrong = []
    for target in prepared.targets:
        name, values = target.info.name, target.values
        if not name.startswith("model.layers.0."):
            continue
        inputs = [read(source.stored.path.parent, name) for source in target.inputs]
        base = inputs.pop() if target.base else None
        whole = merge_tensors(type(prepared.method)(), inputs, base, lambda _, v=values: v)
        if not torch.equal(whole[name].view(torch.int16), read(out, name)[name].view(torch.int16)):
            wrong.append(name)
    return wrong


def mergekit(job: dict, out: Path) -> Callable[[], None]:
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    config = MergeConfiguration.model_validate(yaml.safe_load(job["recipe"]))
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True, random_seed=0)
    return lambda: run_merge(config, str(out), options)


def main(subject: str, job: str, out: str) -> None:
    subjects = {"raw": raw, "raw direct": raw_direct, "mergekit": mergekit, OURS: gemma_ext}
    run = subjects[subject](json.loads(Path(job).read_text()), Path(out))
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    run()
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    # ru_maxrss would count what the parent had before exec
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0]) * 1024
    wrong = differing(json.loads(Path(job).read_text()), Path(out)) if subject == OURS else []
    print(json.dumps({"wall": wall, "cpu": cpu, "peak": peak, "wrong": wrong}))


if __name__ == "__main__":
    main(*sys.argv[1:])
