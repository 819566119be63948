"""The one style of every page that is written here: template, plots, machine."""

from gemma_ext.report.intervals import interval
from gemma_ext.report.kept import Kept
from gemma_ext.report.page import size, this_machine, write_page
from gemma_ext.report.plots import BLUE, GREY, INK, axes, svg

__all__ = [
    "BLUE",
    "GREY",
    "INK",
    "Kept",
    "axes",
    "interval",
    "size",
    "svg",
    "this_machine",
    "write_page",
]
