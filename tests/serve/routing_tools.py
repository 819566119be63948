"""Engines that route on the device beside those that do not, on the CPU."""

from __future__ import annotations

import contextlib

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gemma_ext.serve.config import PAGE, EngineConfig
from gemma_ext.serve.engine import Engine
from gemma_ext.serve.router import Router

_ASKS = {
    getattr(torch.Tensor, name)
    for name in (
        "item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__",
        "__contains__", "nonzero",
    )
}  # fmt: skip
_FROM_HOST = {torch.tensor, torch.as_tensor, torch.from_numpy}
_SIZED_BY_VALUES = ("nonzero", "masked_select", "_local_scalar_dense", "unique")


class HostAsked(AssertionError):
    """A tick asked the host for a number, made a shape of one, or was given one by a copy."""


class _Values(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(name in str(function) for name in _SIZED_BY_VALUES):
            raise HostAsked(str(function))
        at = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
        if any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in at):
            raise HostAsked(f"{function} by a mask")
        return function(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in _ASKS or function in _FROM_HOST:
            raise HostAsked(function.__name__)
        if function is torch.Tensor.__setitem__ and not isinstance(args[2], torch.Tensor):
            at = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(x, torch.Tensor) for x in at):
                raise HostAsked(f"{args[2]} would be copied to where an index points")
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_word_to_the_host():
    with _Methods(), _Values():
        yield


class Watched:
    """Counts the ticks of an engine, none of which asks the host; keys of requests as they end.

    Attributes:
        ticks: that ran.
        keys: of each request, {(loop, position)} of the keys and values that were there.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self.ticks, self.keys = engine, 0, {}
        self._rows: dict[int, tuple] = {}
        open_, close = engine.runner.open, engine.runner.close

        def opened(row, request, drawn=()):
            self._rows[row] = request
            open_(row, request, drawn)

        def closed(row):
            request = self._rows.pop(row)
            self.keys.setdefault(request, self._present(row, request))
            close(row)

        engine.runner.open, engine.runner.close = opened, closed
        if engine.router is not None:
            run = engine.router.work.run

            def watched(rows, reading):
                self.ticks += 1
                with no_word_to_the_host():
                    run(rows, reading)

            engine.router.work.run = watched

    def _present(self, row, request):
        engine, found = self.engine, {}
        tables = engine._tensors["block_tables"][row].long()
        marks = torch.from_numpy(engine.scheduler.buffers()["fill_marks"])
        for pos in range(len(request.prompt) + request.params.max_tokens):
            page = int(tables[pos // PAGE])
            for loop in range(engine.runner.loops):
                if engine.router is not None:
                    there = pos < int(engine.router.work.route.done[row, loop])
                else:
                    there = int(marks[page, pos % PAGE]) > loop
                if there:
                    depths = [int(depth[loop]) for depth in engine.runner.depths.block]
                    held = engine.runner.kv_pool[depths, page, :, :, pos % PAGE]
                    found[loop, pos] = held.clone()
        return found


def engines(model, exits, shortlist=False, **options) -> tuple[Engine, Engine]:
    """(host, device) engines of the same settings."""
    given = {"width": 4, "max_model_len": 64, "prefill_tokens": 16, "verify": True, **options}
    made = []
    for routing in ("host", "device"):
        config = EngineConfig(**given, routing=routing)
        made.append(Engine.of_model(model, config, exits=exits, shortlist=shortlist))
    assert isinstance(made[1].router, Router)
    return tuple(made)
