"""Peers: every module of this folder that defines SUBJECTS takes part.

Packages of other people are taken from the environment or from .peers/, which `make gpu-peers`
fills.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from importlib.util import find_spec
from pathlib import Path

from gemma_ext.bench.subject import Case, Subject

PEERS = Path(__file__).parents[2] / ".peers"
if PEERS.is_dir() and str(PEERS) not in sys.path:
    sys.path.append(str(PEERS))


def discover() -> list[Subject]:
    """Subjects of all modules here, in the order of the modules' names."""
    found = []
    for module in pkgutil.iter_modules(__path__):
        found += importlib.import_module(f"{__name__}.{module.name}").SUBJECTS
    return found


def refuse_without(case: Case, package: str, *modules: str) -> str | None:
    """Why a peer with CUDA kernels only cannot run: no card, or one of its modules is absent."""
    if case.device != "cuda":
        return f"{package} needs a CUDA device"
    absent = [module for module in modules if find_spec(module) is None]
    return f"{package} is not installed: no module {absent[0]}" if absent else None
