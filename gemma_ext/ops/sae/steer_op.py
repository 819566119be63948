"""The steering op as torch sees it, and the same from the formulas."""

from __future__ import annotations

import torch
from torch import Tensor

from gemma_ext.ops._derivatives import refuse_derivatives
from gemma_ext.ops.sae.steer_requests import (
    ALWAYS,
    CAUSAL,
    FOREVER,
    MODE_CODES,
    OWN,
    PROMPT,
    Requests,
)
from gemma_ext.reference import sae_products as formulas

UNDECIDED, NEVER = -2, -1
"""States before the first call, and after calls in which nothing fired; from 0 on, tokens since."""
_MODES = {code: mode for mode, code in MODE_CODES.items()}
_REMEDY = "gemma_ext.ops.sae.steer with impl='reference' has derivatives of every order and mode"


def steer(
    x: Tensor, r: Requests, state: Tensor, reads: Tensor | None, writes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(x' [B, T, D], state after) by the kernel."""
    return torch.ops.gemma_ext.sae_steer(
        x,
        r.decoder,
        r.encoder,
        r.tables,
        r.offsets,
        r.latents,
        r.modes,
        r.amounts,
        r.gates,
        state,
        reads,
        writes,
    )


refuse_derivatives("sae_steer", _REMEDY)


@torch.library.register_fake("gemma_ext::sae_steer")
def _steer_fake(x, *rest):
    return x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=torch.int32)


def plain(
    x: Tensor, r: Requests, state: Tensor, reads: Tensor | None, writes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(x' [B, T, D], state after) request by request."""
    outs, after = [], []
    for b in range(x.shape[0]):
        own = (mask if mask is None else mask[b] for mask in (reads, writes))
        out, since = _request(x[b], r, b, state[b], *own)
        outs.append(out)
        after.append(since)
    if not outs:
        return x.clone(), state.clone()
    return torch.stack(outs), torch.stack(after)


def _request(x, r, b, state, reads, writes):
    wide = torch.promote_types(torch.promote_types(x.dtype, r.decoder.dtype), torch.float32)
    entries = slice(int(r.offsets[b]), int(r.offsets[b + 1]))
    at = r.latents[entries].long()
    modes = r.modes[entries].tolist()
    strength, level, tau = r.amounts[entries].to(wide).unbind(-1)
    bias, threshold, norm = r.tables[at].to(wide).unbind(-1)
    decoder, wide_x = r.decoder[at].to(wide), x.to(wide)
    gate, window = r.gates[b].tolist()
    if r.encoder.numel():
        f = formulas.firing(wide_x, r.encoder[at].to(wide), bias, threshold)
    else:
        f = wide_x.new_zeros(x.shape[0], len(at))
    fires = f > tau if reads is None else (f > tau) & reads.unsqueeze(-1)
    gates, state = _gates(fires, gate, window, state, reads)
    q = (wide_x @ decoder.T) / norm
    amounts = []
    for s, code in enumerate(modes):
        mode = _MODES[code]
        u = formulas.increments(mode, f[:, s], q[:, s], level[s])
        if mode in ("project", "cap"):
            u = u / norm[s]
        # 0 times what is not finite is to be 0
        u = strength[s] * torch.where(strength[s] == 0, u.nan_to_num(0.0, 0.0, 0.0), u)
        opened = gates[:, s] if writes is None else gates[:, s] & writes
        amounts.append(torch.where(opened, u, torch.zeros_like(u)))
    return formulas.added(wide_x, amounts, decoder).to(x.dtype), state


def _gates(fires: Tensor, gate: int, window: int, state: Tensor, reads: Tensor | None):
    """(bool [T, S], state after)."""
    if gate == ALWAYS:
        return torch.ones_like(fires), state
    if gate == OWN:
        return fires, state
    some = fires.any(-1)
    if gate not in (CAUSAL, PROMPT):
        return some.unsqueeze(-1).expand_as(fires), state
    if gate == PROMPT:
        has_tokens = some.numel() > 0 if reads is None else reads.any()
        first = torch.where(some.any(), torch.zeros_like(state), torch.full_like(state, NEVER))
        undecided = (state == UNDECIDED) & has_tokens
        state = torch.where(undecided, first, state)
        return (state >= 0).expand(fires.shape), state
    found, since = [], state
    for t in range(len(some)):
        counted = torch.ones_like(some[t]) if reads is None else reads[t]
        waited = torch.where((since >= 0) & (since < FOREVER), since + 1, since)
        waited = torch.where(some[t], torch.zeros_like(since), waited)
        since = torch.where(counted, waited, since)
        found.append((since >= 0) & (since < window))
    opened = torch.stack(found) if found else some
    return opened.unsqueeze(-1).expand(fires.shape), since
