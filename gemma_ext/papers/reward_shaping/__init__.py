"""Reward Shaping to Mitigate Reward Hacking in RLHF: PAR and its rivals (arXiv 2502.18770).

    PAR(x, y) = mean_m sigma(k (r - q_m)),  r the score of y, q_m those of M reference responses

| in the study                                   | here                                         |
|------------------------------------------------|----------------------------------------------|
| PAR, tanh, fitted polynomial, SgFc, LSC        | `rules`; `Shaping`, `RULES` by name          |
| mean-std, clip, min-max over what was seen     | `Running`, part of `RewardShaper`            |
| ceiling, length penalty, order of all          | `RewardShaper`, `add_flags`, `from_flags`    |
| reference responses                            | `draw_references`, `read_study`              |
| reward models: BT, Reg, ODIN, WARM             | `train_reward_model`, `warm`                 |
| win rate in both orders                        | `win_rate`                                   |
| trainers                                       | `shape`, `for_verl`, `for_openrlhf`          |

Beyond it: `HackingMonitor`, `effect` and `warn_of_cancellation` (what group-relative advantages
undo), `bandit` (64 actions, exact), the `quantile` rule (PAR for k to infinity).

What differs from the reference implementation, and `Quirks` brings back: arithmetic is in float32
and not in the dtype of the reward model; statistics are in float64, one for each rule, the same
on all ranks, and stand still in evaluation. Not brought back: a batch whose minimum is its maximum
is one half and not a division by zero; lsc of one reference is an error.

Defaults are the study's: k = 1, ten references, level 0.85, length penalty 0.01 a token over 300
where flags are used; a `Shaping` has what it is given.
"""

from gemma_ext.papers.reward_shaping.cancellation import Effect, effect, warn_of_cancellation
from gemma_ext.papers.reward_shaping.checkpoints import load_state, save_state, shaping_callback
from gemma_ext.papers.reward_shaping.hooks import ShapedReward, shape
from gemma_ext.papers.reward_shaping.judge import WinRate, verdict, win_rate
from gemma_ext.papers.reward_shaping.monitors import HackingMonitor
from gemma_ext.papers.reward_shaping.references import (
    References,
    add_columns,
    draw_references,
    fingerprint,
    read_references,
    read_study,
    write_references,
)
from gemma_ext.papers.reward_shaping.registries import for_openrlhf, for_verl
from gemma_ext.papers.reward_shaping.reward_model import (
    RewardModel,
    from_causal,
    load_reward_model,
)
from gemma_ext.papers.reward_shaping.running import Running
from gemma_ext.papers.reward_shaping.shaper import RewardShaper
from gemma_ext.papers.reward_shaping.shaping import (
    REFERENCE_COMPATIBLE,
    RULES,
    Quirks,
    Shaping,
    add_flags,
    from_flags,
)
from gemma_ext.papers.reward_shaping.training import (
    WARM_RUNS,
    Pair,
    RewardTraining,
    preference_trainer,
    train_reward_model,
)
from gemma_ext.papers.reward_shaping.warm import Ensemble, warm

__all__ = [
    "REFERENCE_COMPATIBLE",
    "RULES",
    "WARM_RUNS",
    "Effect",
    "Ensemble",
    "HackingMonitor",
    "Pair",
    "Quirks",
    "References",
    "RewardModel",
    "RewardShaper",
    "RewardTraining",
    "Running",
    "ShapedReward",
    "Shaping",
    "WinRate",
    "add_columns",
    "add_flags",
    "draw_references",
    "effect",
    "fingerprint",
    "for_openrlhf",
    "for_verl",
    "from_causal",
    "from_flags",
    "load_reward_model",
    "load_state",
    "preference_trainer",
    "read_references",
    "read_study",
    "save_state",
    "shape",
    "shaping_callback",
    "train_reward_model",
    "verdict",
    "warm",
    "warn_of_cancellation",
    "win_rate",
    "write_references",
]
