"""Outcome-based visual RL: answers about pictures, scored by rules.

Source: Kimi K2.5 technical report (arXiv:2602.02276), Sec. 2.3 and 4.4.2. After zero-vision SFT the
model sometimes ignores the picture; rewards that need it bring the eyes back.
"""

from moonlit.phases.policy_phase import PolicyPhase


class VisualRL(PolicyPhase):
    """Trains the policy on verifiable tasks about pictures and clips.

    Trains: everything, or the named parts (NOT STATED; all of it is our default).
    Minimises: K2.5's token-level objective, see ``losses.policy_gradient.clipped_ratio_loss``.
    Rewards: ``rl.rewards``, by the task's environment; no generative judge.
    Source: arXiv:2602.02276, Sec. 2.3, 4.4.2.
    """
