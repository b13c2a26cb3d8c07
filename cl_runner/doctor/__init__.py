"""What there is on this machine, and what it is missing. Nothing here needs a package but Python's own."""
