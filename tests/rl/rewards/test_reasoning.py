"""reasoning-gym is loaded in silence, and nothing else is silenced."""

import os
import subprocess
import sys
from pathlib import Path

LOADS = """
from moonlit.rl.rewards.reasoning import library
library()
compile("1 is 1", "/home/me/rewards.py", "exec")
"""


def test_only_what_python_says_of_cellpylib_is_silenced(tmp_path: Path):
    """With an empty cache every source is compiled anew, and warned of."""
    fresh = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path)}
    told = subprocess.run(
        [sys.executable, "-c", LOADS], env=fresh, capture_output=True, text=True, check=True
    ).stderr
    warned = [line for line in told.splitlines() if "SyntaxWarning" in line]
    assert len(warned) == 1
    assert warned[0].startswith("/home/me/rewards.py:1: SyntaxWarning")
