"""The header of a safetensors file: read with every claim checked, and written.

A file is the length of its header (8 bytes, little-endian), the header (JSON: name to dtype, shape
and data_offsets, padded with spaces to a multiple of 8), then the bytes of the tensors, one after
another and without holes.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# what the format's own reader accepts
MAX_HEADER_BYTES = 100_000_000
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor of a file.

    Attributes:
        dtype: of its elements.
        shape: of the tensor.
        offset: of its first byte from the start of the file.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> tuple[dict[str, Entry], bytes]:
    """The tensors of a file, in the order of their bytes, and the header's own bytes.

    Raises:
        ValueError: the file is not a whole safetensors file.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        if len(start) < 8:
            raise ValueError(f"{path}: expected a safetensors file, got {size} bytes")
        (length,) = struct.unpack("<Q", start)
        if length > MAX_HEADER_BYTES:
            raise ValueError(
                f"{path}: expected a header of at most {MAX_HEADER_BYTES} bytes, got {length}"
            )
        if length > size - 8:
            raise ValueError(
                f"{path}: expected {length} bytes of header, got a file of {size} bytes"
            )
        text = file.read(length)
    if len(text) < length:
        raise ValueError(f"{path}: expected {length} bytes of header, got {len(text)}")
    return _entries(path, _parse(path, text), 8 + length, size), text


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(name for name, _ in pairs)
        if len(counts) < len(pairs):
            raise ValueError(f"{counts.most_common(1)[0][0]!r} twice")
        return dict(pairs)

    if not text.startswith(b"{"):
        raise ValueError(f"{path}: expected a header that begins with '{{', got {text[:1]!r}")
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
        for name in header:
            name.encode()  # an escape can spell half a character, which no file can hold
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: expected a header in JSON with every name once, got {_short(error)}"
        ) from None
    return header


def _entries(path: Path, header: dict[str, Any], data: int, size: int) -> dict[str, Entry]:
    header.pop("__metadata__", None)
    spans = {name: _entry(f"{path}: tensor {name!r}", info) for name, info in header.items()}
    ordered = sorted(spans.items(), key=lambda item: item[1][2])
    end, last = 0, "the header"
    for name, (_, _, (begin, stop)) in ordered:
        if begin != end:
            flaw = "a hole" if begin > end else "an overlap"
            raise ValueError(
                f"{path}: expected tensor {name!r} to begin at byte {end}, where {last} ends, "
                f"got {begin}: {flaw}"
            )
        end, last = stop, repr(name)
    if end != size - data:
        raise ValueError(f"{path}: expected {end} bytes of tensors, got {size - data}")
    return {name: Entry(dtype, shape, data + begin) for name, (dtype, shape, (begin, _)) in ordered}


def _entry(what: str, info: Any) -> tuple[torch.dtype, tuple[int, ...], tuple[int, int]]:
    if not isinstance(info, dict) or set(info) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{what}: expected dtype, shape and data_offsets, got {_short(info)}")
    name, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    dtype = DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        raise ValueError(f"{what}: expected a dtype of {', '.join(DTYPES)}, got {_short(name)}")
    if not _are_sizes(shape):
        raise ValueError(f"{what}: expected a shape of sizes >= 0, got {_short(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{what}: expected data_offsets [begin, end], got {_short(offsets)}")
    expected = _numel(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != expected:
        raise ValueError(
            f"{what}: expected {expected} bytes for {name} {_short(shape)}, "
            f"got {offsets[1] - offsets[0]}"
        )
    return dtype, tuple(shape), (offsets[0], offsets[1])


def _are_sizes(value: Any) -> bool:
    # below 2^63, as file offsets are; a bool is an int
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)


def _numel(shape: Sequence[int]) -> int:
    """As math.prod, given up above 2^63: a product of very many sizes would take for ever."""
    if 0 in shape:
        return 0
    numel = 1
    for size in shape:
        numel *= size
        if numel >= 2**63:
            break
    return numel


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def file_order(tensors: Mapping[str, torch.dtype]) -> list[str]:
    """Names in the order in which the format's own writer puts them: wide dtypes first, by name."""
    return sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))


def build_header(
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, Entry]]:
    """The first bytes of a file, up to those of the tensors, and where each tensor goes."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name in file_order({name: dtype for name, (dtype, _) in tensors.items()}):
        dtype, shape = tensors[name]
        end = offset + math.prod(shape) * dtype.itemsize
        table[name] = {
            "dtype": NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    data = 8 + len(text)
    entries = {
        name: Entry(DTYPES[info["dtype"]], tuple(info["shape"]), data + info["data_offsets"][0])
        for name, info in table.items()
        if name != "__metadata__"
    }
    return struct.pack("<Q", len(text)) + text, entries
