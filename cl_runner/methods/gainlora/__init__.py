"""GainLoRA, and its gates."""
