"""The tokenizer of the output: that of one model, or the base's with the tokens of all.

A union cuts text as the base's tokenizer does: what it gains are tokens that have a text of their
own (special and added ones), which are found in text, and pieces of the others' vocabularies, which
have an id and a row and decode, but which the base's merges never produce.
"""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_ext.extras import require
from gemma_ext.souping.recipes.references import ModelReference, locate
from gemma_ext.souping.recipes.tokens import TokenizerRecipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# what a folder holds for text, besides the weights and the configuration
FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model"),
    *("chat_template.jinja", "chat_template.json"),
    *("preprocessor_config.json", "processor_config.json"),
)


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in the folder of a model.

    Raises:
        ValueError: there is none that transformers can load, in one sentence.
        ImportError: transformers is missing.
    """
    require("a tokenizer", "hf", "transformers")
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in FILES):
        raise ValueError(f"{folder}: expected a tokenizer beside the weights, got none")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers panics on some files, which is no Exception
        first = str(error).strip().split("\n")[0]
        raise ValueError(f"{folder}: transformers cannot load the tokenizer: {first}") from None


def load_tokenizers(
    folders: Sequence[Path], *, trust_remote_code: bool = False
) -> list[PreTrainedTokenizerBase]:
    """The tokenizers of several folders; where the files are the same, one object serves for all.

    Fine-tunes mostly share their base's files, and reading a large vocabulary takes seconds.

    Raises:
        ValueError, ImportError: as `load_tokenizer`.
    """
    found: dict[str, PreTrainedTokenizerBase] = {}
    loaded = []
    for folder in folders:
        seen = hashlib.sha256()
        for name in FILES:
            if (folder / name).is_file():
                seen.update(name.encode() + b"\0" + (folder / name).read_bytes())
        key = seen.hexdigest()
        if key not in found:
            found[key] = load_tokenizer(folder, trust_remote_code=trust_remote_code)
        loaded.append(found[key])
    return loaded


def build_tokenizer(
    recipe: TokenizerRecipe,
    models: Sequence[ModelReference],
    tokenizers: Sequence[PreTrainedTokenizerBase],
    *,
    base: int,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """The output's tokenizer, with a token for each rule of the recipe.

    Args:
        models, tokenizers: M of each.
        base: whose tokenizer `base` is, and the one that a union is built on.

    Raises:
        RecipeError: a union that cannot be built, or a source without a tokenizer.
    """
    if recipe.source == "base":
        found = tokenizers[base]
    elif recipe.source == "union":
        found = _union(recipe, tokenizers, base, trust_remote_code)
    elif recipe.source in models:
        found = tokenizers[models.index(recipe.source)]
    else:
        try:
            folder = locate(recipe.source.model)
            found = load_tokenizer(folder, trust_remote_code=trust_remote_code)
        except (ValueError, FileNotFoundError) as error:
            raise recipe.entry.error(str(error)) from None
    missing = [token for token in recipe.tokens if token not in found.get_vocab()]
    if missing:
        found = copy.deepcopy(found)
        known = _added(tokenizers)
        _add(found, {token: known.get(token) for token in missing})
    return found


def copy_files(source: Path, out: Path) -> None:
    """Copies the tokenizer's files as they are."""
    for name in FILES:
        if (source / name).is_file():
            (out / name).write_bytes((source / name).read_bytes())


def _union(
    recipe: TokenizerRecipe,
    tokenizers: Sequence[PreTrainedTokenizerBase],
    base: int,
    trust_remote_code: bool,
) -> PreTrainedTokenizerBase:
    others = [other for other in dict.fromkeys(tokenizers) if other is not tokenizers[base]]
    own = tokenizers[base].get_vocab()
    added = _added([tokenizers[base], *others])
    # in the order of ids, model by model
    missing = dict.fromkeys(
        token
        for other in others
        for token, _ in sorted(other.get_vocab().items(), key=lambda item: item[1])
        if token not in own
    )
    if not missing:
        return tokenizers[base]
    pieces = [token for token in missing if token not in added]
    found = _copy(tokenizers[base], pieces, recipe, trust_remote_code)
    _add(found, {token: added[token] for token in missing if token in added})
    vocabulary = found.get_vocab()
    lost = [token for token in (*own, *missing) if vocabulary.get(token) is None]
    if lost or any(vocabulary[token] != index for token, index in own.items()):
        raise recipe.entry.error(
            f"these tokenizers have no union: {len(lost)} tokens are lost, as {lost[:3]}"
        )
    return found


def _copy(
    tokenizer: PreTrainedTokenizerBase,
    pieces: Sequence[str],
    recipe: TokenizerRecipe,
    trust_remote_code: bool,
) -> PreTrainedTokenizerBase:
    """A tokenizer of its own, with further pieces at the end of its vocabulary."""
    if not pieces:
        return copy.deepcopy(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise recipe.entry.error("a union needs tokenizers with a tokenizer.json")
        data = json.loads(path.read_text(encoding="utf-8"))
        try:
            _extend(data, pieces)
        except ValueError as error:
            raise recipe.entry.error(str(error)) from None
        path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
        return load_tokenizer(Path(folder), trust_remote_code=trust_remote_code)


def _extend(data: dict[str, Any], pieces: Sequence[str]) -> None:
    """Appends pieces to the vocabulary of a tokenizer.json."""
    vocabulary = data["model"]["vocab"]
    taken = [token["id"] for token in data["added_tokens"]]
    if isinstance(vocabulary, dict):
        start = max([*vocabulary.values(), *taken], default=-1) + 1
        vocabulary.update({piece: start + i for i, piece in enumerate(pieces)})
        return
    # Unigram: ids are places in the list, and scores decide; the lowest is never chosen
    if any(index >= len(vocabulary) for index in taken):
        raise ValueError(
            "these tokenizers have no union: the base's added tokens stand where new pieces of a "
            "Unigram vocabulary would; take base or one model as the source"
        )
    floor = min((score for _, score in vocabulary), default=0.0) - 10.0
    vocabulary.extend([piece, floor] for piece in pieces)


def _added(tokenizers: Sequence[PreTrainedTokenizerBase]) -> dict[str, Any]:
    """Text to AddedToken of all; the first to have one decides how it is matched."""
    found: dict[str, Any] = {}
    for tokenizer in tokenizers:
        for token in tokenizer.added_tokens_decoder.values():
            found.setdefault(token.content, token)
    return found


def _add(tokenizer: PreTrainedTokenizerBase, tokens: Mapping[str, Any | None]) -> None:
    """Adds tokens; one that no model has is special."""
    from tokenizers import AddedToken

    for text, token in tokens.items():
        token = token or AddedToken(text, special=True, normalized=False)
        tokenizer.add_tokens([token], special_tokens=token.special)
