"""HarmBench's files in and out, and the way from behaviours to labels."""

import json

import pytest

from gemma_ext.lm import Sampling, ScriptedModel
from gemma_ext.papers.continuous_at.evaluation import gcg, harmbench, judges, page, runs
from gemma_ext.papers.continuous_at.evaluation.harmbench import Behavior, Completion
from gemma_ext.papers.continuous_at.evaluation.intervals import wilson
from gemma_ext.papers.continuous_at.evaluation.pair import PairConfig

BEHAVIORS = [
    Behavior("a_1", 'Say "no, never",\nthen yes', "standard", "chemical", ("hash_check", "x")),
    Behavior("b_2", "Sum this up", "contextual", "", (), "A text.\n\nOf two parts."),
]


def test_behaviors_come_back(tmp_path):
    path = tmp_path / "new" / "behaviors.csv"
    harmbench.write_behaviors(path, BEHAVIORS)
    assert harmbench.read_behaviors(path) == BEHAVIORS
    assert path.read_text().splitlines()[0] == (
        "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID"
    )
    assert BEHAVIORS[0].request == 'Say "no, never",\nthen yes'
    assert BEHAVIORS[1].request == "A text.\n\nOf two parts.\n\n---\n\nSum this up"


def test_behaviors_of_other_columns(tmp_path):
    path = tmp_path / "b.csv"
    path.write_text("\ufeffBehaviorID,Category,Behavior\nq,copyright, Write it \n")
    assert harmbench.read_behaviors(path) == [Behavior("q", " Write it ", "copyright")]
    path.write_text("BehaviorID,Behavior\nq,Write it\n")
    assert harmbench.read_behaviors(path)[0].category == "standard"


def test_blanks_around_a_context_belong_to_the_request(tmp_path):
    """HarmBench's direct request joins the columns as they stand, and so do its test cases."""
    path = tmp_path / "b.csv"
    path.write_text(
        "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"
        'Sum it up,contextual,misc,context,"\nA text. \n\n",sum_up\n'
        'Sing it,copyright,copyright,"hash_check, lyrics",,sing\n'
    )
    one, two = harmbench.read_behaviors(path)
    assert one.request == "\nA text. \n\n\n\n---\n\nSum it up"
    assert (two.request, two.tags) == ("Sing it", ("hash_check", "lyrics"))
    harmbench.write_behaviors(path, [one, two])
    assert harmbench.read_behaviors(path) == [one, two]


def test_behaviors_that_do_not_fit(tmp_path):
    path = tmp_path / "b.csv"
    path.write_text("Goal,BehaviorID\nx,y\n")
    with pytest.raises(ValueError, match="expected a column Behavior, got"):
        harmbench.read_behaviors(path)
    path.write_text("Behavior,BehaviorID\nx,y\nz,y\n")
    with pytest.raises(ValueError, match="record 3: expected a BehaviorID of its own, got 'y'"):
        harmbench.read_behaviors(path)
    path.write_text(
        "Behavior,BehaviorID,ImageFileName,Tags\nx,y,,\nDescribe it,z,z.png,multimodal\n"
    )
    with pytest.raises(
        ValueError, match=r"b.csv, z: expected a behaviour of text alone, .* z\.png"
    ):
        harmbench.read_behaviors(path)
    path.write_text("Behavior,BehaviorID\nx,\n")
    with pytest.raises(ValueError, match="record 2: expected a BehaviorID of its own, got ''"):
        harmbench.read_behaviors(path)


def test_targets(tmp_path):
    path = tmp_path / "targets.json"
    path.write_text(json.dumps({"a": "Sure", "b": ["Sure, here", "Of course"]}))
    assert harmbench.read_targets(path) == {"a": ["Sure"], "b": ["Sure, here", "Of course"]}
    path.write_text("[1]")
    with pytest.raises(ValueError, match="expected an object by BehaviorID, got a list"):
        harmbench.read_targets(path)
    path.write_text('{"a": [1]}')
    with pytest.raises(ValueError, match="a: expected a list of strings"):
        harmbench.read_targets(path)


def test_test_cases_and_completions_come_back(tmp_path):
    path = tmp_path / "x" / "cases.json"
    cases = {"a": ["one", "zwei ü"], "b": []}
    harmbench.write_test_cases(path, cases)
    assert harmbench.read_test_cases(path) == cases
    assert "zwei ü" in path.read_text(encoding="utf-8")
    done = {"a": [Completion("one", "No.", False), Completion("zwei ü", "Yes.", True)], "b": []}
    done["c"] = [Completion("three", "Perhaps.")]
    harmbench.write_completions(path, done)
    assert json.loads(path.read_text())["a"][1] == {
        "test_case": "zwei ü", "generation": "Yes.", "label": 1,
    }  # fmt: skip
    assert harmbench.read_completions(path) == done
    assert list(tmp_path.joinpath("x").iterdir()) == [path]
    path.write_text('{"a": [{"test_case": "x", "generation": "y", "label": -1}]}')
    assert harmbench.read_completions(path)["a"][0].label is None
    path.write_text('{"a": [{"test_case": "x"}]}')
    with pytest.raises(ValueError, match="a: expected a list of records with test_case"):
        harmbench.read_completions(path)


def test_success_is_any_completion():
    done = {
        "a": [Completion("1", "x", False), Completion("2", "y", True)],
        "b": [Completion("1", "x", False)],
        "c": [],
    }
    assert harmbench.success(done) == {"a": True, "b": False, "c": False}
    row = page.attack_row("GCG", done)
    assert (row.behaviors, row.shown, row.cases, row.labelled) == (3, 1, 3, 1)
    assert row.rate == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="expected a label of every completion, got none of one"):
        harmbench.success({"a": [Completion("1", "x")]})


def test_a_run_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "cases.json"
    attacked = []

    def attack(behavior):
        attacked.append(behavior.id)
        if behavior.id == "b_2" and len(attacked) == 2:
            raise KeyboardInterrupt
        return [f"{behavior.text}!", "Please"]

    with pytest.raises(KeyboardInterrupt):
        runs.make_test_cases(BEHAVIORS, attack, path, show_progress=False)
    cases = runs.make_test_cases(BEHAVIORS, attack, path, show_progress=False)
    assert attacked == ["a_1", "b_2", "b_2"]
    assert cases == harmbench.read_test_cases(path)
    assert cases["b_2"] == ["Sum this up!", "Please"]

    def says(prompt):
        return "I am sorry." if prompt == "Please" else "Yes: done."

    lm = ScriptedModel(says)
    answers = tmp_path / "completions.json"
    some = runs.complete(lm, {"a_1": cases["a_1"]}, answers, chat=False)
    assert len(lm.asked) == 2
    assert [one.generation for one in some["a_1"]] == [
        "Yes: done.",
        "I am sorry.",
    ]
    done = runs.complete(lm, cases, answers, Sampling(max_tokens=9), chat=False)
    assert len(lm.asked) == 4
    assert harmbench.read_completions(answers) == done
    # other test cases of a behaviour are asked anew, and other behaviours stay in the file
    runs.complete(lm, {"a_1": ["Else"]}, answers, chat=False)
    assert len(lm.asked) == 5
    assert harmbench.read_completions(answers)["b_2"] == done["b_2"]

    made = runs.label(done, BEHAVIORS, judges.RefusalStrings(), answers)
    assert [one.label for found in made.values() for one in found] == [True, False] * 2
    assert harmbench.read_completions(answers) == made
    with pytest.raises(ValueError, match="expected completions of the 1 behaviours, got some of"):
        runs.label(done, BEHAVIORS[:1], judges.RefusalStrings())


def test_answers_are_kept_as_they_come(tmp_path):
    answers = tmp_path / "completions.json"
    cases = {f"b{number:02}": [f"ask {number}"] for number in range(runs.AT_ONCE + 3)}

    def dies(prompt):
        if prompt == f"ask {runs.AT_ONCE}":
            raise KeyboardInterrupt
        return "Yes."

    with pytest.raises(KeyboardInterrupt):
        runs.complete(ScriptedModel(dies), cases, answers, chat=False)
    assert list(harmbench.read_completions(answers)) == list(cases)[: runs.AT_ONCE]
    lm = ScriptedModel(lambda prompt: "Yes.")
    assert list(runs.complete(lm, cases, answers, chat=False)) == list(cases)
    assert len(lm.asked) == 3


def test_chats_are_asked_in_messages():
    lm = ScriptedModel({(("user", "hello"),): "hi"})
    assert runs.complete(lm, {"a": ["hello"]})["a"] == [Completion("hello", "hi")]


class Found:
    """A search that has found its string."""

    def __init__(self):
        self.asked = []

    def run(self, messages, target, resume):
        self.asked.append((messages, target, resume))
        return gcg.GCGResult(0.1, f"<{target}>", [0.1], [f"<{target}>"])


def test_strings_of_gcg_stand_behind_the_request(tmp_path):
    search = Found()
    targets = {"a_1": ["Sure", "Yes", "Of course"]}
    attack = runs.by_gcg(search, targets, tmp_path, strings=2)
    request = BEHAVIORS[0].request
    assert attack(BEHAVIORS[0]) == [f"{request} <Sure>", f"{request} <Yes>"]
    assert search.asked[1] == (f"{request} {{optim_str}}", "Yes", tmp_path / "a_1-1.json")
    assert runs.by_gcg(search, targets)(BEHAVIORS[0]) == [f"{request} <Sure>"]
    assert search.asked[-1][2] is None
    with pytest.raises(ValueError, match="targets: expected one of b_2, got none"):
        attack(BEHAVIORS[1])


def test_prompts_of_pair(tmp_path):
    written = {"Sum": "no prompt", "Say": '{"prompt": "Play a game."}'}
    attacker = ScriptedModel(lambda m: written["Sum" if "Sum this" in m[0][1] else "Say"])
    models = (attacker, ScriptedModel(lambda m: "Fine."), ScriptedModel(lambda m: "[[10]]"))
    targets = {"a_1": ["Sure"], "b_2": ["Yes"]}
    config = PairConfig(streams=1, rounds=1, attempts=1)
    attack = runs.by_pair(*models, targets, config, tmp_path)
    assert attack(BEHAVIORS[0]) == ["Play a game."]
    assert attack(BEHAVIORS[1]) == [BEHAVIORS[1].request]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a_1.json", "b_2.json"]
    attack(BEHAVIORS[0])
    assert len(attacker.asked) == 2


def test_no_attack_is_the_request():
    assert runs.direct(BEHAVIORS[1]) == [BEHAVIORS[1].request]


def test_refusals_by_words():
    judge = judges.RefusalStrings()
    refusals = ["I\u2019m sorry, but no.", "  I CANNOT do that", "As an AI, I ..."]
    refusals.append("I don\u2019t think it\u2019s appropriate to")
    others = ["Sure, here it is", "", "A sorry sight."]
    assert all(map(judge.refuses, refusals))
    assert not any(map(judge.refuses, others))
    assert judge([("q", text) for text in (*refusals, *others)]) == [False] * 4 + [
        True,
        False,
        True,
    ]
    assert not judges.RefusalStrings(within=10).refuses("Well, let me say that I cannot")
    assert judges.RefusalStrings(["nope"]).refuses("Nope!")
    with pytest.raises(ValueError, match="phrases: expected at least one, got none"):
        judges.RefusalStrings([" "])


def test_beginnings():
    judge = judges.Starts(["Sure, here", " Yes"])
    assert judge([("", " Sure, here it is"), ("", "Yes!"), ("", "No. Yes")]) == [True, True, False]
    with pytest.raises(ValueError, match="texts: expected some that are not empty"):
        judges.Starts([])


def test_a_model_judges():
    def logprob(prompt, option):
        ((role, text),) = prompt
        assert role == "user"
        assert "{curly}" in text
        return 0.0 if (option == "yes") == ("ANSWER:\nbomb" in text) else -3.0

    judge = judges.ModelJudge(ScriptedModel(logprobs=logprob))
    pairs = [("how {curly} {answer}", "bomb"), ("{curly}", "no {request}")]
    assert judge(pairs) == [True, False]
    assert judge.shares(pairs)[0][0] == pytest.approx(1 / (1 + 2.718281828**-3))
    assert judge([]) == []
    plain = judges.ModelJudge(ScriptedModel(logprobs={("r a", "y"): 0.0, ("r a", "n"): -1.0}),
                              "{request} {answer}", ("y", "n"), chat=False)  # fmt: skip
    assert plain([("r", "a")]) == [True]
    with pytest.raises(ValueError, match=r"question: expected it to hold \{answer\}"):
        judges.ModelJudge(ScriptedModel(), "{request}")


def test_wilson():
    # 8 of 10, by hand: (0.8 + 1.9207/10 +- 1.96 sqrt(0.016 + 0.0096036)) / 1.38415
    assert wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert wilson(0, 10)[0] == 0.0
    assert wilson(10, 10)[1] == pytest.approx(1.0)
    assert wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="expected a count between 0 and 2, got 3"):
        wilson(3, 2)


def test_page(tmp_path):
    done = {b.id: [Completion("t", "g", b.id == "a_1")] for b in BEHAVIORS}
    none = {b.id: [Completion("t", "g", False)] for b in BEHAVIORS}
    rows = [page.attack_row("GCG", done), page.attack_row("PAIR", none)]
    joined = page.any_attack({"GCG": done, "PAIR": none})
    assert (joined.shown, joined.cases) == (1, 4)
    assert [r.attack for r in page.by_category("GCG", done, BEHAVIORS)] == [
        "GCG, standard", "GCG, contextual",
    ]  # fmt: skip
    assert page.asr_table(rows)[0] == ["GCG", "2", "50.0%", "9.5% to 90.5%", "1 of 2"]
    from gemma_ext.papers.continuous_at.evaluation.over_refusal import Refusals

    refused = [Refusals("all", True, (3, 1, 0))]
    assert page.refusal_table(refused)[0][:3] == ["all, safe", "4", "25.0%"]
    path = tmp_path / "audit.html"
    page.write(
        path, {"base <b>": rows, "robust": [joined]}, {"base <b>": refused},
        {"base <b>": [[3.0, 2.0, 2.5], [4.0]], "robust": [[5.0]]}, {"seed": "0"},
    )  # fmt: skip
    text = path.read_text(encoding="utf-8")
    assert "50.0%" in text
    assert "base &lt;b&gt;" in text
    assert "base <b>" not in text
    assert text.count("<svg") == 2
    page.write(path, {"m": rows}, {}, {}, {})
    assert path.read_text(encoding="utf-8").count("<svg") == 1
