"""A byte-level BPE trained on the corpus, as a fast tokenizer of `transformers`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# The order, hence the ids, of Gemma's own vocabulary.
SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>")
PAD_ID, EOS_ID, BOS_ID = range(3)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, max_length: int
) -> PreTrainedTokenizerFast:
    """Trains the tokenizer; the result is a function of the texts and their order alone.

    Args:
        texts: the training documents.
        vocab_size: V, specials and the 256 bytes included.
        max_length: context length of the model it belongs to.

    Raises:
        ValueError: the texts do not hold enough distinct pairs to fill `vocab_size`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    pad, eos, bos = SPECIAL_TOKENS
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if core.get_vocab_size() != vocab_size:
        raise ValueError(
            f"vocab_size: expected at most {core.get_vocab_size()} for the texts, got {vocab_size}"
        )
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, BOS_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=pad,
        eos_token=eos,
        bos_token=bos,
        model_max_length=max_length,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> list[int]:
    """One stream of ids: <bos> text <eos> for each text, in order."""
    ids: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(list(texts)):
        ids.extend(encoding.ids)
        ids.append(EOS_ID)
    return ids


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Reads the tokenizer that `save_pretrained` wrote into `folder`."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)
