"""One language model protocol, which every paper takes as an argument.

lm = HuggingFaceModel.load("google/gemma-2-2b", cache="answers.sqlite")
lm.generate(["Once upon a time"], Sampling(max_tokens=64, temperature=0.7, stop=["\\n"]))
lm.logprobs(["The sky is"], [" blue"])
lm.choices(["The sky is"], [" blue", " green"])
lm.perplexity(["Call me Ishmael."])
"""

from gemma_ext.lm.classifier import TextClassifier
from gemma_ext.lm.endpoint import EndpointModel
from gemma_ext.lm.http import EndpointError, Usage
from gemma_ext.lm.huggingface import HuggingFaceModel
from gemma_ext.lm.protocol import (
    Choice,
    Completion,
    LanguageModel,
    Perplexity,
    Prompt,
    Sampling,
    Score,
)
from gemma_ext.lm.scripted import ScriptedModel
from gemma_ext.lm.store import Store

__all__ = [
    "Choice",
    "Completion",
    "EndpointError",
    "EndpointModel",
    "HuggingFaceModel",
    "LanguageModel",
    "Perplexity",
    "Prompt",
    "Sampling",
    "Score",
    "ScriptedModel",
    "Store",
    "TextClassifier",
    "Usage",
]
