"""A run in memory: its plan, the loop over stages, one stage's loop, evaluation, checkpoints."""
