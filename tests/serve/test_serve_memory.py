"""Pages of keys and values, by what a machine or a container has left."""

import pytest
import torch

from gemma_ext.pocket import SIZES, build_model
from gemma_ext.serve import memory

CPU = torch.device("cpu")


@pytest.fixture
def files(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    monkeypatch.setattr(memory.os, "sysconf", {"SC_AVPHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}.get)
    return tmp_path


def test_free_memory_is_the_least_that_is_known(files):
    assert memory.free_memory(CPU) == 4_096_000
    (files / "meminfo").write_text("MemTotal: 9000 kB\nMemFree: 100 kB\nMemAvailable: 5000 kB\n")
    assert memory.free_memory(CPU) == 5000 * 1024
    (files / "memory.max").write_text("max\n")
    assert memory.free_memory(CPU) == 5000 * 1024
    (files / "memory.max").write_text("3000000\n")
    (files / "memory.current").write_text("1000000\n")
    assert memory.free_memory(CPU) == 2_000_000


def test_pages_are_what_fits(files):
    size = SIZES["nano"]
    page = 16 * size.layers * 2 * size.kv_heads * size.head_dim * 4
    model = build_model(size)
    assert memory.pages_for(model, 0.5) == 2_048_000 // page
    assert memory.pages_for(model.double(), 0.5) == 2_048_000 // (2 * page)
    with pytest.raises(ValueError, match="kv_memory: expected room for a page of"):
        memory.pages_for(model, 1e-6)
    for share in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"kv_memory: expected a share in \(0, 1\), got"):
            memory.pages_for(model, share)
