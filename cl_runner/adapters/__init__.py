"""PEFT adapters: build, fold, factor groups, save and load. The only folder that imports peft."""

from cl_runner.adapters.folding import Accumulator
from cl_runner.adapters.lora import Adapters, FactorGroup, Pair, PastFactors

__all__ = ["Accumulator", "Adapters", "FactorGroup", "Pair", "PastFactors"]
