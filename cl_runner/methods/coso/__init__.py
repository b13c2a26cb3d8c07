"""CoSO, its dense term and the sketch of a task's gradients."""
