"""Shaping that a group's normalisation takes back.

GRPO's advantage (r - mean_g) / (std_g + eps) is the same for r and a r + b. What a rule does to
the rewards of one prompt is therefore lost where it is affine there.
"""

from __future__ import annotations

import warnings
from enum import Enum
from typing import Any

from gemma_ext.papers.reward_shaping.hooks import ShapedReward
from gemma_ext.papers.reward_shaping.shaping import Shaping


class Effect(Enum):
    """What is left of a shaping under a trainer's normalisation of rewards.

    Attributes:
        NONE: advantages are those of the rewards as they are.
        SCALE: they are those times a number.
        SHAPE: the rule counts.
    """

    NONE = "none"
    SCALE = "scale"
    SHAPE = "shape"


_MODES = ("none", "group", "batch")


def effect(shaping: Shaping, scale_rewards: str = "group", *, alone: bool = True) -> Effect:
    """What group-relative advantages keep of a shaping.

    A ceiling, a clip and a length penalty count as shapes: they are affine only where they do not
    bite.

    Args:
        scale_rewards: of TRL: "group" and "batch" divide by a standard deviation of the shaped
            rewards, "none" does not. The mean of a group is taken off always.
        alone: whether no other reward is added; next to others a factor is a weight.
    """
    if scale_rewards not in _MODES:
        raise ValueError(f"scale_rewards: expected one of {_MODES}, got {scale_rewards!r}")
    bent = (
        shaping.sigmoid or shaping.tanh or shaping.polynomial or shaping.quantile or shaping.lsc
        or shaping.sgfc or shaping.clip or shaping.ceil is not None
        or shaping.length_penalty is not None
    )  # fmt: skip
    if bent:
        return Effect.SHAPE
    scaled = shaping.meanstd or shaping.minmax
    return Effect.SCALE if scaled and (scale_rewards == "none" or not alone) else Effect.NONE


def warn_of_cancellation(trainer: Any) -> list[str]:
    """Warns where a trainer of TRL normalises a shaping away; call it once the trainer is built.

    Args:
        trainer: with `reward_funcs` and `args.scale_rewards` (GRPO); RLOO has none and subtracts
            the mean of the others only.

    Returns:
        The warnings.
    """
    functions = list(getattr(trainer, "reward_funcs", []))
    mode = getattr(trainer.args, "scale_rewards", "none")
    mode = {True: "group", False: "none"}.get(mode, mode)
    found = []
    for function in functions:
        if not isinstance(function, ShapedReward) or function.shaper.shaping == Shaping():
            continue
        left = effect(function.shaper.shaping, mode, alone=len(functions) == 1)
        if left is Effect.NONE:
            text = f"{function.__name__}: its shaping is affine, which group means and scales undo"
        elif left is Effect.SHAPE and mode != "none":
            text = (
                f"{function.__name__}: scale_rewards={mode!r} divides shaped rewards by their "
                "standard deviation, which undoes their bound; scale_rewards='none' keeps it"
            )
        else:
            continue
        warnings.warn(text, stacklevel=2)
        found.append(text)
    return found
