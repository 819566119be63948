"""SALSA: soup-based alignment learning (arXiv 2411.01798), and its relatives.

    maximise over theta   E_x,y~pi_theta r(x, y) - beta E_x KL(pi_theta || pi_soup)
    theta_soup = alpha theta_1 + (1 - alpha) theta_2,  theta_1, theta_2 two SFT runs of one base

PPO with one thing changed, the frozen model that the policy is held near.

| method                                   | here                                                |
|------------------------------------------|-----------------------------------------------------|
| SALSA, soups of K                        | `soup`, `SoupReference`                             |
| KL to each of K models                   | `MultiReference`                                    |
| EMA anchor (WARP, arXiv 2406.16768)      | `ema`; merge and way back: `warp`                   |
| TR-DPO, TRL's `sync_ref_model`           | `sync`                                              |
| WARM (arXiv 2401.12187)                  | `soup` of reward models                             |
| rewarded soups (arXiv 2306.04488)        | `rewarded_soups`                                    |
| parents that are LoRA runs               | `lora_average`, `lora_soup`                         |
| is the soup fit                          | `linear_mode`, `alpha_sweep`, `layer_alphas`        |
| lengths that collapse                    | `Collapse`, `step_zero`                             |
| methods at equal measured divergence     | `Frontier`, `compare`                               |
| under TRL's DPO, GRPO, RLOO              | `salsa.trl.use_reference`                           |

Of the paper the abstract and its reviews could be read. Not verified, and therefore arguments:
which model the policy starts from, beta, sizes, steps, data and the reward model. alpha = 1/2 is
from a summary of it. PPO's details are those of `gemma_ext.ppo`, not the paper's.
"""

from gemma_ext.papers.salsa import trl
from gemma_ext.papers.salsa.checks import (
    Collapse,
    LinearMode,
    divergences,
    held_out_loss,
    linear_mode,
    step_zero,
)
from gemma_ext.papers.salsa.choice import Alphas, alpha_sweep, layer_alphas
from gemma_ext.papers.salsa.folder import digest, read_record, record, save, verify
from gemma_ext.papers.salsa.frontier import Difference, Frontier, compare, interval
from gemma_ext.papers.salsa.lora import lora_average, lora_soup
from gemma_ext.papers.salsa.references import (
    MovingReference,
    MultiReference,
    SoupReference,
    ema,
    sync,
)
from gemma_ext.papers.salsa.soup import check_parents, check_tokenizers, soup, soup_into
from gemma_ext.papers.salsa.warp import rewarded_soups, warp

__all__ = [
    "Alphas",
    "Collapse",
    "Difference",
    "Frontier",
    "LinearMode",
    "MovingReference",
    "MultiReference",
    "SoupReference",
    "alpha_sweep",
    "check_parents",
    "check_tokenizers",
    "compare",
    "digest",
    "divergences",
    "ema",
    "held_out_loss",
    "interval",
    "layer_alphas",
    "linear_mode",
    "lora_average",
    "lora_soup",
    "read_record",
    "record",
    "rewarded_soups",
    "save",
    "soup",
    "soup_into",
    "step_zero",
    "sync",
    "trl",
    "verify",
    "warp",
]
