"""A plugin for tests: a method for which memory suffices for one row at a time."""

NARROW = """
import torch
from cl_runner.methods.seqlora import SeqLoRA


class Narrow(SeqLoRA):
    name = "narrow"

    def loss(self, stage, batch):
        if batch.size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().loss(stage, batch)


METHODS = [Narrow]
"""
