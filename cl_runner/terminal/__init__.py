"""What the user sees and how they stop us: console, progress, signals."""
