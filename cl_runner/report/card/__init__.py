"""The model card of what is exported of a run."""
