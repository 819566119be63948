"""The model step against the model's own forward, in float64 unless a test says otherwise."""

import itertools

import pytest
import torch
from serve_driver import Driver, int32, keys
from serve_tiny import OPTIONS, VOCABULARY, WINDOW, Double, tiny

from gemma_ext.serve.exits import ExitTest
from gemma_ext.serve.protocol import Request, SamplingParams
from gemma_ext.serve.runner import PROMPT, ModelRunner, Rows, Sizes
from gemma_ext.serve.sequential import Sequential
from gemma_ext.serve.weights import read_weights

SIZES = Sizes(requests=4, slots=64, pages=24, max_length=64)


def runner_of(model, sizes=SIZES, **options) -> ModelRunner:
    return ModelRunner(read_weights(model), sizes, **options)


def prefilled_logits(model, ids: list[int], cuts: list[int]) -> torch.Tensor:
    """[T, V] of a prompt that runs in chunks."""
    runner = runner_of(model)
    runner.open(0, Request((1,)))
    tables = int32([5, 2, 7, 0]).unsqueeze(0)
    slots = torch.randperm(SIZES.slots)[: len(ids)].int()
    runner.embed(slots, int32(ids), int32(range(len(ids))))
    bounds = [0, *cuts, len(ids)]
    for begin, end in itertools.pairwise(bounds):
        n = end - begin
        for loop in range(runner.loops):
            seg = int32(n if j > loop else 0 for j in range(runner.loops + 1))
            where = (slots[begin:end], int32(range(begin, end)), int32([0] * n), int32([loop] * n))
            runner.block(Rows(*where, seg, int32([PROMPT] * n), tables))
    return runner.readout.logits(slots.long(), torch.zeros(len(ids), dtype=torch.bool))


def own_logits(model, ids: list[int]) -> torch.Tensor:
    with torch.no_grad(), Double():
        return model(torch.tensor([ids])).logits[0]


def random_ids(count: int, seed: int = 0) -> list[int]:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (count,), generator=random).tolist()


@pytest.mark.parametrize(("loops", "rank", "order"), [(1, 0, "cycle"), (2, 3, "cycle")])
@pytest.mark.parametrize("name", OPTIONS)
def test_prompt_gives_the_models_own_logits(name, loops, rank, order):
    model = tiny(name, loops=loops, rank=rank, order=order)
    ids = random_ids(4 * WINDOW)  # far beyond the window
    got = prefilled_logits(model, ids, [7, 8, 15])
    torch.testing.assert_close(got, own_logits(model, ids), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("order", "layers", "loops"), [("middle-cycle", 6, 2), ("sequence", 4, 2)])
def test_orders_with_layers_run_once(order, layers, loops):
    model = tiny("Gemma2", loops=loops, rank=2, order=order, layers=layers)
    ids = random_ids(17)
    got = prefilled_logits(model, ids, [6])
    torch.testing.assert_close(got, own_logits(model, ids), rtol=1e-11, atol=1e-11)


def test_window_belongs_to_the_depth_and_not_to_the_stored_layer():
    """Three stored layers in two loops: each one slides in one loop only."""
    model = tiny("Gemma2", loops=2, rank=2, layers=6)
    windows = [layer.window.tolist() for layer in read_weights(model).block]
    assert windows == [[WINDOW, 0], [0, WINDOW], [WINDOW, 0]]
    ids = random_ids(21)
    got = prefilled_logits(model, ids, [20])
    torch.testing.assert_close(got, own_logits(model, ids), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("seed", range(3))
def test_cut_of_a_prompt_changes_nothing(seed):
    model = tiny("Gemma2", loops=2, rank=3)
    ids = random_ids(19, seed)
    cuts = sorted(torch.randperm(18)[:seed].add(1).tolist())
    got = prefilled_logits(model, ids, cuts)
    torch.testing.assert_close(got, prefilled_logits(model, ids, []), rtol=1e-12, atol=1e-12)


def requests(count: int = 3, seed: int = 0, **params) -> list[Request]:
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 14, (count,), generator=random).tolist()
    return [
        Request(tuple(random_ids(n, seed + i)), SamplingParams(max_tokens=9, seed=i, **params))
        for i, n in enumerate(lengths)
    ]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("name", "loops", "rank", "threshold"),
    [("Gemma2", 2, 3, 0.35), ("Qwen3", 3, 2, 0.2), ("Llama", 1, 0, 0)],
)
def test_any_schedule_gives_the_tokens_of_sequential_decoding(
    name, loops, rank, threshold, temperature
):
    layers = 6 if loops == 3 else 4
    model = tiny(name, loops=loops, rank=rank, layers=layers)
    exits = ExitTest("max_prob", threshold=threshold)
    asked = requests(temperature=temperature)
    with Double():
        wanted = [Sequential(model, exits).decode(request) for request in asked]
    depths = [[token.exit_depth for token in tokens] for tokens in wanted]
    if loops > 1:
        assert len({depth for each in depths for depth in each}) > 1  # early exits do happen
    for seed in range(3):
        jobs = Driver(runner_of(model, exits=exits), seed).run(asked)
        for job, tokens in zip(jobs, wanted, strict=True):
            assert job.tokens[len(job.request.prompt) :] == [token.id for token in tokens]
        assert [job.depths for job in jobs] == depths


def test_filled_keys_are_those_of_a_full_pass():
    model = tiny("Gemma2", loops=2, rank=3)
    runner = runner_of(model, exits=ExitTest("max_prob", threshold=0.2))
    driver = Driver(runner, 1)
    job = driver.run(requests(1))[0]
    assert job.deferred
    driver.fill(job)
    full = runner_of(model)
    again = Driver(full, 2)
    again.admit(0, Request(tuple(job.tokens[:-1]), SamplingParams(max_tokens=1)))
    count = len(job.tokens) - 2  # the last of them has run nothing there
    for depth in range(4):
        mine, other = (
            r.kv_pool[depth, d.tables[0, :2].long()].permute(1, 2, 0, 3, 4).flatten(2, 3)
            for r, d in ((runner, driver), (full, again))
        )
        torch.testing.assert_close(mine[:, :, :count], other[:, :, :count], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_are_as_near_to_float64_as_the_models_own_forward(dtype):
    model = tiny("Gemma2", loops=2, rank=3, dtype=dtype)
    ids = random_ids(4 * WINDOW)
    got = prefilled_logits(model, ids, [7, 8, 15])
    with torch.no_grad():
        own = model(torch.tensor([ids])).logits[0]
    exact = own_logits(model.double(), ids)
    assert (got - exact).abs().max() <= 2 * (own - exact).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "threshold"), [("Gemma2", 2.5), ("Qwen3", 3.6)])
def test_schedules_give_the_same_bits(name, threshold, dtype):
    """Tokens, exits, log-probabilities and keys, whatever runs beside them in which chunks."""
    model = tiny(name, loops=2, rank=3, dtype=dtype)
    exits = ExitTest("entropy", threshold=threshold)
    asked = requests(temperature=0.7, logprobs=2)
    outcomes = []
    for seed in range(3):
        driver = Driver(runner_of(model, exits=exits), seed)
        jobs = driver.run(asked)
        for job in jobs:
            driver.fill(job)
        outcomes.append((driver, jobs))
    first, jobs = outcomes[0]
    assert len({depth for job in jobs for depth in job.depths}) == 2
    for driver, others in outcomes[1:]:
        for job, other in zip(jobs, others, strict=True):
            assert (job.tokens, job.depths) == (other.tokens, other.depths)
            for (mine, i), (its, j) in zip(job.sampled, other.sampled, strict=True):
                assert torch.equal(mine.logprobs[i], its.logprobs[j])
                assert torch.equal(mine.top_logprobs[i], its.top_logprobs[j])
            count = len(job.tokens) - 1
            assert torch.equal(keys(first, job.row, count), keys(driver, other.row, count))


@pytest.mark.parametrize(
    ("exits", "policy"),
    [
        (ExitTest("latent_diff", threshold=0.7), "exact_lazy"),
        (ExitTest("max_prob", threshold=0.35), "copy"),
        (ExitTest("entropy", threshold=2.5), "propagate"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("order", ["cycle", "middle-cycle"])
def test_fixed_buffers_give_the_same_bits(exits, policy, dtype, order):
    """Rows that fill a launch up, without the graph that a card makes of it."""
    if order == "middle-cycle" and policy == "copy":
        policy = "exact_lazy"
    layers = 4 if order == "cycle" else 6
    model = tiny("Gemma2", loops=2, rank=3, layers=layers, order=order, dtype=dtype)
    asked = requests(4, temperature=0.7, logprobs=2)
    given = {"exits": exits, "policy": policy}
    drivers = [Driver(runner_of(model, graphs=fixed, **given), 1) for fixed in (False, True)]
    plain, filled = (driver.run(asked) for driver in drivers)
    assert len({depth for job in plain for depth in job.depths}) == 2
    for job, other in zip(plain, filled, strict=True):
        assert (job.tokens, job.depths) == (other.tokens, other.depths)
        count = len(job.tokens) - 1
        own, its = (keys(driver, job.row, count) for driver in drivers)
        assert torch.allclose(own, its, rtol=1e-12 if dtype == torch.float64 else 0, atol=0)


def test_what_does_not_fit_is_refused():
    model = tiny("Gemma2", loops=2, layers=6, order="middle-cycle")
    with pytest.raises(ValueError, match=r"^max_length: expected at most the 128 positions of"):
        runner_of(model, Sizes(1, 1, 1, 129))
    with pytest.raises(ValueError, match=r"^pages: expected at least 1, got 0"):
        runner_of(model, Sizes(1, 1, 0, 64))
