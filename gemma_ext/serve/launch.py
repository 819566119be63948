"""From the name of a model to a server of it."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
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
from gemma_ext.serve.loading import (
    DTYPES,
    device_of,
    dtype_of,
    ends_of_text,
    load_model,
    served_name,
)
from gemma_ext.serve.memory import check_sizes, pages_for
from gemma_ext.serve.policies import trained_policy
from gemma_ext.serve.protocol import SamplingParams
from gemma_ext.serve.trace import Trace
from gemma_ext.serve.weights import Weights, read_weights

if TYPE_CHECKING:
    from fastapi import FastAPI
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["DTYPES", "Launch", "ends_of_text", "load_model", "served_name"]

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
        device = device_of(self.device)
        if device.type == "cuda" and self.ranks > 1:
            device = torch.device("cuda", rank)
            torch.cuda.set_device(device)
        return load_model(self.model, device, dtype_of(self.dtype, device))

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
