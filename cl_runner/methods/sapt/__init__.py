"""SAPT, and its shared attention."""
