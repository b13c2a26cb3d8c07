"""What several methods have in common: none of it is a method."""
