"""Load the op library `_C.so` once, and say exactly what is wrong when that fails.

The CUDA kernels, `_C_cuda.so` beside it, are optional: why they are not there is kept, not raised.

A process that loads two copies of the library registers every schema twice, which torch answers
with an abort. So the loader looks for the marker op `gemma_ext::build_info` before it loads.

`GEMMA_EXT_LIB_DIR` names another folder to take the libraries from; `GEMMA_EXT_DISABLE_CUDA=1`
leaves out the CUDA kernels.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path

import torch

MINIMUM_TORCH = (2, 10)


@dataclass(frozen=True)
class LibraryStatus:
    """The loaded libraries.

    Attributes:
        path: the op library.
        record: what the build wrote into it: version, commit, compiler, flags, isas, cuda_compiler,
            cuda_archs, processor, torch_seen, torch_target.
        cuda_path: the library of the CUDA kernels, if it is loaded.
        cuda_error: why it is not.
    """

    path: Path
    record: dict = field(default_factory=dict)
    cuda_path: Path | None = None
    cuda_error: str | None = None


_status: LibraryStatus | None = None


def library_path() -> Path:
    """Where `_C.so` is expected: `GEMMA_EXT_LIB_DIR`, or the folder of this package."""
    folder = os.environ.get("GEMMA_EXT_LIB_DIR")
    return Path(folder or Path(__file__).parent).resolve() / "_C.so"


def load() -> LibraryStatus:
    """Make the operators available, with CUDA kernels if they load; a repeat changes nothing.

    Raises:
        ImportError: torch is too old, the library is missing or does not link (with the linker's
            own text), or another copy of it is already in the process.
    """
    global _status
    if _status is not None:
        return _status
    path = library_path()
    if hasattr(torch.ops.gemma_ext, "build_info"):
        _refuse_other_copy(path)
    else:
        _load_library(path)
    cuda_path = path.with_name("_C_cuda.so")
    cuda_error = _load_cuda_library(cuda_path)
    record = json.loads(torch.ops.gemma_ext.build_info())
    _status = LibraryStatus(path, record, None if cuda_error else cuda_path, cuda_error)
    return _status


def cuda_refusal(op: str) -> str | None:
    """Why `op` takes no CUDA tensors, with the remedy; None if it has a CUDA kernel."""
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"gemma_ext::{op}", "CUDA"):
        return None
    reason = load().cuda_error or f"{load().cuda_path} has none for this op"
    return (
        f"gemma_ext::{op} has no CUDA kernel here ({reason}); build with GEMMA_EXT_CUDA=ON, "
        "or use impl='reference'"
    )


def find_op(name: str) -> torch._ops.OpOverload:
    """The operator `gemma_ext::name`.

    Raises:
        ImportError: the library has none; it was built from older sources than these.
    """
    try:
        return getattr(torch.ops.gemma_ext, name).default
    except AttributeError:
        raise ImportError(
            f"the op library has no {name}: {library_path()} (build {_build_id()}) is older than "
            "the Python code beside it; build it again with `make build`, or install again"
        ) from None


def _refuse_other_copy(path: Path) -> None:
    loaded = {Path(p).resolve() for p in torch.ops.loaded_libraries}
    if path in loaded:
        return
    holder = next((p for p in loaded if p.name == path.name and p.parent.name == "gemma_ext"), None)
    raise ImportError(
        "the operators of gemma_ext are already in this process, from "
        f"{holder or 'a library that was loaded by hand'} (build {_build_id()}); loading {path} as "
        "well would abort it: keep one copy (uninstall gemma_ext, or leave the source folder)"
    )


def _load_library(path: Path) -> None:
    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if found < MINIMUM_TORCH:
        raise ImportError(f"gemma_ext needs torch >= 2.10, got {torch.__version__}")
    if not path.is_file():
        raise ImportError(
            f"the op library is missing: expected {path}; build it with `make build`, or install "
            "with `pip install --no-build-isolation .`"
        )
    if not _is_whole(path):
        raise ImportError(f"{path} is truncated: build or install it again")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(_link_failure(path, error)) from error


def _load_cuda_library(path: Path) -> str | None:
    """Load the CUDA kernels; returns what prevents it."""
    if path in {Path(p).resolve() for p in torch.ops.loaded_libraries}:
        return None
    if os.environ.get("GEMMA_EXT_DISABLE_CUDA", "0") not in ("", "0"):
        return "disabled by GEMMA_EXT_DISABLE_CUDA"
    if not path.is_file():
        return f"not built: there is no {path}"
    try:
        if not _is_whole(path):
            return f"{path} is truncated: build or install it again"
        torch.ops.load_library(str(path))
    except OSError as error:
        return _link_failure(path, error)
    return None


def _is_whole(path: Path) -> bool:
    """Whether an ELF file reaches to its section table, which comes last: mapping one that does not
    kills the process. Other formats are left to the linker."""
    with path.open("rb") as f:
        header = f.read(64)
    if len(header) < 64:
        return False
    if header[:5] != b"\x7fELF\x02":
        return True
    (offset,), (entry, count) = (
        struct.unpack_from("<Q", header, 40),  # e_shoff
        struct.unpack_from("<HH", header, 58),  # e_shentsize, e_shnum
    )
    return path.stat().st_size >= offset + entry * count


def _link_failure(path: Path, error: OSError) -> str:
    # torch replaces the linker's message by its own and chains the original
    cause = error.__cause__ or error.__context__ or error
    built = "unknown"
    try:
        record = json.loads((path.parent / "build_info.json").read_text())
        built = f"{record['commit']}, built with torch {record['torch_seen']}"
    except (OSError, ValueError, KeyError):
        pass
    return (
        f"{path} does not load: {cause}; torch {torch.__version__} is installed, >= 2.10 is "
        f"needed, the library is build {built}"
    )


def _build_id() -> str:
    record = json.loads(torch.ops.gemma_ext.build_info())
    return f"{record['version']} {record['commit']}"
