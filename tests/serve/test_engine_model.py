"""The engine over the real model step: no schedule changes a bit."""

import pytest
import torch
from serve_tiny import VOCABULARY, Double, tiny
from toy_models import drain

from gemma_ext.serve.config import EngineConfig
from gemma_ext.serve.engine import Engine
from gemma_ext.serve.exits import ExitTest
from gemma_ext.serve.policies import POLICIES
from gemma_ext.serve.protocol import Request, SamplingParams
from gemma_ext.serve.sequential import Sequential

LOOPS = 3
EXITS = ExitTest("max_prob", threshold=0.3)


def requests(count=4, **options):
    generator = torch.Generator().manual_seed(1)
    draw = torch.randint(0, VOCABULARY, (count, 40), generator=generator).tolist()
    return [
        Request(
            tuple(draw[i][: 1 + 8 * i]),
            SamplingParams(max_tokens=12 + i, temperature=float(i % 2), seed=i, **options),
        )
        for i in range(count)
    ]


def serve(model, asked, depths=None, **options):
    given = {"width": 4, "max_model_len": 64, "prefill_tokens": 16, "verify": True, **options}
    engine = Engine.of_model(model, EngineConfig(**given), exits=EXITS)
    ids = [engine.submit(request, depths) for request in asked]
    found = drain(engine)
    assert engine.scheduler.free_pages == engine.config.pages
    return [found[id][:2] for id in ids], engine


@pytest.mark.parametrize("policy", POLICIES)
def test_no_schedule_changes_a_token_or_an_exit(policy):
    dtype = torch.float64 if policy == "exact_eager" else torch.float32
    model = tiny("Llama", loops=LOOPS, layers=3, rank=4, dtype=dtype)
    asked = requests()
    first = serve(model, asked, kv_policy=policy, keep=2)[0]
    assert {depth for _, depths in first for depth in depths[1:]} > {LOOPS}
    tight = {"requests": 3, "pages": 6, "kv_pressure": "offload", "margin": 0.0}
    for options in (
        {"width": 1, "requests": 1},
        {
            "width": 3,
            "min_coda_batch": 3,
            "mixed": False,
            "order": "deepest",
            "backlog": 2,
            **tight,
        },
    ):
        assert serve(model, asked, kv_policy=policy, keep=2, **options)[0] == first, options


@pytest.mark.parametrize("policy", ["exact_lazy", "exact_eager"])
@pytest.mark.parametrize("name", ["Gemma2", "Qwen3"])
def test_exact_policies_decode_as_the_model_alone(policy, name):
    model = tiny(name, loops=2, layers=4, rank=4)
    asked = [
        Request((i, 2, 3), SamplingParams(max_tokens=32, temperature=float(i % 2), seed=i))
        for i in range(4)
    ]
    found, engine = serve(
        model, asked, kv_policy=policy, kv_pressure="recompute", pages=5, margin=0.0,
        prefix_cache=True, fill_on_finish=True,
    )  # fmt: skip
    assert engine.stats().preemptions > 0
    with Double():
        for (tokens, depths), request in zip(found, asked, strict=True):
            alone = FirstIsFull(model, EXITS).decode(request)
            assert tokens == [token.id for token in alone]
            assert depths == [token.exit_depth for token in alone]


class FirstIsFull(Sequential):
    """Reads the first token after all loops, as an engine does."""

    def _depth(self, states, drawn, params):
        most = params.max_loops or self.loops
        return most if drawn == 0 else super()._depth(states, drawn, params)


def test_without_exits_all_modes_decode_as_one_loop_of_all_layers():
    model = tiny("Gemma2", loops=2, layers=4, rank=4)
    asked = requests(min_loops=2)
    csb = serve(model, asked, mode="csb")[0]
    assert serve(model, asked)[0] == csb
    with Double():
        for (tokens, _), request in zip(csb, asked, strict=True):
            plain = Sequential(model).decode(request, depths=[2] * request.params.max_tokens)
            assert tokens == [token.id for token in plain]


@pytest.mark.parametrize("routing", ["host", "device"])
def test_adapters_of_layers_that_only_one_loop_runs(routing):
    peft = pytest.importorskip("peft")
    model = tiny("Gemma2", loops=2, rank=2, layers=6, order="middle-cycle")
    for depth in (0, 5):
        names = [f"layers.{depth}.self_attn.v_proj", f"layers.{depth}.mlp.down_proj"]
        adapter = peft.LoraConfig(r=2, target_modules=names)
        peft.inject_adapter_in_model(adapter, model, adapter_name=f"of{depth}")
    for layer in (model.model.layers[0], model.model.layers[5]):
        for linear in (layer.self_attn.v_proj, layer.mlp.down_proj):
            linear.set_adapter(list(linear.lora_A))
            with torch.no_grad():
                for part in (*linear.lora_A.values(), *linear.lora_B.values()):
                    part.weight.normal_(generator=torch.Generator().manual_seed(3))
    model = model.double().eval()
    asked = requests(3)
    found, engine = serve(model, asked, routing=routing)
    assert engine.runner.weights.prelude[0].down.loops == 2
    with Double():
        for request, own in zip(asked, found, strict=True):
            alone = Sequential(model, EXITS).decode(request)
            assert own == ([token.id for token in alone], [token.exit_depth for token in alone])
