"""OSFT, and the spectrum it trains the low end of."""
