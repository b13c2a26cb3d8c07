"""Pages: one file each, with everything in it, that asks nothing of anywhere."""
