"""From the name of a model to a server of it."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from gemma_ext.serve.async_engine import AsyncEngine
from gemma_ext.serve.config import EngineConfig
from gemma_ext.serve.engine import Engine
from gemma_ext.serve.exits import ExitTest
from gemma_ext.serve.http.app import build_app
from gemma_ext.serve.http.served import Served
from gemma_ext.serve.http.settings import Settings
from gemma_ext.serve.memory import check_sizes, pages_for
from gemma_ext.serve.policies import trained_policy
from gemma_ext.serve.protocol import SamplingParams
from gemma_ext.serve.trace import Trace
from gemma_ext.serve.weights import Weights, read_weights

if TYPE_CHECKING:
    from fastapi import FastAPI
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
DEFAULT_LENGTH = 4096  # of the context, where the model allows more


@dataclass(frozen=True)
class Launch:
    """All that a replica needs to build its server; picklable.

    Attributes:
        model: "pocket", "pocket:nano", a folder (recursive or not), or the id of a hub.
        name: what clients call it; None for the last part of `model`.
        device: "cpu", "cuda", "cuda:1", or "auto" for a card if there is one.
        dtype: of `DTYPES`, or "auto" for float32 on a CPU and the stored one on a card.
        engine: fields of `EngineConfig`; kv_policy and keep are those that the model was trained
            with, unless they are given.
        kv_memory: share of the free memory that the KV pool has at most, unless `engine` says how
            many pages it has.
        exits: fields of `ExitTest`.
        exit_weights: safetensors file with `weight` and `bias` of a learned exit test.
        shortlist: read codes of the head for greedy requests (`gemma_ext.serve.readout.Head`).
        trace: file that gets a line for every step (`gemma_ext.serve.trace`).
        chat_template: used in place of the tokenizer's.
        settings: bounds of requests.
        most_open: requests at a time.
        threads: of torch on a CPU; None for its own choice.
        ranks: processes that share one model; on cards, one each.
    """

    model: str = "pocket"
    name: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    engine: dict[str, Any] = field(default_factory=dict)
    kv_memory: float = 0.5
    exits: dict[str, Any] = field(default_factory=dict)
    exit_weights: str | None = None
    shortlist: bool = False
    trace: str | None = None
    chat_template: str | None = None
    settings: Settings = field(default_factory=Settings)
    most_open: int = 256
    threads: int | None = None
    ranks: int = 1

    def check(self) -> None:
        """Raises a ValueError, as `app` does, for options that are wrong whatever the model."""
        EngineConfig(**self._given)
        if self.exit_weights is None:
            ExitTest(**self.exits)

    def app(self) -> FastAPI:
        """Loads the model and makes its engine.

        Raises:
            ValueError: an option that does not fit; one sentence that begins with its name.
        """
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        self.check()  # before the model is read
        exits = ExitTest(**self.exits, **_learned(self.exit_weights))
        exits.own_threshold(SamplingParams())
        file = _opened(self.trace) if self.trace else None
        model, tokenizer = self._load(0)
        config = self._config(model)
        served = Served(
            self.name or served_name(self.model),
            tokenizer,
            ends_of_text(model, tokenizer),
            chat_template=self.chat_template,
            facts={
                "kv_policy": config.kv_policy,
                "trained_kv_policy": trained_policy(model)["kv_policy"],
                "exit_test": exits.name,
                "exit_threshold": exits.threshold,
            },
        )
        engine, finish = self._engine(model, config, exits)
        if file:
            engine.trace = Trace(file)
            weakref.finalize(engine, file.close)
        asked = AsyncEngine(lambda: engine, finish=finish, most_open=self.most_open)
        return build_app(asked, served, self.settings)

    def weights(self, rank: int) -> Weights:
        """Of the whole model, where `rank` computes."""
        model, _ = self._load(rank)
        return read_weights(model)

    def _load(self, rank: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        device = _device(self.device)
        if device.type == "cuda" and self.ranks > 1:
            device = torch.device("cuda", rank)
            torch.cuda.set_device(device)
        return load_model(self.model, device, _dtype(self.dtype, device))

    def _engine(
        self, model: PreTrainedModel, config: EngineConfig, exits: ExitTest
    ) -> tuple[Engine, Callable[[], None]]:
        if self.ranks > 1 and self.shortlist:
            raise ValueError(f"shortlist: expected one rank with it, got {self.ranks}")
        if self.ranks == 1:
            engine = Engine.of_model(model, config, exits=exits, shortlist=self.shortlist)
            return engine, lambda: None
        if config.kv_pressure == "offload":
            raise ValueError("kv_pressure: expected another with more than one rank, got offload")
        from gemma_ext.serve.ranks import Ranks

        whole = read_weights(model)
        backend = "nccl" if whole.device.type == "cuda" else "gloo"
        config = config.routed(device=False)
        if config.routing == "device":
            raise ValueError(f"routing: expected host with {self.ranks} ranks, got 'device'")
        options = {"policy": config.kv_policy, "keep": config.keep, "exits": exits}
        options["drafts"] = config.drafts > 0
        ranks = Ranks(whole, self.weights, self.ranks, backend, config.sizes, options)
        return Engine(ranks.runner, config), ranks.close

    @property
    def _given(self) -> dict[str, Any]:
        return {name: value for name, value in self.engine.items() if value is not None}

    def _config(self, model: PreTrainedModel) -> EngineConfig:
        given = self._given
        longest = model.config.max_position_embeddings
        length = given.get("max_model_len", min(longest, DEFAULT_LENGTH))
        if length > longest:
            raise ValueError(
                f"max_model_len: expected at most the {longest} positions of the model, "
                f"got {length}"
            )
        config = EngineConfig(**{**trained_policy(model), **given, "max_model_len": length})
        if "pages" not in given:
            pages = min(config.pages, pages_for(model, self.kv_memory))
            config = dataclasses.replace(config, pages=pages)
        check_sizes(model, config.slots, config.pages if self.ranks == 1 else 0)  # ranks share them
        return config


def load_model(
    name: str, device: torch.device, dtype: torch.dtype | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM in evaluation mode, recursive where its folder says so, and its tokenizer.

    Args:
        name: "pocket", "pocket:nano", a folder, or the id of a hub.
        dtype: of the weights; None for the stored one.

    Raises:
        ValueError: nothing of that name, or something that cannot be read.
    """
    kind, _, size = name.partition(":")
    if kind == "pocket":
        from gemma_ext import pocket

        if size and size not in pocket.SIZES:
            raise ValueError(
                f"model: expected pocket:{' or pocket:'.join(pocket.SIZES)}, got {name!r}"
            )
        made = pocket.load(size or "small")
        return made.model.to(device, dtype).eval(), made.tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from gemma_ext.nn import recursive

    folder = Path(name).is_dir()
    wanted = f"model: expected pocket, a folder or the id of a hub, got {name!r}"
    if not folder and name.startswith(("/", ".", "~")):
        raise ValueError(wanted)
    if folder and not (Path(name) / "config.json").is_file():
        raise ValueError(f"model: expected a folder with a config.json, got {name!r}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        if folder:
            return recursive.load(name, dtype=dtype, device=device), tokenizer
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype or "auto")
    except (OSError, ValueError, SafetensorError) as error:
        why = str(error).partition("\n")[0]
        raise ValueError(f"{wanted}: {why}") from error
    return model.to(device).eval(), tokenizer


def served_name(model: str) -> str:
    """ "pocket" for the pocket, the folder's own name for a folder, the id for a hub's model."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def ends_of_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens that end a text: of the generation config, the config or the tokenizer."""
    for holder in (model.generation_config, model.config, tokenizer):
        ends = getattr(holder, "eos_token_id", None)
        if ends is not None:
            return tuple(ends) if isinstance(ends, (list, tuple)) else (ends,)
    return ()


def _device(name: str) -> torch.device:
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if cards else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu, cuda, cuda:1 or auto, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= cards:
        raise ValueError(f"device: expected one of the {cards} cards that are there, got {name!r}")
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype | None:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else None
    if name not in DTYPES:
        raise ValueError(f"dtype: expected auto, {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def _opened(trace: str) -> IO[str]:
    try:
        return open(trace, "w", buffering=1)
    except OSError as error:
        raise ValueError(
            f"trace: expected a file that can be written, got {trace}: {error.strerror}"
        ) from None


def _learned(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"exit_weights: expected a safetensors file, got {path}: {error}"
        ) from None
    if "weight" not in tensors or not set(tensors) <= {"weight", "bias"}:
        raise ValueError(f"exit_weights: expected weight and bias in {path}, got {sorted(tensors)}")
    return tensors
