"""One request under any policy, from the modules of `transformers` with K and V in lists."""

from __future__ import annotations

import torch

from gemma_ext.nn.recursive import Plan

COPIED = ("copy", "first_then_shared", "modulo")


class Oracle:
    """Runs a recursive Gemma 2 token by token.

    Keys of depth l live in `keys[place(l)]`, by position; a token sees what is there.
    """

    def __init__(self, model, policy: str, keep: int = 1) -> None:
        self.model, self.policy, self.keep = model, policy, keep
        self.plan = Plan.of_model(model)
        self.layers = model.model.layers
        self.pool: dict[int, dict[int, tuple]] = {}

    def place(self, depth: int) -> int:
        loop, stored = divmod(depth, self.plan.stored)
        if self.policy == "single":
            loop = 0
        elif self.policy == "first_then_shared":
            loop = min(loop, self.keep)
        elif self.policy == "modulo":
            loop %= self.keep
        return loop * self.plan.stored + stored

    def write(self, depth: int, pos: int, x: torch.Tensor) -> None:
        """K and V of a normed input x [D]."""
        attention = self.layers[depth].self_attn
        k, v = (
            projection(x).view(-1, attention.head_dim)
            for projection in (attention.k_proj, attention.v_proj)
        )
        self.pool.setdefault(self.place(depth), {})[pos] = (self.turn(k, pos), v)

    def turn(self, x: torch.Tensor, pos: int) -> torch.Tensor:
        """x [heads, hd] rotated."""
        cos, sin = self.model.model.rotary_emb(x[None], torch.tensor([[pos]]))
        a, b = x.chunk(2, -1)
        return x * cos[0] + torch.cat([-b, a], -1) * sin[0]

    def layer(self, depth: int, pos: int, h: torch.Tensor) -> torch.Tensor:
        layer = self.layers[depth]
        x = layer.input_layernorm(h)
        self.write(depth, pos, x)
        y = layer.post_attention_layernorm(self.attend(depth, pos, x))
        h = h + y
        return h + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(h)))

    def attend(self, depth: int, pos: int, x: torch.Tensor) -> torch.Tensor:
        attention, held = self.layers[depth].self_attn, self.pool[self.place(depth)]
        least = 0
        if attention.sliding_window is not None:
            least = pos - attention.sliding_window + 1
        seen = sorted(p for p in held if least <= p <= pos)
        k, v = (torch.stack([held[p][i] for p in seen], 1) for i in (0, 1))
        if hasattr(attention, "prefix"):
            made = (attention.k_proj(attention.prefix), attention.v_proj(attention.prefix))
            front = (x.unflatten(-1, (-1, attention.head_dim)).transpose(0, 1) for x in made)
            k, v = (torch.cat(pair, 1) for pair in zip(front, (k, v), strict=True))
        groups = attention.num_key_value_groups
        k, v = (t.repeat_interleave(groups, 0) for t in (k, v))  # [heads, seen, hd]
        q = self.turn(attention.q_proj(x).view(-1, attention.head_dim), pos)
        cap = attention.attn_logit_softcapping
        scores = cap * torch.tanh((k @ q.unsqueeze(-1)).squeeze(-1) * attention.scaling / cap)
        out = (scores.softmax(-1).unsqueeze(1) @ v).flatten()
        return attention.o_proj(out)

    def loop(self, loop: int, pos: int, h: torch.Tensor) -> torch.Tensor:
        for stored in range(self.plan.stored):
            h = self.layer(loop * self.plan.stored + stored, pos, h)
        return h

    def skip(self, last: int, pos: int, h: torch.Tensor) -> None:
        """What the policy writes for the loops after `last`, from 0."""
        stored = self.plan.stored
        for own in range(stored):
            written = {self.place(loop * stored + own) for loop in range(last + 1)}
            for depth in range((last + 1) * stored + own, self.plan.layers, stored):
                if self.policy == "propagate":
                    self.write(depth, pos, self.layers[depth].input_layernorm(h))
                elif self.policy in COPIED and self.place(depth) not in written:
                    kept = self.pool[self.place(last * stored + own)][pos]
                    self.pool[self.place(depth)][pos] = kept

    @torch.no_grad()
    def decode(self, prompt: list[int], depths: list[int]) -> list[int]:
        """Greedy output whose token i is read after depths[i] loops; the prompt runs all of them,
        loop by loop."""
        embed = self.model.model.embed_tokens
        states = [embed(torch.tensor(id)) for id in prompt]
        for loop in range(self.plan.loops):
            states = self.chunk(loop, states)
        output = [self.read(states[-1])]
        for depth in depths[1:]:
            pos, h = len(prompt) + len(output) - 1, embed(torch.tensor(output[-1]))
            for loop in range(depth):
                h = self.loop(loop, pos, h)
            self.skip(depth - 1, pos, h)
            output.append(self.read(h))
        return output

    def chunk(self, loop: int, states: list[torch.Tensor]) -> list[torch.Tensor]:
        """Layer by layer, so that each row sees the keys of this loop of all rows before it."""
        for stored in range(self.plan.stored):
            depth = loop * self.plan.stored + stored
            states = [self.layer(depth, pos, h) for pos, h in enumerate(states)]
        return states

    def read(self, h: torch.Tensor) -> int:
        return int(self.model.lm_head(self.model.model.norm(h)).argmax())
