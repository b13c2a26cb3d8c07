"""Merge: each task's update apart, and merged entry by entry after each."""
