"""PEFT adapters: build, fold, factor groups, save and load; or all weights in their place.

The only folder that imports peft.
"""

from cl_runner.adapters.folding import Accumulator
from cl_runner.adapters.full import FullWeights, Stored
from cl_runner.adapters.lora import Adapters, FactorGroup, Pair, PastFactors
from cl_runner.adapters.prompts import Prompts
from cl_runner.adapters.terms import Term, Terms

__all__ = [
    "Accumulator", "Adapters", "FactorGroup", "FullWeights", "Pair", "PastFactors", "Prompts", "Stored", "Term",
    "Terms",
]  # fmt: skip
