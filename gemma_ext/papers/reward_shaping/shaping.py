"""Which rules are on: one frozen record, also by the names of the study and of its flags."""

from __future__ import annotations

from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from dataclasses import dataclass, replace
from typing import Any

import torch

LENGTH_PENALTY = (300, 0.01)  # of the study: first free tokens, price of each further one
MAX_REFERENCES = 10


@dataclass(frozen=True)
class Quirks:
    """What the reference implementation does otherwise; all off is right.

    Attributes:
        update_in_evaluation: evaluation batches move the running statistics.
        per_rank: each rank has statistics of its own.
        shared: meanstd, clip and minmax feed one set of statistics where several are on.
        dtype: of the arithmetic; the reference has that of its reward model, bfloat16, in which
            PAR is exactly 1 above a centred reward of 6.24.
    """

    update_in_evaluation: bool = False
    per_rank: bool = False
    shared: bool = False
    dtype: torch.dtype | None = None


REFERENCE_COMPATIBLE = Quirks(True, True, True, torch.bfloat16)


@dataclass(frozen=True)
class Shaping:
    """The rules, in the order in which they are applied; any number may be on.

    Attributes:
        ceil: r = min(r, ceil), before everything and again behind `clip`.
        length_penalty: (n0, w): r -= w max(0, T - n0) for responses of T tokens.
        centred: mean_m (r - q_m).
        sgfc: mean_m sigma(k (r - 3 - q_m)).
        meanstd: (r - mean) / std, running over all rewards up to and with this batch.
        clip: into [mean - std, mean + std], running likewise.
        minmax: (r - low) / (high - low), running likewise.
        sigmoid, tanh, polynomial: of r, or with `relative` the mean over r - q_m. Relative sigmoid
            is PAR.
        quantile: share of the references below r; not of the study.
        lsc: log sigma(r - Q), Q the `level` quantile of a normal through all references.
        k: slope of sigmoid and sgfc.
        max_references: the first so many count, except in lsc, which takes all; None for all.
        without_references: for a row that has none: "raise", or "uncentred", which takes it as it
            is compared with 0 and leaves lsc, sgfc and quantile an error.
        quirks: of the reference implementation.
    """

    ceil: float | None = None
    length_penalty: tuple[float, float] | None = None
    centred: bool = False
    sgfc: bool = False
    meanstd: bool = False
    clip: bool = False
    minmax: bool = False
    sigmoid: bool = False
    tanh: bool = False
    polynomial: bool = False
    quantile: bool = False
    lsc: bool = False
    relative: bool = False
    k: float = 1.0
    level: float = 0.85
    max_references: int | None = MAX_REFERENCES
    without_references: str = "raise"
    quirks: Quirks = Quirks()

    def __post_init__(self) -> None:
        if not self.k > 0:
            raise ValueError(f"k: expected a slope above 0, got {self.k}")
        if not 0 < self.level < 1:
            raise ValueError(f"level: expected a quantile in (0, 1), got {self.level}")
        if self.max_references is not None and self.max_references < 1:
            raise ValueError(f"max_references: expected at least 1, got {self.max_references}")
        if self.without_references not in ("raise", "uncentred"):
            raise ValueError(
                "without_references: expected 'raise' or 'uncentred', "
                f"got {self.without_references!r}"
            )
        if self.relative and not (self.sigmoid or self.tanh or self.polynomial):
            raise ValueError("relative: expected sigmoid, tanh or polynomial with it, got none")

    @classmethod
    def named(cls, name: str, **changes: Any) -> Shaping:
        """A rule of `RULES` by name, with other fields changed.

        Example:
            >>> Shaping.named("par", k=2)
        """
        if name not in RULES:
            raise ValueError(f"name: expected one of {', '.join(RULES)}, got {name!r}")
        return replace(RULES[name], **changes)

    @property
    def needs_references(self) -> bool:
        return self.centred or self.sgfc or self.relative or self.lsc or self.quantile

    @property
    def running(self) -> tuple[str, ...]:
        """The rules that have statistics, in their order."""
        return tuple(name for name in ("meanstd", "clip", "minmax") if getattr(self, name))


RULES = {
    "vanilla": Shaping(),
    "ceil": Shaping(ceil=5.0),
    "centred": Shaping(centred=True),
    "sgfc": Shaping(sgfc=True),
    "meanstd": Shaping(meanstd=True),
    "clip": Shaping(clip=True),
    "minmax": Shaping(minmax=True),
    "sigmoid": Shaping(sigmoid=True),
    "par": Shaping(sigmoid=True, relative=True),
    "tanh": Shaping(tanh=True, relative=True),
    "polynomial": Shaping(polynomial=True, relative=True),
    "quantile": Shaping(quantile=True),
    "lsc": Shaping(lsc=True),
}

_SWITCHES = {
    "reward_centered": "centred",
    "reward_sgfc": "sgfc",
    "reward_meanstd": "meanstd",
    "reward_clipping": "clip",
    "reward_minmax": "minmax",
    "reward_sigmoid": "sigmoid",
    "reward_relative": "relative",
    "reward_tanh": "tanh",
    "reward_fittedpoly": "polynomial",
    "reward_lsc": "lsc",
}


def add_flags(parser: ArgumentParser) -> None:
    """The flags of the reference implementation, with its defaults, and `--reward_shaping NAME`.

    What it cannot say is `--no-reward_penalize_length`; its slope is whole, here it need not be.
    """
    group = parser.add_argument_group("reward shaping")
    group.add_argument("--reward_shaping", choices=list(RULES), help="a rule by name")
    for flag, field in _SWITCHES.items():
        group.add_argument(f"--{flag}", action="store_true", help=f"the rule {field}")
    group.add_argument("--reward_ceil", type=float, help="largest reward")
    group.add_argument("--reward_maxref", type=int, default=MAX_REFERENCES, help="references")
    group.add_argument("--sigmoid_k", type=float, default=1.0, help="slope of the sigmoid")
    group.add_argument("--reward_odin", action="store_true", help="no length penalty")
    group.add_argument("--reward_penalize_length", action=BooleanOptionalAction, default=True)
    group.add_argument("--gen_valid_len", type=float, default=LENGTH_PENALTY[0])
    group.add_argument("--len_penalty", type=float, default=LENGTH_PENALTY[1])


def from_flags(arguments: Namespace) -> Shaping:
    """The rules that flags of `add_flags` ask for, the length penalty on as in the reference."""
    base = Shaping.named(arguments.reward_shaping) if arguments.reward_shaping else Shaping()
    changes: dict[str, Any] = {
        field: True for flag, field in _SWITCHES.items() if getattr(arguments, flag)
    }
    if arguments.reward_ceil is not None:
        changes["ceil"] = arguments.reward_ceil
    if arguments.reward_penalize_length and not arguments.reward_odin:
        changes["length_penalty"] = (arguments.gen_valid_len, arguments.len_penalty)
    if "relative" in changes and not {"sigmoid", "tanh", "polynomial"} & changes.keys():
        # the reference ignores the flag alone; with a name it belongs to that rule
        changes["relative"] = base.sigmoid or base.tanh or base.polynomial
    return replace(base, k=arguments.sigmoid_k, max_references=arguments.reward_maxref, **changes)
