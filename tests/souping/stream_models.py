"""Small checkpoints with everything a real one has, and methods to stream them with."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemma_ext.ops.souping import Part, soup_
from gemma_ext.souping.method import Method, TensorInfo, Values

SHAPES = {
    "model.embed_tokens.weight": (53, 12),
    "model.layers.0.mlp.up_proj.weight": (31, 12),
    "model.layers.0.input_layernorm.weight": (12,),
    "model.layers.1.mlp.up_proj.weight": (31, 12),
    "model.layers.1.input_layernorm.weight": (12,),
    "model.norm.weight": (12,),
    "model.scale": (),
    "model.none": (0, 12),
}


def tensors(seed: int, dtype: torch.dtype = torch.bfloat16, shapes=None) -> dict[str, Tensor]:
    """Random weights of SHAPES, and a tensor of integers."""
    generator = torch.Generator().manual_seed(seed)
    made = {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape in (shapes or SHAPES).items()
    }
    return {**made, "model.positions": torch.arange(seed, seed + 9)}


def save(folder: Path, weights: dict[str, Tensor], name: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / name, metadata={"format": "pt"})
    return folder


def save_models(root: Path, count: int, **options) -> tuple[list[Path], Path]:
    """`count` models and a base."""
    models = [save(root / f"model{m}", tensors(m, **options)) for m in range(count)]
    return models, save(root / "base", tensors(99, **options))


def load(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, as safetensors reads them."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and left[name].shape == right[name].shape
        and bytes_of(left[name]) == bytes_of(right[name])
        for name in left
    )


def bytes_of(tensor: Tensor) -> bytes:
    return (
        tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    )


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def rising(count: int, first: int = 1):
    """Values of `Linear`: weights in the ratio first : first + 1 : ... that add up to 1."""
    weights = [m + first for m in range(count)]

    def values(tensor: TensorInfo) -> Values:
        return Values([{"weight": weight / sum(weights)} for weight in weights])

    return values


class Linear(Method):
    """sum_m w_m x_m."""

    name = "test_linear"

    def merge(self, part: Part, state: Values) -> None:
        soup_([part], state.of("weight"))


class Deltas(Linear):
    """base + sum_m w_m (x_m - base)."""

    name = "test_deltas"
    base = "needed"


class Shrunk(Method):
    """Every tensor of the first model over the largest magnitude in it, or in the whole model.

    It looks twice, so that what the first survey settled must be there in the second.
    """

    name = "test_shrunk"
    surveys = 2

    def __init__(self, grain: str = "element", model_wide: bool = False) -> None:
        self.grain, self.model_wide = grain, model_wide

    def begin(self, tensor: TensorInfo, values: Values) -> dict:
        return {"shape": tensor.shape, "largest": 0.0, "seen": [0, 0], "scale": None}

    def survey(self, step: int, part: Part, state: dict) -> None:
        assert part.out is None
        self.check_shape(part, state)
        assert part.offset == state["seen"][step]
        state["seen"][step] += part.sources[0].numel()
        if step == 1:
            largest = float(part.sources[0].abs().max())
            assert state["scale"] == 3.0
            state["largest"] = max(state["largest"], largest)

    def settle(self, step: int, state: dict) -> None:
        assert state["seen"][step] == torch.Size(state["shape"]).numel()
        state["scale"] = 3.0

    def settle_model(self, step: int, states: dict) -> None:
        assert self.model_wide
        if step == 1:
            largest = max(state["largest"] for state in states.values())
            for state in states.values():
                state["largest"] = largest

    def merge(self, part: Part, state: dict) -> None:
        self.check_shape(part, state)
        part.out.copy_(part.sources[0].float() * (state["scale"] / state["largest"]))

    def check_shape(self, part: Part, state: dict) -> None:
        shape = tuple(part.sources[0].shape)
        if self.grain == "tensor":
            assert shape == state["shape"]
        if self.grain == "row" and state["shape"]:
            assert shape[-1] == state["shape"][-1]
