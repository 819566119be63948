"""One shaper for every trainer: the rules in their order, with what they remember."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gemma_ext.papers.reward_shaping import rules
from gemma_ext.papers.reward_shaping.running import Running
from gemma_ext.papers.reward_shaping.shaping import Shaping

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_SHARED = "shared"
References = Tensor | Sequence[Sequence[float]]


class RewardShaper:
    """Scores of a reward model to the terminal rewards of reinforcement learning.

    Arithmetic is in float32, or float64 for float64 scores; statistics are in float64, merged over
    the ranks of a process group, updated by a training batch before it is shaped and frozen in
    evaluation. An evaluation before the first training batch is shaped by its own statistics.

    Args:
        shaping: the rules, or the name of one.
        group: ranks that share statistics; None is the world where torch.distributed is set up.
            With a rule that has statistics, each rank has to call the shaper equally often.

    Example:
        >>> shaper = RewardShaper("par")
        >>> shaper(torch.tensor([1.0]), [[0.0, 1.0]])
        tensor([0.6155])
    """

    def __init__(self, shaping: Shaping | str, group: ProcessGroup | None = None) -> None:
        self.shaping = Shaping.named(shaping) if isinstance(shaping, str) else shaping
        self.group = group
        self.training = True
        shared = self.shaping.quirks.shared
        names = (_SHARED,) if shared and self.shaping.running else self.shaping.running
        self._running = {name: Running() for name in names}

    def train(self, mode: bool = True) -> RewardShaper:
        self.training = mode
        return self

    def eval(self) -> RewardShaper:
        return self.train(False)

    def statistics(self, rule: str) -> Running:
        """What a rule remembers.

        Raises:
            ValueError: the rule is off or has no statistics.
        """
        if rule not in self.shaping.running:
            raise ValueError(f"rule: expected one of {list(self.shaping.running)}, got {rule!r}")
        return self._running[_SHARED if self.shaping.quirks.shared else rule]

    def state_dict(self) -> dict[str, dict[str, float]]:
        """Statistics by rule; JSON keeps them to the last bit."""
        return {name: running.state_dict() for name, running in self._running.items()}

    def load_state_dict(self, state: Mapping[str, dict[str, Any]]) -> None:
        """Raises a ValueError where the state is that of other rules."""
        if set(state) != set(self._running):
            raise ValueError(
                f"state: expected statistics of {sorted(self._running)}, got {sorted(state)}"
            )
        self._running = {name: Running.from_state(state[name]) for name in self._running}

    def __call__(
        self,
        rewards: Tensor | Sequence[float],
        references: References | None = None,
        *,
        mask: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """Shaped rewards [B].

        Args:
            rewards: [B] scores of a reward model, of any floating dtype.
            references: [B, M] scores of reference responses to the same prompts, or B lists of any
                lengths. They include the length penalty if the rewards get one.
            mask: [B, M] bool, which references there are; for a tensor.
            lengths: [B] tokens of the responses; for the length penalty.

        Raises:
            ValueError: a score that is not finite, a row without references, lsc with fewer than
                two, a missing argument or another shape.
        """
        shaping = self.shaping
        r = _rewards(rewards, shaping.quirks.dtype)
        q, real = None, None
        if shaping.needs_references:
            q, real = _references(references, mask, r, shaping)
        if shaping.ceil is not None:
            r = r.clamp(max=shaping.ceil)
        if shaping.length_penalty is not None:
            r = rules.penalised(r, _lengths(lengths, r), *shaping.length_penalty)
        # the first so many references, and all of them for lsc
        first, kept = (x if x is None else x[:, : shaping.max_references] for x in (q, real))
        if shaping.centred:
            r = rules.centred(r, first, kept)
        if shaping.sgfc:
            r = rules.sgfc(r, first, kept, shaping.k)
        if shaping.meanstd:
            seen = self._seen("meanstd", r)
            r = (r - seen.mean) / (seen.std or 1.0)
        if shaping.clip:
            seen = self._seen("clip", r)
            r = r.clamp(seen.mean - seen.std, seen.mean + seen.std)
        if shaping.ceil is not None:
            r = r.clamp(max=shaping.ceil)
        if shaping.minmax:
            seen = self._seen("minmax", r)
            wide = seen.high > seen.low
            r = (r - seen.low) / (seen.high - seen.low) if wide else torch.full_like(r, 0.5)
        relative = (first, kept) if shaping.relative else (None, None)
        if shaping.sigmoid:
            r = rules.sigmoid(r, *relative, shaping.k)
        if shaping.tanh:
            r = rules.tanh(r, *relative)
        if shaping.polynomial:
            r = rules.polynomial(r, *relative)
        if shaping.quantile:
            r = rules.quantile(r, first, kept)
        if shaping.lsc:
            r = rules.lsc(r, q, real, shaping.level)
        return r

    def _seen(self, rule: str, r: Tensor) -> Running:
        """Statistics to shape this batch by."""
        quirks = self.shaping.quirks
        name = _SHARED if quirks.shared else rule
        values = r.detach() if quirks.dtype is not None else r.detach().double()
        before = self._running[name]
        if not self.training and not quirks.update_in_evaluation and before.count:
            return before
        batch = Running.of(values)
        if not quirks.per_rank:
            batch = batch.gathered(self.group)
        seen = before.merged(batch)
        if self.training or quirks.update_in_evaluation:
            self._running[name] = seen
        return seen


def _rewards(rewards: Tensor | Sequence[float], dtype: torch.dtype | None) -> Tensor:
    r = torch.as_tensor(rewards)
    if r.ndim != 1:
        raise ValueError(f"rewards: expected [B], got {list(r.shape)}")
    bad = (~torch.isfinite(r)).nonzero()
    if len(bad):
        row = int(bad[0])
        raise ValueError(f"rewards: expected finite scores, got {float(r[row])} in row {row}")
    return r.to(dtype or (torch.float64 if r.dtype == torch.float64 else torch.float32))


def _references(
    references: References | None, mask: Tensor | None, r: Tensor, shaping: Shaping
) -> tuple[Tensor, Tensor | None]:
    """[B, M] scores and which of them there are, None for all."""
    if references is None:
        raise ValueError("references: expected the scores of reference responses, got none")
    if isinstance(references, Tensor):
        q = references.to(r)
        real = None if mask is None else mask.to(r.device, torch.bool)
    else:
        q, real = padded(references, r)
    if q.ndim != 2 or len(q) != len(r) or (real is not None and real.shape != q.shape):
        shapes = [list(x.shape) for x in (q, real) if x is not None]
        raise ValueError(f"references: expected [{len(r)}, M] and a mask like it, got {shapes}")
    bad = ~torch.isfinite(q) if real is None else real & ~torch.isfinite(q)
    if bad.any():
        row, place = bad.nonzero()[0].tolist()
        raise ValueError(
            f"references: expected finite scores, got {float(q[row, place])} in row {row}"
        )
    real = torch.ones_like(q, dtype=torch.bool) if real is None else real
    used = real[:, : shaping.max_references].sum(1)
    if shaping.lsc and (fewest := real.sum(1)).numel() and int(fewest.min()) < 2:
        row = int(fewest.argmin())
        raise ValueError(
            f"references: expected at least 2 for lsc, got {int(fewest[row])} in row {row}"
        )
    if used.numel() and not used.all():
        row = int(used.argmin())
        if shaping.without_references == "raise" or shaping.sgfc or shaping.quantile:
            raise ValueError(f"references: expected at least 1, got none in row {row}")
        # one reference of 0 is the uncentred form
        if not q.shape[1]:
            q, real = r.new_zeros(len(r), 1), torch.zeros(len(r), 1, dtype=torch.bool).to(r.device)
        empty = (used == 0)[:, None] & (torch.arange(q.shape[1], device=q.device) == 0)
        q, real = torch.where(empty, 0.0, q), real | empty
    return q, real if not real.all() else None


def padded(references: Sequence[Sequence[float]], like: Tensor) -> tuple[Tensor, Tensor]:
    """Lists of any lengths as [B, M] scores and their mask."""
    width = max(map(len, references), default=0)
    q, real = like.new_zeros(len(references), width), torch.zeros(len(references), width).bool()
    for at, row in enumerate(references):
        q[at, : len(row)] = torch.tensor([float(x) for x in row], dtype=torch.float64).to(q)
        real[at, : len(row)] = True
    return q, real.to(q.device)


def _lengths(lengths: Tensor | Sequence[int] | None, r: Tensor) -> Tensor:
    if lengths is None:
        raise ValueError("lengths: expected the tokens of each response, got none")
    found = torch.as_tensor(lengths, device=r.device)
    if found.shape != r.shape:
        raise ValueError(f"lengths: expected [{len(r)}], got {list(found.shape)}")
    return found
