"""The algorithms of the benchmark with what each is tuned over.

| name                | operator                                           | script's | tuned     |
|---------------------|----------------------------------------------------|----------|-----------|
| Model soup          | base + sum delta / M                               | 1/5      |           |
| Task arithmetic     | base + s sum delta                                 | .4       | s         |
| TIES                | global trim to K, elect, disjoint sum, times s     | .3, .4   | K, s      |
| DARE                | keep 1 - p, over 1 - p, sum, times s               | .9, .4   | p, s      |
| Consensus           | where 2 TALL masks of lambda agree, sum times s    | .2, .4   | lambda, s |
| Localize-and-Stitch | largest tenth of each delta, averaged where shared | .1       |           |
| the same, trained   | masks that start there and follow the loss         | 1e8      | rate      |
| Fisher              | sum F theta / sum F                                |          |           |
| RegMean             | closed form per linear layer                       | .5       | reduction |
| RegMean++           | the same on the merged stream                      | .1       | reduction |

The grids that the paper tuned over are not published; these are around the values of its script.
`as_released=True` gives what the published code computes where that is something else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

from torch import Tensor, nn

from gemma_ext.papers.mergebench import as_released
from gemma_ext.papers.mergebench.protocol import Algorithm, Config, Pool, left_out
from gemma_ext.souping.engine.memory import merge_tensors
from gemma_ext.souping.localize import localize
from gemma_ext.souping.method import Method
from gemma_ext.souping.methods import get
from gemma_ext.souping.methods.fisher import Fisher
from gemma_ext.souping.methods.localize import Stitch
from gemma_ext.souping.methods.regmean import RegMean
from gemma_ext.souping.methods.regmean_plus_plus import regmean_plus_plus
from gemma_ext.souping.parameters import constant
from gemma_ext.souping.statistics import collect_grams, fisher_diagonal

SCALINGS = (0.2, 0.4, 0.6, 0.8, 1.0)
MASK_RATES = (1e4, 1e6, 1e8)  # of trained masks; the script's 1e8 is for billions of parameters


def grid(**axes: Sequence[float]) -> tuple[Config, ...]:
    """All combinations, the first axis slowest."""
    return tuple(dict(zip(axes, point, strict=True)) for point in product(*axes.values()))


@dataclass(frozen=True)
class ByMethod:
    """An algorithm that is a method of `gemma_ext.souping`.

    Attributes:
        method: makes it from what `statistics` found and a configuration.
        values: from a configuration and M to the method's parameters.
        statistics: of the pool, by name of expert; None for a method that needs no data.
    """

    name: str
    grid: Sequence[Config]
    method: Callable[[Any, Config], Method]
    values: Callable[[Config, int], Mapping[str, Any]]
    statistics: Callable[[Pool, int], Any] | None = None

    def prepare(self, pool: Pool, seed: int) -> Any:
        return self.statistics(pool, seed) if self.statistics else None

    def merge(self, pool: Pool, prepared: Any, config: Config, seed: int) -> dict[str, Tensor]:
        method = self.method(prepared, config)
        parameters = self.values(config, len(pool.experts))
        values = constant(method, len(pool.experts), seed=seed, **parameters)
        base = pool.weights(pool.base)
        experts = [pool.weights(model) for model in pool.experts.values()]
        return dict(merge_tensors(method, experts, base, values))


@dataclass(frozen=True)
class RegMeanPlusPlus:
    """RegMean whose inputs come from the layers already merged."""

    name: str = "RegMean++"
    grid: Sequence[Config] = grid(reduction=(0.1, 0.5))

    def prepare(self, pool: Pool, seed: int) -> None:
        return None

    def merge(self, pool: Pool, prepared: None, config: Config, seed: int) -> dict[str, Tensor]:
        merged = copy.deepcopy(pool.base)
        means = mean_of(pool)
        for name, p in merged.named_parameters():
            if name in means:
                p.data.copy_(means[name])
        batches = [pool.calibration[domain] for domain in pool.experts]
        regmean_plus_plus(merged, list(pool.experts.values()), batches, **config)
        return pool.weights(merged)


@dataclass(frozen=True)
class Released:
    """A function of the released code: base, experts and configuration to merged weights."""

    name: str
    grid: Sequence[Config]
    function: Callable[[Pool, Any, Config], dict[str, Tensor]]
    statistics: Callable[[Pool, int], Any] | None = None

    def prepare(self, pool: Pool, seed: int) -> Any:
        return self.statistics(pool, seed) if self.statistics else None

    def merge(self, pool: Pool, prepared: Any, config: Config, seed: int) -> dict[str, Tensor]:
        return self.function(pool, prepared, config)


def mean_of(pool: Pool) -> dict[str, Tensor]:
    """The uniform mean of the experts."""
    uniform = constant(get("linear"), len(pool.experts), weight=1.0)
    experts = [pool.weights(model) for model in pool.experts.values()]
    return dict(merge_tensors(get("linear")(), experts, None, uniform))


def fishers(pool: Pool, seed: int) -> list[dict[str, Tensor]]:
    """Diagonal Fisher information of each expert on its own data, of what is merged."""
    found = []
    for domain, model in pool.experts.items():
        with frozen(model, pool.weights(model)):
            found.append(fisher_diagonal(model, pool.calibration[domain], seed=seed))
    return found


@contextmanager
def frozen(model: nn.Module, kept: Mapping[str, Tensor]) -> Iterator[None]:
    """No gradient of parameters but `kept`: of Gemma 3 270M the embeddings are two thirds."""
    others = [p for name, p in model.named_parameters() if name not in kept and p.requires_grad]
    for p in others:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in others:
            p.requires_grad_(True)


def grams(pool: Pool, seed: int) -> list[Mapping[str, Tensor]]:
    """Gram matrices of each expert on its own data."""
    return [collect_grams(m, pool.calibration[d]) for d, m in pool.experts.items()]


def trained_masks(pool: Pool, seed: int) -> dict[float, list[dict[str, Tensor]]]:
    """By rate, masks of each expert trained on its own data from the largest tenth."""
    return {
        rate: [
            localize(
                pool.base,
                model,
                pool.calibration[domain],
                density=0.1,
                lr=rate,
                trained=lambda name: pool.embeddings or not left_out(name),
            )
            for domain, model in pool.experts.items()
        ]
        for rate in MASK_RATES
    }


def named(name: str) -> Callable[[Any, Config], Method]:
    return lambda found, config: get(name)()


def fitted(method: Callable[[Any], Method]) -> Callable[[Any, Config], Method]:
    return lambda found, config: method(found)


MODEL_SOUP = ByMethod(
    "Model soup",
    ({},),
    named("task_arithmetic"),
    lambda config, models: {"weight": 1.0, "lambda": 1 / models},
)
TASK_ARITHMETIC = ByMethod(
    "Task arithmetic",
    grid(scaling=SCALINGS),
    named("task_arithmetic"),
    lambda config, models: {"weight": 1.0, "lambda": config["scaling"]},
)
TIES = ByMethod(
    "TIES",
    grid(density=(0.1, 0.3, 0.5), scaling=(0.4, 0.7, 1.0)),
    named("ties_ref"),
    lambda config, models: {
        "weight": 1.0,
        "density": config["density"],
        "lambda": config["scaling"],
        "merge_func": "sum",
    },
)
DARE = ByMethod(
    "DARE",
    grid(drop=(0.5, 0.9), scaling=(0.2, 0.4, 0.6)),
    named("dare_linear"),
    lambda config, models: {
        "weight": 1.0,
        "density": 1 - config["drop"],
        "lambda": config["scaling"],
        "rescale": True,
    },
)
CONSENSUS = ByMethod(
    "Consensus",
    grid(tall_lambda=(0.2, 0.4, 0.6), scaling=(0.4, 0.7)),
    named("consensus"),
    lambda config, models: {
        "tall_lambda": config["tall_lambda"],
        "votes": 2,
        "lambda": config["scaling"],
    },
)
LOCALIZE_AND_STITCH = ByMethod(
    "Localize-and-Stitch",
    ({"density": 0.1},),
    named("localize_and_stitch"),
    lambda config, models: {"density": config["density"], "keep_equal": True},
)
TRAINED_STITCH = ByMethod(
    "Localize-and-Stitch, trained",
    grid(rate=MASK_RATES),
    lambda found, config: Stitch(found[config["rate"]]),
    lambda config, models: {},
    trained_masks,
)
FISHER = ByMethod(
    "Fisher",
    ({},),
    fitted(Fisher),
    lambda config, models: {"weight": 1.0, "normalize": False, "floor": 1e-10},
    fishers,
)
REGMEAN = ByMethod(
    "RegMean",
    grid(reduction=(0.1, 0.5, 0.9)),
    fitted(RegMean),
    lambda config, models: {"weight": 1.0, **config},
    grams,
)


def _stitch_released(pool: Pool, prepared: None, config: Config) -> dict[str, Tensor]:
    experts = [pool.weights(model) for model in pool.experts.values()]
    return as_released.localize_and_stitch(pool.weights(pool.base), experts, config["density"])


def _moving_fishers(pool: Pool, seed: int) -> list[dict[str, Tensor]]:
    return [as_released.moving_fisher(m, pool.calibration[d]) for d, m in pool.experts.items()]


def _regmean_released(pool: Pool, prepared: Any, config: Config) -> dict[str, Tensor]:
    merged = mean_of(pool)
    experts = [pool.weights(model) for model in pool.experts.values()]
    for name in merged:
        if all(name in found for found in prepared):
            layers = [expert[name] for expert in experts]
            merged[name] = as_released.regmean_bfloat16(
                layers, [found[name] for found in prepared], config["reduction"]
            ).to(merged[name].dtype)
    return merged


def algorithms(*, released: bool = False) -> list[Algorithm]:
    """The table above in its order; `released` appends what the published code computes."""
    methods: list[Algorithm] = [
        MODEL_SOUP,
        TASK_ARITHMETIC,
        TIES,
        DARE,
        CONSENSUS,
        LOCALIZE_AND_STITCH,
        TRAINED_STITCH,
        FISHER,
        REGMEAN,
        RegMeanPlusPlus(),
    ]
    if not released:
        return methods
    consensus = grid(tall_lambda=(as_released.CONSENSUS_LAMBDA,), scaling=(0.4, 0.7))
    return [
        *methods,
        ByMethod("Consensus, as released", consensus, CONSENSUS.method, CONSENSUS.values),
        Released("Localize-and-Stitch, as released", ({"density": 0.1},), _stitch_released),
        ByMethod("Fisher, as released", FISHER.grid, FISHER.method, FISHER.values, _moving_fishers),
        Released("RegMean, as released", ({"reduction": 0.5},), _regmean_released, grams),
    ]
