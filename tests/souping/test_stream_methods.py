"""Every method there is: streamed as in memory, however tensors are cut."""

from __future__ import annotations

import random

import pytest
from stream_models import load, same_bits, save_models

from gemma_ext.souping.engine.memory import merge_tensors
from gemma_ext.souping.engine.stream import merge_files
from gemma_ext.souping.method import Required, Values
from gemma_ext.souping.methods import METHODS

REQUIRED = {float: 0.5, int: 0, bool: False, str: ""}
GIVEN = {"density": 0.6, "select_topk": 0.6, "weight": 0.7}
WITH_STATISTICS = {"fisher", "regmean", "stitch"}  # of data, which they are made with


def some_values(kind, count: int) -> Values:
    defaults = {
        p.key: REQUIRED[p.kind] if p.default is Required else p.default for p in kind.parameters
    }
    defaults |= {key: value for key, value in GIVEN.items() if key in defaults}
    per_model = {p.key for p in kind.parameters if p.per_model}
    return Values(
        [{key: value for key, value in defaults.items() if key in per_model}] * count,
        {key: value for key, value in defaults.items() if key not in per_model},
        seed=7,
    )


@pytest.mark.parametrize("name", sorted(METHODS.keys() - WITH_STATISTICS))
def test_streams_as_it_merges_in_memory(name, tmp_path):
    kind, draw = METHODS[name], random.Random(name)
    models, base = save_models(tmp_path, 2)
    least, most = kind.models
    models = models[: min(max(least, 2), most or 2)]
    origin = None if kind.base == "unused" else base
    values = some_values(kind, len(models))
    sources = [load(model) for model in models]
    expected = merge_tensors(kind(), sources, origin and load(origin), lambda tensor: values)
    for i in range(3):
        options = {
            "chunk_bytes": draw.choice([10, 100, 1000]),
            "memory_bytes": draw.choice([1, 4000, 1 << 20]),
        }
        out = tmp_path / f"out{i}"
        merge_files(kind(), models, origin, lambda tensor: values, out, **options)
        assert same_bits(load(out), expected), options
