"""One reading in place of two: what lies in the lower half of a key, windows, samples."""

from __future__ import annotations

import pytest
import torch
from soup_problem import DEVICES, DTYPES, generator, models

from gemma_ext.ops.souping import Magnitudes, Part, op, plain, sample
from gemma_ext.reference.souping import delta_keys

pytestmark = pytest.mark.parametrize("device", DEVICES)
COARSE = 1 << 15


@pytest.fixture(autouse=True)
def small_samples(monkeypatch):
    monkeypatch.setattr(sample, "ENOUGH", 2000)
    monkeypatch.setattr(sample, "SAMPLE", 500)


def radix(parts, count, keep, of=0, **options) -> Magnitudes:
    """Both readings of all bins."""
    magnitudes = Magnitudes(count, **options)
    for _ in range(2):
        magnitudes.survey(parts, of)
        magnitudes.settle(keep)
    return magnitudes


def same(a: Magnitudes, b: Magnitudes) -> None:
    for index in range(a.cuts):
        assert torch.equal(a.cut(index).bits, b.cut(index).bits)
        assert torch.equal(a.cut(index).ties, b.cut(index).ties)
    assert torch.equal(a.counts, b.counts)
    assert torch.equal(a.zeros, b.zeros)


def readings(monkeypatch) -> list[int]:
    """Grows by one with each reading from here on."""
    seen = []
    real = op.survey
    monkeypatch.setattr(op, "survey", lambda *a: (seen.append(1), real(*a))[1])
    return seen


def test_bfloat16_needs_one_reading(device):
    part = models((61, 83), 3, seed=1, device=device)
    one = Magnitudes(3)
    one.survey([part])
    one.settle(1000)
    assert one.settled
    same(one, radix([part], 3, 1000))


def test_a_cut_among_long_keys_needs_two(device):
    """1 + 2^-9 .. of bfloat16 minus a small number: more bits than bfloat16 has."""
    n = 512
    x = torch.full((n,), 1.0, dtype=torch.bfloat16, device=device)
    base = torch.zeros(n, dtype=torch.bfloat16, device=device)
    base[::2] = -(2.0**-10)
    part = Part([x], base, None)
    for keep, known in ((0, True), (1, False), (n // 2, False), (n // 2 + 1, True), (n, True)):
        magnitudes = Magnitudes(1)
        magnitudes.survey([part])
        magnitudes.settle(keep)
        assert magnitudes.settled is known
        if not known:
            with pytest.raises(ValueError, match="expected two readings before a cut, got 1"):
                magnitudes.cut()
            magnitudes.survey([part])
            magnitudes.settle(keep)
        same(magnitudes, radix([part], 1, keep))


def test_other_types_need_two(device):
    mixed = models((40, 41), 2, dtype=[torch.bfloat16, torch.float32, torch.bfloat16], seed=2)
    brain = models((40, 41), 2, seed=3)
    for parts in ([mixed], [brain, mixed], [mixed, brain]):
        magnitudes = Magnitudes(2)
        magnitudes.survey(parts)
        magnitudes.settle(700)
        assert not magnitudes.settled
        magnitudes.survey(parts)
        magnitudes.settle(700)
        same(magnitudes, radix(parts, 2, 700))


def histograms(streams: int, device: str):
    coarse = torch.zeros(2, streams, COARSE, dtype=torch.int64, device=device)
    return coarse, torch.zeros(2, streams, dtype=torch.int64, device=device), coarse.clone()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quantity", ["delta", "variance"])
def test_windows(quantity, dtype, seed, device):
    g = generator(seed)
    parts = [models((t + 7, 331), 3, dtype=dtype, seed=seed, device=device) for t in range(3)]
    parts[1].sources[0][2, 5] = torch.nan
    parts[2].sources[1][0, :3] = torch.tensor([torch.inf, -torch.inf, 0.0])
    streams, groups = 3 if quantity == "delta" else 1, [1, 0, 1]
    bins = delta_keys(*plain.stacked(parts[0])) >> 16
    at = bins.flatten()[torch.randint(0, bins.numel(), (2, streams, 2), generator=g)]
    window = at.sort(-1).values + torch.tensor([-1, 1])
    window[0, 0] = torch.tensor([[-1, COARSE - 1], [-1, 0], [5, 6], [COARSE - 2, COARSE - 1]][seed])
    found, want = histograms(streams, device), histograms(streams, "cpu")
    op.survey(parts, groups, quantity, *found, window.to(device), None, None)
    plain.survey(parts, groups, quantity, *want, window, None, None)
    for a, b in zip(found, want, strict=True):
        assert torch.equal(a.cpu(), b)


def test_a_window_that_makes_no_sense_stays_inside(device):
    part = models((50, 60), 1, seed=5, device=device)
    for window in ([-9, 1 << 40], [1 << 40, -9], [7, 7], [-(1 << 40), -(1 << 50)]):
        coarse, zeros, odd = histograms(1, device)
        given = torch.tensor(window, device=device).expand(2, 1, 2).contiguous()
        op.survey([part], [0], "delta", coarse, zeros, odd, given, None, None)
        assert int(coarse.sum()) == 3000


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quantity", ["delta", "variance"])
def test_find(quantity, dtype, device):
    parts = [models((60 + t, 83), 3, dtype=dtype, seed=t, device=device) for t in range(3)]
    for share in (0.0, 1e-3, 0.2, 0.5, 0.97, 1.0, 2.0):
        keep = int(share * 5000)
        found = Magnitudes(3, quantity=quantity, groups=3, cuts=2)
        wanted = [[keep, keep // 3]] * found.streams
        found.find(parts, wanted, [2, 0, 1])
        options = {"quantity": quantity, "groups": 3, "cuts": 2}
        same(found, radix(parts, 3, wanted, [2, 0, 1], **options))


def test_find_reads_once_where_it_can(device, monkeypatch):
    part = models((97, 131), 3, seed=6, device=device)
    seen = readings(monkeypatch)
    Magnitudes(3).find([part], 2000)
    assert len(seen) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [[-1, 9], [0x3A80, 0x3B00], [COARSE - 9, COARSE - 1]])
def test_a_wrong_sample_changes_nothing(window, dtype, device, monkeypatch):
    if device != "cpu":
        pytest.skip("samples are for the CPU")
    part = models((97, 131), 2, dtype=dtype, seed=7, device=device)
    wrong = torch.tensor([[[0x3900, 0x3C00], window]], device=device)
    monkeypatch.setattr(sample, "window", lambda *a: wrong)
    found = Magnitudes(2)
    seen = readings(monkeypatch)
    found.find([part], [2000, 2000])
    monkeypatch.undo()
    assert len(seen) == (2 if dtype == torch.bfloat16 else 3)
    same(found, radix([part], 2, [2000, 2000]))


def test_samples_hit(device):
    part = models((301, 257), 3, seed=8, device=device)
    n = part.base.numel()
    for keep in (0, n // 10, n // 2, n):
        wanted = torch.tensor([[[keep]] * 3])
        window = sample.window([part], wanted, [0], "delta").cpu()
        cut = radix([part], 3, keep).cut()
        bins = cut.bits[..., None].cpu() >> 16
        inside = (bins > window[..., :1]) & (bins < window[..., 1:])
        assert bool((inside | (keep == 0)).all())


def test_small_or_strided_parts_are_not_sampled(device):
    small = models((10, 20), 2, seed=9, device=device)
    wide = models((61, 83), 2, seed=9, device=device)
    strided = Part([x.T.contiguous().T for x in wide.sources], wide.base, None)
    wanted = torch.tensor([[[100], [100]]])
    assert sample.window([small], wanted, [0], "delta") is None
    assert sample.window([strided], wanted, [0], "delta") is None
    assert sample.window([wide], wanted, [0], "delta") is not None
    found = Magnitudes(2)
    found.find([strided], 100)
    same(found, radix([wide], 2, 100))


def test_find_comes_first(device):
    part = models((30, 40), 1, device=device)
    magnitudes = radix([part], 1, 9)
    with pytest.raises(ValueError, match="expected nothing to be settled before `find`"):
        magnitudes.find([part], 9)


def test_nothing_to_find(device):
    magnitudes = Magnitudes(2)
    magnitudes.find([], 5)
    assert magnitudes.cut().ties.tolist() == [[0, 0]]


def test_reference_finds_the_same(device):
    part = models((61, 83), 3, seed=10, device=device)
    found, want = Magnitudes(3), Magnitudes(3, impl="reference")
    found.find([part], 700)
    want.find([part], 700)
    assert torch.equal(found.cut().bits.cpu(), want.cut().bits)
    assert torch.equal(found.cut().ties.cpu(), want.cut().ties)
