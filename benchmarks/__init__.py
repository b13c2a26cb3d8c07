"""Ratios measured side by side in one run: ours beside what else one would do. See README.md."""
