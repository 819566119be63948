"""A reward model: the backbone of a language model under a scalar head, and the function of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gemma_ext.extras import require
from gemma_ext.lm.causal import padded
from gemma_ext.lm.huggingface import evaluating
from gemma_ext.lm.identity import identity
from gemma_ext.lm.text import Text
from gemma_ext.nn._models import unwrap

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

QUALITY, LENGTH = 0, 1  # heads of ODIN; trainers read the first column


def from_causal(model: PreTrainedModel, *, heads: int = 1, seed: int = 0) -> PreTrainedModel:
    """A sequence classifier with the backbone of a causal model and a new head without bias.

    Args:
        model: a pocket's or any other; it is copied, not shared.
        heads: 2 for ODIN.
        seed: of the head, which is normal with the model's own standard deviation.

    Raises:
        TypeError: transformers has no sequence classifier of that kind.
    """
    require("a reward model", "hf", "transformers")
    import transformers

    model = unwrap(model)
    config = type(model.config).from_dict(model.config.to_dict())
    config.num_labels = heads
    config.problem_type = "regression"
    attention = getattr(model.config, "_attn_implementation", None)
    options = {"attn_implementation": attention} if attention else {}
    auto = transformers.AutoModelForSequenceClassification
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = auto.from_config(config, **options)
    except ValueError as error:
        raise TypeError(
            f"model: expected a kind with a sequence classifier, got {type(model).__name__}"
        ) from error
    backbone = getattr(made, made.base_model_prefix)
    backbone.load_state_dict(getattr(model, model.base_model_prefix).state_dict())
    weight = next(model.parameters())
    return headless_bias(made).to(weight.device, weight.dtype).eval()


def load_reward_model(
    path: str | Path, *, heads: int = 1, dtype: torch.dtype | str = "auto", device: str = "cpu"
) -> PreTrainedModel:
    """A reward model of a folder or of the hub; a causal model's folder gets a new head.

    Args:
        path: "pocket" and "pocket:small" too.
        heads: of a new head.
    """
    require("a reward model", "hf", "transformers", "safetensors")
    import transformers

    name = str(path)
    if name.partition(":")[0] == "pocket":
        from gemma_ext.sae import load_model

        return from_causal(load_model(name)[0], heads=heads).to(device)
    config = transformers.AutoConfig.from_pretrained(path)
    trained = any("SequenceClassification" in kind for kind in config.architectures or ())
    if not trained:
        causal = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        return from_causal(causal, heads=heads).to(device)
    auto = transformers.AutoModelForSequenceClassification
    # a pocket's soft-caps need its own attention
    options = {"attn_implementation": "eager"} if config.model_type == "gemma2" else {}
    return auto.from_pretrained(path, dtype=dtype, **options).to(device).eval()


def headless_bias(model: PreTrainedModel) -> PreTrainedModel:
    """Takes the bias off the head: a constant cancels in every preference."""
    head = score_head(model)
    if head.bias is not None:
        head.bias = None
    return model


def score_head(model: nn.Module) -> nn.Linear:
    """The linear module that gives the scores.

    Raises:
        TypeError: there is none.
    """
    inside = unwrap(model)
    for name in ("score", "classifier"):
        head = getattr(inside, name, None)
        if isinstance(head, nn.Linear):
            return head
    raise TypeError(f"expected a model with a linear head, got {type(inside).__name__}")


class RewardModel:
    """A reward function of TRL's signature from a sequence classifier.

    Args:
        model: with logits [B, heads], such as of `from_causal`. A model without a padding token
            gets the tokenizer's.
        tokenizer: of the model.
        head: column of the scores; ODIN's quality is the first.
        max_length: a longer text loses its start, None for the model's own limit.
        batch_tokens: padded tokens that are run at once.
        own_ids: score `completion_ids` as they were drawn, for a policy of the same vocabulary:
            decoding and encoding again may change them, and loses the end of the text.

    Example:
        >>> score = RewardModel(model, tokenizer)
        >>> score(["The sky is"], [" blue"])
        tensor([1.5])
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        head: int = QUALITY,
        max_length: int | None = None,
        batch_tokens: int = 4096,
        own_ids: bool = False,
    ) -> None:
        heads = model.config.num_labels
        if not 0 <= head < heads:
            raise ValueError(f"head: expected one of {heads}, got {head}")
        self.model, self.tokenizer, self.head = model, tokenizer, head
        self.text = Text(tokenizer, False)
        config = model.config.get_text_config()
        if config.pad_token_id is None:
            config.pad_token_id = tokenizer.pad_token_id
        limit = getattr(config, "max_position_embeddings", None)
        self.max_length = max_length or limit or 2048
        self.batch_tokens, self.own_ids = batch_tokens, own_ids
        self.__name__ = "reward"

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> Tensor:
        """Scores [B] in the model's dtype.

        Args:
            prompts, completions: texts, or messages, which the tokenizer's chat template joins.
        """
        if self.own_ids:
            if completion_ids is None:
                raise ValueError("completion_ids: expected the ids of the completions, got none")
            before = self.text.encode(list(prompts))
            rows = [[*p, *ids] for p, ids in zip(before, completion_ids, strict=True)]
        else:
            texts = [self._joined(p, c) for p, c in zip(prompts, completions, strict=True)]
            rows = self.text.encode(texts)
        return self.score([row[-self.max_length :] for row in rows])

    @torch.no_grad()
    def score(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Scores of token ids, longest first in batches of similar length."""
        weight = next(self.model.parameters())
        found = torch.empty(len(rows), dtype=weight.dtype, device=weight.device)
        order = sorted(range(len(rows)), key=lambda at: -len(rows[at]))
        with evaluating(self.model):
            while order:
                size = max(1, self.batch_tokens // len(rows[order[0]]))
                some, order = order[:size], order[size:]
                found[some] = scores(self.model, [rows[at] for at in some])[:, self.head]
        return found

    def fingerprint(self) -> str:
        """Digest of weights, head and text, as a cache of scores needs it."""
        return identity(self.model, text=self.text.describe(), head=self.head, ids=self.own_ids)

    def _joined(self, prompt: Any, completion: Any) -> str:
        if isinstance(prompt, str) and isinstance(completion, str):
            return prompt + completion
        answer = completion
        if isinstance(completion, str):
            answer = [{"role": "assistant", "content": completion}]
        return self.tokenizer.apply_chat_template([*prompt, *answer], tokenize=False)


def scores(model: nn.Module, rows: Sequence[Sequence[int]]) -> Tensor:
    """[B, heads] of rows of ids, read by the model at the last one that is no padding.

    Raises:
        ValueError: the model's configuration has no padding token.
    """
    config = unwrap(model).config.get_text_config()
    if config.pad_token_id is None:
        raise ValueError("model: expected a configuration with pad_token_id, got None")
    device = next(model.parameters()).device
    ids, real = padded([list(row) for row in rows], left=False, device=device)
    ids = torch.where(real.bool(), ids, config.pad_token_id)
    return model(input_ids=ids, attention_mask=real).logits
