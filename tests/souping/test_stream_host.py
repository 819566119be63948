"""The reader and writer threads of `_host`."""

from __future__ import annotations

import errno
import os
import random
from contextlib import suppress
from itertools import pairwise

import pytest
import torch

from gemma_ext import _host
from gemma_ext.souping.engine.files.ring import PAGE, Ring

# of the specification's own test program, as xxhsum prints them
KNOWN = {
    b"": 0xEF46DB3751D8E999,
    b"a": 0xD24EC4F1A98C6E5B,
    b"abc": 0x44BC2CF5AD770999,
    b"Nobody inspects the spammish repetition": 0xFBCEA83C8A378BF1,
}


def memory(size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)


@pytest.fixture
def transfers():
    made = _host.Transfers(3)
    yield made
    made.close()


@pytest.fixture
def file(tmp_path):
    made = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield made
    os.close(made)


@pytest.mark.parametrize("text", KNOWN)
def test_digest_is_xxh64(text):
    assert _host.digest(text) == KNOWN[text]


def test_digest_depends_on_every_byte_and_the_seed():
    for size in (1, 3, 4, 8, 31, 32, 33, 100):
        data = bytearray(memory(size).numpy().tobytes())
        seen = {_host.digest(bytes(data)), _host.digest(bytes(data), 1)}
        for i in range(size):
            data[i] ^= 1
            seen.add(_host.digest(bytes(data)))
            data[i] ^= 1
        assert len(seen) == size + 2


def test_writes_and_reads_anywhere_in_a_file(transfers, file):
    data, draw = memory(100_000), random.Random(1)
    cuts = sorted({0, len(data), *draw.sample(range(len(data)), 50)})
    spans = list(pairwise(cuts))
    draw.shuffle(spans)
    asked = {
        (a, b): transfers.write(file, 7 + a, data[a:b].data_ptr(), b - a, seed=a) for a, b in spans
    }
    for (a, b), transfer in asked.items():
        assert transfer.wait() == _host.digest(data[a:b].numpy().tobytes(), a)
        assert transfer.done()
        assert transfers.check(file, 7 + a, b - a, seed=a).wait() == transfer.wait()
    back = torch.zeros_like(data)
    reads = [transfers.read(file, 7 + a, back[a:b].data_ptr(), b - a) for a, b in spans]
    assert [read.wait() for read in reads] == [0] * len(reads)
    assert torch.equal(back, data)


def test_copies_and_fetches(transfers, file, tmp_path):
    data = memory(3_000_001)
    (tmp_path / "other").write_bytes(data.numpy().tobytes())
    other = os.open(tmp_path / "other", os.O_RDONLY)
    transfers.copy(other, 1, file, 5, 3_000_000).wait()
    os.close(other)
    assert (tmp_path / "file").read_bytes() == bytes(5) + data[1:].numpy().tobytes()
    back = torch.zeros(3_000_000, dtype=torch.uint8)
    transfers.fetch(data.data_ptr() + 1, back.data_ptr(), 3_000_000, mapped=False).wait()
    assert torch.equal(back, data[1:])
    assert int(data.sum()) > 0  # not mapped: kept
    mapped = torch.from_file(str(tmp_path / "other"), False, 3_000_001, dtype=torch.uint8)
    for _ in range(2):
        back.zero_()
        transfers.fetch(mapped.data_ptr() + 1, back.data_ptr(), 3_000_000, mapped=True).wait()
        assert torch.equal(back, data[1:])


def test_copy_passes_through_where_the_kernel_cannot(transfers, tmp_path):
    """From a pipe's sibling: /dev/zero has no extents that could be shared."""
    zero = os.open("/dev/zero", os.O_RDONLY)
    target = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    transfers.copy(zero, 0, target, 3, 2_500_000).wait()
    os.close(zero)
    os.close(target)
    assert (tmp_path / "file").read_bytes() == bytes(2_500_003)


def test_errors_are_os_errors(transfers, file, tmp_path):
    data = memory(10)
    with pytest.raises(OSError, match="the file ends early") as caught:
        transfers.read(file, 0, data.data_ptr(), 10).wait()
    assert caught.value.errno == errno.EIO
    with pytest.raises(OSError, match="read") as caught:
        transfers.read(-1, 0, data.data_ptr(), 10).wait()
    assert caught.value.errno == errno.EBADF
    full = os.open("/dev/full", os.O_RDWR)
    failed = transfers.write(full, 0, data.data_ptr(), 10, seed=0)
    for _ in range(2):
        with pytest.raises(OSError, match="write") as caught:
            failed.wait()
        assert caught.value.errno == errno.ENOSPC
    os.close(full)
    with pytest.raises(OSError, match="the file ends early"):
        transfers.copy(file, 0, file, 0, 10).wait()


def test_closed_transfers_give_up_what_has_not_begun(tmp_path):
    transfers = _host.Transfers(1)
    data = memory(1 << 20)
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    asked = [transfers.write(file, 0, data.data_ptr(), len(data), seed=0) for _ in range(200)]
    transfers.close()
    assert all(transfer.done() for transfer in asked)
    begun = 0
    for transfer in asked:
        with suppress(RuntimeError):
            transfer.wait()
            begun += 1
    assert begun < 200
    transfers.close()
    with pytest.raises(RuntimeError):
        transfers.read(file, 0, data.data_ptr(), 1).wait()
    os.close(file)


def test_reserve_sets_the_length_and_keeps_what_is_there(file, tmp_path):
    os.pwrite(file, b"abc", 0)
    _host.reserve(file, 10_000)
    assert (tmp_path / "file").read_bytes() == b"abc" + bytes(9_997)
    _host.reserve(file, 2)
    assert (tmp_path / "file").read_bytes() == b"ab"
    with pytest.raises(OSError, match="reserve"):
        _host.reserve(-1, 10)


def test_ring_never_hands_out_what_is_in_use():
    ring, draw, used, waited = Ring(20 * PAGE), random.Random(2), [], 0
    for i in range(2000):
        size = draw.randrange(1, 8 * PAGE)
        while (taken := ring.take(size)) is None:
            waited += 1
            first, mark = used.pop(0)
            assert bool((first == mark).all())
            ring.give_back()
        assert taken.numel() == size
        assert taken.data_ptr() % PAGE == 0
        used.append((taken.fill_(i % 251), i % 251))
    assert waited > 500
    assert ring.take(21 * PAGE) is None


@pytest.fixture
def pages(tmp_path):
    """A file in both ways, and memory that begins a page."""
    path = tmp_path / "pages"
    plain = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        direct = os.open(path, os.O_RDWR | os.O_DIRECT)
    except OSError:
        pytest.skip("the file system knows no O_DIRECT")
    yield plain, direct, Ring(4 << 20).take(4 << 20)
    os.close(plain)
    os.close(direct)


def drop_cache(file):
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


def test_direct_writes_and_reads_give_the_same_bytes(transfers, pages):
    """Anywhere in a page, neighbours written at the same time, the last bytes of the file too."""
    plain, direct, block = pages
    draw, size = random.Random(5), 3_000_000
    data = memory(size, seed=1)
    cuts = [0, 1, 700_000, 700_003, 1_999_872, 2_600_001, size]
    spans = list(pairwise(cuts))
    draw.shuffle(spans)
    asked, at = [], 0
    for a, b in spans:
        run = block[at + (5 + a) % PAGE :][: b - a].copy_(data[a:b])
        asked.append(transfers.write(plain, 5 + a, run.data_ptr(), b - a, a, direct))
        assert asked[-1].wait() == _host.digest(data[a:b].numpy().tobytes(), a)
        at = (at + b - a + 2 * PAGE) // PAGE * PAGE
    for transfer in asked:
        transfer.wait()
    back = torch.zeros(size, dtype=torch.uint8)
    transfers.read(plain, 5, back.data_ptr(), size).wait()
    assert torch.equal(back, data)
    for begin, end in [(0, size), (1, 900_001), (4091, size - 1), (2_500_000, size)]:
        drop_cache(plain)
        run = block[(5 + begin) % PAGE :][: end - begin].zero_()
        transfers.read(plain, 5 + begin, run.data_ptr(), end - begin, direct).wait()
        assert torch.equal(run, data[begin:end])
    with pytest.raises(OSError, match="the file ends early"):
        transfers.read(plain, 5, block[5:].data_ptr(), size + 1, direct).wait()


def test_direct_reads_take_what_is_cached_from_the_cache(transfers, pages):
    """Seen by what stands beyond the bytes: a read past the cache brings whole pages."""
    plain, direct, block = pages
    os.pwrite(plain, b"\x01" * (1 << 20), 0)
    size = (1 << 20) - 100
    for cached in (True, False):
        if not cached:
            drop_cache(plain)
        block.zero_()
        transfers.read(plain, 0, block.data_ptr(), size, direct).wait()
        assert bool((block[:size] == 1).all())
        if cached:
            assert not block[size:].any()


def test_direct_transfers_fall_back(transfers, pages):
    """Where memory lies otherwise than the file, and where the file refuses."""
    plain, direct, block = pages
    data = memory(1 << 20)
    for run, file in ((block[8 : 8 + (1 << 20)], direct), (block[: 1 << 20], -1)):
        run.copy_(data)
        os.ftruncate(plain, 0)
        transfers.write(plain, 0, run.data_ptr(), 1 << 20, 0, file).wait()
        drop_cache(plain)
        run.zero_()
        transfers.read(plain, 0, run.data_ptr(), 1 << 20, file).wait()
        assert torch.equal(run, data)
