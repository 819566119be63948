"""Pages and plots: complete, self-contained, written whole."""

import re
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from jinja2 import UndefinedError

from gemma_ext import report

TEMPLATE = """\
{% extends "base.html.jinja" %}
{% block title %}t{% endblock %}
{% block headline %}{{ headline }}{% endblock %}
{% block sections %}<section>{{ plot | safe }}</section>{% endblock %}
{% block last %}the end{% endblock %}
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An importable package with a template in it."""
    folder = tmp_path / "pages_of_a_test"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "page.jinja").write_text(TEMPLATE)
    monkeypatch.syspath_prepend(tmp_path)
    return folder.name


def plot():
    figure, axes = report.axes(1, 2, (4, 2), sharey=True)
    axes[0].plot([1, 2], [3, 4], color=report.BLUE)
    return report.svg(figure, 'two "lines" & more')


def test_a_page_has_its_parts_and_stands_alone(package, tmp_path):
    path = tmp_path / "deep" / "page.html"
    report.write_page(
        path,
        package,
        "page.jinja",
        numbers=[("speed", "3 <b>")],
        machine={"cores": "2"},
        headline="a & b",
        plot=plot(),
    )
    page = path.read_text()
    for text in ("<h1>a &amp; b</h1>", "<b>3 &lt;b&gt;</b><span>speed</span>", "the end"):
        assert text in page
    assert "<tr><td>cores</td><td>2</td></tr>" in page
    assert page.count("<svg") == 1
    assert not re.findall(r'(?:src|href)="(?!#)', page.replace("xlink:href", ""))
    assert list(path.parent.iterdir()) == [path]


def test_a_missing_value_is_an_error_and_leaves_the_old_page(package, tmp_path):
    path = tmp_path / "page.html"
    path.write_text("old")
    with pytest.raises(UndefinedError, match="headline"):
        report.write_page(path, package, "page.jinja", numbers=[], machine={}, plot="")
    assert path.read_text() == "old"


def test_a_plot_is_an_element_with_a_description():
    text = plot()
    root = ElementTree.fromstring(text)
    assert root.attrib["role"] == "img"
    assert root.attrib["aria-label"] == 'two "lines" & more'
    assert plot() == text or "<dc:date>" not in text


def test_this_machine_and_sizes():
    rows = report.this_machine()
    assert {"processor", "cores", "torch", "gemma_ext"} <= rows.keys()
    assert report.size(3 * 2**29) == "1.50 GiB"
    assert report.size(5 * 2**20) == "5 MiB"


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    needs = r"pip install 'gemma_ext\[merge\]'"
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=f"gemma_ext.report needs jinja2: {needs}"):
        report.write_page(tmp_path / "p", "gemma_ext.demo", "x", numbers=[], machine={})
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=f"gemma_ext.report needs matplotlib: {needs}"):
        report.axes(1, 1, (1, 1))
