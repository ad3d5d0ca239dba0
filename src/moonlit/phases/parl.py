"""PARL: an orchestrator learns when and how to split work over frozen sub-agents.

Source: Kimi K2.5 technical report (arXiv:2602.02276), Sec. 3. Sub-agents come from fixed
checkpoints; what they write is an observation, so only the orchestrator's tokens have a gradient.
"""

from moonlit.batch import Group
from moonlit.phases.policy_phase import PolicyPhase
from moonlit.rl.swarm_environment import SwarmEnvironment


class PARL(PolicyPhase):
    """Trains the orchestrator.

    Trains: the named parts; sub-agents are no part of the model.
    Minimises: K2.5's token-level objective on the orchestrator's tokens.
    Rewards: lambda 1 r_parallel + lambda 2 r_finish + r_perf, both lambdas annealed to zero.
    Source: arXiv:2602.02276, Sec. 3.
    """

    watched = ("critical_steps", "parallelism")
    environment: SwarmEnvironment

    def collect(self) -> list[Group]:
        """Tell the environment how far the run is, for the annealing; then roll out."""
        self.tell_environment()
        lambda_1, lambda_2 = self.environment.reward.lambdas(self.environment.progress)
        self.log_dict({"swarm/lambda_parallel": lambda_1, "swarm/lambda_finish": lambda_2})
        return super().collect()

    def on_validation_start(self) -> None:
        """Tell it before an evaluation too, which may be the first thing of a resumed run."""
        super().on_validation_start()
        self.tell_environment()

    def tell_environment(self) -> None:
        """Say how far the run is."""
        done = min(1.0, self.global_step / max(1, self.trainer.max_steps))
        self.environment.tell(progress=done, step=self.global_step)
