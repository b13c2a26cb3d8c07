"""Runs on disk: one folder's layout, the catalog of them, what their stages left."""
