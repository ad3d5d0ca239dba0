"""Watches a swarm: critical steps, parallelism, agents, finish rate, retries, rewards, tokens."""

from typing import Any

from lightning import Callback, LightningModule, Trainer

from moonlit.agents.swarm.assignment import FAILURES
from moonlit.batch import Group

WATCHED = (
    "critical_steps",
    "total_steps",
    "parallelism",
    "agents_created",
    "agents_used",
    "tasks_assigned",
    "finish_rate",
    "retries",
    "conflicts",
    "conflict_cells_right",
    "ambiguity_kept",
    "row_f1",
    "performance",
    "orchestrator_tokens",
    "subagent_tokens",
    *(f"failed_{kind}" for kind in FAILURES),
)
PARTS = ("parallel", "finish")


class SwarmWatch(Callback):
    """Logs the mean of each over an iteration's rollouts, as ``swarm/NAME``.

    Reads what the environment measured (``trajectory.metrics``) from the phase's ``last_groups``.
    """

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Log the iteration's means, this rank's rollouts."""
        groups: list[Group] = getattr(pl_module, "last_groups", [])
        rollouts = [one for group in groups for one in group.trajectories if one.error is None]
        values = {name: [one.metrics[name] for one in rollouts if name in one.metrics]
                  for name in WATCHED}  # fmt: skip
        values |= {f"reward_{name}": [one.rewards[name] for one in rollouts if name in one.rewards]
                   for name in PARTS}  # fmt: skip
        means = {name: sum(some) / len(some) for name, some in values.items() if some}
        pl_module.log_dict({f"swarm/{name}": mean for name, mean in means.items()})
