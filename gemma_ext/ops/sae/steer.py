"""Steering by latents: increments along decoder rows, gated by when the latents fire."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from gemma_ext.ops.sae import steer_op as op
from gemma_ext.ops.sae.impls import is_reference
from gemma_ext.ops.sae.steer_inputs import (
    check_dtypes,
    check_mask,
    check_state,
    check_x,
    numbers,
    table,
)
from gemma_ext.ops.sae.steer_requests import Requests, pack

MODES = ("add", "ablate", "clamp", "min_clamp", "scale", "project", "cap")
GATES = ("constant", "per_input", "per_token")
SCOPES = ("causal", "prompt", "window")
READS_CODE = ("ablate", "clamp", "min_clamp", "scale")


@dataclass(frozen=True)
class Steering:
    """What is done along S directions d_s, and when: x' = x + sum_s g_s a_s u_s d_s.

    With f_s = p 1[p > threshold_s], p = x . encoder_s + bias_s, both read from x before anything is
    added, and q_s = x . d_s / |d_s|:

    | mode | u_s | | mode | u_s |
    |---|---|---|---|---|
    | add | 1 | | scale | (level - 1) f_s |
    | ablate | -f_s | | project | (level - 1) q_s / |d_s|: level 0 leaves no part along d_s |
    | clamp | level - f_s | | cap | min(level - q_s, 0) / |d_s|: at most `level` along d_s |
    | min_clamp | max(level - f_s, 0) | | | |

    Attributes:
        decoder: [S, D], rows d_s as they are.
        strength: a_s, [S], [B, S] or one number; at 0 a direction changes nothing, not a bit.
        encoder: [S, D], needed where f is.
        bias: [S], with that of the decoder folded in; 0 without.
        threshold: [S] or one number; f is 0 at the threshold itself.
        mode: above.
        level: [S], [B, S] or one number.
        gate: g_s: "constant" 1; "per_token" 1[f_s > gate_threshold], or with `together` where any
            of the S is; "per_input" by `scope`, for all S.
        gate_threshold: tau; 0 means active.
        scope: of per_input: "prompt", whether any token of the first call fires, from then on;
            "causal", from the first token that fires; "window", for `window` tokens from one that
            fires.

    Raises:
        ValueError, TypeError: what does not fit.
    """

    decoder: Tensor
    strength: Tensor | float = 1.0
    encoder: Tensor | None = None
    bias: Tensor | None = None
    threshold: Tensor | float = 0.0
    mode: str = "add"
    level: Tensor | float = 0.0
    gate: str = "constant"
    gate_threshold: float = 0.0
    together: bool = False
    scope: str = "causal"
    window: int | None = None

    def __post_init__(self) -> None:
        for name, values in (("mode", MODES), ("gate", GATES), ("scope", SCOPES)):
            if getattr(self, name) not in values:
                raise ValueError(
                    f"expected {name} to be {', '.join(values[:-1])} or {values[-1]}, "
                    f"got {getattr(self, name)!r}"
                )
        if (self.scope == "window") != (self.window is not None):
            raise ValueError(
                f"expected window with scope='window' and only there, got {self.window!r} "
                f"with {self.scope!r}"
            )
        if self.window is not None and self.window < 1:
            raise ValueError(f"expected window to be at least 1, got {self.window}")
        table("decoder", self.decoder, self.decoder)
        if self.encoder is not None:
            table("encoder", self.encoder, self.decoder)
        elif self.reads_code:
            raise ValueError(
                f"expected an encoder with mode={self.mode!r} and gate={self.gate!r}, got None"
            )
        for name in ("bias", "threshold", "strength", "level"):
            value = getattr(self, name)
            batched = name in ("strength", "level")
            if value is not None:
                numbers(name, value, self.decoder, batched=batched)
        self.requests_of_its_own  # noqa: B018  both checked together

    @property
    def reads_code(self) -> bool:
        """Whether f is needed."""
        return self.mode in READS_CODE or self.gate != "constant"

    @property
    def requests_of_its_own(self) -> int:
        """B of strengths or levels [B, S], else 1."""
        sizes = {
            numbers(name, getattr(self, name), self.decoder, batched=True).shape[0]
            for name in ("strength", "level")
        }
        if len(sizes - {1}) > 1:
            raise ValueError(f"expected strength and level of one batch, got {sorted(sizes)}")
        return max(sizes)

    @property
    def requests(self) -> Requests:
        """This steering for every request of a batch. Built once, so that what is written into its
        tensors afterwards is not seen; anew where one of them asks for a gradient."""
        found = vars(self).get("_packed")
        if found is None or found.requires_grad:
            found = pack([self])
            object.__setattr__(self, "_packed", found)
        return found

    def with_strength(self, strength: Tensor | float) -> Steering:
        """The same with other strengths."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        return Steering(**{**given, "strength": strength})


def fresh_state(requests: int, device: torch.device | str = "cpu") -> Tensor:
    """int32 [B]: what `steer` remembers between calls, before the first."""
    return torch.full((requests,), op.UNDECIDED, dtype=torch.int32, device=device)


def steer(
    x: Tensor,
    steering: Steering | Sequence[Steering | None] | Requests,
    *,
    state: Tensor | None = None,
    reads: Tensor | None = None,
    writes: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """x with directions added where their gates are open; everything else bit for bit as it was.

    Sums are float32 and rounded once. Only the S encoder rows of the latents are read. Requests
    steered together have the bits that each has alone.

    Args:
        x: [B, T, D], or [T, D] for one request: a residual stream.
        steering: one for all, one per request (None leaves it alone), or those packed by `pack`.
        state: int32 [B] of `fresh_state`, updated: gates that know of earlier calls. Without it
            every call is the first.
        reads: bool [B, T], tokens that may open gates; all by default. Padding and BOS are not
            among them.
        writes: bool [B, T], tokens that may change; those of `reads` by default.
        impl: "auto", or "reference" for plain torch, which alone is differentiable; inputs that
            ask for a gradient go there.

    Returns:
        A tensor like x.

    Raises:
        ValueError, TypeError: what does not fit.
    """
    requests = packed(steering)
    batch, tokens = check_x(x, requests)
    check_state(state, batch, x)
    reads = check_mask("reads", reads, batch, tokens, x)
    writes = reads if writes is None else check_mask("writes", writes, batch, tokens, x)
    reference = is_reference(impl, x.device, "sae_steer")
    check_dtypes(x, requests, reference=reference)
    rows = x.reshape(batch, tokens, x.shape[-1])
    before = fresh_state(batch, x.device) if state is None else state
    wants = torch.is_grad_enabled() and (x.requires_grad or requests.requires_grad)
    run = op.plain if reference or wants else op.steer
    out, after = run(rows, requests.spread(batch), before, reads, writes)
    if state is not None:
        with torch.no_grad():
            state.copy_(after)
    return out.reshape(x.shape)


def packed(steering: Steering | Sequence[Steering | None] | Requests) -> Requests:
    """Requests of what `steer` takes."""
    if isinstance(steering, Requests):
        return steering
    if isinstance(steering, Steering):
        return steering.requests
    return pack(list(steering))
