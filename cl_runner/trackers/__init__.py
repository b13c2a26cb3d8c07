"""Experiment trackers: what a run logs, handed on to TensorBoard, W&B, MLflow, Trackio, or to one of your own."""
