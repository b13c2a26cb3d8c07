"""Grassmann, and the spans of past pairs."""
