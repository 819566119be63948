"""The same bits, however tensors are cut, whoever computes them, in any order of the models."""

from __future__ import annotations

import pytest
import torch
from soup_digest import digests, problem, results
from soup_problem import DEVICES, DTYPES, assert_same_bits, bits, pieces
from test_cce_isa import HERE, run_script, runnable

from gemma_ext.ops.souping import (
    Magnitudes,
    Mask,
    Part,
    Rule,
    consensus_,
    crossover_,
    fisher_,
    merge_,
    mutate_,
    nearswap_,
    soup_,
)


def digest_of(isa: str | None, threads: int) -> dict[str, str]:
    script = f"import sys; sys.argv = ['', '{threads}']; import runpy; " + (
        f"runpy.run_path(r'{HERE / 'soup_digest.py'}', run_name='__main__')"
    )
    done = run_script(script, isa)
    assert done.returncode == 0, done.stderr
    lines = [line.split(" ", 1) for line in done.stdout.splitlines()]
    return {name: digest for digest, name in lines}


def differing(a: dict[str, str], b: dict[str, str]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if a[name] != b[name]]


@pytest.mark.slow
@pytest.mark.parametrize("isa", runnable())
def test_every_instruction_set(isa):
    assert differing(digest_of(isa, 1), digests()) == []


def test_any_number_of_threads():
    want = results(torch.bfloat16)
    before = torch.get_num_threads()
    try:
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            found = results(torch.bfloat16)
            assert [name for name in want if not torch.equal(want[name], found[name])] == []
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif("cuda" not in DEVICES, reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_and_cpu(dtype):
    want, found = results(dtype), results(dtype, "cuda")
    assert [name for name in want if not torch.equal(want[name], found[name])] == []


def test_runs_are_the_same():
    first, second = results(torch.float16), results(torch.float16)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


EDGES = [1, 2, 3, 4, 7, 512, 513, 4096, 40_001, 40_002, 62_890]
WEIGHTS = [0.3, -0.7, 1.1]


def merges(parts: list[Part], cut, rounding: str) -> None:
    rule = Rule("sum", combine="weighted_mean")
    mask = Mask(keep=cut, density=0.7)
    for part in parts:
        merge_([part], rule, WEIGHTS, mask=mask, divide=0.7, seed=6, rounding=rounding)


OPS = {
    "soup": lambda p, r: soup_(p, WEIGHTS, scale=0.9, rounding=r, seed=5),
    "merge": lambda p, r: merge_(p, Rule("count"), WEIGHTS, mask=Mask(density=0.4), rounding=r),
    "consensus": lambda p, r: consensus_(p, 0.4, rounding=r),
    "fisher": lambda p, r: fisher_(p, [[x.abs() for x in q.sources] for q in p], rounding=r),
    "nearswap": lambda p, r: nearswap_([first(q) for q in p], 1e-3, rounding=r),
    "mutate": lambda p, r: mutate_([first(q, base=False) for q in p], 0.4, 0.1, rounding=r),
    "pick": lambda p, r: crossover_(p, [0.2, 0.3, 0.5], rounding=r),
}


def first(part: Part, base: bool = True) -> Part:
    start = part.base if base else None
    return Part(part.sources[:1], start, part.out, part.name, part.offset)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("name", OPS)
def test_any_cutting(name, rounding, device):
    part = problem(torch.bfloat16, device)
    OPS[name]([part], rounding)
    want = part.out.clone()
    for at_once in (True, False):
        part.out.fill_(torch.nan)
        broken = pieces(part, EDGES)
        for parts in [broken] if at_once else [[p] for p in broken]:
            OPS[name](parts, rounding)
        assert_same_bits(part.out, want)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_any_cutting_of_a_trimmed_merge(rounding, device):
    part = problem(torch.bfloat16, device)
    magnitudes = Magnitudes(3)
    for _ in range(2):
        magnitudes.survey([part])
        magnitudes.settle(part.base.numel() // 5)
    merges([part], magnitudes.cut(), rounding)
    want = part.out.clone()
    part.out.fill_(torch.nan)
    merges(pieces(part, EDGES), magnitudes.cut(), rounding)
    assert_same_bits(part.out, want)


@pytest.mark.parametrize("device", DEVICES)
def test_permuted_models_draw_the_same(device):
    """Sums of three in another order differ by rounding; masks, and sums of two, do not."""
    part = problem(torch.bfloat16, device)
    sources = part.sources[:2]
    for rule in (Rule(), Rule("sum", combine="mean"), Rule("count")):
        outs = []
        for order in ([0, 1], [1, 0]):
            moved = [sources[m] for m in order]
            outs.append(Part(moved, part.base, torch.empty_like(part.out), part.name, 0, order))
            weights = [WEIGHTS[m] for m in order]
            merge_(outs[-1:], rule, weights, mask=Mask(density=0.5), seed=1)
        assert_same_bits(outs[0].out, outs[1].out)


def test_digest_sees_a_difference():
    a = {"x": "1"}
    assert differing(a, {"x": "2"}) == ["x"]
    assert not torch.equal(bits(torch.tensor([0.0])), bits(torch.tensor([-0.0])))
