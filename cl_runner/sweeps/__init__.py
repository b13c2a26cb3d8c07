"""Many runs from one file: what they are, which stages they share, who runs them, and how that stands."""
