"""A planned merge, from files into tensors that are in use."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from gemma_ext.ops.souping import Part
from gemma_ext.souping.engine.plan import Target
from gemma_ext.souping.method import Method
from gemma_ext.souping.recipes.peek import read_whole


def merge_into(
    live: Mapping[str, Tensor],
    targets: Sequence[Target],
    method: Method,
    also: Collection[str] = (),
) -> None:
    """Writes every target over the live tensor of its name, in the dtype of that.

    Args:
        live: name to tensor.
        targets: of `prepare` or `plan`.
        method: that they were planned for.
        also: further names that targets may have; they are passed over (tied weights, buffers).

    Raises:
        ValueError: a name on one side alone, or another shape.
    """
    wanted = [target for target in targets if target.info.name in live]
    _check(live, targets, also)
    merged = [target for target in wanted if target.values is not None]
    states = {t.info.name: method.begin(t.info, t.values) for t in merged}
    if method.model_wide:
        for step in range(method.surveys):
            for target in merged:
                _survey(method, step, target, None, states, live)
            method.settle_model(step, states)
    for target in wanted:
        name, out = target.info.name, live[target.info.name]
        if target.values is None:
            out.copy_(read_whole(target.sources[0], target.info.shape))
            continue
        part = _part(target, out)
        for step in range(0 if method.model_wide else method.surveys):
            _survey(method, step, target, part, states, live)
        method.merge(part, states.pop(name))


def _survey(
    method: Method,
    step: int,
    target: Target,
    part: Part | None,
    states: Mapping[str, object],
    live: Mapping[str, Tensor],
) -> None:
    state = states[target.info.name]
    if not method.skips(step, state):
        part = part or _part(target, live[target.info.name])
        method.survey(step, Part(part.sources, part.base, None, part.name), state)
        method.settle(step, state)


def _part(target: Target, out: Tensor) -> Part:
    shape = target.info.shape
    tensors = [read_whole(source, shape).to(out.device) for source in target.inputs]
    base = tensors.pop() if target.base is not None else None
    return Part(tensors, base, out, target.info.name)


def _check(live: Mapping[str, Tensor], targets: Sequence[Target], also: Collection[str]) -> None:
    shapes = {target.info.name: target.info.shape for target in targets}
    for name, tensor in live.items():
        if name not in shapes:
            raise ValueError(f"expected {name} in the merge, got none")
        if tuple(tensor.shape) != tuple(shapes[name]):
            raise ValueError(
                f"expected {name} of the merge to be {list(tensor.shape)}, got {list(shapes[name])}"
            )
    for name in shapes:
        if name not in live and name not in also:
            raise ValueError(f"expected tensors of the model alone in the merge, got {name}")
