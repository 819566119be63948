"""fp8 weights whose quantiser wrote scales beside them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from stream_models import Linear, load, rising, same_bits, save

from gemma_ext.souping.engine.files.checkpoint import open_checkpoint
from gemma_ext.souping.engine.files.sources import RowMap, Source
from gemma_ext.souping.engine.memory import merge_tensors
from gemma_ext.souping.engine.plan import copied
from gemma_ext.souping.engine.provenance import provenance
from gemma_ext.souping.engine.stream import merge_files, write_checkpoint
from gemma_ext.souping.method import TensorInfo

BLOCK, NAME = 128, "model.layers.0.mlp.up_proj.weight"
SCALES = {  # suffix, shape of the scales of a weight [N, K]
    "tensor": ("_scale", lambda n, k: ()),
    "tensor of one": ("_scale", lambda n, k: (1,)),
    "row": ("_scale", lambda n, k: (n, 1)),
    "row, flat": ("_scale", lambda n, k: (n,)),
    "block": ("_scale_inv", lambda n, k: (-(-n // BLOCK), -(-k // BLOCK))),
    "block of compressed-tensors": ("_scale", lambda n, k: (-(-n // BLOCK), -(-k // BLOCK))),
}


def expanded(scales: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """The scale of every element in float64, one by one."""
    n, k = shape
    out = torch.empty(shape, dtype=torch.float64)
    for i in range(n):
        for j in range(k):
            if scales.numel() == 1:
                out[i, j] = scales.view(-1)[0]
            elif scales.numel() == n:
                out[i, j] = scales[i].view(-1)[0]
            else:
                out[i, j] = scales[i // BLOCK, j // BLOCK]
    return out


def quantised(kind: str, shape: tuple[int, int], seed: int = 0) -> dict[str, torch.Tensor]:
    suffix, of = SCALES[kind]
    generator = torch.Generator().manual_seed(seed)
    return {
        NAME: torch.randn(shape, generator=generator).to(torch.float8_e4m3fn),
        f"{NAME}{suffix}": torch.rand(of(*shape), generator=generator) + 0.01,
        "model.layers.0.mlp.up_proj.input_scale": torch.ones(()),
        "model.norm.weight": torch.randn(7, generator=generator).bfloat16(),
    }


def values(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    (scales,) = (t for name, t in weights.items() if name.startswith(f"{NAME}_"))
    return weights[NAME].double() * expanded(scales, weights[NAME].shape)


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("shape", [(300, 140), (129, 64), (5, 300), (1, 257)])
def test_scales_are_applied(kind, shape, tmp_path):
    weights = quantised(kind, shape)
    plain = {NAME: torch.randn(shape), "model.norm.weight": torch.zeros(7)}
    models = [save(tmp_path / "a", weights), save(tmp_path / "b", plain)]
    expected = values(weights) / 3 + plain[NAME].double() * 2 / 3
    options = {"dtype": torch.float32, "chunk_bytes": 1000, "memory_bytes": 1 << 20}
    out = load(merge_files(Linear(), models, None, rising(2), tmp_path / "out", **options))
    assert set(out) == {NAME, "model.norm.weight"}
    torch.testing.assert_close(out[NAME].double(), expected, rtol=1e-6, atol=1e-7)


def test_bin_files_and_shards_have_scales_too(tmp_path):
    weights = quantised("block", (200, 150))
    whole = save(tmp_path / "whole", weights)
    (tmp_path / "bin").mkdir()
    torch.save(weights, tmp_path / "bin" / "pytorch_model.bin")
    first = load(merge_files(Linear(), [whole], None, rising(1), tmp_path / "first"))
    assert first[NAME].dtype == torch.bfloat16
    torch.testing.assert_close(first[NAME].double(), values(weights), rtol=2**-8, atol=0)
    again = merge_files(Linear(), [tmp_path / "bin"], None, rising(1), tmp_path / "again")
    assert same_bits(load(again), first)


def test_a_copied_tensor_is_scaled(tmp_path):
    weights = quantised("row", (130, 9))
    stored = open_checkpoint(save(tmp_path / "a", weights)).tensors[NAME]
    target = copied(TensorInfo(NAME, stored.shape), Source(stored), None)
    out = load(write_checkpoint([target], Linear(), tmp_path / "out"))[NAME]
    assert torch.equal(out, values(weights).bfloat16())


def test_rows_of_a_map_are_scaled(tmp_path):
    weights = quantised("block", (200, 130))
    stored = open_checkpoint(save(tmp_path / "a", weights)).tensors[NAME]
    order = torch.randperm(200)
    rows = RowMap([stored], torch.zeros(200, 1, dtype=torch.int64), order.view(-1, 1))
    target = copied(TensorInfo(NAME, (200, 130)), Source(stored, rows), torch.float32)
    out = load(write_checkpoint([target], Linear(), tmp_path / "out", chunk_bytes=9000))[NAME]
    assert torch.equal(out, values(weights).float()[order])


def test_another_scale_is_another_merge(tmp_path):
    weights, hashes = quantised("row", (20, 9)), set()
    for i in range(2):
        weights[f"{NAME}_scale"][3] += i
        stored = open_checkpoint(save(tmp_path / str(i), weights)).tensors[NAME]
        target = copied(TensorInfo(NAME, stored.shape), Source(stored), None)
        hashes.add(provenance(Linear(), [target], ""))
    assert len(hashes) == 2


def test_fp8_without_scales_stands_for_itself(tmp_path):
    weights = {NAME: torch.randn(5, 3).to(torch.float8_e5m2), "a.weight_scale": torch.ones(5)}
    tensors = open_checkpoint(save(tmp_path / "a", weights)).tensors
    assert set(tensors) == set(weights)
    assert tensors[NAME].scale is None


@pytest.mark.parametrize("shape", [(300, 2), (2, 140), (3, 3), (300, 140), (2,)])
def test_scales_of_other_shapes_are_refused(shape, tmp_path):
    weights = quantised("block", (300, 140)) | {f"{NAME}_scale_inv": torch.ones(shape)}
    save(tmp_path / "a", weights)
    with pytest.raises(ValueError, match=r"a: expected the scales of fp8 '.*' \[300, 140\] to be"):
        open_checkpoint(tmp_path / "a")


@pytest.mark.parametrize("beside", ["weight_zero_point", "scale_weight", "weight_scale_inv"])
def test_what_cannot_be_applied_is_named(beside, tmp_path):
    module = NAME.removesuffix("weight")
    weights = quantised("tensor", (9, 3)) | {module + beside: torch.ones(())}
    (tmp_path / "a").mkdir()
    save_file(weights, tmp_path / "a" / "model.safetensors")
    with pytest.raises(ValueError, match=rf"expected the scales of fp8 '{NAME}' as .*{beside}'"):
        open_checkpoint(tmp_path / "a")


def test_in_memory_they_have_to_be_applied():
    with pytest.raises(ValueError, match=rf"fp8 '{NAME}' with its '{NAME}_scale' applied"):
        merge_tensors(Linear(), [quantised("row", (9, 3))], None, rising(1))
