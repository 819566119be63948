"""One search of GCG: its buffer of strings, its step, and what it goes on from after a kill."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gemma_ext.papers.continuous_at.evaluation.candidates import RoundTrip, draw
from gemma_ext.papers.continuous_at.evaluation.config import GCGConfig, GCGResult
from gemma_ext.papers.continuous_at.evaluation.probe import Probe
from gemma_ext.papers.continuous_at.evaluation.scorer import Opened, Scores, TargetScorer
from gemma_ext.papers.continuous_at.evaluation.template import SLOT, render, split, with_slot

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FILL = [*".,!?;:()[]{}@#$%&*wxyz"]  # of a buffer's further strings


class Search:
    """The state of one search.

    Attributes:
        losses, strings: as in `GCGResult`, so far.
        stopped: whether a candidate had the whole target, and the search ends there.

    Args:
        banned: ids that are not drawn.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: GCGConfig,
        banned: Tensor,
        messages: str | Sequence[Mapping[str, str]],
        target: str,
    ) -> None:
        self.config, self.tokenizer, self.banned = config, tokenizer, banned
        parts = split(self.tokenizer, messages, target)
        self.scorer = TargetScorer(
            model,
            parts,
            share=config.use_prefix_cache,
            batch_size=config.batch_size,
            mellowmax=config.mellowmax_alpha if config.use_mellowmax else None,
        )
        self.keep: RoundTrip | None = None
        if config.filter_prompt:
            texts = render(self.tokenizer, with_slot(messages)).split(SLOT)
            around = tuple(zip(texts, parts[:2], strict=True))
            self.keep = RoundTrip(self.tokenizer, around)
        elif config.filter_ids:
            self.keep = RoundTrip(self.tokenizer)
        self.probe: Probe | None = None
        if config.probe_sampling_config is not None:
            self.probe = Probe(
                config.probe_sampling_config, self.tokenizer, messages, target, self.scorer
            )
        self.generator = torch.Generator()
        seed = torch.randint(2**63 - 1, ()).item() if config.seed is None else config.seed
        self.generator.manual_seed(seed)
        self.losses: list[float] = []
        self.strings: list[str] = []
        self.stopped = False
        self._buffer: list[tuple[float, list[int]]] = []

    @property
    def buffer(self) -> list[tuple[float, list[int]]]:
        """(loss, ids) of the strings that are kept, the best first."""
        if not self._buffer:
            first = self._first()
            losses = self.scorer.score(first).losses.tolist()
            self._buffer = list(zip(losses, first.tolist(), strict=True))
            if self.config.buffer_size:
                self._buffer.sort(key=lambda entry: entry[0])
        return self._buffer

    def step(self) -> None:
        """Draws candidates, scores them and goes on from the best."""
        config = self.config
        opened = self.scorer.open(torch.tensor(self.buffer[0][1]))
        gradient = self.scorer.token_gradient(opened)
        gradient[:, self.banned.to(gradient.device)] = torch.inf
        candidates = draw(
            opened.ids, gradient, config.search_width, config.topk, config.n_replace, self.generator
        )
        loss, ids, matched = self._best(candidates, opened)
        self.losses.append(loss)
        self.stopped = config.early_stop and matched
        self._remember(loss, ids)
        self.strings.append(self.tokenizer.batch_decode([self.buffer[0][1]])[0])

    def _best(self, candidates: Tensor, opened: Opened) -> tuple[float, list[int], bool]:
        """Loss and ids of the best candidate, and whether any of them has the whole target."""
        # of equal ones the first, in the order they were drawn
        distinct, where = candidates.unique(dim=0, return_inverse=True)
        if self.probe is None:
            scores = self.scorer.best(distinct, opened, self.keep)
        else:
            kept = distinct if self.keep is None else distinct[self.keep(distinct)]
            where, distinct = torch.arange(len(kept)), kept
            scores = self._probed(kept, opened)
        losses = scores.losses[where]
        if not len(losses) or losses.isinf().all():
            raise RuntimeError(
                "expected a candidate that has the ids of its text, got none of "
                f"{len(candidates)}; set filter_ids=False or another optim_str_init"
            )
        best = int(losses.argmin())
        return losses[best].item(), distinct[where[best]].tolist(), bool(scores.matched.any())

    def _probed(self, candidates: Tensor, opened: Opened) -> Scores:
        if not len(candidates):
            return Scores(torch.empty(0), torch.empty(0, dtype=torch.bool))
        return self.probe.score(candidates, opened, self.generator)

    def _remember(self, loss: float, ids: list[int]) -> None:
        buffer, size = self.buffer, self.config.buffer_size
        if size == 0:
            buffer[:] = [(loss, ids)]
        elif loss < buffer[-1][0]:
            if len(buffer) == size:
                buffer.pop()
            buffer.append((loss, ids))
            buffer.sort(key=lambda entry: entry[0])

    def _first(self) -> Tensor:
        """Strings [max(1, buffer_size), n] that the search starts from."""
        start, size = self.config.optim_str_init, max(1, self.config.buffer_size)
        texts = [start] if isinstance(start, str) else list(start)
        rows = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        if len({len(row) for row in rows}) != 1 or not rows[0]:
            raise ValueError(
                "expected optim_str_init to hold texts of one length in tokens, at least one, "
                f"got lengths {[len(row) for row in rows]}"
            )
        rows = torch.tensor(rows)
        if self.config.n_replace > rows.shape[1]:
            raise ValueError(
                f"expected n_replace to be at most the {rows.shape[1]} tokens of optim_str_init, "
                f"got {self.config.n_replace}"
            )
        if not isinstance(start, str):
            if len(rows) != size:
                raise ValueError(
                    f"expected {size} texts of optim_str_init for a buffer of "
                    f"{self.config.buffer_size}, got {len(rows)}"
                )
            return rows
        if size == 1:
            return rows
        fill = self.tokenizer(_FILL, add_special_tokens=False)["input_ids"]
        fill = torch.tensor([ids[0] for ids in fill])
        drawn = torch.randint(0, len(fill), (size - 1, rows.shape[1]), generator=self.generator)
        return torch.cat([rows, fill[drawn]])

    def result(self) -> GCGResult:
        if not self.losses:
            loss, ids = self.buffer[0]
            return GCGResult(loss, self.tokenizer.batch_decode([ids])[0], [], [])
        best = self.losses.index(min(self.losses))
        return GCGResult(self.losses[best], self.strings[best], self.losses, self.strings)

    def state(self) -> dict[str, Any]:
        """What `load` goes on from."""
        return {
            "losses": self.losses,
            "strings": self.strings,
            "buffer": self._buffer,
            "stopped": self.stopped,
            "generator": self.generator.get_state().numpy().tobytes().hex(),
        }

    def load(self, found: dict[str, Any], identity: dict[str, Any], path: Path) -> None:
        if found["identity"] != json.loads(json.dumps(identity)):
            raise ValueError(f"expected {path} to be of the same search, got one of another")
        self.losses, self.strings = found["losses"], found["strings"]
        self._buffer = [(loss, ids) for loss, ids in found["buffer"]]
        self.stopped = found["stopped"]
        state = bytearray.fromhex(found["generator"])
        self.generator.set_state(torch.frombuffer(state, dtype=torch.uint8))
