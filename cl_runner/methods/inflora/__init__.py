"""InfLoRA, and its memory of what past tasks use."""
