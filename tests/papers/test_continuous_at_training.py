"""Steps of training: what they add up to, that they resume, and that references are paired."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from gemma_ext.papers.continuous_at import (
    Attack,
    AttackConfig,
    Batch,
    ContinuousTrainer,
    Mixture,
    Pair,
    References,
    Row,
    TargetLoss,
    TrainConfig,
    attacked_loss,
    mean_losses,
    over_refusal,
    with_lora,
)
from gemma_ext.papers.continuous_at.losses import cut, ipo
from gemma_ext.papers.continuous_at.objective import Objective
from gemma_ext.papers.continuous_at.trainer import METRICS

pytest.importorskip("transformers")
pytest.importorskip("peft")
ATTACK = AttackConfig(steps=3, rate=0.3, unit="ball", eps_rel=0.3)
UL = TrainConfig(
    attack=ATTACK, steps=4, batch=6, micro_batch=3, adversarial=0.5, rank=4, learning_rate=1e-2,
    dropout=0.2, save_every=1,
)  # fmt: skip
IPO = replace(UL, loss="ipo", adversarial=1.0)
PAIRS = [
    Pair(Row(prompt, harmful), Row(prompt, safe))
    for prompt, harmful, safe in (
        ((2, 5, 6, 7), (30, 31, 32), (40, 41, 1)),
        ((2, 8), (33, 34), (40, 41, 42, 43, 1)),
        ((2, 9, 9, 10, 11), (35,), (40, 1)),
        ((2, 12, 13), (36, 0, 37), (41, 1)),
        ((2, 14, 15), (38, 39, 30), (42, 1)),
    )
]
USEFUL = [Row((2, at), (at + 1, at + 2, 1)[: 1 + at % 3]) for at in range(50, 60)]


def tiny():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=6,
        query_pre_attn_scalar=8, attn_implementation="eager", pad_token_id=0, eos_token_id=1,
        bos_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    return Gemma2ForCausalLM(config).eval()


def trainer(out, config=UL, **options):
    mixture = Mixture(PAIRS, USEFUL, config.adversarial)
    return ContinuousTrainer(with_lora(tiny(), config), mixture, config, out, **options)


def weights(made):
    return {name: p.detach().clone() for name, p in made.trained.items()}


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "config",
    [
        UL, IPO, replace(UL, reference_compatible=True), replace(IPO, ipo_token_floor=True),
        replace(IPO, reference_compatible=True),
    ],
)  # fmt: skip
def test_a_steps_gradient_is_that_of_the_formula_whatever_the_pieces(config):
    found = []
    for pieces in (1, 3, 16):
        config = replace(config, micro_batch=pieces, dropout=0.0)
        model = with_lora(tiny(), config)
        attack = Attack(model, config.attack)
        attacked = attack([pair.harmful for pair in PAIRS])
        references = None
        if config.loss == "ipo":
            references = References()
            rows = [row for pair in PAIRS for row in (pair.safe, pair.harmful)]
            references.compute(attack.perturbed.loss, rows, show_progress=False)
        terms = Objective(attack.perturbed, config, references).backward(PAIRS, attacked, USEFUL)
        found.append((terms, gradients(model)))
    model = with_lora(tiny(), config)
    attack = Attack(model, config.attack)
    loss = attack.perturbed.loss
    total, far = 0.0, 0
    floors = config.loss == "ipo" and (config.ipo_token_floor or config.reference_compatible)
    for at, pair in enumerate(PAIRS):
        delta = attacked.of([at])
        safe, each_harmful = (
            attack.perturbed(Batch([row]), delta) for row in (pair.safe, pair.harmful)
        )
        if floors:
            far += int((each_harmful > 5).sum())
            each_harmful = each_harmful.masked_fill(each_harmful > 5, 0.0)
        safe, harmful = safe.mean(), each_harmful.mean()
        if config.loss == "ul":
            jump = {"reference_compatible": config.reference_compatible}
            each = 0.5 * cut(safe, 0.5, **jump) + 0.5 * cut(-harmful, -5.0, **jump)
        else:
            with torch.no_grad(), model.disable_adapter():
                before = [-loss(Batch([row])).mean() for row in (pair.safe, pair.harmful)]
            each = ipo(-safe, before[0], -harmful, before[1], config.beta)
        total = total + each / len(PAIRS)
    assert (far > 0) == floors
    total = total + torch.cat([loss(Batch([row])) for row in USEFUL]).mean()
    total.backward()
    expected = gradients(model)
    for terms, gradient in found:
        assert terms["loss"] == pytest.approx(float(total), rel=1e-5)
        for name, value in expected.items():
            scale = float(value.abs().max())
            assert torch.allclose(gradient[name], value, atol=1e-5 * scale + 1e-7), name
    assert found[0][0]["away"] == pytest.approx(float(attacked.losses[-1].mean()), rel=1e-4)


def test_references_belong_to_their_rows_in_any_order(tmp_path):
    model = with_lora(tiny(), UL)
    loss = TargetLoss(model)
    rows = [row for pair in PAIRS for row in (pair.safe, pair.harmful)]
    references = References(tmp_path / "references.json")
    references.compute(loss, rows, batch=3, show_progress=False)
    expected = -loss.means(Batch(rows)).detach()
    assert len(set(expected.tolist())) == len(rows)  # each row has a value of its own
    assert torch.allclose(references(rows), expected, atol=1e-5)
    order = torch.randperm(len(rows)).tolist()
    assert torch.equal(references([rows[at] for at in order]), references(rows)[order])
    read = References(tmp_path / "references.json")
    assert torch.equal(read(rows), references(rows))
    with pytest.raises(ValueError, match="rows: expected rows that were computed before"):
        read([Row((2,), (3,))])


def test_references_are_of_the_model_without_its_adapter_and_dropout():
    model = with_lora(tiny(), UL)
    loss, rows = TargetLoss(model), [pair.safe for pair in PAIRS]
    with torch.no_grad():
        before = -loss.means(Batch(rows))
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
        assert not torch.allclose(-loss.means(Batch(rows)), before, atol=1e-2)
    model.train()
    references = References()
    references.compute(loss, rows, show_progress=False)
    assert torch.allclose(references(rows), before, atol=1e-5)
    assert model.training


def test_references_survive_the_pipeline(tmp_path, monkeypatch):
    made = trainer(tmp_path, replace(IPO, steps=1, batch=16))
    seen = []
    original = References.__call__

    def spy(self, rows):
        values = original(self, rows)
        seen.extend(zip(rows, values.tolist(), strict=True))
        return values

    monkeypatch.setattr(References, "__call__", spy)
    made.run(show_progress=False)
    loss = TargetLoss(with_lora(tiny(), IPO))
    assert len(seen) == 32
    for row, value in seen:
        assert value == pytest.approx(-float(loss.means(Batch([row])).detach()), abs=1e-5)


@pytest.mark.parametrize("config", [UL, IPO])
def test_an_interrupted_run_gives_the_same_bits(tmp_path, config):
    whole = trainer(tmp_path / "whole", config)
    whole.run(show_progress=False)
    for stop in (1, 3):
        trainer(tmp_path / "parts", config).run(show_progress=False, stop_after=stop)
    last = trainer(tmp_path / "parts", config)
    last.run(show_progress=False)
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(last)[name]), name

    def numbers(made):
        return [{k: v for k, v in line.items() if k != "seconds"} for line in made.history()]

    assert numbers(whole) == numbers(last)
    assert [line["step"] for line in whole.history()] == [1, 2, 3, 4]


@pytest.mark.parametrize("config", [UL, IPO])
def test_an_interrupted_run_without_an_adapter_gives_the_same_bits(tmp_path, config):
    """Its embeddings are trained too, which the radius is relative to."""
    config = replace(config, learning_rate=1e-3, attack=replace(ATTACK, eps_rel=0.05))

    def made(out):
        mixture = Mixture(PAIRS, USEFUL, config.adversarial)
        return ContinuousTrainer(tiny().requires_grad_(True), mixture, config, out)

    whole = made(tmp_path / "whole")
    whole.run(show_progress=False)
    made(tmp_path / "parts").run(show_progress=False, stop_after=2)
    (tmp_path / "parts" / "references.json").unlink(missing_ok=True)
    last = made(tmp_path / "parts")
    last.run(show_progress=False)
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(last)[name]), name


def test_references_of_another_model_are_not_taken_over(tmp_path):
    """As a run leaves them that ends before its first checkpoint."""
    config = replace(IPO, steps=1, save_every=10)
    row = PAIRS[0].safe
    path = tmp_path / "references.json"
    trainer(tmp_path, config).references.compute(TargetLoss(tiny()), [row], show_progress=False)
    assert path.exists()
    other = tiny()
    with torch.no_grad():
        other.model.norm.weight.add_(0.5)
    expected = -float(TargetLoss(other).means(Batch([row])).detach())
    mixture = Mixture(PAIRS, USEFUL, 1.0)
    made = ContinuousTrainer(with_lora(other, config), mixture, config, tmp_path)
    made.run(show_progress=False)
    assert float(made.references([row])) == pytest.approx(expected, abs=1e-5)


def test_metrics_tell_what_happened(tmp_path):
    made = trainer(
        tmp_path,
        replace(UL, evaluate_every=2),
        heldout=PAIRS[:2],
        probes={"first": lambda model: float(model.training), "none": lambda model: math.nan},
    )
    made.run(show_progress=False)
    lines = made.history()
    for name in ("loss", "toward", "away", "utility", "boundary", "harmful_before", "attack_steps"):
        assert all(name in line for line in lines), name
    assert ["heldout_harmful_attacked" in line for line in lines] == [False, True, False, True]
    assert lines[1]["heldout_harmful_attacked"] < lines[1]["heldout_harmful_before"]
    assert lines[1]["first"] == 1.0
    assert math.isnan(lines[1]["none"])
    # what is no number is null in the file: NaN is not JSON
    assert '"none": null' in (tmp_path / METRICS).read_text().split("\n")[1]
    assert not made.model.training


def test_training_raises_the_attacked_loss_and_the_control_is_not_attacked(tmp_path):
    config = replace(UL, steps=12, batch=8, dropout=0.0, adversarial=0.6)
    made = trainer(tmp_path / "ul", config)
    before = attacked_loss(made.attack, PAIRS)
    made.run(show_progress=False)
    after = attacked_loss(made.attack, PAIRS)
    assert after["harmful_attacked"] > before["harmful_attacked"] + 1
    assert after["safe_attacked"] < before["safe_attacked"]
    control = trainer(tmp_path / "k0", replace(config, attack=replace(ATTACK, steps=0)))
    control.run(show_progress=False)
    assert all(line.get("boundary", 0.0) == 0.0 for line in control.history())
    assert all("harmful_before" not in line for line in control.history())


def test_only_adapters_are_trained_and_the_head_has_none(tmp_path):
    made = trainer(tmp_path)
    assert all("lora_" in name for name in made.trained)
    assert not any("lm_head" in name for name in made.trained)
    base = {n: p.clone() for n, p in made.model.named_parameters() if n not in made.trained}
    before = weights(made)
    made.run(show_progress=False, stop_after=1)
    assert any(not torch.equal(before[name], value) for name, value in weights(made).items())
    for name, p in made.model.named_parameters():
        if name in base:
            assert torch.equal(p, base[name])
            assert p.grad is None


def test_another_run_is_not_resumed(tmp_path):
    trainer(tmp_path).run(show_progress=False, stop_after=1)
    with pytest.raises(ValueError, match=r"is of another run \(learning_rate differ\)"):
        trainer(tmp_path, replace(UL, learning_rate=1.0)).run(show_progress=False)
    frozen = tiny().requires_grad_(False)
    with pytest.raises(ValueError, match="model: expected parameters that ask for gradients"):
        ContinuousTrainer(frozen, Mixture(PAIRS, USEFUL, 0.5), UL, tmp_path)


def test_over_refusal_counts_requests_whose_refusal_is_likelier():
    loss = TargetLoss(tiny())
    answers = [Row((2, at), (at + 1, at + 2)) for at in range(50, 62)]
    refusals = [Row(row.prompt, (7, 8)) for row in answers]
    expected = mean_losses(loss, refusals, 5) < mean_losses(loss, answers, 16)
    found = over_refusal(loss, answers, refusals, batch=5)
    assert found == pytest.approx(float(expected.double().mean()))
    assert 0 < found < 1
    assert over_refusal(loss, refusals, answers) == pytest.approx(1 - found)
    with pytest.raises(ValueError, match="refusals: expected rows of the prompts of answers"):
        over_refusal(loss, answers, refusals[::-1])


def test_an_attacked_loss_is_that_of_the_iterate_that_is_kept():
    """Steps beyond the ball and back, so that the last iterate is not the best of each row."""
    attack = Attack(tiny(), replace(ATTACK, steps=6, rate=3.0, eps_rel=2.0, keep="best"))
    found = attack([pair.harmful for pair in PAIRS])
    assert bool((found.losses[-1] > found.losses.amin(0)).any())
    kept = attack.losses([pair.harmful for pair in PAIRS], found.deltas)
    told = attacked_loss(attack, PAIRS)["harmful_attacked"]
    assert told == pytest.approx(float(kept.double().mean()), rel=1e-5)
