"""What an engine is made with: widths, memory, and who may run when."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from typing import Any

from gemma_ext._host import Scheduler
from gemma_ext.serve.policies import EXACT, POLICIES
from gemma_ext.serve.route import Shape
from gemma_ext.serve.runner import Sizes

PAGE = 16  # tokens
MODES = ("cdb", "csb", "lockstep", "static")
PRESSURES = ("none", "reserve", "recompute", "offload")
ORDERS = ("fifo", "deepest", "uniform")
ROUTINGS = ("auto", "host", "device")
_AHEAD = 2  # ticks that are under way, or have not been heard of
_OVERWRITTEN = ("single", "first_then_shared", "modulo")  # keys of a loop take another's place


@dataclass(frozen=True)
class EngineConfig:
    """Sizes and policies of an engine.

    Attributes:
        width: tokens in a run of the block at most, W.
        requests: that hold pages at a time, R; more than `width` keep a step full while some wait
            for the head. None for 2 W.
        max_model_len: tokens of prompt and output of a request at most.
        pages: of 16 tokens, of the KV pool; None for R requests of `max_model_len`.
        mode: "cdb" refills at every loop; "csb" at full passes, every token runs all loops;
            "lockstep" when all tokens of a pass have left; "static" when all requests have ended.
        kv_policy: of tokens that leave early (`gemma_ext.serve.policies`); keep: its k.
        backlog: unfilled tokens of a request at most, beyond which it fills before it goes on.
        fill_rows: rows of a run beyond W for tokens that fill. None for W + 16: the fills of an
            average step, and what one token that goes deep finds owed at a time.
        prefill_tokens: rows of prompts in a run at most.
        mixed: prompt rows share runs with tokens, else they take turns.
        min_coda_batch: tokens that wait for the head until it runs, unless nothing else can.
        min_free_requests: free places before requests are admitted, unless none runs.
        order: of tokens that are ready: "fifo"; "deepest" loops first; "uniform" runs one loop
            alone where it and the rest fill W each, which reads fewer adapters.
        kv_pressure: "reserve" gives a request all its pages at once. The others give them one by
            one and stop a request that finds none. When all have stopped, the one with the least
            computed ends with an error ("none"), is computed again later ("recompute", exact
            policies only) or waits in host memory ("offload").
        margin: share of the pool that admission leaves free under them.
        drafts: tokens that early exits of a request may run ahead of its output. With any, an exit
            is a draft: it is told once the loops that it skipped give the same token, and replaced
            by theirs where they do not, so that outputs are those of all loops. 0: exits are final.
        prefix_cache: pages of finished prefixes are kept and shared; fill_on_finish: the loops
            that an output skipped are run after its end, so that it can be shared too.
        routing: who reads exits and tokens and makes the next rows: the "host" after every step, or
            the "device" itself, which the host hears of a tick later (`gemma_ext.serve.router`);
            "auto" is the device on a card where it can, else the host.
        verify: every run that the host plans checks that the keys it reads are there.

    Raises:
        ValueError: one sentence that begins with the attribute's name.
    """

    width: int = 16
    requests: int | None = None
    max_model_len: int = 1024
    pages: int | None = None
    mode: str = "cdb"
    kv_policy: str = "exact_lazy"
    keep: int = 1
    backlog: int = 64
    fill_rows: int | None = None
    prefill_tokens: int = 256
    mixed: bool = True
    min_coda_batch: int = 1
    min_free_requests: int = 1
    order: str = "fifo"
    kv_pressure: str = "reserve"
    margin: float = 0.2
    drafts: int = 0
    prefix_cache: bool = False
    fill_on_finish: bool = False
    routing: str = "auto"
    verify: bool = False

    def __post_init__(self) -> None:
        if self.requests is None:
            object.__setattr__(self, "requests", 2 * self.width)
        if self.fill_rows is None:
            object.__setattr__(self, "fill_rows", self.width + 16)
        if self.pages is None:
            each = math.ceil(self.max_model_len / PAGE)
            object.__setattr__(self, "pages", self.requests * each)
        counts = ("width", "requests", "max_model_len", "pages", "keep", "backlog")
        for name in (*counts, "prefill_tokens", "min_coda_batch", "min_free_requests"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("fill_rows", "drafts"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        if self.min_free_requests > self.requests:
            raise ValueError(
                f"min_free_requests: expected at most the {self.requests} requests, "
                f"got {self.min_free_requests}"
            )
        if not 0 <= self.margin < 1:
            raise ValueError(f"margin: expected a share in [0, 1), got {self.margin}")
        words = {
            "mode": MODES,
            "kv_policy": POLICIES,
            "order": ORDERS,
            "kv_pressure": PRESSURES,
            "routing": ROUTINGS,
        }
        for name, legal in words.items():
            if getattr(self, name) not in legal:
                raise ValueError(
                    f"{name}: expected one of {', '.join(legal)}, got {getattr(self, name)!r}"
                )
        if self.kv_pressure == "recompute" and self.kv_policy not in EXACT:
            raise ValueError(
                f"kv_pressure: expected none, reserve or offload with kv_policy {self.kv_policy}, "
                "whose keys and values a second computation would change, got 'recompute'"
            )
        if self.kv_policy in _OVERWRITTEN and self.prefill_tokens % PAGE:
            raise ValueError(
                f"prefill_tokens: expected a multiple of {PAGE} with kv_policy {self.kv_policy}, "
                f"got {self.prefill_tokens}"
            )
        if self.fill_on_finish and not (self.prefix_cache and self.kv_policy in EXACT):
            raise ValueError(
                "fill_on_finish: expected a prefix_cache and an exact kv_policy with it, "
                f"got {self.prefix_cache} and {self.kv_policy}"
            )
        if self.drafts > self.backlog:
            raise ValueError(
                f"drafts: expected at most the backlog of {self.backlog}, got {self.drafts}"
            )
        if self.drafts and (reason := self._undrafted()):
            raise ValueError(f"drafts: expected {reason} with them, got another")
        if self.routing == "device" and (reason := self._host_only()):
            raise ValueError(f"routing: expected {reason} with 'device', got another")

    def _undrafted(self) -> str | None:
        """What would have to be otherwise for exits to be drafts."""
        if self.mode != "cdb":
            return "mode cdb"
        if self.kv_policy not in EXACT:
            return f"kv_policy {' or '.join(EXACT)}"
        return "another kv_pressure than offload" if self.kv_pressure == "offload" else None

    def _host_only(self) -> str | None:
        """What would have to be otherwise for a device to route."""
        for name, wanted in (
            ("min_coda_batch", 1),  # a head of fixed shape costs the same for fewer rows
            ("drafts", 0),
        ):
            if getattr(self, name) != wanted:
                return f"{name} {wanted}"
        return None

    def routed(self, device: bool) -> EngineConfig:
        """The same with "auto" decided: by the device if it may and these settings let it."""
        if self.routing != "auto":
            return self
        chosen = "device" if device and self._host_only() is None else "host"
        return replace(self, routing=chosen)

    @property
    def ring(self) -> int:
        """Hidden states of a request that a device routes: what it owes, and the current one."""
        return self.backlog + 1 if self.kv_policy in EXACT else 1

    @property
    def slots(self) -> int:
        """Hidden states at a time: of prompts, tokens that run, and backlogs."""
        if self.routing == "device":
            return self.prefill_tokens + self.requests * self.ring + 1  # scratch
        deferred = self.backlog + 1 if self.kv_policy in EXACT else 0
        return self.requests * (deferred + 1) + self.prefill_tokens

    @property
    def sizes(self) -> Sizes:
        """Of a runner."""
        rows = self.requests + (self.routing == "device")  # scratch
        return Sizes(rows, self.slots, self.pages, self.max_model_len)

    def shape(self, loops: int, prefix: int = 0) -> Shape:
        """Of a device that routes tokens."""
        owes = loops > 1 and self.kv_policy in EXACT
        rows = self.width + (self.fill_rows if owes else 0)
        sizes = (self.requests, self.width, rows, loops, self.backlog, self.ring)
        return Shape(
            *sizes,
            self.prefill_tokens,
            prefix,
            mode=self.mode,
            order=self.order,
            eager=self.kv_policy == "exact_eager",
            finishes=self.fill_on_finish,
        )

    def scheduler(self, loops: int, revision: str = "", prefix: int = 0) -> Scheduler:
        """The scheduler for a model of so many loops.

        Args:
            revision: of the model; prefixes of another are not shared.
            prefix: keys and values in front of every prompt, in pages of each request.
        """
        exact = self.kv_policy in EXACT or loops == 1
        fills = {"exact_eager": "eager", "propagate": "write", "copy": "write"}
        named = fills.get(self.kv_policy, "lazy" if exact else "none")
        salt = f"{revision}|{self.kv_policy}|{self.keep}|{loops} loops complete"
        options: dict[str, Any] = {
            name: getattr(self, name)
            for name in (
                "width", "fill_rows", "requests", "pages", "backlog", "order", "margin", "mode",
                "fill_on_finish", "verify", "drafts",
            )
        }  # fmt: skip
        device = self.routing == "device"
        return Scheduler(
            loops=loops,
            slots=self.prefill_tokens if device else self.slots,
            mixed=self.mixed and not device,
            device=device,
            ahead=_AHEAD,
            request_pages=math.ceil((self.max_model_len + prefix) / PAGE),
            prefix=prefix,
            prefill=self.prefill_tokens,
            aligned=self.kv_policy in _OVERWRITTEN and loops > 1,
            min_coda=self.min_coda_batch,
            min_rows=self.min_free_requests,
            pressure=self.kv_pressure,
            fills="lazy" if loops == 1 else named,
            publish=("all" if exact else "prompt") if self.prefix_cache else "none",
            salt=hashlib.sha256(salt.encode()).hexdigest(),
            **options,
        )
