"""Figures of runs: vectors for a page, in its colours, or files for a paper."""
