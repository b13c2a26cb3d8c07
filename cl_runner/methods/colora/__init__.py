"""CoLoRA: experts beside a shared pair, rounds, and the gate that tells tasks apart."""
