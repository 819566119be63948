"""A causal language model for the step benchmark: weights, batches, peaked logits, adapters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gemma_ext

ZIPF = 1.1  # exponent of the token frequencies, those of English text
NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f")
SCALES = tuple(2.0 ** (k / 2) for k in range(11))  # of the norm: 1 to 32
DOUBLINGS = 4  # of the embeddings, before a kept share is given up
BISECTIONS = 6
ADAPTED = ("q_proj", "v_proj")
RANK = 16
ROWS = 512  # of the logits that are held at a time


@dataclass(frozen=True)
class Head:
    """What a causal model does after its backbone: softcap(h @ weight.T)."""

    weight: Tensor  # [V, D]
    softcap: float | None


def read_config(model: str | None, device: str):
    """A transformers config by path or id; by default Gemma-2-2B, without a card a small one."""
    from transformers import AutoConfig, Gemma2Config

    if model is not None:
        return AutoConfig.from_pretrained(model)
    if device == "cuda":
        return Gemma2Config(
            vocab_size=256000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26,
            num_attention_heads=8, num_key_value_heads=4, head_dim=256, query_pre_attn_scalar=256,
        )  # fmt: skip
    return Gemma2Config(
        vocab_size=32768, hidden_size=512, intermediate_size=1024, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=128, query_pre_attn_scalar=128,
    )  # fmt: skip


def has_weights(model: str | None) -> bool:
    """Whether a path or id names trained weights; a folder or file of a config alone does not."""
    if model is None or model.endswith(".json"):
        return False
    folder = Path(model)
    return not folder.is_dir() or any(folder.glob("*.safetensors*"))


def build(config, dtype: torch.dtype, device: str, checkpointing: bool, weights: str | None = None):
    """The model in training mode, random with a fixed seed unless ``weights`` names a folder."""
    from transformers import AutoModelForCausalLM

    config.use_cache = False
    torch.manual_seed(0)
    if weights is None:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(weights, dtype=dtype).to(device)
        model.config.use_cache = False
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def head_of(model: nn.Module) -> Head:
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(model.get_output_embeddings().weight, softcap)


def zipf_tokens(config, count: int, b: int, t: int, device: str) -> list[Tensor]:
    """``count`` batches [b, t] of token ids whose frequencies fall as their ids rise; no padding,
    whose embedding is zero and whose rows no scale makes peaked."""
    text = config.get_text_config()
    frequency = torch.arange(1, text.vocab_size + 1, dtype=torch.float64) ** -ZIPF
    if text.pad_token_id is not None:
        frequency[text.pad_token_id] = 0
    generator = torch.Generator().manual_seed(1)
    drawn = torch.multinomial(frequency, count * b * t, replacement=True, generator=generator)
    return list(drawn.view(count, b, t).to(device))


def text_tokens(text: str, model: str, count: int, b: int, t: int, device: str) -> list[Tensor]:
    """``count`` batches [b, t] of a text in the tokens of a model, repeated if too short."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model)(text, return_tensors="pt").input_ids[0]
    ids = ids.repeat(math.ceil(count * b * t / len(ids)))[: count * b * t]
    return list(ids.view(count, b, t).to(device))


@torch.no_grad()
def hidden_states(model: nn.Module, ids: Tensor) -> Tensor:
    """[B, T, D] hidden states that the head sees."""
    return model.base_model(input_ids=ids).last_hidden_state


def kept_share(hidden: Tensor, head: Head, labels: Tensor, filter_eps: float | str | None) -> float:
    """Share of gradient strips that the loss of hidden [B, T, D] and labels [B, T] computes."""
    out = gemma_ext.linear_cross_entropy(
        hidden.detach().requires_grad_(),
        head.weight.detach().requires_grad_(),
        labels,
        softcap=head.softcap,
        shift=1,
        filter_eps=filter_eps,
        return_stats=True,
    )
    return float(out.stats.kept_fraction)


@torch.no_grad()
def model_labels(hidden: Tensor, head: Head, seed: int) -> Tensor:
    """Labels [B, T] drawn from the model's own next-token softmax: those of a calibrated model."""
    rows = hidden[:, :-1].flatten(0, 1)
    generator = torch.Generator(rows.device).manual_seed(seed)
    drawn = [
        torch.multinomial(softmax(part, head), 1, generator=generator)[:, 0]
        for part in rows.split(ROWS)
    ]
    following = torch.cat(drawn).view(len(hidden), -1)
    return F.pad(following, (1, 0))  # the first label of a sequence is not looked at


def softmax(rows: Tensor, head: Head) -> Tensor:
    """float32 [M, V] probabilities of rows [M, D]."""
    logits = F.linear(rows, head.weight).float()
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits.softmax(-1)


def sharpen(
    model: nn.Module, ids: Tensor, target: float, filter_eps: float | str = "auto"
) -> float:
    """Scale the final norm until at most ``target`` of the strips are kept; returns what is, with
    labels drawn from the model.

    A softcap flattens again what is scaled too far. Where no scale reaches the target the
    embeddings are doubled, whose rows then weigh more in the residual stream of a tied head; after
    DOUBLINGS of them the sharpest scale stays.
    """
    head, norm = head_of(model), final_norm(model)

    def share(scale: float) -> float:
        scaled = (hidden.float() * scale).to(hidden.dtype)
        return kept_share(scaled, head, model_labels(scaled, head, seed=0), filter_eps)

    for doublings in range(DOUBLINGS + 1):
        if doublings:
            with torch.no_grad():
                model.get_input_embeddings().weight.mul_(2)
        hidden = hidden_states(model, ids)
        scales = [scale / 2**doublings for scale in SCALES]
        shares = list(map(share, scales))
        if min(shares) <= target:
            break
    place = next((i for i, found in enumerate(shares) if found <= target), None)
    if place is None:
        high = scales[shares.index(min(shares))]
    else:
        high, low = scales[place], scales[max(place - 1, 0)]
        for _ in range(BISECTIONS):
            middle = math.sqrt(low * high)
            low, high = (low, middle) if share(middle) <= target else (middle, high)
    scale_norm(norm, high)
    return share(high)


def final_norm(model: nn.Module) -> nn.Module:
    """The norm before the head.

    Raises:
        ValueError: if the backbone has none under a name of NORMS.
    """
    for name in NORMS:
        if hasattr(model.base_model, name):
            return getattr(model.base_model, name)
    raise ValueError(
        f"expected the backbone of {type(model).__name__} to have one of {', '.join(NORMS)}"
    )


@torch.no_grad()
def scale_norm(norm: nn.Module, scale: float) -> None:
    """Multiply the output of a norm, whether it multiplies by its weight or by 1 + its weight."""
    weight = norm.weight.clone()
    norm.weight.zero_()
    from_one = bool(norm(torch.ones_like(weight)[None]).abs().sum() > 0)
    norm.weight.copy_((1 + weight) * scale - 1 if from_one else weight * scale)


class LowRank(nn.Module):
    """A frozen linear layer and a trained product of two thin ones."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        place = {"dtype": base.weight.dtype, "device": base.weight.device, "bias": False}
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, **place)
        self.up = nn.Linear(rank, base.out_features, **place)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def add_adapters(model: nn.Module, rank: int = RANK, names: Sequence[str] = ADAPTED) -> None:
    """Freeze the model, head included, and put adapters on its linear layers of these names.

    Raises:
        ValueError: if it has none.
    """
    model.requires_grad_(False)
    places = [
        (module, name)
        for module in model.modules()
        for name, child in module.named_children()
        if name in names and isinstance(child, nn.Linear)
    ]
    if not places:
        raise ValueError(f"expected {type(model).__name__} to have linear layers named {names}")
    for module, name in places:
        setattr(module, name, LowRank(getattr(module, name), rank))
