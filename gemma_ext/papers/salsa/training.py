"""PPO against a reference that the policy does not start from.

At step 0 such a policy pays KL(pi_1 || pi_soup) at every token, so that stopping at once is what
costs least. `PPOTrainer` with a report of what is paid before the first step, ways to pay less
of it, and an end of the run where responses collapse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gemma_ext.files import read_json, write_json
from gemma_ext.nn.ppo import Reference, Sequences, sequence_sum
from gemma_ext.nn.ppo.kl_control import FixedKL
from gemma_ext.papers.salsa.checks import SHORT, Collapse, step_zero
from gemma_ext.ppo import Generate, History, PPOConfig, PPOTrainer
from gemma_ext.ppo.checkpoint import POINTER
from gemma_ext.ppo.experience import TokenScores
from gemma_ext.ppo.metrics import ended
from gemma_ext.ppo.ranks import gathered, mean_of, rank
from gemma_ext.ppo.rollout import seed_of

STEP_ZERO = "step_zero.json"


@dataclass(frozen=True)
class Options:
    """What may be done about a divergence that is there from the start.

    Attributes:
        min_length: tokens before a response may end; such draws are the sampler's alone, ratios
            and divergences stay those of the whole distribution.
        length_normalised: pay the mean of a response's divergence, not its sum.
        subtract_step_zero: pay what is beyond the mean divergence of a token at step 0.
        kl_warmup: steps until beta is `kl_coef`, linear from its first share.
        collapse_share: of the median length at step 0, below which a policy has collapsed.
        collapse_patience: steps in a row below it that end the run; None to go on.

    Raises:
        ValueError: a number out of its range.
    """

    min_length: int = 0
    length_normalised: bool = False
    subtract_step_zero: bool = False
    kl_warmup: int = 0
    collapse_share: float = SHORT
    collapse_patience: int | None = 2

    def __post_init__(self) -> None:
        for name in ("min_length", "kl_warmup"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        if not 0 < self.collapse_share < 1:
            raise ValueError(f"collapse_share: expected (0, 1), got {self.collapse_share}")
        if self.collapse_patience is not None and self.collapse_patience < 1:
            raise ValueError(
                f"collapse_patience: expected None or at least 1, got {self.collapse_patience}"
            )

    def check(self, config: PPOConfig) -> None:
        """Refuses settings that these do not go with.

        Raises:
            ValueError: which.
        """
        if self.kl_warmup and config.kl_target is not None:
            raise ValueError("kl_warmup: expected 0 beside a kl_target, which moves beta as well")
        if (self.length_normalised or self.subtract_step_zero) and config.kl_in != "reward":
            raise ValueError("kl_in: expected reward for a divergence that is changed, got loss")
        if self.min_length and config.rollouts != "generate":
            raise ValueError(
                f"rollouts: expected generate with a min_length, got {config.rollouts}"
            )
        if self.min_length >= config.response_length:
            raise ValueError(
                f"min_length: expected less than the {config.response_length} tokens of a "
                f"response, got {self.min_length}"
            )


class SalsaTrainer(PPOTrainer):
    """`PPOTrainer` for a reference apart from the start.

    `step_zero.json` of the run holds what is paid before the first step. Lines of history have the
    divergence as measured, "salsa/kl" and "salsa/kl_per_token", where "objective/kl" has it as it
    is paid for, and "collapse/*".

    Args:
        options: see `Options`.
        anchors: models whose divergences `step_zero.json` has too, by name.
        arguments, named: of `PPOTrainer`.

    Attributes:
        zero: what `step_zero.json` holds, from `train` on.
        stopped: why the run ended early, or None.

    Raises:
        ValueError: options that do not go with the settings.
    """

    def __init__(
        self,
        config: PPOConfig,
        *arguments: Any,
        options: Options | None = None,
        anchors: Mapping[str, nn.Module | Reference] | None = None,
        **named: Any,
    ) -> None:
        self.options = options or Options()
        self.options.check(config)
        super().__init__(config, *arguments, **named)
        self.anchors = dict(anchors or {})
        self.zero: dict[str, float] = {}
        self.stopped: str | None = None
        self.collapse: Collapse | None = None
        if self.options.min_length and named.get("sampler") is None:
            self.sampler = _AtLeast(config, self.ends, self.pad, self.options.min_length)
        if self.options.kl_warmup:
            self.control = Rising(config.kl_coef, self.options.kl_warmup)

    def train(self) -> History:
        place = self.folder / STEP_ZERO
        # without a checkpoint, which is held against this run, the file may be another run's
        known = (self.folder / POINTER).exists() and place.exists()
        self.zero = read_json(place) if known else self._step_zero()
        if rank() == 0 and not known:
            write_json(place, self.zero)
        self.collapse = Collapse(
            [self.zero["length_median"]],
            share=self.options.collapse_share,
            patience=self.options.collapse_patience or self.steps + 1,
        )
        return super().train()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"collapse": self.collapse.state_dict()}

    def load_state_dict(self, kept: Mapping[str, Any]) -> None:
        super().load_state_dict(kept)
        self.collapse.load_state_dict(kept["collapse"])
        if self.collapse.collapsed:
            self.stopped, self.steps = self.collapse.sentence(), self.step

    def train_step(self) -> dict[str, float]:
        line = super().train_step()
        sequences, kl = self._paid
        lengths = sequences.lengths
        line |= mean_of(
            {"salsa/kl": sequence_sum(kl, lengths)[lengths > 0], "salsa/kl_per_token": kl}
        )
        some = lengths[lengths > 0].tolist()
        ends = ended(sequences, self.ends)[lengths > 0].tolist()
        everyone = [[x for part in gathered(of) for x in part] for of in (some, ends)]
        if self.collapse.update(*everyone):
            self.stopped = self.collapse.sentence()
            self.steps = self.step  # the loop sees its last step
        return line | self.collapse.seen

    def score_tokens(self, sequences: Sequences) -> TokenScores:
        found = super().score_tokens(sequences)
        self._paid = sequences, found.kl
        kl = found.kl
        if self.options.subtract_step_zero:
            kl = kl - self.zero["kl_reference_per_token"]
        if self.options.length_normalised:
            kl = kl / sequences.lengths[sequences.owners]
        return found._replace(kl=kl)

    def _step_zero(self) -> dict[str, float]:
        rollout = self.respond(self._rows(0), seed_of(self.config.seed, "step zero"))
        sequences = rollout.sequences
        found = step_zero(
            self.policy,
            {"reference": self.reference, **self.anchors},
            sequences,
            ended(sequences, self.ends),
            self.config.temperature,
        )
        return mean_of({name: torch.tensor([value]) for name, value in found.items()})

    def _run(self) -> dict[str, Any]:
        return super()._run() | {f"options.{k}": v for k, v in vars(self.options).items()}


class Rising(FixedKL):
    """beta that rises linearly over the first batches.

    Args:
        coef: that it rises to. batches: until then.
    """

    def __init__(self, coef: float, batches: int) -> None:
        self.full, self.batches, self.done = float(coef), batches, 0
        super().__init__(self.full / batches)

    def update(self, kl: float, samples: int) -> float:
        self.done += 1
        self.coef = self.full * min(1.0, (self.done + 1) / self.batches)
        return self.coef

    def state_dict(self) -> dict[str, float]:
        return {"coef": self.coef, "done": self.done}

    def load_state_dict(self, state: dict[str, float]) -> None:
        super().load_state_dict(state)
        self.done = int(state["done"])


class _AtLeast(Generate):
    """Responses that do not end before their least length."""

    def __init__(self, config: PPOConfig, ends: Any, pad: int, least: int) -> None:
        super().__init__(config, ends, pad)
        self.least = least

    def _settings(self) -> Any:
        settings = super()._settings()
        settings.min_new_tokens = self.least
        return settings
