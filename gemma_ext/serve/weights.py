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

from gemma_ext.nn.recursive import Plan
from gemma_ext.ops.depth_batching.linear import Projection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ARCHITECTURES = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")
ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "silu": "silu"}
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # whose angles depend on the position alone


@dataclass(frozen=True)
class Layer:
    """One stored layer and what its loops differ in.

    Attributes:
        depths: depth in each loop.
        window: int32 [loops], tokens that are attended to; 0 for all.
        rope_of: int32 [loops], entry of `Weights.ropes`.
        norms: weights [D] before attention and MLP; after them, or None where the model has none.
        q_norm, k_norm: [head_dim] or None.
        prefix: [loops, P, D] vectors whose keys and values every token sees, or None.
    """

    depths: tuple[int, ...]
    window: Tensor
    rope_of: Tensor
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
    prefix: Tensor | None = None


@dataclass(frozen=True)
class Weights:
    """A decoder ready to be run one loop at a time.

    Attributes:
        architecture: `model_type` of the configuration.
        loops: B; depths: L.
        prelude, block, coda: layers run before the loops, in each loop, and after the last.
        embedding: [V, D], times `embedding_scale`; head: [V, D], the same tensor where tied.
        plus_one: norms scale by 1 + w.
        scale, attention_softcap, head_softcap: of the scores, and caps.
        activation: "gelu_tanh" or "silu", of the gate.
        ropes: (frequencies float32 [head_dim / 2] in radians per position, factor of cosines and
            sines) of each setting.
        exit_head: (A [r, D], B [V, r]) of early exits, whose head is W + B A; or None.
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
    attention_softcap: float | None
    head_softcap: float | None
    activation: str
    ropes: tuple[tuple[Tensor, float], ...]
    exit_head: tuple[Tensor, Tensor] | None
    max_length: int

    @property
    def depths(self) -> int:
        return len(self.prelude) + self.loops * len(self.block) + len(self.coda)

    @property
    def prefix(self) -> int:
        """P, keys and values in front of every prompt."""
        prefix = self.block[0].prefix
        return 0 if prefix is None else prefix.shape[1]

    @property
    def vocabulary(self) -> int:
        return self.embedding.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device


def read_weights(
    model: PreTrainedModel,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Weights:
    """The tensors of `model`, shared with it where dtype and device are its own.

    Args:
        model: a causal LM of `ARCHITECTURES`, vanilla or of `gemma_ext.nn.recursive`. Active LoRA
            adapters of peft inside it are read as they are, at any rank, beside the shared weights.

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
        self.layers = self.body.layers[: self.config.num_hidden_layers]
        self.ropes: list[tuple[Tensor, float]] = []

    def weights(self) -> Weights:
        config, plan = self.config, Plan.of_model(self.model)
        if plan.order == "sequence":  # its loops lie inside each other: no depth comes back
            plan = Plan.of(plan.layers, 1)
        head, embed, norm = (
            self.model.get_output_embeddings(),
            self.body.embed_tokens,
            self.body.norm,
        )
        if any(hasattr(m, "modules_to_save") or hasattr(m, "base_layer") for m in (head, embed)):
            raise ValueError("model: expected adapters of the layers alone, got one of the head")
        if head.bias is not None:
            raise ValueError("model: expected a head without bias, got one with a bias")
        attention = self.layers[0].self_attn
        last = len(self.layers) - plan.coda
        block = [
            [plan.prelude + loop * plan.stored + layer for loop in range(plan.loops)]
            for layer in range(plan.stored)
        ]
        return Weights(
            architecture=config.model_type,
            loops=plan.loops,
            prelude=tuple(self.layer([depth] * plan.loops) for depth in range(plan.prelude)),
            block=tuple(self.layer(depths) for depths in block),
            coda=tuple(self.layer([d] * plan.loops) for d in range(last, len(self.layers))),
            embedding=self.tensor(embed.weight),
            embedding_scale=self.embedding_scale(embed),
            final_norm=self.tensor(norm.weight),
            head=self.tensor(head.weight),
            eps=getattr(norm, "eps", None) or norm.variance_epsilon,
            plus_one=config.model_type.startswith("gemma"),
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=attention.head_dim,
            scale=float(attention.scaling),
            attention_softcap=getattr(attention, "attn_logit_softcapping", None),
            head_softcap=getattr(config, "final_logit_softcapping", None),
            activation=self.activation(),
            ropes=tuple(self.ropes),
            exit_head=self.exit_head(),
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
        first, attention = loops[0], loops[0].self_attn
        sandwich = hasattr(first, "pre_feedforward_layernorm")
        inner = first.post_attention_layernorm

        def projections(block: str, *names: str) -> tuple[Projection, ...]:
            return tuple(
                self.projection([getattr(getattr(layer, block), name) for layer in loops])
                for name in names
            )

        return Layer(
            depths=tuple(depths),
            window=self.integers([self.window(depth) for depth in depths]),
            rope_of=self.integers([self.rope(depth) for depth in depths]),
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
            prefix=self.prefix(loops),
        )

    def prefix(self, loops: list[nn.Module]) -> Tensor | None:
        found = [getattr(layer.self_attn, "prefix", None) for layer in loops]
        return None if found[0] is None else torch.stack([self.tensor(x) for x in found])

    def projection(self, loops: list[nn.Module]) -> Projection:
        first = loops[0]
        if any(loop.weight is not first.weight for loop in loops):
            raise ValueError("model: expected the loops of a layer to share their weights")
        found = [_low_rank(loop) for loop in loops]
        rank = max(len(a) for a, _ in found)
        if rank == 0:
            return Projection(self.tensor(first.weight), self.tensor(first.bias))
        outs, ins = first.weight.shape
        a = torch.zeros(len(loops), rank, ins, **self.place)
        b = torch.zeros(len(loops), outs, rank, **self.place)
        for j, (down, up) in enumerate(found):
            a[j, : len(down)], b[j, :, : len(down)] = down, up
        return Projection(self.tensor(first.weight), self.tensor(first.bias), a, b)

    def exit_head(self) -> tuple[Tensor, Tensor] | None:
        head = getattr(self.model, "exit_head", None)
        return None if head is None else (self.tensor(head.lora_A), self.tensor(head.lora_B))

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

    def rope(self, depth: int) -> int:
        """The entry of `ropes` at `depth`, which is added where it is new."""
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
        for entry, (known, factor) in enumerate(self.ropes):
            if factor == scale and torch.equal(known, frequencies):
                return entry
        self.ropes.append((frequencies.float(), float(scale)))
        return len(self.ropes) - 1


@torch.no_grad()
def _low_rank(linear: nn.Module) -> tuple[Tensor, Tensor]:
    """A [r, D] and B [F, r] that act beside the weight, of a depth and of active adapters."""
    downs = [linear.weight.new_zeros(0, linear.weight.shape[1])]
    ups = [linear.weight.new_zeros(linear.weight.shape[0], 0)]
    if hasattr(linear, "base_layer"):  # peft's
        active = () if linear.disable_adapters or linear.merged else linear.active_adapters
        for name in active:
            if not hasattr(linear, "lora_A") or linear.use_dora.get(name):
                raise ValueError(f"model: expected plain LoRA adapters, got another kind in {name}")
            if name not in linear.lora_A:  # it leaves this layer alone
                continue
            downs.append(linear.lora_A[name].weight)
            ups.append(linear.lora_B[name].weight * linear.scaling[name])
    elif hasattr(linear, "lora_A"):  # a plan may leave out the matrices of the first loops
        downs.append(linear.lora_A)
        ups.append(linear.lora_B)
    return torch.cat(downs), torch.cat(ups, 1)
