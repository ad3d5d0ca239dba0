"""Joint multimodal RL: domains are abilities, and each mixes text and pictures.

Source: Kimi K2.5 technical report (arXiv:2602.02276), Sec. 2.3 and 4.4.2.
"""

from moonlit.phases.policy_phase import PolicyPhase


class JointRL(PolicyPhase):
    """Trains the policy on tasks of several abilities at once.

    Trains: everything, or the named parts.
    Minimises: K2.5's token-level objective, see ``losses.policy_gradient.clipped_ratio_loss``.
    Rewards: by the task's environment, then Toggle's budgets (``rl.toggle``).
    Source: arXiv:2602.02276, Sec. 2.3, 4.4.2. Number of domains and mixture are NOT STATED.
    """
