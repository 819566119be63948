"""Names of models in recipes: `path[@revision][+lora[@revision]]`, and the folders they mean."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gemma_ext.extras import require
from gemma_ext.souping.recipes.marks import Entry

_FILES = ["*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.json"]
_TEXTS = ["*.model", "*.txt", "*.jinja", "*.py"]


@dataclass(frozen=True)
class Location:
    """A folder or a repository of the hub.

    Attributes:
        path: of a local folder, else `owner/name` on the hub.
        revision: of the repository; None for its main branch.
    """

    path: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.path}@{self.revision}" if self.revision else self.path


@dataclass(frozen=True)
class ModelReference:
    """A model, with an adapter to be added to its weights or without."""

    model: Location
    lora: Location | None = None

    def __str__(self) -> str:
        return f"{self.model}+{self.lora}" if self.lora else str(self.model)


def parse_reference(text: str) -> ModelReference:
    """`path[@revision][+lora[@revision]]`.

    A folder that exists under the whole text is taken as it is, so that + and @ may be in its name.

    Raises:
        ValueError: a part is empty.
    """
    if Path(text).expanduser().is_dir():
        return ModelReference(Location(text))
    model, plus, lora = text.partition("+")
    return ModelReference(_location(model, text), _location(lora, text) if plus else None)


def read_reference(entry: Entry) -> ModelReference:
    """A reference as text, or as mergekit's mapping {model: {path, revision}, lora}.

    Raises:
        RecipeError: as of `parse_reference`, or an `override_architecture`.
    """
    if entry.shape == "mapping":
        keys = entry.mapping(("model", "lora", "override_architecture", "path", "revision"))
        if "override_architecture" in keys:
            raise keys["override_architecture"].error(
                "not supported: layers are found in the tensors' own names"
            )
        if "path" in keys:
            return ModelReference(_read_location(entry))
        if "model" not in keys:
            raise entry.error("expected model or path among the keys")
        lora = keys.get("lora")
        return ModelReference(_read_location(keys["model"]), lora and _read_location(lora))
    try:
        return parse_reference(entry.text())
    except ValueError as error:
        raise entry.error(str(error)) from None


def locate(place: Location, cache_dir: str | None = None) -> Path:
    """The folder with the files of a model or an adapter.

    A repository of the hub is taken from the cache of huggingface_hub, and downloaded into it where
    it is missing and there is a network.

    Args:
        cache_dir: of huggingface_hub; None for its own.

    Raises:
        FileNotFoundError: there is none, in one sentence.
        ImportError: a repository is asked for and huggingface_hub is missing.
    """
    folder = Path(place.path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise FileNotFoundError(f"{place.path}: expected a folder with a model, got a file")
    if folder.is_absolute() or place.path.startswith((".", "~")) or place.path.count("/") != 1:
        raise FileNotFoundError(f"{place.path}: no such folder")
    require(f"{place}, which is no folder but a repository of the hub,", "hf", "huggingface_hub")
    from huggingface_hub import snapshot_download

    options = {"revision": place.revision, "cache_dir": cache_dir}
    try:
        return Path(snapshot_download(place.path, **options, local_files_only=True))
    except Exception as error:
        missing = error
    try:
        return Path(snapshot_download(place.path, **options, allow_patterns=_FILES + _TEXTS))
    except Exception as error:
        # a revision, a network or a login may be at fault: the last line of either says which
        reason = (str(error) or str(missing)).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{place}: no such folder, not in the cache of the hub, and not to be downloaded: "
            f"{reason}"
        ) from None


def _location(text: str, whole: str) -> Location:
    path, at, revision = text.strip().partition("@")
    if not path or (at and not revision):
        raise ValueError(f"expected path[@revision][+lora[@revision]], got {whole!r}")
    return Location(path, revision or None)


def _read_location(entry: Entry) -> Location:
    if entry.shape == "scalar":
        return _location(entry.text(), entry.text())
    keys = entry.mapping(("path", "revision"))
    if "path" not in keys:
        raise entry.error("expected path among the keys")
    revision = keys.get("revision")
    return Location(keys["path"].text(), revision and revision.text())
