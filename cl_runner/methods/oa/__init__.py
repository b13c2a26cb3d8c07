"""OA-Adapter, and its term."""
