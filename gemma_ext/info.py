"""What is installed and which way each operator goes: `python -m gemma_ext.info`.

Bug reports ask for this output.
"""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path

import torch

from gemma_ext import _loader
from gemma_ext._version import __version__

OPTIONAL = ("numpy", "transformers", "tokenizers", "safetensors", "accelerate", "peft", "trl")


def main() -> None:
    """Print versions, libraries, the instruction set in use, and every operator's kernels."""
    for title, rows in report().items():
        print(title)
        width = max(len(name) for name in rows)
        for name, value in rows.items():
            print(f"  {name:<{width}}  {value}")


def report() -> dict[str, dict[str, str]]:
    """The printed report as sections of name and value."""
    status = _loader.load()
    record = status.record
    return {
        "versions": {
            "gemma_ext": __version__,
            "torch": torch.__version__,
            "python": f"{platform.python_version()} ({sys.executable})",
            "system": f"{platform.platform()}, {os.cpu_count()} cores",
            **{name: _version_of(name) for name in OPTIONAL},
        },
        "op library": {
            "file": f"{status.path}, {status.path.stat().st_size / 1024:.0f} KiB",
            "build": f"{record['version']} {record['commit']}",
            "compiler": f"{record['compiler']} {record['flags']}",
            "torch at build": f"{record['torch_seen']}, stable ABI {record['torch_target']}",
            "instruction sets": ", ".join(record["isas"]),
            "in use here": _isa_in_use(),
            "threads": str(torch.get_num_threads()),
        },
        "host module": {"_host": _host_state()},
        "cuda": _cuda(status),
        "operators": {name: _path_of(name) for name in operators()},
    }


def operators() -> list[str]:
    """Names of all operators of the namespace, without overloads."""
    names = torch._C._dispatch_get_all_op_names()
    return sorted({name.split(".")[0] for name in names if name.startswith("gemma_ext::")})


def _path_of(name: str) -> str:
    if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU"):
        if _takes_no_tensor(name):
            return "no tensor arguments"
        composed = torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeExplicitAutograd")
        return "made of the others" if composed else "no kernel"
    parts = [f"CPU: {_isa_in_use()} kernel"]
    has_cuda = torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
    parts.append("CUDA: kernel" if has_cuda else "CUDA: none")
    if torch._C._dispatch_has_kernel_for_dispatch_key(name, "Autograd"):
        parts.append("autograd")
    return ", ".join(parts)


def _takes_no_tensor(name: str) -> bool:
    schema = torch._C._get_schema(name, "")
    return not any("Tensor" in str(argument.type) for argument in schema.arguments)


def _isa_in_use() -> str:
    if not hasattr(torch.ops.gemma_ext, "cpu_isa"):
        return "no kernels in this library"
    return torch.ops.gemma_ext.cpu_isa()


def _host_state() -> str:
    try:
        from gemma_ext import _host
    except ImportError as error:
        return f"absent ({error})"
    return str(Path(_host.__file__))


def _cuda(status: _loader.LibraryStatus) -> dict[str, str]:
    if status.cuda_path is None:
        return {
            "torch": _torch_cuda(),
            "kernels": f"none: {status.cuda_error}",
        }
    size = status.cuda_path.stat().st_size / 1024
    archs = ", ".join(status.record["cuda_archs"])
    usable = torch.version.cuda is not None and torch.cuda.is_available()
    return {
        "torch": _torch_cuda(),
        "file": f"{status.cuda_path}, {size:.0f} KiB",
        "compiler": f"{status.record['cuda_compiler']}, for {archs}",
        "kernels": "loaded" if usable else "loaded, nothing here to run them on",
    }


def _torch_cuda() -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return f"CUDA {torch.version.cuda}, no device visible"
    major, minor = torch.cuda.get_device_capability(0)
    name = torch.cuda.get_device_name(0)
    return f"CUDA {torch.version.cuda}, {name}, compute capability {major}.{minor}"


def _version_of(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()
