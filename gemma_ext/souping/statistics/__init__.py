"""What some methods want to know about each model beside its weights."""

from gemma_ext.souping.statistics.files import Statistics, StatisticsFile, run_of, save_statistics
from gemma_ext.souping.statistics.fisher import fisher_diagonal, squared_scores
from gemma_ext.souping.statistics.grams import collect_grams

__all__ = [
    "Statistics",
    "StatisticsFile",
    "collect_grams",
    "fisher_diagonal",
    "run_of",
    "save_statistics",
    "squared_scores",
]
