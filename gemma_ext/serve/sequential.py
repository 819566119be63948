"""One request at a time through the model's own modules: what an engine must not differ from.

Every token runs every loop, so that its keys and values are there for all later ones; it is read
after the first loop whose exit test passes, the first token of an output, which the prompt gives,
after all the loops that the request may run. That is what the exact policies of an engine promise
(`gemma_ext.serve.policies`), whatever else runs beside a request.

Nothing of the engine is used here but the noise of a draw: masks, caches and layers are those of
`transformers`, logits are held, and exit tests and distributions are computed in float64 from the
formulas.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from gemma_ext.nn.recursive import Plan
from gemma_ext.nn.recursive.exits import final_norm
from gemma_ext.reference.depth_batching_head import gumbel
from gemma_ext.serve.exits import ExitTest
from gemma_ext.serve.protocol import Request, SamplingParams, Token

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Sequential:
    """A decoder of single requests.

    Args:
        model: causal LM of `transformers`, vanilla or recursive, in evaluation mode.
        exits: the exit test.

    Example:
        >>> [token.id for token in Sequential(model).decode(Request((1, 2), SamplingParams()))]
    """

    def __init__(self, model: PreTrainedModel, exits: ExitTest | None = None) -> None:
        self.model, self.exits = model, exits or ExitTest()
        plan = Plan.of_model(model)
        self.loops = 1 if plan.order == "sequence" else plan.loops
        ends = [plan.layers] if self.loops == 1 else plan.exits()
        self.ends = [*ends[:-1], plan.layers]  # depths that have run after each loop
        self.inner = [end - 1 for end in ends]  # and before its last layer
        taken = inspect.signature(model.forward).parameters
        self._cache = next(name for name in ("cache", "past_key_values") if name in taken)

    @torch.inference_mode()
    def decode(self, request: Request, depths: Sequence[int] | None = None) -> list[Token]:
        """The output of a request, with exit depths and log-probabilities as it asks for them.

        Args:
            depths: of every output token but the first; None for those of the exit test.
        """
        params, tokens, output = request.params, list(request.prompt), []
        states, cache = self._run(tokens, None)
        while len(output) < params.max_tokens:
            given = depths[len(output)] if depths is not None else None
            if not output:
                loop = min(params.max_loops or self.loops, self.loops)
            else:
                loop = self._depth(states, len(output), params) if given is None else given
            logits = self._logits(states[self.ends[loop - 1]], loop)
            id = draw(logits, tokens, len(output), request)
            output.append(_token(id, logits / params.divisor, params.logprobs, loop))
            tokens.append(id)
            if id in params.stop_ids or len(output) == params.max_tokens:
                break
            states, cache = self._run([id], cache)
        return output

    def _run(self, ids: list[int], cache: Any) -> tuple[list[Tensor], Any]:
        """States [D] of the last of `ids` after 0, 1, ..., L depths, and the grown cache."""
        states: list[Tensor] = []
        layers = self.model.get_decoder().layers

        def keep(module: Any, args: tuple, kwargs: dict) -> None:
            states.append((args[0] if args else kwargs["hidden_states"])[0, -1])

        def keep_last(module: Any, args: tuple, output: Any) -> None:
            states.append((output if isinstance(output, Tensor) else output[0])[0, -1])

        hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
        hooks.append(layers[-1].register_forward_hook(keep_last))
        try:
            given = {} if cache is None else {self._cache: cache}
            device = self.model.get_input_embeddings().weight.device
            output = self.model(torch.tensor([ids], device=device), use_cache=True, **given)
        finally:
            for hook in hooks:
                hook.remove()
        return states, getattr(output, self._cache)

    def _logits(self, state: Tensor, loop: int) -> Tensor:
        """float64 [V] behind loop `loop`, from 1."""
        x, weight = final_norm(self.model)(state), self.model.get_output_embeddings().weight
        if loop < self.loops and getattr(self.model, "exit_head", None) is not None:
            x, weight = self.model.exit_head(x, weight)
        z = functional.linear(x, weight).double()
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return z if cap is None else cap * torch.tanh(z / cap)

    def _depth(self, states: list[Tensor], drawn: int, params: SamplingParams) -> int:
        """The loop, from 1, after which the token is read."""
        most = min(params.max_loops or self.loops, self.loops)
        test, t = self.exits, self.exits.own_threshold(params)
        if test.decay:
            fall = math.exp(-test.decay * drawn / max(params.max_tokens, 1))
            t = min(max(0.9 * t + 0.1 * t * fall, 0.0), 1.0)
        survival, streak, argmax = 1.0, 0, -1
        for loop in range(1, most):
            h = states[self.ends[loop - 1]].double()
            score: float | None = None
            if test.name in ("max_prob", "margin", "entropy", "argmax"):
                logits = self._logits(states[self.ends[loop - 1]], loop)
                best = int(logits.argmax())
                streak = streak + 1 if best == argmax else 0
                argmax = best
                score = streak if test.name == "argmax" else _HEAD_SCORES[test.name](logits)
            elif test.name in ("kl", "cosine", "latent_diff"):
                if loop == 1 and self.loops != 2:
                    continue
                before = self.inner[0] if self.loops == 2 else self.ends[loop - 2]
                if test.name == "kl":
                    p, q = (
                        self._logits(states[at], loop).log_softmax(-1)
                        for at in (self.ends[loop - 1], before)
                    )
                    score = float((p.exp() * (p - q)).sum())
                else:
                    score = _CHANGE_SCORES[test.name](h, states[before].double())
            elif test.name == "preloop":
                z = test.weight.double() @ states[0].double()
                z = z + torch.as_tensor(0.0 if test.bias is None else test.bias).double()
                score = float(z.softmax(-1)[:loop].sum())
            elif test.name in ("gate", "hazard"):
                z = float(test.weight.double() @ h) + float(test.bias or 0.0)
                share = 1 / (1 + math.exp(-z))
                survival *= 1 - share
                score = share if test.name == "gate" else 1 - survival
            if score is None or loop < params.min_loops:
                continue
            if bool(test.passes(torch.tensor(score), torch.tensor(t))):
                return loop
        return most


def _margin(logits: Tensor) -> float:
    first, second = logits.softmax(-1).topk(2).values.tolist()
    return first - second


def _entropy(logits: Tensor) -> float:
    log_p = logits.log_softmax(-1)
    return -float((log_p.exp() * log_p).sum())


_HEAD_SCORES: dict[str, Callable[[Tensor], float]] = {
    "max_prob": lambda logits: float(logits.softmax(-1).max()),
    "margin": _margin,
    "entropy": _entropy,
}
_CHANGE_SCORES: dict[str, Callable[[Tensor, Tensor], float]] = {
    "cosine": lambda h, before: float(h @ before / (h.norm() * before.norm())),
    "latent_diff": lambda h, before: float((h - before).norm() / h.norm()),
}


def distribution(
    logits: Tensor, tokens: Sequence[int], drawn: int, params: SamplingParams
) -> Tensor:
    """float64 [V] probabilities of the next token.

    Args:
        logits: float64 [V].
        tokens: prompt and output so far, the last `drawn` of them output.
    """
    z = logits.double().clone()
    for token, value in params.logit_bias:
        z[token] += value
    if drawn < params.min_tokens:
        z[list(params.stop_ids)] = -math.inf
    for token in set(tokens):
        z[token] *= 1 / params.repetition_penalty if z[token] > 0 else params.repetition_penalty
    output = tokens[len(tokens) - drawn :]
    for token in set(output):
        z[token] -= params.presence_penalty + params.frequency_penalty * output.count(token)
    if params.temperature == 0:
        return functional.one_hot(z.argmax(), len(z)).double()
    p = (z / params.temperature).softmax(-1)
    order = p.argsort(descending=True, stable=True)
    if params.top_k:
        order = order[: params.top_k]
    share = p[order] / p[order].sum()
    order = order[(share.cumsum(0) - share < params.top_p) & (share >= params.min_p * share[0])]
    kept = torch.zeros_like(p)
    kept[order] = p[order]
    return kept / kept.sum()


def draw(logits: Tensor, tokens: Sequence[int], drawn: int, request: Request) -> int:
    """The next token of a request: argmax of log p_v and the noise of its place."""
    p = distribution(logits, tokens, drawn, request.params)
    every = torch.arange(len(p), device=p.device)
    key = torch.tensor([[request.params.seed, request.choice, len(tokens)]], device=p.device)
    return int((p.log() + gumbel(every.unsqueeze(0), key)[0]).argmax())


def _token(id: int, logits: Tensor, asked: int | None, depth: int) -> Token:
    if asked is None:
        return Token(id, exit_depth=depth)
    logprobs = logits.log_softmax(-1)
    order = logprobs.argsort(descending=True, stable=True)[:asked]
    top = tuple((int(token), float(logprobs[token])) for token in order)
    return Token(id, float(logprobs[id]), top, depth)
