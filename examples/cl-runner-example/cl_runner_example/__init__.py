"""A method and a task source for cl-runner."""
