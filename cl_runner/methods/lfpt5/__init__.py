"""LFPT5, and what it writes."""
