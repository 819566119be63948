"""What an output depends on, as a hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from gemma_ext.souping.engine.files.sources import Source
from gemma_ext.souping.engine.plan import Target
from gemma_ext.souping.method import Method


def provenance(method: Method, targets: Sequence[Target], recipe: str) -> str:
    """SHA-256 of the recipe, the method, every target's parameters and its sources' fingerprints.

    It does not depend on where the sources lie nor on how they are cut into files. Weights enter by
    samples, see `Stored.fingerprint`.
    """
    seen = hashlib.sha256()
    seen.update(repr((recipe, method.name, len(targets))).encode())
    for target in targets:
        seen.update(repr((target.info, target.dtype, target.values)).encode())
        for source in target.inputs:
            seen.update(repr(_describe(source)).encode())
        seen.update(repr((len(target.sources), target.base is not None)).encode())
    return seen.hexdigest()


def file_states(targets: Sequence[Target]) -> str:
    """A hash of the sources' paths, sizes and times of change: another if somebody touched them."""
    files = {
        part.path
        for target in targets
        for source in target.inputs
        for stored in (source.rows.stored if source.rows else [source.stored])
        for part in (stored, stored.scale)
        if part is not None and (part.tensor is None or part.mapped)
    }
    states = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(files)]
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()


def _describe(source: Source) -> tuple[object, ...]:
    adapted = source.adapt.fingerprint if source.adapt else None
    if source.rows is None:
        return source.stored.fingerprint(), adapted
    maps = hashlib.sha256()
    for indices in (source.rows.owners, source.rows.rows):
        maps.update(indices.contiguous().numpy().tobytes())
    owners = [stored.fingerprint() for stored in source.rows.stored]
    return owners, maps.hexdigest(), adapted
