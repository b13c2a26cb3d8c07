"""Progressive Prompts, and how a prompt is made of what trains."""
