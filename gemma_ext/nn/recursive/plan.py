"""Which stored layer runs at which depth; the `recursive` entry of a model's config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

ORDERS = ("cycle", "middle-cycle", "sequence")


@dataclass(frozen=True)
class Plan:
    """The shape of a recursive model. Depths, loops and layers count from 0.

    Attributes:
        loops: B, how often the stored block runs.
        stored_of_depth: [L], the stored layer of each depth.
        order: "cycle" (0 1 0 1), "sequence" (0 0 1 1), or "middle-cycle": a cycle between layers
            that are not shared.
        prelude, coda: layers in front of and behind the block that run once.
        init: how the stored layers came from a model; "" if they did not.
        source_indices: of each stored layer, the layers of that model it was made of.
        ranks: of the matrices of each depth, by linear ("self_attn.q_proj").
        lora_from_loop: the first loop that has them.
        prefix: P, trained key and value positions of each depth.
        kv_policy, keep: the keys and values of loops that a token skips which the model was trained
            with, as `gemma_ext.serve.policies` names them; "" where every token ran every loop.
    """

    loops: int
    stored_of_depth: tuple[int, ...]
    order: str = "cycle"
    prelude: int = 0
    coda: int = 0
    init: str = ""
    source_indices: tuple[tuple[int, ...], ...] = ()
    ranks: Mapping[str, int] = field(default_factory=dict)
    lora_from_loop: int = 0
    prefix: int = 0
    kv_policy: str = ""
    keep: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.lora_from_loop < max(self.loops, 1):
            raise ValueError(
                f"lora_from_loop: expected one of the loops 0..{self.loops - 1}, got "
                f"{self.lora_from_loop}"
            )

    @classmethod
    def of(
        cls,
        layers: int,
        loops: int,
        order: str = "cycle",
        *,
        prelude: int | None = None,
        coda: int | None = None,
        **values: Any,
    ) -> Plan:
        """The plan of L layers in B loops.

        Args:
            layers: L.
            loops: B, a divisor of the layers in the block.
            order: see `Plan`.
            prelude, coda: of "middle-cycle", by default 1 and 1; 0 of the others.
            values: the other attributes.

        Raises:
            ValueError: an unknown order, or layers that B loops cannot share.
        """
        if order not in ORDERS:
            raise ValueError(f"order: expected one of {', '.join(ORDERS)}, got {order!r}")
        alone = 1 if order == "middle-cycle" else 0
        prelude = alone if prelude is None else prelude
        coda = alone if coda is None else coda
        if order != "middle-cycle" and (prelude or coda):
            raise ValueError(f"prelude, coda: expected 0 for order {order!r}, got {prelude, coda}")
        if prelude < 0 or coda < 0:
            raise ValueError(f"prelude, coda: expected numbers >= 0, got {prelude, coda}")
        shared = layers - prelude - coda
        if loops < 1 or shared < loops or shared % loops:
            raise ValueError(
                f"loops: expected a divisor of the {shared} shared layers of {layers}, got {loops}"
            )
        block = shared // loops
        inner = [d // loops if order == "sequence" else d % block for d in range(shared)]
        return cls(
            loops,
            (
                *range(prelude),
                *(prelude + s for s in inner),
                *(prelude + block + s for s in range(coda)),
            ),
            order,
            prelude,
            coda,
            **values,
        )

    @property
    def layers(self) -> int:
        """L."""
        return len(self.stored_of_depth)

    @property
    def stored(self) -> int:
        """K, layers of the block."""
        return (self.layers - self.prelude - self.coda) // self.loops

    @property
    def stored_layers(self) -> int:
        """All stored layers: prelude, block, coda."""
        return self.prelude + self.stored + self.coda

    def depths_of(self, stored: int) -> list[int]:
        """The depths that run a stored layer, ascending."""
        return [depth for depth, s in enumerate(self.stored_of_depth) if s == stored]

    def loop_of(self, depth: int) -> int | None:
        """The loop of a depth; None in prelude and coda."""
        at = depth - self.prelude
        if not 0 <= at < self.loops * self.stored:
            return None
        return at % self.loops if self.order == "sequence" else at // self.stored

    def rank_of(self, depth: int, linear: str) -> int:
        """The rank of a linear's matrices at a depth."""
        loop = self.loop_of(depth)
        return 0 if loop is None or loop < self.lora_from_loop else self.ranks.get(linear, 0)

    def exits(self) -> list[int]:
        """[B], the number of depths run at the end of each loop.

        Raises:
            ValueError: the order is "sequence", whose loops end inside each other.
        """
        if self.order == "sequence":
            raise ValueError("order: expected a cycle, whose loops have ends, got 'sequence'")
        return [self.prelude + self.stored * (loop + 1) for loop in range(self.loops)]

    def to_dict(self) -> dict[str, Any]:
        """As it stands in `config.json`."""
        return {**asdict(self), "stored": self.stored, "ranks": dict(self.ranks)} | {
            "stored_of_depth": list(self.stored_of_depth),
            "source_indices": [list(group) for group in self.source_indices],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """Its inverse.

        Raises:
            ValueError: a key or value that no plan has.
        """
        values = dict(values)
        stored = values.pop("stored", None)
        names = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - names)
        missing = sorted({"loops", "stored_of_depth"} - set(values))
        if unknown or missing:
            raise ValueError(
                f"recursive: expected keys {', '.join(sorted(names))}, got "
                f"{', '.join(unknown) or 'no ' + ', '.join(missing)}"
            )
        values["stored_of_depth"] = tuple(values["stored_of_depth"])
        values["source_indices"] = tuple(tuple(g) for g in values.get("source_indices", ()))
        plan = cls(**values)
        regular = cls.of(plan.layers, plan.loops, plan.order, prelude=plan.prelude, coda=plan.coda)
        if regular.stored_of_depth != plan.stored_of_depth or stored not in (None, plan.stored):
            raise ValueError(
                f"recursive: expected stored_of_depth {list(regular.stored_of_depth)} and stored "
                f"{regular.stored}, got {list(plan.stored_of_depth)} and {stored}"
            )
        return plan

    @classmethod
    def of_model(cls, model: Any) -> Plan:
        """The plan of a model; one loop if it is not recursive."""
        values = getattr(model.config, "recursive", None)
        if values is None:
            return cls.of(model.config.get_text_config().num_hidden_layers, 1)
        return cls.from_dict(values)
