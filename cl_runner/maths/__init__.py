"""Mathematics that methods and metrics share: plain functions on tensors. Imports nothing of the project."""
