"""Several runs beside each other, over methods, orders and seeds: what is compared, and how it looks."""
