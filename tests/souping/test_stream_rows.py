"""Rows put together from other rows, and rows changed as they are read."""

from __future__ import annotations

import pytest
import torch
from stream_models import Linear, Shrunk, bytes_of, load, rising, save
from torch import Tensor

from gemma_ext.souping.engine.files.checkpoint import Stored, open_checkpoint
from gemma_ext.souping.engine.files.sources import RowMap, Source
from gemma_ext.souping.engine.plan import Target, merged
from gemma_ext.souping.engine.stream import write_checkpoint
from gemma_ext.souping.method import TensorInfo

V, D = 41, 7


@pytest.fixture
def embeddings(tmp_path):
    """Two models of other sizes and dtypes, and rows in memory."""
    generator = torch.Generator().manual_seed(5)
    tensors = [
        torch.randn(30, D, generator=generator).bfloat16(),
        torch.randn(25, D, generator=generator),
        torch.randn(2, D, generator=generator),
    ]
    tensors[0][3, 2] = -0.0
    stored = [
        open_checkpoint(save(tmp_path / str(i), {"e": tensor})).tensors["e"]
        for i, tensor in enumerate(tensors[:2])
    ]
    return tensors, [*stored, Stored.of(tensors[2])]


def random_map(stored, slots: int, seed: int = 0) -> RowMap:
    """Runs and single rows, some without an owner, of up to `slots` owners each."""
    generator = torch.Generator().manual_seed(seed)
    owners = torch.randint(-1, len(stored), (V, slots), generator=generator)
    rows = torch.randint(0, 2, (V, slots), generator=generator)
    owners[5:20, 0], rows[5:20, 0] = 0, torch.arange(3, 18)
    owners[20:30, 0], rows[20:30, 0] = 1, torch.arange(9, 19)
    return RowMap(stored, owners, rows)


def expected_rows(tensors, rows: RowMap) -> Tensor:
    """float64 means."""
    out = torch.zeros(V, D, dtype=torch.float64)
    for v in range(V):
        named = [
            tensors[owner][row].double()
            for owner, row in zip(rows.owners[v].tolist(), rows.rows[v].tolist(), strict=True)
            if owner >= 0
        ]
        if named:
            out[v] = torch.stack(named).mean(0)
    return out


def write(tmp_path, name: str, sources, method=None, **options) -> Tensor:
    info = TensorInfo("e", sources[0].shape)
    target = Target(info, torch.float32, sources, values=rising(len(sources))(info))
    return load(write_checkpoint([target], method or Linear(), tmp_path / name, **options))["e"]


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_rows_are_means_of_what_they_name(slots, embeddings, tmp_path):
    tensors, stored = embeddings
    maps = [random_map(stored, slots, seed) for seed in range(2)]
    sources = [Source(stored[0], rows) for rows in maps]
    first, second = (expected_rows(tensors, rows) for rows in maps)
    outs = [
        write(tmp_path, f"{chunk} {memory}", sources, chunk_bytes=chunk, memory_bytes=memory)
        for chunk in (1, 100, 1000, 1 << 20)
        for memory in (1, 1 << 20)
    ]
    torch.testing.assert_close(outs[0].double(), first / 3 + second * 2 / 3, rtol=1e-6, atol=1e-6)
    assert len({bytes_of(out) for out in outs}) == 1


@pytest.mark.parametrize("method", [Shrunk(), Shrunk("tensor"), Shrunk(model_wide=True)])
def test_rows_in_every_kind_of_method(method, embeddings, tmp_path):
    tensors, stored = embeddings
    source = Source(stored[0], random_map(stored, 2))
    out = write(tmp_path, "out", [source], method, chunk_bytes=200)
    rows = expected_rows(tensors, source.rows)
    torch.testing.assert_close(out.double(), 3 * rows / rows.abs().max(), rtol=1e-6, atol=1e-6)


def test_single_rows_keep_their_bits(embeddings, tmp_path):
    tensors, stored = embeddings
    owners = torch.zeros(V, 1, dtype=torch.int64)
    rows = torch.arange(V).remainder(30)[:, None]
    source = Source(stored[0], RowMap(stored, owners, rows))
    info = TensorInfo("e", (V, D))
    for chunk in (1, 60, 1 << 20):
        target = Target(info, torch.bfloat16, [source])
        out = load(
            write_checkpoint([target], Linear(), tmp_path / f"out{chunk}", chunk_bytes=chunk)
        )
        assert bytes_of(out["e"]) == bytes_of(tensors[0][rows[:, 0]])


def test_row_map_that_names_nothing_is_zero(embeddings, tmp_path):
    owners = torch.full((V, 2), -1)
    source = Source(embeddings[1][0], RowMap(embeddings[1], owners, owners))
    out = write(tmp_path, "out", [source])
    assert bytes_of(out) == bytes(V * D * 4)


def test_unmerged_rows(embeddings, tmp_path):
    """A mapped tensor that is taken as it is."""
    tensors, stored = embeddings
    source = Source(stored[0], random_map(stored, 2))
    target = Target(TensorInfo("e", (V, D)), torch.float32, [source])
    out = load(write_checkpoint([target], Linear(), tmp_path / "out", chunk_bytes=90))["e"]
    torch.testing.assert_close(out.double(), expected_rows(tensors, source.rows))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda o, r: (o[:, 0], r), r"expected owners to be \[V, K\] integers, got torch.int64 \["),
        (lambda o, r: (o, r.float()), r"expected rows to be \[V, K\] integers, got torch.float32"),
        (lambda o, r: (o, r[1:]), r"expected rows \[41, 2\] like owners, got \[40, 2\]"),
        (lambda o, r: (o + 3, r), r"expected owners in -1 .. 2, got 2 .. 5"),
        (lambda o, r: (o - 1, r), r"expected owners in -1 .. 2, got -2 .. 1"),
        (lambda o, r: (o, r + 30), r"expected a row below \d+, got 3\d for row \d+"),
        (lambda o, r: (o, r - 30), r"expected a row below \d+, got -\d+ for row \d+"),
    ],
)
def test_row_maps_that_fit_nothing(change, sentence, embeddings):
    rows = random_map(embeddings[1], 2)
    with pytest.raises(ValueError, match=f"RowMap: {sentence}"):
        RowMap(rows.stored, *change(rows.owners, rows.rows))


def test_row_map_of_several_widths(embeddings):
    stored = [*embeddings[1], Stored.of(torch.zeros(3, D + 1))]
    with pytest.raises(ValueError, match=r"expected tensors of one width, got \[\[30, 7\]"):
        random_map(stored, 1)


class LowRank:
    """W + scale B A."""

    def __init__(self, scale: float) -> None:
        generator = torch.Generator().manual_seed(1)
        self.b = torch.randn(V, 2, generator=generator) * scale
        self.a = torch.randn(2, D, generator=generator)
        self.fingerprint = f"low rank {scale}"

    def __call__(self, rows: Tensor, first: int) -> Tensor:
        assert rows.shape[1:] == (D,)
        return rows.float() + self.b[first : first + len(rows)] @ self.a


@pytest.mark.parametrize("grain", ["element", "row", "tensor"])
def test_rows_are_changed_as_they_are_read(grain, tmp_path):
    weight = torch.randn(V, D)
    stored = open_checkpoint(save(tmp_path / "model", {"e": weight})).tensors["e"]
    adapter = LowRank(0.5)
    changed = weight.double() + adapter.b.double() @ adapter.a.double()
    for chunk in (1, 100, 1 << 20):
        source = Source(stored, adapt=adapter)
        out = write(tmp_path, f"out{chunk}", [source], Shrunk(grain), chunk_bytes=chunk)
        expected = 3 * changed / changed.abs().max()
        torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)


def test_provenance_sees_maps_and_adapters(embeddings, tmp_path):
    from gemma_ext.souping.engine.provenance import provenance

    stored = embeddings[1]
    info = TensorInfo("e", (V, D))
    sources = [
        Source(stored[0], random_map(stored, 2, 0)),
        Source(stored[0], random_map(stored, 2, 1)),
        Source(stored[0], random_map(stored, 2, 0), LowRank(1.0)),
        Source(stored[0], random_map(stored, 2, 0), LowRank(2.0)),
    ]
    hashes = {provenance(Linear(), [merged(info, [s], None, rising(1))], "") for s in sources}
    assert len(hashes) == 4
    again = Source(stored[0], random_map(stored, 2, 0))
    assert provenance(Linear(), [merged(info, [again], None, rising(1))], "") in hashes
