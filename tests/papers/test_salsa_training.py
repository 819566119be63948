"""PPO against soups: bit for bit PPO at alpha 1, token identities, thresholds, options, ends."""

from __future__ import annotations

import copy
import json

import pytest
import tiny_gemma
import torch
from salsa_toy import model, near, responses

from gemma_ext.nn.ppo import (
    FrozenReference,
    aggregate,
    kl_estimate,
    packed_gae,
    policy_loss,
    value_loss,
)
from gemma_ext.papers import salsa
from gemma_ext.papers.salsa.study import measure
from gemma_ext.papers.salsa.training import Options, Rising, SalsaTrainer
from gemma_ext.ppo import PPOConfig, PPOTrainer, Prompts
from gemma_ext.ppo.experience import TokenScores, build
from gemma_ext.ppo.opening import load_causal

TEXTS = ["the quick brown fox jumps over the lazy dog. a cat sat on the mat, the end. " * 8] * 4
PROMPTS = ["the quick", "a cat", "on the", "lazy"]


def long(completions, **columns):
    return [len(text) / 10 for text in completions]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tiny_gemma.base(tmp_path_factory.mktemp("model"), TEXTS)
    return load_causal(str(folder), "float32", "cpu")


def config(folder, **changes):
    settings = {
        "output_dir": folder,
        "total_episodes": 16,
        "per_device_train_batch_size": 8,
        "response_length": 6,
        "temperature": 1.0,
        "learning_rate": 1e-3,
        "kl_coef": 0.1,
        "num_ppo_epochs": 2,
        "sample_prompts": 1,
    }
    return PPOConfig(**{**settings, **changes})


def trainer(kind, folder, start, reference, options=None, rewards=long, **changes):
    policy, tokenizer = copy.deepcopy(start[0]).requires_grad_(True), start[1]
    extra = {} if kind is PPOTrainer else {"options": options}
    torch.manual_seed(0)
    return kind(
        config(folder, **changes),
        policy,
        reference,
        rewards,
        PROMPTS,
        tokenizer=tokenizer,
        show_progress=False,
        **extra,
    )


def weights(made):
    return [p.detach().clone() for p in made.policy.parameters()]


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(two), strict=True))


def test_alpha_one_is_ppo_bit_for_bit(start, tmp_path):
    first, second = start[0], near(start[0], 1)
    plain = trainer(PPOTrainer, tmp_path / "ppo", start, FrozenReference(copy.deepcopy(first)))
    soup = salsa.SoupReference([first, second], [1.0, 0.0])
    held = trainer(SalsaTrainer, tmp_path / "salsa", start, soup)
    other = trainer(SalsaTrainer, tmp_path / "o", start, salsa.SoupReference([first, second]))
    for made in (plain, held, other):
        made.train()
    assert same(plain, held)
    assert not same(plain, other)
    assert held.history["objective/scores"] == plain.history["objective/scores"]
    assert held.history["objective/kl"] == plain.history["objective/kl"]
    assert held.history["salsa/kl"] == pytest.approx(held.history["objective/kl"])
    zero = json.loads((tmp_path / "salsa" / "step_zero.json").read_text())
    assert abs(zero["kl_reference"]) < 1e-6
    assert other.zero["kl_reference"] > 1e-4
    assert other.zero["kl_reference"] == pytest.approx(
        other.zero["kl_reference_per_token"] * other.zero["length_mean"], rel=1e-5
    )


def test_the_reference_does_not_train(start, tmp_path):
    soup = salsa.SoupReference([start[0], near(start[0], 1)])
    before = salsa.digest(soup.model)
    made = trainer(SalsaTrainer, tmp_path, start, soup)
    made.train()
    assert salsa.digest(soup.model) == before
    assert salsa.digest(made.policy) != salsa.digest(start[0])


def test_a_moving_reference_moves_in_a_run_and_resumes_to_the_bit(start, tmp_path):
    def fresh(folder, **changes):
        reference = salsa.ema(copy.deepcopy(start[0]), 0.5, shadow=True)
        return trainer(SalsaTrainer, folder, start, reference, save_steps=1, **changes)

    whole = fresh(tmp_path / "whole", total_episodes=32)
    whole.train()
    assert whole.history["reference/moves"] == [1.0, 2.0, 3.0, 4.0]

    broken = fresh(tmp_path / "broken", total_episodes=32)
    broken.callbacks.append(stop_at(2))
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = fresh(tmp_path / "broken", total_episodes=32)
    resumed.train()
    assert resumed.step == 4
    assert same(whole, resumed)
    pairs = zip(
        whole.reference.model.parameters(), resumed.reference.model.parameters(), strict=True
    )
    assert all(torch.equal(a, b) for a, b in pairs)


def stop_at(wanted):
    def callback(trainer, step, line):
        if step == wanted:
            raise KeyboardInterrupt

    return callback


def test_rewards_of_tokens_add_up_to_the_score_less_beta_times_the_log_ratio():
    """sum_t R_t = r - beta sum_t s_t with k1; with lambda 1 it is the first token's return."""
    one = model(0)
    reference = salsa.SoupReference([one, near(one, 1, by=0.1)])
    policy, sequences = near(one, 2, by=0.1), responses(rows=6)
    logprobs = FrozenReference(policy).logprobs(sequences)
    ref = reference.logprobs(sequences)
    scores = torch.randn(6)
    values = torch.randn(len(ref))
    found = TokenScores(logprobs, ref, kl_estimate(logprobs, ref), torch.zeros_like(ref), values)
    beta = 0.3
    made = build(sequences, scores, found, beta, config("x", lam=1.0))
    s = sequences.unpack(logprobs).double() - sequences.unpack(ref).double()
    expected = scores.double() - beta * s.sum(1)
    assert (made.returns[:, 0].double() - expected).abs().max() < 1e-5
    behind = ~sequences.response_mask
    for name in ("returns", "advantages", "logprobs", "ref_logprobs"):
        assert (getattr(made, name)[behind] == 0).all()


@pytest.mark.parametrize("beta", [0.5, 4.0])
def test_a_two_token_toy_collapses_beyond_its_threshold(beta):
    """Stop at once for 0, or go on for R and pay beta KL for a second token that stays as it is.

    The best chance of going on is ref(go) exp((R - beta KL) / beta) / Z: above the reference's
    below beta = R / KL, below it beyond.
    """
    torch.manual_seed(0)
    arms, batch, gain = 5, 512, 1.0
    ref_stop = torch.tensor([0.0, 0.0])  # stop, go
    second = torch.randn(arms).log_softmax(-1)
    ref_second = (second + 2 * torch.randn(arms)).log_softmax(-1)
    kl = float((second.exp() * (second - ref_second)).sum())
    assert 0.5 < gain / kl < 4.0
    z = ref_stop.log_softmax(-1) + torch.tensor([0.0, (gain - beta * kl) / beta])
    best = float(z.softmax(-1)[1])
    assert (best > 0.5) == (beta < gain / kl)

    logits = ref_stop.clone().requires_grad_()
    critic = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.Adam(
        [{"params": [logits], "lr": 0.03}, {"params": [critic], "lr": 0.1}]
    )
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, 300)
    for _ in range(300):
        with torch.no_grad():
            table = logits.log_softmax(-1)
            went = torch.multinomial(table.exp(), batch, replacement=True)
            arm = torch.multinomial(second.exp(), batch, replacement=True)
            go = went == 1
            mask = torch.stack([torch.ones(batch, dtype=torch.bool), go], 1)
            old = torch.stack([table[went], second[arm]], 1)[mask]
            ref = torch.stack([ref_stop.log_softmax(-1)[went], ref_second[arm]], 1)[mask]
            values = critic.expand(batch, 2)[mask].clone()
            lengths = mask.sum(1)
            rewards = -beta * kl_estimate(old, ref)
            rewards[lengths.cumsum(0) - 1] += gain * go
            advantages, returns = packed_gae(rewards, values, lengths)
        first = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)[:-1]])
        for _ in range(2):
            new = old.clone()
            new[first] = logits.log_softmax(-1)[went]
            loss = policy_loss(new, old, advantages).loss
            loss = loss + value_loss(critic.expand(batch, 2)[mask], values, returns, clip=None).loss
            optimizer.zero_grad()
            aggregate(loss, lengths).backward()
            optimizer.step()
        schedule.step()
    assert float(logits.softmax(-1)[1]) == pytest.approx(best, abs=0.02)


def test_what_is_paid_is_what_the_options_say(start, tmp_path):
    reference = salsa.SoupReference([start[0], near(start[0], 1)])
    plain = trainer(SalsaTrainer, tmp_path / "1", start, reference)
    less = trainer(SalsaTrainer, tmp_path / "2", start, reference, Options(subtract_step_zero=True))
    mean = trainer(SalsaTrainer, tmp_path / "3", start, reference, Options(length_normalised=True))
    for made in (plain, less, mean):
        made.zero = {"kl_reference_per_token": 0.25}
    sequences = plain.respond([0, 1, 2, 3], 5).sequences
    kl = plain.score_tokens(sequences).kl
    assert torch.equal(less.score_tokens(sequences).kl, kl - 0.25)
    expected = kl / sequences.lengths[sequences.owners]
    assert torch.equal(mean.score_tokens(sequences).kl, expected)
    assert torch.equal(mean._paid[1], kl)
    less = trainer(SalsaTrainer, tmp_path / "4", start, reference, Options(subtract_step_zero=True))
    less.train()
    per_token = less.zero["kl_reference_per_token"]
    for line in less.history:
        paid = line["salsa/kl_per_token"] - per_token
        assert line["objective/kl_per_token"] == pytest.approx(paid, abs=1e-6)


def test_beta_rises_and_remembers():
    rising = Rising(0.4, 4)
    seen = [rising.coef] + [rising.update(1.0, 8) for _ in range(5)]
    assert seen == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    first, second = Rising(0.4, 4), Rising(0.4, 4)
    first.update(1.0, 8)
    second.load_state_dict(first.state_dict())
    assert second.update(1.0, 8) == pytest.approx(0.3)


def test_beta_rises_in_a_run(start, tmp_path):
    reference = salsa.SoupReference([start[0], near(start[0], 1)])
    made = trainer(SalsaTrainer, tmp_path, start, reference, Options(kl_warmup=2))
    made.train()
    assert made.history["kl_coef"] == pytest.approx([0.05, 0.1])


def test_responses_have_their_least_length(start, tmp_path):
    reference = salsa.SoupReference([start[0], near(start[0], 1)])
    free = trainer(SalsaTrainer, tmp_path / "1", start, reference)
    held = trainer(SalsaTrainer, tmp_path / "2", start, reference, Options(min_length=4))
    for made in (free, held):
        made.sampler.ends = list(range(0, 280, 2))  # every other token ends
    rows = [0, 1, 2, 3] * 4
    lengths = [made.respond(rows, 3).sequences.lengths for made in (free, held)]
    assert int(lengths[0].min()) < 4
    assert int(lengths[1].min()) >= 4


def test_a_run_ends_where_responses_collapse(start, tmp_path):
    reference = salsa.SoupReference([start[0], near(start[0], 1)])
    options = Options(collapse_share=0.99, collapse_patience=2)

    def made():
        return trainer(
            SalsaTrainer, tmp_path, start, reference, options, total_episodes=80, save_steps=50
        )

    run = made()
    zero = {**run._step_zero(), "length_median": 1000.0}
    run._step_zero = lambda: zero
    run.train()
    assert run.step == 2
    assert "the policy has collapsed" in run.stopped
    assert run.history["collapse/updates_below"] == [1.0, 2.0]
    again = made()
    again.train()
    assert again.step == 2
    assert same(run, again)
    assert again.stopped == run.stopped


def test_without_patience_a_run_goes_on(start, tmp_path):
    reference = salsa.SoupReference([start[0], near(start[0], 1)])
    made = trainer(SalsaTrainer, tmp_path, start, reference, Options(collapse_patience=None))
    zero = {**made._step_zero(), "length_median": 1000.0}
    made._step_zero = lambda: zero
    made.train()
    assert made.step == 2
    assert made.stopped is None


def test_step_zero_of_a_run_without_a_checkpoint_is_not_taken_for_anothers(start, tmp_path):
    """A run that ended before its first checkpoint leaves the file behind."""
    far = {"kl_reference_per_token": 9.0, "length_median": 1000.0}
    (tmp_path / "step_zero.json").write_text(json.dumps(far))
    reference = salsa.SoupReference([start[0], near(start[0], 1)])
    made = trainer(SalsaTrainer, tmp_path, start, reference, Options(subtract_step_zero=True))
    made.train()
    assert made.zero["length_median"] <= 6
    assert json.loads((tmp_path / "step_zero.json").read_text()) == made.zero
    assert made.stopped is None


def test_anchors_are_measured_before_the_first_step(start, tmp_path):
    second = near(start[0], 1)
    made = SalsaTrainer(
        config(tmp_path, total_episodes=8),
        copy.deepcopy(start[0]).requires_grad_(True),
        salsa.MultiReference([copy.deepcopy(start[0]), second]),
        long,
        PROMPTS,
        tokenizer=start[1],
        anchors={"second": second},
        show_progress=False,
    )
    made.train()
    assert made.zero["kl_second"] == pytest.approx(2 * made.zero["kl_reference"], rel=1e-4)


def test_options_that_do_not_fit_are_refused(tmp_path):
    for changes, message in (
        ({"min_length": -1}, "min_length: expected at least 0, got -1"),
        ({"kl_warmup": -2}, "kl_warmup: expected at least 0, got -2"),
        ({"collapse_share": 1.0}, r"collapse_share: expected \(0, 1\), got 1"),
        ({"collapse_patience": 0}, "collapse_patience: expected None or at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Options(**changes)
    for options, settings, message in (
        (Options(kl_warmup=2), {"kl_target": 1.0}, "kl_warmup: expected 0 beside a kl_target"),
        (Options(length_normalised=True), {"kl_in": "loss"}, "kl_in: expected reward"),
        (Options(min_length=6), {}, "min_length: expected less than the 6 tokens"),
        (Options(min_length=2), {"rollouts": "engine"}, "rollouts: expected generate with a min"),
    ):
        with pytest.raises(ValueError, match=message):
            options.check(config(tmp_path, **settings))


def test_a_resumed_run_knows_how_long_responses_have_been_short(start, tmp_path):
    """Whatever lines of history were written: the checkpoint has it."""
    reference = salsa.SoupReference([start[0], near(start[0], 1)])
    options = Options(collapse_share=0.99, collapse_patience=4)

    def made(folder, **changes):
        run = trainer(
            SalsaTrainer, folder, start, reference, options,
            total_episodes=80, save_steps=1, logging_steps=3, **changes,
        )  # fmt: skip
        zero = {**run._step_zero(), "length_median": 1000.0}
        run._step_zero = lambda: zero
        return run

    whole = made(tmp_path / "whole")
    whole.train()
    assert whole.step == 4

    def stop(run, step, line):
        if step == 2:
            raise InterruptedError

    pieces = made(tmp_path / "pieces")
    pieces.callbacks.append(stop)
    with pytest.raises(InterruptedError):
        pieces.train()
    again = made(tmp_path / "pieces")
    again.train()
    assert again.step == 4
    assert same(whole, again)
    assert again.stopped == whole.stopped


class Stateful:
    """Learns from what it sees in training."""

    def __init__(self):
        self.seen, self.training = 0, True

    def __call__(self, completions, **columns):
        self.seen += len(completions) * self.training
        return [1.0] * len(completions)

    def train(self, mode=True):
        self.training = mode

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


def test_a_measurement_is_no_training(start, tmp_path):
    reference = salsa.SoupReference([start[0], near(start[0], 1)])
    reward = Stateful()
    made = trainer(SalsaTrainer, tmp_path, start, reference, rewards=reward)
    questions = Prompts(PROMPTS, start[1])
    made.callbacks.append(lambda run, step, line: measure(run, questions, {}, 0))
    made.train()
    assert reward.seen == 16
