"""OGD, and the directions it keeps clear of."""
