"""The settings of a run: the schema, YAML with positions, what is wrong in plain words, lookup by name."""
