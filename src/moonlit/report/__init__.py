"""``moonlit report``: one self-contained HTML page of a run's curves and rollouts."""
