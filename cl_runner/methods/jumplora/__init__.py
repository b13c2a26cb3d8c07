"""JumpLoRA, and its gate."""
