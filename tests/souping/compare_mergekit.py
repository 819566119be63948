"""The recipes of `recipes/` run by mergekit and by us, tensor by tensor.

    python tests/souping/compare_mergekit.py --mergekit /path/to/venv/bin/mergekit-yaml

mergekit lives in an environment of its own: its pins conflict with current packages. Models are
float32, so that what it rounds in between does not show; recipes that draw at random, and those
that only run here, are left out. Where a recipe has a tokenizer section, embeddings are compared
token by token.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from recipe_models import save_models, weights
from tiny_tokenizers import save_bpe

from gemma_ext.souping.recipes.recipe import read_recipes
from gemma_ext.souping.recipes.run import run_recipes
from gemma_ext.souping.recipes.tokenizer import load_tokenizer

NAMES = [f"kitchen/broth-2b{end}" for end in ("", "-chat", "-code", "-math", "-story", "-toxic")]
RANDOM = ("dare_", "della")
OURS = re.compile(r"^---|\+kitchen|^modules:|source: model:|kind: zero", re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mergekit", type=Path, required=True, help="its mergekit-yaml")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_models(root)
        for path in sorted((Path(__file__).parent / "recipes").glob("*.yml")):
            text = path.read_text()
            drawn = any(f"merge_method: {name}" in text for name in RANDOM)
            if text.startswith("# runs") and not drawn and not OURS.search(text):
                print(f"{path.stem:<34} {compare(text, root, options.mergekit)}", flush=True)


def make_models(root: Path) -> None:
    for name in NAMES:
        words = ["soup", "tale"] if name.endswith("story") else ["soup", "stone"]
        marks = ("<|im_start|>", "<|im_end|>") if name.endswith("chat") else ()
        save_bpe(root / name, words, ("<s>", "</s>", *marks))
    sizes = {"num_hidden_layers": 6, "vocab_size": 24}
    save_models(root, *NAMES, kind="Llama", dtype=torch.float32, **sizes)


def compare(text: str, root: Path, mergekit: Path) -> str:
    """The largest difference, of the largest element of its tensor, and where it is."""
    text = re.sub(r"^(out_)?dtype:.*$", "", text, flags=re.MULTILINE) + "\ndtype: float32\n"
    recipe = root / "recipe.yml"
    recipe.write_text(re.sub(r"kitchen/[\w-]+", lambda match: str(root / match[0]), text))
    with tempfile.TemporaryDirectory(dir=root) as folder:
        theirs, ours = Path(folder) / "theirs", Path(folder) / "ours"
        command = [str(mergekit), str(recipe), str(theirs), "--quiet"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
        if done.returncode:
            return f"mergekit fails: {done.stderr.strip().splitlines()[-1][:100]}"
        run_recipes(read_recipes(recipe), ours)
        read = by_token if "tokenizer" in text else weights
        return worst(read(theirs), read(ours))


def worst(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> str:
    if a.keys() != b.keys():
        return f"other tensors: {sorted(a.keys() ^ b.keys())[:3]}"
    found = [
        (float((a[name] - b[name]).abs().max() / a[name].abs().max().clamp(min=1e-30)), name)
        for name in a
    ]
    return "{:.1e}  {}".format(*max(found))


def by_token(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor; those with a row per token in the order of the tokens, not of their ids."""
    found = weights(folder)
    vocabulary = load_tokenizer(folder).get_vocab()
    order = [vocabulary[token] for token in sorted(vocabulary)]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = found[name]
        order_here = [row for row in order if row < len(rows)]
        found[name] = torch.cat([rows[order_here], rows[len(vocabulary) :]])
    return found


if __name__ == "__main__":
    main()
