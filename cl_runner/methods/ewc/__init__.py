"""EWC, and the Fisher information it goes by."""
