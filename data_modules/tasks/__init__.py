"""Sources of tasks whose answers can be checked: from a split and a number to a task."""
