"""Peers: every module of this folder that defines SUBJECTS takes part."""

from __future__ import annotations

import importlib
import pkgutil

from gemma_ext.bench.subject import Subject


def discover() -> list[Subject]:
    """Subjects of all modules here, in the order of the modules' names."""
    found = []
    for module in pkgutil.iter_modules(__path__):
        found += importlib.import_module(f"{__name__}.{module.name}").SUBJECTS
    return found
