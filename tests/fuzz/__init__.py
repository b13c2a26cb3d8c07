"""A mutating fuzzer of all that reads what others wrote: ``make fuzz`` (docs/fuzzing.md)."""
