"""Files of metrics: JSON that every reader takes, and nan where a mean was of nothing."""

import json
import math

import pytest

from gemma_ext import files


def refuse(name):
    raise AssertionError(f"{name} is no JSON")


def test_what_is_no_finite_number_comes_back_as_nan(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    lines = [{"step": 1, "loss": 0.25, "none": math.nan}, {"step": 2, "loss": math.inf}]
    files.write_metrics(path, lines)
    texts = path.read_text().splitlines()
    assert [json.loads(text, parse_constant=refuse) for text in texts] == [
        {"step": 1, "loss": 0.25, "none": None}, {"step": 2, "loss": None},
    ]  # fmt: skip
    first, second = files.read_metrics(path)
    assert (first["step"], first["loss"]) == (1, 0.25)
    assert math.isnan(first["none"])
    assert math.isnan(second["loss"])
    assert files.metric_line(first) == texts[0] + "\n"


def test_a_line_that_was_cut_short_and_a_missing_file_say_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert files.read_metrics(path) == []
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert files.read_metrics(path) == [{"step": 1}]


def test_names_may_hold_separators_of_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"a\u2028}": 1}\n', encoding="utf-8")
    assert files.read_metrics(path) == [{"a\u2028}": 1}]


@pytest.mark.parametrize("value", [0, -3, 1e300, 1 << 60])
def test_numbers_come_back(tmp_path, value):
    files.write_metrics(tmp_path / "m.jsonl", [{"x": value}])
    assert files.read_metrics(tmp_path / "m.jsonl") == [{"x": value}]
