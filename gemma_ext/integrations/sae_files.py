"""Every dictionary format by its files: `load_dictionary` and `save_dictionary`.

| name                | found by                               |
|---------------------|----------------------------------------|
| saelens             | sae_weights.safetensors               |
| gemma_scope         | params.npz                            |
| gemma_scope_2       | params.safetensors                    |
| dictionary_learning | ae.pt                                 |
| sparsify            | sae.safetensors                       |
| crosscoder          | cc_weights.pt, model_final.pt or trainer_config.json |
| openai              | a .pt file with pre_bias              |
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from gemma_ext.extras import require
from gemma_ext.files import read_pickle
from gemma_ext.integrations import (
    crosscoder_files,
    dictionary_learning,
    gemma_scope,
    openai_sae,
    saelens,
    sparsify,
)
from gemma_ext.nn.sparse_autoencoder import SparseAutoencoder

_LOAD: dict[str, Callable[[Path], SparseAutoencoder]] = {
    "saelens": saelens.load_saelens,
    "gemma_scope": gemma_scope.load_gemma_scope,
    "gemma_scope_2": gemma_scope.load_gemma_scope,
    "dictionary_learning": dictionary_learning.load_dictionary_learning,
    "sparsify": sparsify.load_sparsify,
    "crosscoder": crosscoder_files.load_crosscoder,
    "openai": openai_sae.load_openai,
}
_SAVE: dict[str, Callable[[SparseAutoencoder, Path], None]] = {
    "saelens": saelens.save_saelens,
    "gemma_scope": gemma_scope.save_gemma_scope,
    "gemma_scope_2": partial(gemma_scope.save_gemma_scope, version=2),
    "dictionary_learning": dictionary_learning.save_dictionary_learning,
    "sparsify": sparsify.save_sparsify,
    "crosscoder": crosscoder_files.save_crosscoder,
    "openai": openai_sae.save_openai,
}
FORMATS = tuple(_LOAD)
_HUB = "hf:"
_FILES = {
    saelens.WEIGHTS: "saelens",
    gemma_scope.ARRAYS: "gemma_scope",
    gemma_scope.PARAMETERS: "gemma_scope_2",
    dictionary_learning.WEIGHTS: "dictionary_learning",
    sparsify.WEIGHTS: "sparsify",
    crosscoder_files.OLDER_WEIGHTS: "crosscoder",
    crosscoder_files.LAST: "crosscoder",
    "trainer_config.json": "crosscoder",
}


def load_dictionary(path: str | Path, format: str | None = None) -> SparseAutoencoder:
    """The dictionary at `path`: a folder, a file, or hf:REPOSITORY:FOLDER of the hub.

    Args:
        format: one of FORMATS; None finds it by the files that are there.

    Raises:
        ValueError: no known format.
        ImportError: huggingface_hub is missing.

    Example:
        >>> load_dictionary("hf:google/gemma-scope-2b-pt-res:layer_12/width_16k/average_l0_82")
    """
    path = _fetched(str(path)) if str(path).startswith(_HUB) else Path(path)
    return _LOAD[_known(format or found_format(path))](path)


def save_dictionary(sae: SparseAutoencoder, path: str | Path, format: str = "saelens") -> None:
    """Writes `sae` to `path`: a folder, for openai a file.

    Raises:
        ValueError: no such format, or a dictionary that it has no word for.
    """
    _SAVE[_known(format)](sae, Path(path))


def found_format(path: Path) -> str:
    """Name of the format of a folder or file.

    Raises:
        ValueError: none.
    """
    if path.is_dir():
        for name, found in _FILES.items():
            if (path / name).exists():
                return found
    elif path.name in _FILES:
        return _FILES[path.name]
    elif path.suffix == ".npz":
        return "gemma_scope"
    elif path.is_file():
        return "openai" if "pre_bias" in read_pickle(path) else "crosscoder"
    got = "a folder without their files" if path.is_dir() else "no such file or folder"
    raise ValueError(f"{path}: expected a dictionary of {', '.join(FORMATS)}, got {got}")


def _fetched(name: str) -> Path:
    """The folder in the cache of huggingface_hub; only its files are downloaded."""
    require("a dictionary of the hub", "hf", "huggingface_hub")
    from huggingface_hub import snapshot_download

    repository, _, folder = name.removeprefix(_HUB).partition(":")
    root = snapshot_download(repository, allow_patterns=f"{folder}/*" if folder else None)
    return Path(root) / folder


def _known(name: str) -> str:
    if name not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {name!r}")
    return name
