"""How a model becomes recursive, with the paper's names and its choices as defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gemma_ext.nn.recursive import ORDERS, Plan
from gemma_ext.papers.recursive.initialise import INITS, source_indices

NORMS = ("average", "first")
LORA_INITS = ("svd", "zero")
SVDS = ("auto", "exact", "randomised")


@dataclass(frozen=True)
class Recipe:
    """A conversion.

    Attributes:
        loops: B. The paper runs 2 and 3.
        init: of the stored layers: "stepwise" (best without low-rank matrices), "average" (best
            with them), "lower", "upper", "random".
        order: of the loops, see `nn.recursive.Plan`.
        prelude, coda: of "middle-cycle"; None for one layer each.
        rank: r of every linear, cut to the linear's size; 0 for none.
        ranks: by linear, before `rank`: "q_proj" or "self_attn.q_proj".
        lora_init: "svd" of the residuals, or "zero".
        lora_from_loop: below B; 1 leaves the first loop without matrices.
        svd: "exact", "randomised", or "auto": randomised where the smaller side is above 1024.
        refine: rounds of W' <- mean(W_l - B_l A_l) and a new decomposition; changes nothing for
            two loops averaged that both have matrices.
        prefix: P trained keys and values of each depth, the paper's other relaxation.
        norms: under "average": mean, or "first" for those of the first layer. The paper found no
            difference.
        seed: of "random", of randomised decompositions and of Gaussian matrices.
    """

    loops: int = 2
    init: str = "average"
    order: str = "cycle"
    prelude: int | None = None
    coda: int | None = None
    rank: int = 0
    ranks: Mapping[str, int] = field(default_factory=dict)
    lora_init: str = "svd"
    lora_from_loop: int = 0
    svd: str = "auto"
    refine: int = 0
    prefix: int = 0
    norms: str = "average"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("init", INITS),
            ("order", ORDERS),
            ("lora_init", LORA_INITS),
            ("svd", SVDS),
            ("norms", NORMS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        for name in ("rank", "refine", "lora_from_loop", "prefix"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected a number >= 0, got {getattr(self, name)}")
        if self.refine and self.lora_init != "svd":
            raise ValueError("refine: expected lora_init 'svd', got 'zero'")

    def plan(self, layers: int, sizes: Mapping[str, tuple[int, int]]) -> Plan:
        """The plan for a model of L layers whose linears have the sizes [out, in].

        Raises:
            ValueError: loops that do not divide the layers; a rank of an unknown linear.
        """
        ranks = {name: min(self._rank_of(name), *sizes[name]) for name in sizes}
        for name, rank in self.ranks.items():
            if not any(_is(name, linear) for linear in sizes):
                raise ValueError(f"ranks: expected linears among {', '.join(sizes)}, got {name!r}")
            if rank < 0:
                raise ValueError(f"ranks: expected numbers >= 0, got {rank} for {name!r}")
        plan = Plan.of(
            layers,
            self.loops,
            self.order,
            prelude=self.prelude,
            coda=self.coda,
            init=self.init,
            ranks={name: rank for name, rank in ranks.items() if rank},
            lora_from_loop=self.lora_from_loop,
            prefix=self.prefix,
        )
        return source_indices(plan, self.seed)

    def _rank_of(self, linear: str) -> int:
        found = [rank for name, rank in self.ranks.items() if _is(name, linear)]
        return found[-1] if found else self.rank


def _is(name: str, linear: str) -> bool:
    return linear == name or linear.endswith(f".{name}")
