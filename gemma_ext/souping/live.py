"""Merging into models that are in memory and in use.

Only parameters are merged; buffers stay the model's own. A weight that is tied under several names
is merged once. Wherever a model is expected, a mapping of parameter names to tensors does as well,
on any device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from gemma_ext.ops import souping as ops
from gemma_ext.ops.souping import Part
from gemma_ext.souping.engine.memory import merge_tensors
from gemma_ext.souping.method import Method
from gemma_ext.souping.parameters import constant

if TYPE_CHECKING:
    from gemma_ext.souping.recipes.recipe import Recipe
    from gemma_ext.souping.recipes.run import Options

Model = nn.Module | Mapping[str, Tensor]


def parameters_of(model: Model) -> dict[str, Tensor]:
    """Name to tensor, tied weights under their first name, outside of autograd."""
    if isinstance(model, nn.Module):
        return {name: tensor.detach() for name, tensor in model.named_parameters()}
    return {name: tensor.detach() for name, tensor in model.items()}


def like(names: Mapping[str, Tensor], model: Model, who: str) -> dict[str, Tensor]:
    """The tensors of `model` under the given names, on the devices of those.

    Raises:
        ValueError: one is missing or of another shape; `who` names the model.
    """
    held, found = parameters_of(model), {}
    for name, tensor in names.items():
        if name not in held:
            raise ValueError(f"expected {name} in {who}, got none")
        if held[name].shape != tensor.shape:
            raise ValueError(
                f"expected {name} of {who} to be {list(tensor.shape)}, got {list(held[name].shape)}"
            )
        found[name] = held[name].to(tensor.device)
    return found


def soup_(
    model: Model,
    others: Sequence[Model],
    weights: Sequence[float],
    *,
    base: Model | None = None,
    scale: float = 1.0,
    rounding: str = "nearest",
    seed: int = 0,
) -> None:
    """model = sum_m w_m model_m, or base + scale * sum_m w_m (model_m - base), the first its own.

    Sums are float32 (64-bit sums: `ops.souping.soup_`), rounded once; no copy of a model is made.

    Args:
        model: is overwritten.
        others: M - 1 of the same names and shapes; dtypes may differ.
        weights: M, the model's own first; not normalised.
        base: what deltas are taken from.
        scale: of the sum of deltas.
        rounding: "nearest" or "stochastic", which keeps updates below a unit in the last place of
            bfloat16 alive on average.
        seed: of stochastic rounding; another one for every update.

    Raises:
        ValueError: another number of weights than of models, or a model that does not fit.

    Example:
        >>> souping.soup_(policy, [sft_1, sft_2], [0.5, 0.25, 0.25])
    """
    if len(weights) != 1 + len(others):
        raise ValueError(f"expected {1 + len(others)} weights, got {len(weights)}")
    own = parameters_of(model)
    sources = [like(own, other, f"others[{i}]") for i, other in enumerate(others)]
    origin = None if base is None else like(own, base, "base")
    parts = [
        Part(
            [tensor, *(source[name] for source in sources)],
            None if origin is None else origin[name],
            tensor,
            name,
        )
        for name, tensor in own.items()
    ]
    ops.soup_(parts, weights, scale=scale, rounding=rounding, seed=seed)


def ema_(
    target: Model, model: Model, decay: float, *, rounding: str = "stochastic", seed: int = 0
) -> None:
    """target = decay * target + (1 - decay) * model.

    With nearest rounding a bfloat16 target stands still as soon as steps are below half a unit in
    its last place; stochastic rounding moves it right on average.

    Args:
        target: is overwritten, for example the reference model of a trainer.
        model: same names and shapes.
        decay: in [0, 1].
        rounding, seed: as of `soup_`; give another seed at every step.

    Raises:
        ValueError: a decay outside of [0, 1], or a model that does not fit.
    """
    _check_decay(decay)
    own = parameters_of(target)
    other = like(own, model, "model")
    parts = [Part([other[name]], tensor, tensor, name) for name, tensor in own.items()]
    ops.soup_(parts, 1.0 - decay, rounding=rounding, seed=seed)


def _check_decay(decay: float) -> None:
    if not 0 <= decay <= 1:
        raise ValueError(f"expected decay in [0, 1], got {decay}")


class Ema:
    """An exponential moving average of a model's parameters in their own dtype.

    Args:
        model: whose parameters are copied to begin with.
        decay: in [0, 1].
        rounding: "stochastic" or "nearest".
        seed: of stochastic rounding.

    Raises:
        ValueError: a decay outside of [0, 1].

    Example:
        >>> ema = Ema(model, 0.999)
        >>> for batch in data:
        ...     train(model, batch)
        ...     ema.update(model)
        >>> with Swap(model) as swap:
        ...     swap.put(ema.tensors)
        ...     evaluate(model)
    """

    def __init__(
        self, model: Model, decay: float, *, rounding: str = "stochastic", seed: int = 0
    ) -> None:
        _check_decay(decay)
        self.tensors = {name: tensor.clone() for name, tensor in parameters_of(model).items()}
        self.decay, self.rounding, self.seed = decay, rounding, seed
        self.steps = 0

    def update(self, model: Model) -> None:
        """Takes in the model as it is now."""
        seed = self.seed + (self.steps << 32)
        ema_(self.tensors, model, self.decay, rounding=self.rounding, seed=seed)
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {"tensors": self.tensors, "steps": self.steps, "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, tensor in like(self.tensors, state["tensors"], "state").items():
            self.tensors[name].copy_(tensor)
        self.steps, self.seed = state["steps"], state["seed"]


class Swap:
    """Other weights in a running model, and its own again.

    The parameters stay where they are, so captured graphs, optimizers and compiled code keep
    pointing at them. Memory: one copy of the parameters from the first change to `restore`.

    Example:
        >>> with Swap(model) as swap:
        ...     swap.merge(Ties(), [math, code], base=model, weight=1.0, density=0.2)
        ...     model.generate(**inputs)
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.own: dict[str, Tensor] | None = None

    def merge(
        self,
        method: Method,
        models: Sequence[Model],
        base: Model | None = None,
        *,
        seed: int = 0,
        **parameters: Any,
    ) -> None:
        """Writes a merge into the model; if it fails, the model has its own weights.

        Args:
            method: how.
            models: M; the running model itself stands for its own weights.
            base: that deltas are taken from, or None.
            seed: of everything random.
            parameters: of the method, see `parameters.constant`.

        Raises:
            ValueError: something does not fit.
        """
        live, values = self._live(), constant(method, len(models), seed=seed, **parameters)
        sources = [self._named(model, f"models[{i}]") for i, model in enumerate(models)]
        origin = None if base is None else self._named(base, "base")
        try:
            merge_tensors(method, sources, origin, values, live)
        except BaseException:
            self.restore()
            raise

    def recipe(self, recipe: Recipe, options: Options | None = None) -> None:
        """Runs a recipe into the model, tensor by tensor from the files of its sources.

        Memory: the tensors of one name of all sources, beside the copy. Surveys of the whole model
        read the files once more each. If it fails, the model has its own weights.

        Args:
            recipe: `recipe.parse_recipe` of a file's text; its output has the model's shapes.
            options: as of `run.run_recipe`; what concerns the output folder has no effect.

        Raises:
            RecipeError, ValueError, OSError, ImportError: as `run_recipe`; or the output has other
                tensors than the model.
        """
        from gemma_ext.souping.recipes.into import merge_into
        from gemma_ext.souping.recipes.run import open_recipe

        prepared = open_recipe(recipe, options)
        live = self._live()
        try:
            merge_into(live, prepared.targets, prepared.method, self.model.state_dict())
        except BaseException:
            self.restore()
            raise

    def put(self, tensors: Model) -> None:
        """Copies weights into the model."""
        live = self._live()
        for name, tensor in like(live, tensors, "tensors").items():
            live[name].copy_(tensor)

    def restore(self) -> None:
        """The model's own weights again."""
        if self.own is not None:
            live = parameters_of(self.model)
            for name, tensor in self.own.items():
                live[name].copy_(tensor)
            self.own = None

    def __enter__(self) -> Swap:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def _live(self) -> dict[str, Tensor]:
        live = parameters_of(self.model)
        if self.own is None:
            self.own = {name: tensor.clone() for name, tensor in live.items()}
        return live

    def _named(self, model: Model, who: str) -> dict[str, Tensor]:
        own = self.own if model is self.model else model
        return like(self.own, own, who)
