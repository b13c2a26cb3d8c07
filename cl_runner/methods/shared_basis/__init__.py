"""Shared basis: its terms, how tasks mix, and what it carries."""
