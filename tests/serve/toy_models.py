"""Recursive decoders small enough to be run a row at a time, in float64 and without torch's ops.

A row's numbers depend on nothing but the row and the keys it reads, so that a schedule that is
right gives the same bits as one request after the other.
"""

from dataclasses import dataclass

import numpy as np
import torch

from gemma_ext.serve.config import PAGE, EngineConfig
from gemma_ext.serve.protocol import Request
from gemma_ext.serve.sampling import Sampled


@dataclass
class ToyModel:
    """`stored` layers run `loops` times, each depth with a low-rank change of its own."""

    loops: int = 3
    stored: int = 2
    width: int = 8
    vocabulary: int = 29
    seed: int = 0

    def __post_init__(self):
        rng = np.random.default_rng([self.seed, self.loops, self.stored])
        d, depths = self.width, self.loops * self.stored
        scale = 1 / np.sqrt(d)
        self.embedding = rng.normal(size=(self.vocabulary, d))
        self.q, self.k, self.v, self.o, self.up, self.down = rng.normal(
            size=(6, self.stored, d, d), scale=scale
        )
        self.a, self.b = rng.normal(size=(2, depths, d), scale=scale)
        self.bias = rng.normal(size=(depths, d), scale=0.3)
        self.head = rng.normal(size=(self.vocabulary, d))
        self.gate = rng.normal(size=d)

    def norm(self, h):
        return h / np.sqrt((h * h).mean() + 1e-6)

    def keys(self, h, depth, pos):
        """A key and a value [d] of the state that enters a layer."""
        s, x = depth % self.stored, self.norm(h)
        turn = np.cos(pos * np.arange(1, self.width + 1) / 7)
        return (self.k[s] @ x + self.a[depth] * (self.b[depth] @ x)) * turn, self.v[s] @ x

    def layer(self, h, depth, pos, k, v):
        """The state behind a layer; k, v [n, d] of the tokens it attends to, itself among them."""
        s = depth % self.stored
        score = k @ (self.q[s] @ self.norm(h) * np.cos(pos / 5))
        p = np.exp(score - score.max())
        h = h + self.o[s] @ ((p / p.sum()) @ v)
        return h + self.down[s] @ np.tanh(self.up[s] @ self.norm(h) + self.bias[depth])

    def draw(self, h, request, position):
        z = self.head @ self.norm(h)
        if request.params.temperature:
            key = [request.params.seed % 2**64, request.choice, position]
            z = z / request.params.temperature + np.random.default_rng(key).gumbel(size=len(z))
        return int(z.argmax())

    def signal(self, h, threshold):
        """Whether a gate lets the token go."""
        return 1 / (1 + np.exp(-self.gate @ self.norm(h))) >= threshold


def place_of(policy, keep):
    """Which loop's place a loop writes to."""
    if policy == "single":
        return lambda j: 0
    if policy == "first_then_shared":
        return lambda j: min(j, keep)
    if policy == "modulo":
        return lambda j: j % keep
    return lambda j: j


def decode(model, request, config, depths=None):
    """(tokens, exit depths, keys and values by (place, layer, position)) of one request alone."""
    params, place = request.params, place_of(config.kv_policy, config.keep)
    most = params.max_loops or model.loops
    kv, tokens, exits = {}, list(request.prompt), []

    def run(positions, states, loop):
        for s in range(model.stored):
            depth, at = loop * model.stored + s, (place(loop), s)
            for pos in positions:
                kv[(*at, pos)] = model.keys(states[pos], depth, pos)
            for pos in positions:
                seen = [kv[(*at, i)] for i in range(pos + 1) if (*at, i) in kv]
                k, v = (np.stack(part) for part in zip(*seen, strict=True))
                states[pos] = model.layer(states[pos], depth, pos, k, v)

    chunk = config.prefill_tokens
    for begin in range(0, len(tokens), chunk):
        positions = range(begin, min(begin + chunk, len(tokens)))
        states = {pos: model.embedding[tokens[pos]] for pos in positions}
        for loop in range(most):
            run(positions, states, loop)
    depth, pos = most, len(tokens) - 1
    while len(exits) < params.max_tokens:
        exits.append(depth)
        tokens.append(model.draw(states[pos], request, pos + 1))
        if tokens[-1] in params.stop_ids or len(exits) == params.max_tokens:
            break
        pos += 1
        states, depth = {pos: model.embedding[tokens[pos]]}, None
        for loop in range(most):
            run([pos], states, loop)
            last = loop + 1 == most
            if depths is not None:
                leaves = loop + 1 >= depths[len(exits)]
            else:
                threshold = params.exit_threshold
                passed = threshold is not None and model.signal(states[pos], threshold)
                leaves = passed and loop + 1 >= params.min_loops
            if (leaves or last) and depth is None:
                depth, kept = loop + 1, states[pos]
                if config.kv_policy.startswith("exact"):
                    continue  # the rest of the loops, for keys and values
                fill(model, kv, config, pos, kept, depth, most)
                break
        states[pos] = kept
    return tokens[len(request.prompt) :], exits, kv


COPIES = ("copy", "first_then_shared", "modulo")


def fill(model, kv, config, pos, h, depth, most):
    """Keys and values of the loops that a token did not run, of `most` that it may."""
    place = place_of(config.kv_policy, config.keep)
    for loop in range(depth, most):
        for s in range(model.stored):
            if config.kv_policy in COPIES:
                kv[place(loop), s, pos] = kv[place(depth - 1), s, pos]
            elif config.kv_policy == "propagate":
                kv[loop, s, pos] = model.keys(h, loop * model.stored + s, pos)


class ToyRunner:
    """Runs the toy for an engine, a row at a time. Memory that nobody wrote holds NaN."""

    def __init__(self, model: ToyModel, config: EngineConfig):
        self.model, self.config = model, config
        self.loops, self.vocabulary = model.loops, model.vocabulary
        self.place = place_of(config.kv_policy, config.keep)
        shape = (model.loops * model.stored, config.pages, 2, 1, PAGE, model.width)
        self.pool = np.full(shape, np.nan)
        self.hidden = np.full((config.slots, model.width), np.nan)
        self.kv_pool, self.bank = torch.from_numpy(self.pool), torch.from_numpy(self.hidden)
        self.open_rows: dict[int, Request] = {}
        self.present = {}  # (row, loop) -> positions there, of active_only
        self.ran = 0

    def open(self, row, request, drawn=0):
        assert row not in self.open_rows
        self.open_rows[row] = request
        for loop in range(self.loops):
            self.present[row, loop] = set()

    def close(self, row):
        del self.open_rows[row]

    def embed(self, slots, ids, positions):
        for slot, id in zip(slots.tolist(), ids.tolist(), strict=True):
            self.hidden[slot] = self.model.embedding[id]

    def block(self, rows):
        model, tables = self.model, rows.block_tables.numpy()
        fields = (rows.slot, rows.pos, rows.req, rows.loop, rows.kind)
        every = list(zip(*(x.tolist() for x in fields), strict=True))
        assert [row[3] for row in every] == sorted(row[3] for row in every)
        assert len({row[0] for row in every}) == len(every)
        self.ran += sum(kind != 2 for *_, kind in every)
        for s in range(model.stored):
            for slot, pos, req, loop, kind in every:
                page = self.pool[self._depth(loop, s), tables[req, pos // PAGE]]
                page[:, 0, pos % PAGE] = model.keys(self.hidden[slot], loop * model.stored + s, pos)
                self.present[req, loop].update(range(pos + 1) if kind == 2 else (pos,))
            for slot, pos, req, loop, _ in every:
                pages = self.pool[self._depth(loop, s), tables[req, : pos // PAGE + 1]]
                kv = pages[:, :, 0].transpose(1, 0, 2, 3).reshape(2, -1, model.width)[:, : pos + 1]
                if self.config.kv_policy == "active_only":
                    kv = kv[:, sorted(i for i in self.present[req, loop] if i <= pos)]
                depth = loop * model.stored + s
                self.hidden[slot] = model.layer(self.hidden[slot], depth, pos, kv[0], kv[1])
        signals = [self._signal(*row) for row in every]
        return torch.tensor(signals) if any(signals) else None

    def _depth(self, loop, s):
        return self.place(loop) * self.model.stored + s

    def _signal(self, slot, pos, req, loop, kind):
        threshold = self.open_rows[req].params.exit_threshold if kind == 0 else None
        return threshold is not None and bool(self.model.signal(self.hidden[slot], threshold))

    def coda(self, slots, requests, positions, loops, tables):
        ids = []
        for slot, req, pos, depth in zip(
            *(x.tolist() for x in (slots, requests, positions, loops)), strict=True
        ):
            ids.append(self.model.draw(self.hidden[slot], self.open_rows[req], pos + 1))
            most = self.open_rows[req].params.max_loops or self.loops
            self._fill(slot, pos, range(depth, most), int(tables[req, pos // PAGE]))
        return Sampled(torch.tensor(ids, dtype=torch.int32), None, None, None)

    def _fill(self, slot, pos, skipped, page):
        at = (page, slice(None), 0, pos % PAGE)
        for loop in skipped:
            for s in range(self.model.stored):
                where = self._depth(loop, s)
                if self.config.kv_policy in COPIES:
                    self.pool[where][at] = self.pool[self._depth(skipped[0] - 1, s)][at]
                elif self.config.kv_policy == "propagate":
                    self.pool[where][at] = self.model.keys(self.hidden[slot], where, pos)

    def score(self, slots, requests, positions, ids, top):
        logprobs = []
        for slot, id in zip(slots.tolist(), ids.tolist(), strict=True):
            z = self.model.head @ self.model.norm(self.hidden[slot])
            logprobs.append(z[id] - z.max() - np.log(np.exp(z - z.max()).sum()))
        none = torch.zeros(len(logprobs), top)
        return Sampled(ids, torch.tensor(logprobs), none.int(), none)


class CountingRunner(ToyRunner):
    """Each loop adds 1 to the value of the token, so that a token is one more per loop it ran."""

    def embed(self, slots, ids, positions):
        self.hidden[slots.numpy()] = ids.numpy()[:, None]

    def block(self, rows):
        self.ran += int((rows.kind != 2).sum())
        self.hidden[rows.slot.numpy()] += 1

    def coda(self, slots, requests, positions, loops, tables):
        values = self.hidden[slots.numpy(), 0] % self.vocabulary
        return Sampled(torch.from_numpy(values.astype(np.int32)), None, None, None)


def drain(engine, *, check=True, most=100_000):
    """Steps until nothing is left; {request: ([tokens], [exit depths], finish reason)}."""
    found = {}
    for _ in range(most):
        if not engine.has_work():
            return found
        collect(found, engine.step())
        if check:
            engine.scheduler.check()
    raise AssertionError("the engine does not come to an end")


def collect(found, events):
    for event in events:
        tokens, depths, reason = found.setdefault(event.request, ([], [], None))
        assert reason is None
        if event.token is not None:
            tokens.append(event.token.id)
            depths.append(event.token.exit_depth)
        found[event.request] = (tokens, depths, event.finish_reason)
