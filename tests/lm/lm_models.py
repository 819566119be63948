"""Models of a few thousand parameters over bytes, and their log-probabilities by hand."""

from __future__ import annotations

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from gemma_ext.lm.text import Job

PAD, EOS, BOS = range(3)
MERGES = [("Ġ", "b"), ("Ġb", "l"), ("a", "b"), ("ab", "c")]
BASE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 96,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}


def tokenizer(bos: bool = True, eos: bool = False) -> transformers.PreTrainedTokenizerFast:
    """Bytes and a few merges, some of which lie across a space; <bos> first unless told."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<pad>", "<eos>", "<bos>", *letters, *("".join(pair) for pair in MERGES)]
    core = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, MERGES))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    if bos or eos:
        around = f"{'<bos> ' * bos}$A{' <eos>' * eos}"
        core.post_processor = processors.TemplateProcessing(
            single=around, special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>" if bos else None,
        clean_up_tokenization_spaces=False,
    )


def causal(
    name: str = "Gemma2", seed: int = 0, scale: float = 8.0, **options
) -> transformers.PreTrainedModel:
    """A randomly initialised causal `name` whose next token is far from uniform."""
    torch.manual_seed(seed)
    cls = getattr(transformers, f"{name}{'LMHeadModel' if name == 'GPT2' else 'ForCausalLM'}")
    config = cls.config_class(**{**BASE, "vocab_size": len(tokenizer()), **options})
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return model


def by_hand(model: torch.nn.Module, job: Job, window: int = 96) -> tuple[list[float], bool]:
    """Log-probabilities of the targets from the logits of one unpadded sequence, in float64."""
    tokens = (job.context + job.targets)[-(window + 1) :]
    with torch.no_grad():
        logits = model(torch.tensor([tokens[:-1]])).logits[0].double()
    logits = logits[len(logits) - len(job.targets) :]
    found = logits.log_softmax(-1).gather(1, torch.tensor(job.targets)[:, None])[:, 0]
    return found.tolist(), logits.argmax(-1).tolist() == job.targets
