"""LFPT5, and the frames of what it writes."""
