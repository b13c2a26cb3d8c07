"""DOC, and how it tracks the directions that past tasks work along."""
