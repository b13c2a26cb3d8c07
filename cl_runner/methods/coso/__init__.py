"""CoSO, and the sketch of a task's gradients."""
