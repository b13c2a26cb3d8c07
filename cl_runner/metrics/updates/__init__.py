"""Metrics of updates: how large, how sparse, how low in rank a ΔW is, and how those of several stages overlap."""
