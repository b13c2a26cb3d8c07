"""N-LoRA, in three forms."""
