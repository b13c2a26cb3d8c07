"""The adapter kinds, one class in one file each, named in ``cl_runner.registry``. Importing one imports no torch."""
