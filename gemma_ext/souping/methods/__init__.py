"""Every way to merge that a recipe can name."""

from __future__ import annotations

import difflib

from gemma_ext.souping.method import Method
from gemma_ext.souping.methods.breadcrumbs import Breadcrumbs, BreadcrumbsRow, BreadcrumbsTies
from gemma_ext.souping.methods.dare import DareLinear, DareTies
from gemma_ext.souping.methods.della import Della, DellaLinear
from gemma_ext.souping.methods.fisher import Fisher
from gemma_ext.souping.methods.linear import Linear, Passthrough, greedy_soup
from gemma_ext.souping.methods.localize import Consensus, LocalizeAndStitch, Stitch, TallMasks
from gemma_ext.souping.methods.matrix import IsoC, TaskSingularVectors
from gemma_ext.souping.methods.pairs import ArceeFusion, NearSwap
from gemma_ext.souping.methods.ram import MagMax, Ram, RamPlus
from gemma_ext.souping.methods.regmean import RegMean
from gemma_ext.souping.methods.sce import Sce
from gemma_ext.souping.methods.spherical import Karcher, ModelStock, MultiSlerp, NuSlerp, Slerp
from gemma_ext.souping.methods.task_vectors import TaskArithmetic
from gemma_ext.souping.methods.ties import Ties, TiesLocalize, TiesMergeLM, TiesRef, TiesRow

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Linear,
        Passthrough,
        TaskArithmetic,
        Ties,
        TiesRef,
        TiesMergeLM,
        TiesRow,
        TiesLocalize,
        DareLinear,
        DareTies,
        Della,
        DellaLinear,
        Breadcrumbs,
        BreadcrumbsTies,
        BreadcrumbsRow,
        Slerp,
        NuSlerp,
        MultiSlerp,
        Karcher,
        ModelStock,
        Sce,
        NearSwap,
        ArceeFusion,
        Ram,
        RamPlus,
        MagMax,
        TallMasks,
        Consensus,
        LocalizeAndStitch,
        Stitch,
        Fisher,
        TaskSingularVectors,
        IsoC,
        RegMean,
    )
}


def get(name: str) -> type[Method]:
    """The method that goes by a name in recipes.

    Raises:
        ValueError: there is none.
    """
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(name, METHODS, n=1)
    hint = f"; did you mean {near[0]}?" if near else f": {', '.join(sorted(METHODS))}"
    raise ValueError(f"expected a known merge method, got {name!r}{hint}")


__all__ = ["METHODS", "get", "greedy_soup"]
