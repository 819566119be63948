"""What stands beside the weights of a merge: configuration, tokenizer, recipe and card."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

from gemma_ext.souping.recipes.card import write_card
from gemma_ext.souping.recipes.configuration import (
    Config,
    move_tokens,
    read_json,
    set_depth,
    set_dtype,
    set_rows,
)
from gemma_ext.souping.recipes.layout import Layout, read_layout
from gemma_ext.souping.recipes.prepare import Prepared
from gemma_ext.souping.recipes.resolve import Resolved
from gemma_ext.souping.recipes.tokenizer import copy_files

RECIPE = "mergekit_config.yml"  # the name that readers of merges look for


def write_extras(
    prepared: Prepared,
    config: Config | None,
    folder: Path,
    title: str,
    *,
    tokenizer: bool = True,
    card: bool = True,
    trust_remote_code: bool = False,
) -> None:
    """Fills the folder of the output.

    Args:
        config: of `output_config`, which is asked for before the merge, as it may refuse.
        title: of the card.
        tokenizer: copy the lead model's where the recipe asks for none of its own.
        card: write README.md and the recipe.
        trust_remote_code: copy the lead model's Python files, if its configuration names them.
    """
    lead = prepared.models[prepared.lead]
    if config is not None:
        _write_json(folder / "config.json", config)
        if trust_remote_code and "auto_map" in config:
            for path in sorted(lead.folder.glob("*.py")):
                shutil.copyfile(path, folder / path.name)
    generation = lead.folder / "generation_config.json"
    if generation.is_file():
        own = read_json(generation)
        if prepared.vocabulary is not None:
            move_tokens(own, prepared.lead_vocabulary, prepared.vocabulary)
        _write_json(folder / generation.name, own)
    if prepared.tokenizer is not None:
        saved = copy.deepcopy(prepared.tokenizer)
        if prepared.template is not None:
            saved.chat_template = prepared.template
        saved.save_pretrained(folder)
    elif tokenizer:
        copy_files(lead.tokenizer_folder, folder)
        if prepared.template is not None:
            _set_template(folder, prepared.template)
    if card:
        (folder / RECIPE).write_text(prepared.recipe.text.rstrip() + "\n", encoding="utf-8")
        (folder / "README.md").write_text(write_card(prepared, title), encoding="utf-8")


def output_config(prepared: Prepared) -> Config | None:
    """The lead model's configuration with layers, vocabulary, dtype and tokens of the output.

    Raises:
        ValueError: the number of layers changes and the configuration has none that fits.
    """
    lead = prepared.models[prepared.lead]
    if lead.config is None:
        return None
    config = copy.deepcopy(lead.config)
    config.pop("_name_or_path", None)
    shapes = {target.info.name: target.info.shape for target in prepared.targets}
    layout = read_layout(shapes)
    _set_layers(config, prepared, lead.layout, layout)
    if layout.rows:
        set_rows(config, lead.layout.rows, layout.rows)
    dtypes = [target.dtype for target in prepared.targets if target.dtype.is_floating_point]
    if dtypes:
        most = max(dict.fromkeys(dtypes), key=dtypes.count)
        set_dtype(config, str(most).removeprefix("torch."))
    if prepared.vocabulary is not None:
        move_tokens(config, prepared.lead_vocabulary, prepared.vocabulary)
    if any(_unties(one, prepared) for one in prepared.resolved):
        config["tie_word_embeddings"] = False
    return config


def _set_layers(config: Config, prepared: Prepared, old: Layout, new: Layout) -> None:
    for stack, layers in new.stacks.items():
        before = len(old.stacks.get(stack, ()))
        origins: dict[int, tuple[Config | None, int]] = {}
        for one in prepared.resolved:
            if one.info.name.startswith(f"{stack}.") and one.info.layer is not None:
                source = one.sources[0]
                layer = int(source.name.removeprefix(f"{stack}.").split(".")[0])
                origins[one.info.layer] = (prepared.models[source.model].config, layer)
        same = all(layer == origin[1] for layer, origin in origins.items())
        if not origins or (same and len(layers) == before):
            continue
        set_depth(config, before, [origins[n] for n in range(len(layers))], stack.split(".")[0])


def _unties(one: Resolved, prepared: Prepared) -> bool:
    """Whether this is a head beside the embedding: made of embeddings, or untied in a model."""
    if one.info.layer is not None:
        return False
    inputs = [*one.sources, *([one.base] if one.base else [])]
    if any(each.name != one.info.name for each in inputs):
        return True
    models = [prepared.models[each.model] for each in inputs]
    return one.info.name in models[0].layout.heads and any(
        (model.config or {}).get("tie_word_embeddings") is False for model in models
    )


def _set_template(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    path = folder / "tokenizer_config.json"
    if path.is_file():
        config = read_json(path)
        config.pop("chat_template", None)
        _write_json(path, config)


def _write_json(path: Path, data: Config) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
