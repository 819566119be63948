"""Layers of a model, read off the names of its tensors, without a table of architectures.

The first whole number between dots counts the layers of a stack: `model.layers.3.mlp.up.weight`
is in layer 3 of `model.layers`, `transformer.h.0.ln_1.weight` in layer 0 of `transformer.h`. The
stack with most elements is the one that slices cut; others (a vision tower) keep their depth.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

Shapes = Mapping[str, tuple[int, ...]]

_LAYER = re.compile(r"(.+?)\.(\d+)\.(.+)")
_FIRST = re.compile(r"embed(?!_out)|wte|wpe")  # in names of what stands before the layers
_TOKENS = re.compile(r"(embed_tokens|word_embeddings|wte|embed_in|tok_embeddings|shared)\.weight$")
_HEAD = re.compile(r"(head|embed_out)\.(weight|bias)$")
_REST = ("text_decoder", "decoder", "language_model")  # modules that take what none else claims


@dataclass(frozen=True)
class Layout:
    """The tensors of a model, or of a module of it.

    Attributes:
        shapes: name to shape.
        stacks: stack to the names in each of its layers, each as its part after the number.
        outside: names that are in no layer.
        main: the stack that slices cut; "" without layers.
    """

    shapes: Shapes
    stacks: Mapping[str, Sequence[Sequence[str]]]
    outside: Sequence[str]
    main: str

    @property
    def layers(self) -> int:
        """Number of layers of the main stack."""
        return len(self.stacks.get(self.main, ()))

    @cached_property
    def embedding(self) -> str | None:
        """The tensor that turns tokens into vectors; None without one."""
        return next(
            (name for name in self.outside if _TOKENS.search(name) and len(self.shapes[name]) == 2),
            None,
        )

    @property
    def heads(self) -> list[str]:
        """Weights that turn vectors into scores of tokens."""
        return [n for n in self.outside if _HEAD.search(n) and n.endswith("weight")]

    @property
    def rows(self) -> int:
        """Rows of the embedding."""
        return self.shapes[self.embedding][0] if self.embedding else 0

    def is_vocabulary(self, name: str) -> bool:
        """Whether a tensor has a row per token: the embedding, the head and the head's bias."""
        shape = self.shapes[name]
        if self.embedding is None or name not in self.outside or shape[:1] != (self.rows,):
            return False
        return name == self.embedding or _HEAD.search(name) is not None

    def find(self, name: str) -> str | None:
        """A tensor by name; a head that is not stored is the embedding."""
        if name in self.shapes:
            return name
        return self.embedding if _HEAD.search(name) and name.endswith("weight") else None

    def elsewhere(self) -> dict[str, tuple[int, int] | None]:
        """Names that are not in the main stack, with (layer, layers) of the stack they are in."""
        found: dict[str, tuple[int, int] | None] = dict.fromkeys(self.outside)
        for stack, layers in self.stacks.items():
            if stack != self.main:
                for layer, rests in enumerate(layers):
                    found |= {f"{stack}.{layer}.{rest}": (layer, len(layers)) for rest in rests}
        return found


def read_layout(shapes: Shapes) -> Layout:
    """The layout of a model from the shapes of its tensors."""
    found: dict[str, dict[int, list[str]]] = {}
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        if match := _LAYER.fullmatch(name):
            found.setdefault(match[1], {}).setdefault(int(match[2]), []).append(match[3])
            sizes[match[1]] = sizes.get(match[1], 0) + prod(shape)
    # the weights of a Sequential, 0, 2, 4, are no layers
    stacks = {
        stack: [layers[number] for number in range(len(layers))]
        for stack, layers in found.items()
        if layers.keys() == set(range(len(layers)))
    }
    main = max(stacks, key=lambda stack: (sizes[stack], stack), default="")
    inside = {
        f"{stack}.{number}.{rest}"
        for stack, layers in stacks.items()
        for number, rests in enumerate(layers)
        for rest in rests
    }
    return Layout(shapes, stacks, [name for name in shapes if name not in inside], main)


def stands_first(name: str) -> bool:
    """Whether a tensor outside of layers comes before them (embeddings), not after (norm, head)."""
    return _FIRST.search(name) is not None


def split_modules(names: list[str], modules: list[str]) -> dict[str, list[str]]:
    """The tensors of each module of a recipe.

    A tensor belongs to the module that is one of the parts of its name: `vision_tower` has
    `model.vision_tower.encoder.layers.0.mlp.fc1.weight`. One named text_decoder, decoder or
    language_model also gets what no other claims.

    Raises:
        ValueError: a module without tensors or a tensor without a module.
    """
    found: dict[str, list[str]] = {module: [] for module in modules}
    rest = next((module for module in _REST if module in found), None)
    for name in names:
        parts = name.split(".")
        module = min((m for m in modules if m in parts), key=parts.index, default=rest)
        if module is None:
            raise ValueError(f"none of the modules {', '.join(modules)} has the tensor {name}")
        found[module].append(name)
    for module, own in found.items():
        if not own:
            first = sorted({part for name in names for part in name.split(".")[:2]})
            raise ValueError(
                f"no tensor is named after the module {module}; names begin with {', '.join(first)}"
            )
    return found
