"""Every method from disk to disk in small pieces: the bytes of the merge in memory."""

from __future__ import annotations

import pytest
import torch
from merge_oracle import family, run
from safetensors.torch import load_file, save_file

from gemma_ext.souping.engine.stream import merge_files
from gemma_ext.souping.methods import METHODS
from gemma_ext.souping.parameters import constant
from gemma_ext.souping.statistics import save_statistics

PARAMETERS = {"weight": 0.4, "t": 0.3, "task": 0, "density": 0.5, "select_topk": 0.4,
              "filter_wise": True, "nuslerp_flatten": False, "nuslerp_row_wise": True}  # fmt: skip
FILES = {"fisher": "fishers", "regmean": "grams", "stitch": "masks"}


def statistics(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if name == "regmean":
        x = torch.randn(20, shape[-1], generator=generator)
        return x.T @ x
    random = torch.rand(shape, generator=generator)
    return (random < 0.4).float() if name == "stitch" else random


@pytest.mark.parametrize("name", sorted(METHODS))
def test_streamed_is_the_same(name, tmp_path):
    """Pieces of 48 bytes: they end inside of rows, and not at a multiple of four elements."""
    method = METHODS[name]
    count = method.models[1] or 3
    tunes, base = family(count, dtype=torch.bfloat16)
    for index, model in enumerate([*tunes, base]):
        (tmp_path / str(index)).mkdir()
        save_file(model, tmp_path / str(index) / "model.safetensors")
    keys = {p.key for p in method.parameters}
    parameters = {key: value for key, value in PARAMETERS.items() if key in keys}
    if name in FILES:
        paths = [str(tmp_path / f"statistics-{m}") for m in range(count)]
        for m, path in enumerate(paths):
            held = {n: t for n, t in base.items() if name != "regmean" or t.dim() == 2}
            save_statistics({n: statistics(name, t.shape, m) for n, t in held.items()}, path)
        parameters[FILES[name]] = paths
    used = method.base != "unused"
    folders = [tmp_path / str(m) for m in range(count)]
    merge_files(
        method(),
        folders,
        tmp_path / str(count) if used else None,
        constant(method, count, seed=5, **parameters),
        tmp_path / "out",
        chunk_bytes=48,
        memory_bytes=1,
        threads=1,
    )
    whole = run(method, tunes, base if used else None, seed=5, **parameters)
    streamed = load_file(tmp_path / "out" / "model.safetensors")
    assert streamed.keys() == whole.keys()
    for n in whole:
        assert torch.equal(streamed[n].view(torch.int16), whole[n].view(torch.int16)), n
