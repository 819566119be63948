"""Headers: every malformed one is refused in a sentence, and nothing is written."""

from __future__ import annotations

import json
import random
import struct
from contextlib import suppress

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from stream_models import Linear, bytes_of, rising, save_models, tensors

from gemma_ext.souping.engine.files.header import DTYPES, build_header, read_header
from gemma_ext.souping.engine.stream import merge_files

GOOD = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def file_with(path, header, data: int = 24, length: int | None = None):
    """A file with this header (JSON text, or what becomes it) and so many bytes after it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = struct.pack("<Q", len(text) if length is None else length)
    path.write_bytes(size + text + bytes(data))
    return path


def moved(begin: int, end: int, **more):
    return {**GOOD, "data_offsets": [begin, end], **more}


MALFORMED = {
    "empty": (b"", 0, None, "expected a header that begins with '{', got b''"),
    "absurd length": ({"x": GOOD}, 24, 2**60, "header of at most 100000000 bytes, got 11529215"),
    "length beyond the file": ({"x": GOOD}, 24, 4000, "expected 4000 bytes of header, got a file"),
    "not JSON": (b"{" + b"x" * 7, 0, None, "expected a header in JSON"),
    "not an object": (b"[1, 2]  ", 0, None, "begins with '{', got b'\\['"),
    "not UTF-8": (b'{"\xff": 1}', 0, None, "expected a header in JSON"),
    "half a character": (b'{"\\ud800": 1}', 0, None, "expected a header in JSON"),
    "endless nesting": (b'{"x":' + b"[" * 200_000, 0, None, "expected a header in JSON"),
    "endless number": (b'{"x":' + b"9" * 5000 + b"}", 0, None, "expected a header in JSON"),
    "a name twice": (
        b'{"x":%s,"x":%s}' % ((json.dumps(GOOD).encode(),) * 2),
        24,
        None,
        "every name once, got 'x' twice",
    ),
    "an entry that is none": ({"x": 3}, 24, None, "expected dtype, shape and data_offsets, got 3"),
    "a missing key": ({"x": {"dtype": "F32"}}, 24, None, "expected dtype, shape and data_offsets"),
    "an unknown key": ({"x": {**GOOD, "y": 1}}, 24, None, "expected dtype, shape and data_off"),
    "bad dtype": ({"x": {**GOOD, "dtype": "F33"}}, 24, None, "expected a dtype of .*, got F33"),
    "dtype that is none": ({"x": {**GOOD, "dtype": [1]}}, 24, None, "expected a dtype of .*, got"),
    "negative size": ({"x": {**GOOD, "shape": [-2, 3]}}, 24, None, "expected a shape of sizes"),
    "size that is none": ({"x": {**GOOD, "shape": [True]}}, 24, None, "expected a shape of sizes"),
    "huge shape": ({"x": {**GOOD, "shape": [2**62] * 9}}, 24, None, "expected .* bytes for F32"),
    "long shape": ({"x": {**GOOD, "shape": [7] * 90_000}}, 24, None, "expected .* bytes for F32"),
    "three offsets": ({"x": {**GOOD, "data_offsets": [0, 8, 24]}}, 24, None, r"\[begin, end\]"),
    "reversed offsets": ({"x": moved(24, 0)}, 24, None, r"data_offsets \[begin, end\], got \[24"),
    "fractional offset": ({"x": moved(0, 24.0)}, 24, None, r"data_offsets \[begin, end\]"),
    "wrong size": ({"x": moved(0, 20)}, 20, None, r"expected 24 bytes for F32 \[2, 3\], got 20"),
    "a hole before": ({"x": moved(8, 32)}, 32, None, "to begin at byte 0, where the header ends"),
    "a hole": ({"x": GOOD, "y": moved(28, 52)}, 52, None, "where 'x' ends, got 28: a hole"),
    "an overlap": ({"x": GOOD, "y": moved(20, 44)}, 44, None, "where 'x' ends, got 20: an over"),
    "truncated": (
        {"x": GOOD, "y": moved(24, 48)},
        47,
        None,
        "48 bytes of tensors, got 47",
    ),
    "bytes to spare": ({"x": GOOD}, 25, None, "expected 24 bytes of tensors, got 25"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_header_is_refused(name, tmp_path):
    header, data, length, sentence = MALFORMED[name]
    path = file_with(tmp_path / "model.safetensors", header, data, length)
    with pytest.raises(ValueError, match=sentence) as caught:
        read_header(path)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value)) < 600
    with pytest.raises(ValueError, match=sentence):
        merge_files(Linear(), [tmp_path], None, rising(1), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_file_shorter_than_a_length_is_refused(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"1234567")
    with pytest.raises(ValueError, match="expected a safetensors file, got 7 bytes"):
        read_header(tmp_path / "x.safetensors")


def damage(data: bytes, draw: random.Random) -> bytes:
    """A file's bytes with one thing wrong; what it is may happen to be harmless."""
    (length,) = struct.unpack("<Q", data[:8])
    kind = draw.choice(["cut", "length", "flip", "number", "insert", "delete", "grow", "name"])
    end = 8 + length
    if kind == "cut":
        return data[: draw.randrange(len(data))]
    if kind == "length":
        size = draw.choice([0, 1, length - 8, length + 8, 2**31, 2**63, draw.getrandbits(64)])
        return struct.pack("<Q", size) + data[8:]
    if kind == "flip":
        at = draw.randrange(end)
        return data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]
    if kind == "grow":
        return data + bytes(draw.randrange(1, 20))
    if kind in ("insert", "delete"):
        at = draw.randrange(8, end)
        middle = bytes([draw.randrange(256)]) if kind == "insert" else b""
        text = data[8:at] + middle + data[at + (kind == "delete") : end]
        return struct.pack("<Q", len(text)) + text + data[end:]
    header = json.loads(data[8:end])
    name = draw.choice([n for n in header if n != "__metadata__"])
    if kind == "name":
        header[draw.choice(["", "\u0000", "x" * 300])] = header.pop(name)
    else:
        field = draw.choice(["shape", "data_offsets"])
        wrong = draw.choice([-1, 0, 1, 10**30, 2**63, 1.5, None, "3", True, [], {}])
        values = list(header[name][field]) or [0]
        values[draw.randrange(len(values))] = wrong
        header[name][field] = draw.choice([values, wrong])
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[end:]


def test_two_hundred_damaged_files(tmp_path):
    """A merge of one either ends in a ValueError with nothing written, or the format's own reader
    finds nothing wrong with it either."""
    models, _ = save_models(tmp_path, 2)
    path = models[1] / "model.safetensors"
    whole, draw, refused = path.read_bytes(), random.Random(8), 0
    for i in range(200):
        path.write_bytes(damage(whole, draw))
        out = tmp_path / f"out{i}"
        try:
            merge_files(Linear(), models, None, rising(2), out)
        except ValueError:
            assert not out.exists()
            refused += 1
        else:
            with safe_open(path, "pt") as file:
                assert file.keys()
            load_file(out / "model.safetensors")
        assert not out.with_name(f"{out.name}.partial").exists()
    assert refused > 150


def test_whatever_the_formats_own_reader_refuses_is_refused(tmp_path):
    save_file(tensors(0), tmp_path / "whole.safetensors")
    whole, draw, both = (tmp_path / "whole.safetensors").read_bytes(), random.Random(9), 0
    path = tmp_path / "damaged.safetensors"
    for _ in range(200):
        path.write_bytes(damage(whole, draw))
        try:
            with safe_open(path, "pt") as file:
                names = sorted(file.keys())
        except (SafetensorError, ValueError, OSError):
            both += 1
            with pytest.raises(ValueError):
                read_header(path)
        else:
            with suppress(ValueError):  # stricter: names twice, keys that it does not know
                assert sorted(read_header(path)[0]) == names
    assert both > 120


@pytest.mark.parametrize("name", DTYPES)
def test_header_reads_what_the_formats_own_writer_wrote(name, tmp_path):
    weights = {"x": torch.zeros(3, 5).to(DTYPES[name]), "none": torch.zeros(0).to(DTYPES[name])}
    save_file(weights, tmp_path / "x.safetensors")
    entries, _ = read_header(tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    assert set(entries) == set(weights)
    for key, entry in entries.items():
        assert (entry.dtype, entry.shape) == (DTYPES[name], tuple(weights[key].shape))
        assert data[entry.offset : entry.offset + entry.nbytes] == bytes_of(weights[key])


def test_built_header_is_read_back(tmp_path):
    layout = {
        "b": (torch.bfloat16, (3,)),
        "a": (torch.bfloat16, (2, 2)),
        "wide": (torch.float32, ()),
        "byte": (torch.uint8, (5,)),
        "naïve": (torch.int64, (0, 7)),
    }
    header, entries = build_header(layout, {"format": "pt"})
    assert len(header) % 8 == 0
    assert list(entries) == ["naïve", "wide", "a", "b", "byte"]
    path = tmp_path / "x.safetensors"
    path.write_bytes(header + bytes(sum(entry.nbytes for entry in entries.values())))
    assert read_header(path)[0] == entries
    assert set(load_file(path)) == set(layout)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
