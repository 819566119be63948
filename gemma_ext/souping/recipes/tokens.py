"""The tokenizer section of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gemma_ext.souping.recipes.marks import Entry
from gemma_ext.souping.recipes.references import ModelReference, parse_reference, read_reference


@dataclass(frozen=True)
class TokenRule:
    """Where the embedding of a token comes from.

    Attributes:
        kind: "model" (its own row there), "model_token" (the row of another token) or "zero".
        model: for the first two.
        token: for "model_token": its text or its id.
        force: for every model, also those that have the token.
    """

    kind: str
    model: ModelReference | None
    token: str | int | None
    force: bool
    entry: Entry


@dataclass(frozen=True)
class TokenizerRecipe:
    """The vocabulary of the output.

    Attributes:
        source: "union", "base" or a model.
        tokens: rules by the token's text; tokens that the vocabulary lacks are added.
        pad: the number of rows is a multiple of it.
    """

    source: str | ModelReference
    tokens: Mapping[str, TokenRule]
    pad: int | None
    entry: Entry


def read_tokenizer(keys: Mapping[str, Entry]) -> TokenizerRecipe | None:
    """The `tokenizer` or `tokenizer_source` among the keys of a recipe."""
    if "tokenizer_source" in keys:
        entry = keys["tokenizer_source"]
        if "tokenizer" in keys:
            raise entry.error("expected tokenizer or tokenizer_source, got both")
        return TokenizerRecipe(_vocabulary(entry), {}, None, entry)
    if "tokenizer" not in keys:
        return None
    entry = keys["tokenizer"]
    inner = entry.mapping(("source", "tokens", "pad_to_multiple_of"))
    tokens = inner["tokens"].mapping() if "tokens" in inner else {}
    pad = inner["pad_to_multiple_of"].integer() if "pad_to_multiple_of" in inner else None
    if pad is not None and pad < 1:
        raise inner["pad_to_multiple_of"].error(f"expected at least 1, got {pad}")
    return TokenizerRecipe(
        source=_vocabulary(inner["source"]) if "source" in inner else "union",
        tokens={name: _token(rule) for name, rule in tokens.items()},
        pad=pad,
        entry=entry,
    )


def _vocabulary(entry: Entry) -> str | ModelReference:
    if entry.shape == "scalar":
        text = entry.text()
        if text in ("union", "base"):
            return text
        if text.startswith("model:"):
            return parse_reference(text.removeprefix("model:"))
    return read_reference(entry)


def _token(entry: Entry) -> TokenRule:
    keys = entry.mapping(("source", "force"))
    if "source" not in keys:
        raise entry.error("expected source among the keys")
    force = keys["force"].boolean() if "force" in keys else False
    source = keys["source"]
    if source.shape != "mapping" or "kind" not in source.mapping():
        return TokenRule("model", read_reference(source), None, force, source)
    kind = source.mapping()["kind"].choice("model_token", "zero")
    if kind == "zero":
        source.mapping(("kind",))
        return TokenRule("zero", None, None, force, source)
    inner = source.mapping(("kind", "model", "token", "token_id"))
    if "model" not in inner or ("token" in inner) == ("token_id" in inner):
        raise source.error("expected model and one of token and token_id")
    token = inner["token"].text() if "token" in inner else inner["token_id"].integer()
    return TokenRule("model_token", read_reference(inner["model"]), token, force, source)
