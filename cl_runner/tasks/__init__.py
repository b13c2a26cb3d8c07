"""Tasks, their rows, and orders of them."""
