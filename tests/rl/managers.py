"""Rollout managers that a test has made and the next one must not meet."""

from moonlit.rl.rollout_manager import RolloutManager

MADE: list[RolloutManager] = []
"""Closed after each test, see ``conftest.py``."""
