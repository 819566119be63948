"""torch's own checks of the souping ops, and what the bare ops refuse."""

from __future__ import annotations

import pytest
import torch
from soup_problem import generator, models
from torch.library import opcheck

import gemma_ext  # noqa: F401  registers the ops, their fakes and refusals

T, M, SHAPE = 2, 3, (5, 7)
WIDE = torch.float64


def lists(dtype: torch.dtype, variant: str):
    """(sources, bases, outs, offsets, keys, models)."""
    parts = [models(SHAPE, M, dtype=dtype, seed=t) for t in range(T)]
    sources = [x for p in parts for x in p.sources]
    bases = [] if variant == "bare" else [p.base for p in parts]
    outs = [p.out.zero_() for p in parts]
    return sources, bases, outs, [0, 5], [11, -12], list(range(M)) * T


def numbers(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=generator(1), dtype=WIDE) + 0.1


def mask(variant: str, rescale: bool = True) -> list:
    """The arguments of a mask: none, cuts and chance, or rows."""
    found = [None, None, False, None, None, False, None, None, False]
    if variant == "full":
        bits = torch.full((1, M), 0x39000000, dtype=torch.int32)
        ties = torch.full((1, M), 2)
        found = [bits, ties, False, bits + 99999, ties.clone(), False, numbers(T, M), None, False]
    if variant == "auto":
        found[-2] = torch.tensor([[1.0, 3.0, 0.3, 0.4, 1.0]] * M, dtype=WIDE)
    return [*found, *([variant == "auto"] if rescale else [])]


def soup(dtype, variant, _):
    sources, bases, outs, offsets, keys, _ = lists(dtype, variant)
    rows = variant == "auto"
    count = T * SHAPE[0] if rows else T
    options = (rows, variant == "full", variant == "full")
    return sources, bases, outs, offsets, keys, numbers(count, M), numbers(count), *options


def merge(dtype, variant, _):
    alone = numbers(T, M) if variant == "full" else None
    rule = (1, True, 1, 2) if variant == "full" else (0, False, -1, 0)
    given = (numbers(T, M), numbers(T, M), alone, numbers(T), variant == "auto", variant == "full")
    return *lists(dtype, variant), *rule, *mask(variant), *given


def survey(dtype, variant, _):
    sources, bases, *_ = lists(dtype, variant)
    variance = variant == "auto"
    streams = 1 if variance else M
    coarse = torch.zeros(T, streams, 1 << 15, dtype=torch.int64)
    zeros = torch.zeros(T, streams, dtype=torch.int64)
    odd = window = prefix = fine = None
    if variant == "bare":
        odd = torch.zeros_like(coarse)
        window = torch.tensor([0x3900, 0x3A00]).expand(T, streams, 2).contiguous()
    if variant == "full":
        prefix = torch.full((T, streams, 2), 0x3900)
        fine = torch.zeros(T, streams, 2, 1 << 16, dtype=torch.int64)
    return sources, bases, [0, 1], variance, coarse, zeros, odd, window, prefix, fine


def sums(dtype, variant, _):
    sources, bases, outs, *places = lists(dtype, variant)
    kind = {"bare": 0, "full": 1, "auto": 2}[variant]
    quantities = (M * (M + 1) // 2, 4 * M, M)[kind]
    state = torch.zeros(T, quantities, 66, dtype=WIDE)
    top = torch.zeros(T, M, 2, dtype=WIDE) if kind == 1 else None
    extras = outs if kind == 2 else []
    given = mask("bare" if kind == 2 else variant, rescale=False)
    return sources, bases, extras, *places, [0, 1], kind, *given, state, top


def gram_rows(dtype, variant, _):
    sources, bases, *_ = lists(dtype, variant)
    return sources, bases, M


def counts(dtype, variant, _):
    sources, bases, _, *places = lists(dtype, variant)
    kind = int(variant == "full")
    given = (T, kind, 1, True, *mask(variant), numbers(T, M), numbers(T, M))
    return sources, bases, *places, *given


def apply(dtype, variant, _):
    sources, _, outs, *places = lists(dtype, variant)
    bases = lists(dtype, "full")[1]
    element = {"bare": 0, "full": 1, "auto": 4}[variant]
    columns = (M + 1, 2 * M + 1, 0, 0, M)[element]
    extras = [x.abs() for x in sources] if element == 1 else []
    bases = [] if element == 4 else bases
    given = (element, numbers(T, columns), 2, -1, variant == "full")
    return sources, bases, extras, outs, *places, *given


def swarm(dtype, variant, _):
    sources, _, _, offsets, keys, _ = lists(dtype, variant)
    xs, vs = lists(dtype, "full")[1], [x.clone() for x in sources[:T]]
    return xs, vs, sources, offsets, keys, numbers(T, 5), variant == "full"


def gather(dtype, variant, _):
    tables = lists(dtype, variant)[0][:2]
    return (
        torch.zeros(4, 7, dtype=dtype),
        tables,
        torch.tensor([[0, -1], [4, 4], [-1, -1], [-1, 3]]),
    )


SAMPLES = {
    "soup_": soup,
    "soup_merge_": merge,
    "soup_survey_": survey,
    "soup_sums_": sums,
    "soup_gram_rows": gram_rows,
    "soup_counts": counts,
    "soup_apply_": apply,
    "soup_swarm_": swarm,
    "soup_gather_rows_": gather,
}


def test_no_op_is_forgotten():
    registered = {
        name.removeprefix("gemma_ext::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("gemma_ext::soup_")
    }
    assert registered == set(SAMPLES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("variant", ["bare", "auto", "full"])
@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name, variant, dtype):
    op = getattr(torch.ops.gemma_ext, name).default
    opcheck(op, SAMPLES[name](dtype, variant, False))


@pytest.mark.parametrize("variant", ["bare", "full"])
@pytest.mark.parametrize("name", ["soup_gram_rows", "soup_counts"])
def test_fake_shapes_follow_the_kernel(name, variant):
    op = getattr(torch.ops.gemma_ext, name).default
    args = SAMPLES[name](torch.float32, variant, False)
    real = op(*args)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        fake = op(*args)
    assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())


def changed(name: str, variant: str, **changes):
    """Arguments by name, with some replaced."""
    op = getattr(torch.ops.gemma_ext, name).default
    names = [a.name for a in op._schema.arguments]
    args = dict(zip(names, SAMPLES[name](torch.float32, variant, False), strict=True))
    for key, change in changes.items():
        args[key] = change(args[key]) if callable(change) else change
    return op, args


BAD = {
    "a source of another size": ("soup_", "full", {"sources": lambda s: [*s[:-1], s[0][1:]]}),
    "a source too few": ("soup_", "full", {"sources": lambda s: s[:-1]}),
    "a base too few": ("soup_", "full", {"bases": lambda b: b[:-1]}),
    "a wrong dtype": ("soup_", "full", {"sources": lambda s: [x.double() for x in s]}),
    "an offset too few": ("soup_", "full", {"offsets": [0]}),
    "a negative offset": ("soup_", "full", {"offsets": [0, -1]}),
    "a key too few": ("soup_", "full", {"keys": [0]}),
    "weights too few": ("soup_", "full", {"weights": lambda w: w[:-1].contiguous()}),
    "weights of another dtype": ("soup_", "full", {"weights": lambda w: w.float()}),
    "weights that are strided": ("soup_", "full", {"weights": lambda w: w.T.contiguous().T}),
    "scales too few": ("soup_", "full", {"scale": lambda s: s[:-1]}),
    "too many models": ("soup_", "bare", {"sources": lambda s: s * 22}),
    "ids of models too few": ("soup_merge_", "full", {"models": [0]}),
    "an unknown election": ("soup_merge_", "full", {"election": 3}),
    "an unknown combination": ("soup_merge_", "full", {"combine": -1}),
    "a cut without ties": ("soup_merge_", "full", {"keep_ties": None}),
    "a cut of another size": ("soup_merge_", "full", {"keep": lambda b: b[:, :2].contiguous()}),
    "ties of another size": ("soup_merge_", "full", {"drop_ties": lambda t: t[:, :2].contiguous()}),
    "a density of another size": ("soup_merge_", "full", {"density": lambda d: d[:1]}),
    "rows of another size": ("soup_merge_", "auto", {"rows": lambda r: r[:1]}),
    "a group too large": ("soup_survey_", "bare", {"groups": [0, 2]}),
    "a group too few": ("soup_survey_", "bare", {"groups": [0]}),
    "a short histogram": ("soup_survey_", "bare", {"coarse": lambda c: c[..., :-1].contiguous()}),
    "short zeros": ("soup_survey_", "bare", {"zeros": lambda z: z[:, :1].contiguous()}),
    "short odd": ("soup_survey_", "bare", {"odd": lambda o: o[..., :-1].contiguous()}),
    "a short window": ("soup_survey_", "bare", {"window": lambda w: w[..., :1].contiguous()}),
    "a prefix without fine": ("soup_survey_", "full", {"fine": None}),
    "a short state": ("soup_sums_", "bare", {"state": lambda s: s[..., :-1].contiguous()}),
    "norms without top": ("soup_sums_", "full", {"top": None}),
    "dots without along": ("soup_sums_", "auto", {"extras": []}),
    "an unknown sum": ("soup_sums_", "bare", {"sum": 3}),
    "no model": ("soup_gram_rows", "bare", {"models": 0}),
    "an unknown count": ("soup_counts", "bare", {"count": 2}),
    "an unknown rule": ("soup_apply_", "bare", {"element": 7}),
    "numbers too few": ("soup_apply_", "bare", {"numbers": lambda n: n[:, 1:].contiguous()}),
    "a rule without its base": ("soup_apply_", "bare", {"bases": []}),
    "fishers too few": ("soup_apply_", "full", {"extras": lambda e: e[:2]}),
    "pulls too few": ("soup_swarm_", "bare", {"pulls": lambda p: p[:-1]}),
    "velocities too few": ("soup_swarm_", "bare", {"vs": lambda v: v[:-1]}),
    "a table of another width": (
        "soup_gather_rows_",
        "bare",
        {"sources": lambda s: [s[0][:, 1:]] * 2},
    ),
    "rows too few": ("soup_gather_rows_", "bare", {"rows": lambda r: r[1:]}),
    "rows of another dtype": ("soup_gather_rows_", "bare", {"rows": lambda r: r.int()}),
    "an out that is strided": ("soup_gather_rows_", "bare", {"out": lambda o: o.T.contiguous().T}),
    "a row too large": ("soup_gather_rows_", "bare", {"rows": lambda r: r + 5}),
}


@pytest.mark.parametrize("case", BAD)
def test_bare_ops_refuse_what_does_not_fit(case):
    """The ops are public too: a wrong shape is an error, not a read out of bounds."""
    name, variant, changes = BAD[case]
    op, args = changed(name, variant, **changes)
    with pytest.raises(RuntimeError, match=r"soup_.*: expected"):
        op(**args)
