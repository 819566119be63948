"""The tensors of a `transformers` decoder, by stored layer instead of by depth.

A recursive model of L depths stores fewer layers than it runs. Its depths are

    prelude (run once) | stored layer 0 .. K-1, run `loops` times | coda (run once)

and depth p + j K + s is loop j of the repeated layer s. What belongs to a depth and not to a stored
layer is stacked over the loops: the depth LoRA, the attention window, the rotary frequencies, the
place in the pool of keys and values. A vanilla model is the case of one loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ARCHITECTURES = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")
ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "silu": "silu"}
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # whose angles depend on the position alone


@dataclass(frozen=True)
class Projection:
    """y = x W^T + b + (x A_j^T) B_j^T in loop j.

    Attributes:
        weight: [out, in]; bias: [out] or None.
        lora_a: [loops, r, in] and lora_b: [loops, out, r], or both None.
    """

    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None


@dataclass(frozen=True)
class Layer:
    """One stored layer and what its loops differ in.

    Attributes:
        depths: depth in each loop.
        depth_of, window: int32 [loops]; window 0 attends to everything.
        frequencies: float32 [loops, head_dim / 2], radians per position.
        rope_scale: factor of the cosines and sines of every loop.
        norms: weights [D] before attention and MLP; after them, or None where the model has none.
        q_norm, k_norm: [head_dim] or None.
    """

    depths: tuple[int, ...]
    depth_of: Tensor
    window: Tensor
    frequencies: Tensor
    rope_scale: float
    attention_norm: Tensor
    attention_out_norm: Tensor | None
    mlp_norm: Tensor
    mlp_out_norm: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    qkv: tuple[Projection, ...]
    out: Projection
    gate_up: tuple[Projection, ...]
    down: Projection


@dataclass(frozen=True)
class Weights:
    """A decoder ready to be run one loop at a time.

    Attributes:
        architecture: `model_type` of the configuration.
        loops: B; depths: L.
        prelude, block, coda: layers run before the loops, in each loop, and after the last.
        embedding: [V, D], times `embedding_scale`; head: [V, D], the same tensor where tied.
        plus_one: norms scale by 1 + w.
        scale, attention_softcap, head_softcap: of the scores, and caps, 0 for none.
        activation: "gelu_tanh" or "silu", of the gate.
    """

    architecture: str
    loops: int
    prelude: tuple[Layer, ...]
    block: tuple[Layer, ...]
    coda: tuple[Layer, ...]
    embedding: Tensor
    embedding_scale: float
    final_norm: Tensor
    head: Tensor
    eps: float
    plus_one: bool
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    attention_softcap: float
    head_softcap: float
    activation: str
    max_length: int

    @property
    def depths(self) -> int:
        return len(self.prelude) + self.loops * len(self.block) + len(self.coda)

    @property
    def vocabulary(self) -> int:
        return self.embedding.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device


@dataclass(frozen=True)
class Shape:
    """Which depths are run once and which are the loops of one stored layer."""

    loops: int
    prelude: int
    stored: int
    coda: int

    def depths(self, layer: int) -> tuple[int, ...]:
        """Depth of the repeated `layer` in each loop."""
        return tuple(self.prelude + loop * self.stored + layer for loop in range(self.loops))


def shape_of(stored_of_depth: Sequence[int]) -> Shape:
    """The loops in a list of stored layers, one of each depth.

    Only depths that come back in the same order can be batched across loops; every other list, as
    [0, 0, 1, 1], is run as one loop of all its depths.

    Example:
        >>> shape_of([0, 1, 2, 1, 2, 3])
        Shape(loops=2, prelude=1, stored=2, coda=1)
    """
    order = list(stored_of_depth)
    once = [order.count(stored) == 1 for stored in order]
    if all(once):
        return Shape(1, 0, len(order), 0)
    prelude = once.index(False)
    coda = once[::-1].index(False)
    middle = order[prelude : len(order) - coda]
    stored = len(set(middle))
    loops, rest = divmod(len(middle), stored)
    if rest or middle != middle[:stored] * loops:
        return Shape(1, 0, len(order), 0)
    return Shape(loops, prelude, stored, coda)


def read_weights(
    model: PreTrainedModel,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Weights:
    """The tensors of `model`, shared with it where dtype and device are its own.

    Args:
        model: a causal LM of `ARCHITECTURES`, vanilla or of `gemma_ext.nn.recursive`.

    Raises:
        ValueError: the architecture, or an option of it, that the engine does not run.
    """
    config = model.config
    if config.model_type not in ARCHITECTURES:
        raise ValueError(
            f"model: expected one of the architectures {', '.join(ARCHITECTURES)}, "
            f"got {config.model_type}"
        )
    if getattr(config, "use_bidirectional_attention", None):
        raise ValueError("model: expected causal attention, got use_bidirectional_attention")
    reader = _Reader(model, dtype, device)
    return reader.weights()


class _Reader:
    def __init__(self, model: PreTrainedModel, dtype: Any, device: Any) -> None:
        self.config, self.body, self.model = model.config, model.get_decoder(), model
        first = self.body.embed_tokens.weight
        self.place = {"dtype": dtype or first.dtype, "device": device or first.device}
        recursive = getattr(self.config, "recursive", None) or {}
        depths = self.config.num_hidden_layers
        self.shape = shape_of(recursive.get("stored_of_depth", range(depths)))
        self.layers = self.body.layers[:depths]

    def weights(self) -> Weights:
        config, shape = self.config, self.shape
        attention = self.layers[0].self_attn
        head = self.model.get_output_embeddings()
        if head.bias is not None:
            raise ValueError("model: expected a head without bias, got one with a bias")
        embed = self.body.embed_tokens
        end = len(self.layers) - shape.coda
        norm = self.body.norm
        return Weights(
            architecture=config.model_type,
            loops=shape.loops,
            prelude=tuple(self.layer([depth] * shape.loops) for depth in range(shape.prelude)),
            block=tuple(self.layer(shape.depths(layer)) for layer in range(shape.stored)),
            coda=tuple(self.layer([d] * shape.loops) for d in range(end, len(self.layers))),
            embedding=self.tensor(embed.weight),
            embedding_scale=self.embedding_scale(embed),
            final_norm=self.tensor(norm.weight),
            head=self.tensor(head.weight),
            eps=_eps(norm),
            plus_one=config.model_type.startswith("gemma"),
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=attention.head_dim,
            scale=float(attention.scaling),
            attention_softcap=getattr(attention, "attn_logit_softcapping", None) or 0.0,
            head_softcap=getattr(config, "final_logit_softcapping", None) or 0.0,
            activation=self.activation(),
            max_length=config.max_position_embeddings,
        )

    def tensor(self, parameter: Tensor | None) -> Tensor | None:
        return None if parameter is None else parameter.detach().to(**self.place)

    def embedding_scale(self, embed: nn.Module) -> float:
        """As the model applies it: rounded to float32, then to its dtype."""
        scale = torch.as_tensor(getattr(embed, "embed_scale", 1.0), dtype=torch.float32)
        return scale.to(self.place["dtype"]).item()

    def activation(self) -> str:
        name = getattr(self.config, "hidden_activation", None) or self.config.hidden_act
        if name not in ACTIVATIONS:
            raise ValueError(f"model: expected activation {' or '.join(ACTIVATIONS)}, got {name}")
        return ACTIVATIONS[name]

    def layer(self, depths: Sequence[int]) -> Layer:
        """The layer stored once that is run at `depths`, one for each loop."""
        loops = [self.layers[depth] for depth in depths]
        first, attention, mlp = loops[0], loops[0].self_attn, loops[0].mlp
        sandwich = hasattr(first, "pre_feedforward_layernorm")
        inner = first.post_attention_layernorm
        frequencies, scales = zip(*(self.rotary(depth) for depth in depths), strict=True)
        if len(set(scales)) > 1:
            raise ValueError(f"model: expected one scale of rotary angles a layer, got {scales}")

        def projections(block: str, *names: str) -> tuple[Projection, ...]:
            return tuple(
                self.projection([getattr(getattr(layer, block), name) for layer in loops])
                for name in names
            )

        return Layer(
            depths=tuple(depths),
            depth_of=self.integers(depths),
            window=self.integers([self.window(depth) for depth in depths]),
            frequencies=torch.stack(frequencies).to(self.place["device"]),
            rope_scale=scales[0],
            attention_norm=self.tensor(first.input_layernorm.weight),
            attention_out_norm=self.tensor(inner.weight) if sandwich else None,
            mlp_norm=self.tensor((first.pre_feedforward_layernorm if sandwich else inner).weight),
            mlp_out_norm=self.tensor(first.post_feedforward_layernorm.weight) if sandwich else None,
            q_norm=self.tensor(getattr(getattr(attention, "q_norm", None), "weight", None)),
            k_norm=self.tensor(getattr(getattr(attention, "k_norm", None), "weight", None)),
            qkv=projections("self_attn", "q_proj", "k_proj", "v_proj"),
            out=projections("self_attn", "o_proj")[0],
            gate_up=projections("mlp", "gate_proj", "up_proj"),
            down=projections("mlp", "down_proj")[0],
        )

    def projection(self, loops: list[nn.Module]) -> Projection:
        first = loops[0]
        if any(loop.weight is not first.weight for loop in loops):
            raise ValueError("model: expected the loops of a layer to share their weights")
        factors = [(getattr(m, "lora_A", None), getattr(m, "lora_B", None)) for m in loops]
        a = b = None
        if factors[0][0] is not None:
            a = torch.stack([self.tensor(a) for a, _ in factors])
            b = torch.stack([self.tensor(b) for _, b in factors])
        return Projection(self.tensor(first.weight), self.tensor(first.bias), a, b)

    def integers(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.place["device"])

    def layer_type(self, depth: int) -> str | None:
        types = getattr(self.config, "layer_types", None)
        return types[depth] if types else None

    def window(self, depth: int) -> int:
        window = getattr(self.config, "sliding_window", None) or 0
        if self.config.model_type == "mistral":
            return window
        return window if self.layer_type(depth) == "sliding_attention" else 0

    def rotary(self, depth: int) -> tuple[Tensor, float]:
        """Frequencies float32 [head_dim / 2] and the factor of cosine and sine, at `depth`."""
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        rotary, kind, named = self.body.rotary_emb, self.body.rotary_emb.rope_type, {}
        if isinstance(kind, dict):
            named = {"layer_type": self.layer_type(depth)}
            kind = kind[named["layer_type"]]
        if kind not in _STATIC_ROPE:
            raise ValueError(f"model: expected rope type {', '.join(_STATIC_ROPE)}, got {kind}")
        default = rotary.compute_default_rope_parameters
        compute = default if kind == "default" else ROPE_INIT_FUNCTIONS[kind]
        frequencies, scale = compute(self.config, device=None, **named)
        return frequencies.float(), float(scale)


def _eps(norm: nn.Module) -> float:
    return getattr(norm, "eps", None) or norm.variance_epsilon
