"""Tools that a rollout is given: an interpreter with the task's pictures, a library to search."""
