"""DeepSpeed, optimizers, and this process's place among others."""
