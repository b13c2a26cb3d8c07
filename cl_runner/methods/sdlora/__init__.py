"""SD-LoRA, and the directions that stay."""
