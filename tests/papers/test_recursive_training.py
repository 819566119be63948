"""Objectives against their formulas with all logits, and training through `Trainer`."""

import copy

import pytest
import torch
import torch.nn.functional as F
from recursive_models import assert_same_model, equal_norms, exit_states, logits, tiny, tokens

from gemma_ext.nn.recursive import decoder_layers, load, merged, save
from gemma_ext.papers.recursive import Objective, Recipe, convert
from gemma_ext.papers.recursive.text import examples, text_windows
from gemma_ext.papers.recursive.trainer import RecursiveTrainer, TrainerCallback, arguments


def made(kind="gemma2", loops=3, rank=3, dtype=torch.float32):
    return convert(tiny(kind, dtype=dtype), Recipe(loops, "average", rank=rank)).train()


def divergence(kind, p, q):
    """Mean over tokens of probabilities [N, V], as the paper defines them."""
    m = (p + q) / 2
    return {
        "forward_kl": (p * (p / q).log()).sum(-1),
        "reverse_kl": (q * (q / p).log()).sum(-1),
        "jsd": ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2,
        "tvd": (p - q).abs().sum(-1) / 2,
    }[kind].mean()


def all_logits(model, ids):
    """[B] of [N, V]: every loop, next tokens of all but the last position."""
    cap = getattr(model.config, "final_logit_softcapping", None)
    found = []
    for state in exit_states(model, ids):
        score = model.get_output_embeddings()(state[:, :-1])
        score = cap * torch.tanh(score / cap) if cap else score
        found.append(score.flatten(0, 1))
    return found


def expected(objective, model, ids, teacher=None):
    scores = all_logits(model, ids)
    labels = ids[:, 1:].flatten()
    total = 0.0
    for loop, (alpha, score) in enumerate(zip(objective.alphas(len(scores)), scores, strict=True)):
        if not alpha:
            continue
        last = loop + 1 == len(scores)
        target = None
        if last and teacher is not None:
            target = all_logits(teacher, ids)[-1].detach()
        elif not last and objective.self_distillation:
            target = scores[-1].detach()
        loss = F.cross_entropy(score, labels)
        if target is not None:
            p, q = ((x / objective.temperature).softmax(-1) for x in (target, score))
            loss = objective.ce_weight * loss
            loss = loss + objective.divergence_weight * divergence(objective.divergence, p, q)
        total = total + alpha * loss
    return total


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


OBJECTIVES = {
    "text": (Objective(), False),
    "fkl": (Objective(), True),
    "rkl": (Objective("reverse_kl", ce_weight=0.3), True),
    "jsd": (Objective("jsd", ce_weight=0.0, divergence_weight=2.0), True),
    "tvd": (Objective("tvd"), True),
    "warm": (Objective(temperature=2.0), True),
    "no kd": (Objective(divergence_weight=0.0, ce_weight=0.5), True),
    "weighted": (Objective(exits="weighted"), False),
    "aggressive": (Objective(exits="aggressive"), False),
    "self": (Objective(exits="aggressive", self_distillation=True), False),
    "both": (Objective(exits="weighted", self_distillation=True), True),
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("kind", ["gemma2", "pythia"])
def test_objectives_are_their_formulas(name, kind):
    objective, taught = OBJECTIVES[name]
    model = made(kind)
    truth = copy.deepcopy(model).double()
    teacher = tiny(kind, dtype=torch.float32, seed=7) if taught else None
    ids = tokens(12)
    loss = objective(model, {"input_ids": ids, "labels": ids}, teacher)
    loss.backward()
    wide = copy.deepcopy(teacher).double() if taught else None
    true = expected(objective, truth, ids, wide)
    true.backward()
    torch.testing.assert_close(loss.double(), true, rtol=2e-5, atol=1e-5)
    found, wanted = gradients(model), gradients(truth)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        error = (found[key].double() - value).norm() / value.norm().clamp_min(1e-6)
        assert error < 2e-3, key
    if taught:
        assert all(p.grad is None for p in teacher.parameters())


def test_forward_kl_pulls_by_the_difference_of_probabilities():
    """d FKL / d logits = (q - p) / N; through the head, times the weight."""
    model, teacher = made("llama"), tiny("llama", dtype=torch.float32, seed=7)
    ids = tokens(9)
    seen = {}
    model.model.norm.register_forward_hook(
        lambda m, a, o: (o.retain_grad(), seen.__setitem__("h", o))[1]
    )
    objective = Objective(ce_weight=0.0)
    objective(model, {"input_ids": ids, "labels": ids}, teacher).backward()
    q = model.lm_head(seen["h"][:, :-1]).softmax(-1)
    p = logits(teacher, ids)[:, :-1].softmax(-1)
    pull = (q - p) / p[..., 0].numel() @ model.lm_head.weight
    torch.testing.assert_close(seen["h"].grad[:, :-1], pull, rtol=1e-4, atol=1e-6)


def test_without_weight_exits_change_nothing():
    ids = tokens(12)
    batch = {"input_ids": ids, "labels": ids}
    one, two = made(), made()
    Objective()(one, batch).backward()
    Objective(exits="aggressive", exit_weight=0.0)(two, batch).backward()
    first, second = gradients(one), gradients(two)
    assert first.keys() == second.keys()
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=1e-5, atol=1e-7)


def test_the_last_loop_does_not_learn_from_the_loops_that_imitate_it():
    """Matrices of the last loop alone: their gradient is that of the last loop's text loss."""
    ids = tokens(12)
    batch = {"input_ids": ids, "labels": ids}
    one, two = made(), made()
    Objective()(one, batch).backward()
    Objective(exits="aggressive", self_distillation=True, exit_weight=5.0)(two, batch).backward()
    for depth in (4, 5):
        mine, theirs = (dict(m.model.layers[depth].named_parameters()) for m in (one, two))
        for key in mine:
            if ".lora_" in key:
                torch.testing.assert_close(theirs[key].grad, mine[key].grad, rtol=1e-4, atol=1e-7)
    early = two.model.layers[0].mlp.up_proj.lora_B.grad
    assert not torch.allclose(early, one.model.layers[0].mlp.up_proj.lora_B.grad, rtol=0.1)


def test_frozen_exits_leave_the_model_as_it_is(tmp_path):
    model = made("gemma2")
    ids = tokens(12)
    before = logits(model, ids)
    objective = Objective(exits="frozen")
    objective.prepare(model, rank=5)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"exit_head.lora_A", "exit_head.lora_B"}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(20):
        loss = objective(model, {"input_ids": ids, "labels": ids})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    assert torch.equal(logits(model, ids), before)
    save(model, tmp_path)
    again = load(tmp_path)
    assert torch.equal(again.exit_head.lora_B, model.exit_head.lora_B)
    # sum of both early loops' losses, of a head with W + B A
    cap = model.config.final_logit_softcapping
    weight = model.lm_head.weight + model.exit_head.lora_B @ model.exit_head.lora_A
    total = 0.0
    for state in exit_states(model, ids)[:-1]:
        score = cap * torch.tanh(F.linear(state, weight)[:, :-1] / cap)
        total += float(F.cross_entropy(score.flatten(0, 1), ids[:, 1:].flatten()))
    assert float(objective(again, {"input_ids": ids, "labels": ids})) == pytest.approx(total, 1e-5)


def test_alphas():
    assert Objective().alphas(3) == [0, 0, 1]
    assert Objective(exits="weighted").alphas(3) == [1 / 6, 2 / 6, 3 / 6]
    assert Objective(exits="aggressive").alphas(3) == [0.1, 0.1, 1]
    assert Objective(exits="frozen").alphas(3) == [1, 1, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "kl"}, "divergence: expected one of forward_kl"),
        ({"exits": "all"}, "exits: expected one of none, weighted"),
        ({"ce_weight": -1.0}, "ce_weight: expected a number >= 0, got -1"),
        ({"exit_weight": -1.0}, "exit_weight: expected"),
        ({"self_distillation": True}, "expected exits 'weighted' or 'aggressive', got 'none'"),
    ],
)
def test_what_is_no_objective(options, message):
    with pytest.raises(ValueError, match=message):
        Objective(**options)


def test_batches_and_models_that_do_not_fit():
    ids = tokens(5)
    with pytest.raises(ValueError, match="expected labels in the batch, got none"):
        Objective()(made(), {"input_ids": ids})
    with pytest.raises(ValueError, match="at least two loops"):
        Objective(exits="weighted")(tiny("llama"), {"input_ids": ids, "labels": ids})


def trainer(model, folder, steps, callbacks=(), teacher=None, objective=None, **options):
    options = {
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "disable_tqdm": True,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        **options,
    }
    return RecursiveTrainer(
        model,
        arguments(folder, steps, **options),
        train_dataset=examples(tokens(12, 16)),
        eval_dataset=examples(tokens(12, 5, seed=9)),
        teacher=teacher,
        objective=objective,
        callbacks=list(callbacks),
    )


def test_training_goes_on_from_a_checkpoint_to_the_same_model(tmp_path):
    teacher = tiny("llama", dtype=torch.float32, seed=7)
    whole = made("llama")
    options = {"lr_scheduler_type": "constant", "warmup_steps": 0, "teacher": teacher}
    trainer(whole, tmp_path / "a", 6, **options).train()
    half = made("llama")
    saving = {"save_strategy": "steps", "save_steps": 3, **options}
    trainer(half, tmp_path / "b", 3, **saving).train()
    kept = tmp_path / "b" / "checkpoint-3"
    assert_same_model(load(kept), half, tokens())
    again = made("llama")
    trainer(again, tmp_path / "b", 6, **saving).train(resume_from_checkpoint=str(kept))
    assert not torch.equal(logits(again, tokens()), logits(half, tokens()))
    for one, two in zip(again.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    _, layers = decoder_layers(again)
    assert layers[0].mlp.up_proj.weight is layers[2].mlp.up_proj.weight


def test_the_best_checkpoint_comes_back(tmp_path):
    model = made("llama")
    run = trainer(
        model,
        tmp_path,
        4,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=1,
        eval_steps=1,
        load_best_model_at_end=True,
        learning_rate=0.3,
    )
    run.train()
    best = load(run.state.best_model_checkpoint)
    assert_same_model(model.eval(), best, tokens())


def test_evaluation_is_cross_entropy_of_the_last_loop(tmp_path):
    model = made("gemma2")
    objective = Objective(exits="weighted")
    run = trainer(model, tmp_path, 1, objective=objective, per_device_eval_batch_size=5)
    ids = tokens(12, 5, seed=9)
    score = logits(model.eval(), ids)[:, :-1].flatten(0, 1)
    truth = F.cross_entropy(score, ids[:, 1:].flatten())
    assert run.evaluate()["eval_loss"] == pytest.approx(float(truth), rel=1e-5)


def test_accumulated_batches_are_one_batch(tmp_path):
    one, two = made("llama"), made("llama")
    options = {"lr_scheduler_type": "constant", "warmup_steps": 0, "optim": "sgd"}
    trainer(one, tmp_path, 2, per_device_train_batch_size=4, **options).train()
    trainer(
        two, tmp_path, 2, per_device_train_batch_size=2, gradient_accumulation_steps=2, **options
    ).train()
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_activations_computed_twice_give_the_same_gradients(tmp_path):
    found = []
    for twice in (False, True):
        keep = Keep()
        objective = Objective(exits="aggressive", self_distillation=True)
        options = {"activation_checkpointing": twice, "objective": objective}
        trainer(made("gemma2"), tmp_path, 1, [keep], **options).train()
        found.append(keep.found)
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-5, atol=1e-8)


class Keep(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = gradients(model)


def test_gradients_of_loops_are_summed_in_float32_under_autocast(tmp_path):
    """A cast shared by the loops would sum them in bfloat16."""
    source = equal_norms(tiny("llama", dtype=torch.float32))
    tied = convert(source, Recipe(6, "average"))
    untied = merged(tied)
    found = []
    for model in (tied, untied):
        keep = Keep()
        trainer(model, tmp_path, 1, [keep], bf16=True, max_grad_norm=0.0).train()
        found.append(keep.found)
    name = "model.layers.{}.mlp.down_proj.weight"
    parts = torch.stack([found[1][name.format(depth)] for depth in range(6)])
    total = found[0][name.format(0)]
    assert total.dtype == torch.float32
    scale = parts.double().abs().sum(0).clamp_min(1e-12)
    error = ((total.double() - parts.double().sum(0)).abs() / scale).max()
    assert error < 1e-6  # 2^-9 is the rounding of bfloat16
    assert not torch.equal(total, total.bfloat16().float())


def test_vanilla_models_train_and_save_as_ever(tmp_path):
    model = tiny("llama", dtype=torch.float32)
    run = trainer(model, tmp_path / "c", 2)
    run.train()
    run.save_model(str(tmp_path / "m"))
    assert_same_model(load(tmp_path / "m"), model.eval(), tokens())


def test_the_papers_schedule(tmp_path):
    options = arguments(tmp_path, 5000, use_cpu=True)
    assert options.learning_rate == 2e-4
    assert options.warmup_steps == 200
    assert options.lr_scheduler_type == "cosine"
    assert arguments(tmp_path, 50, use_cpu=True).warmup_steps == 5


class Letters:
    """A token a letter."""

    bos_token_id, eos_token_id = 1, None

    def __call__(self, text, add_special_tokens, verbose):
        from types import SimpleNamespace

        return SimpleNamespace(input_ids=[ord(letter) for letter in text])


def test_windows_of_texts(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "b.jsonl").write_text('{"text": "de"}\n{"text": "f"}\n')
    rows = text_windows([tmp_path / "a.txt", tmp_path / "b.jsonl"], Letters(), 4)
    expected = [[1, 97, 98, 99], [1, 100, 101, 1]]
    assert [row["input_ids"].tolist() for row in rows] == expected
    assert all(row["labels"] is row["input_ids"] for row in rows)
    with pytest.raises(ValueError, match="text: expected at least 99 tokens, got 4"):
        text_windows([tmp_path / "a.txt"], Letters(), 99)
    (tmp_path / "b.jsonl").write_text('{"text": "de"}\n{"body": "f"}\n')
    with pytest.raises(ValueError, match=r"b.jsonl:2: expected an object with the key text"):
        text_windows([tmp_path / "b.jsonl"], Letters(), 4)


def test_lines_end_where_json_lines_end(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "d\u2028e"}\n{"text": "f"}\n', encoding="utf-8")
    (row,) = text_windows([path], Letters(), 6)
    assert row["input_ids"].tolist() == [1, 100, 0x2028, 101, 1, 102]


def test_without_a_target_the_text_counts_once():
    ids = tokens(12)
    batch = {"input_ids": ids, "labels": ids}
    model = made()
    assert float(Objective(ce_weight=0.3)(model, batch)) == float(Objective()(model, batch))
    teacher = tiny("gemma2", dtype=torch.float32, seed=7)
    less = Objective(ce_weight=0.3)(model, batch, teacher)
    assert float(less) < 0.9 * float(Objective()(model, batch, teacher))
