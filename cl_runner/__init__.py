"""cl-runner: continual-learning experiments for language models."""

__version__ = "0.1.0"
