"""Pictures of rollouts: what is drawn is where the truth and the answer say."""

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks.rollout_pictures import (
    LINE_HEIGHT,
    SAID,
    SIDE,
    TRUE,
    RolloutPictures,
    card,
    chosen,
    rounded,
    sheet,
)
from moonlit.batch import Group, Task, Trajectory
from moonlit.chat.messages import Image as ImagePart
from moonlit.chat.messages import Message, Text

TRUTHS = {
    "grounding": [[0.25, 0.25, 0.5, 0.75]],
    "pointing": [[0.25, 0.5]],
    "segmentation": [[[0.25, 0.25], [0.5, 0.25], [0.5, 0.75]]],
    "counting": 3,
}


def task(environment: str, *, side: int = 56, picture: bool = True) -> Task:
    parts: list[Any] = [Text("Where is it?")]
    if picture:
        parts.insert(0, ImagePart(Image.new("RGB", (side, side), "white")))
    return Task(
        prompt=[Message(role="user", content=parts)], domain="perception",
        environment=environment, answer=TRUTHS[environment],
    )  # fmt: skip


def rollout(text: str, reward: float = 0.0, error: str | None = None) -> Trajectory:
    return Trajectory(
        segments=[], messages=[], spans=[], stop_reason="answer", text=text, reward=reward,
        error=error,
    )  # fmt: skip


def where(image_yx3: np.ndarray, colour: tuple[int, int, int]) -> tuple[float, float, float, float]:
    """The box around a colour in the picture, in [0, 1]."""
    rows, columns = np.nonzero((image_yx3[:SIDE, :SIDE] == colour).all(axis=-1))
    left, top, right, bottom = columns.min(), rows.min(), columns.max(), rows.max()
    return tuple(float(edge) / SIDE for edge in (left, top, right, bottom))


@pytest.mark.parametrize(
    ("environment", "answer", "true", "said"),
    [
        ("grounding", "(0.6, 0.1, 0.9, 0.2)", (0.25, 0.25, 0.5, 0.75), (0.6, 0.1, 0.9, 0.2)),
        ("pointing", "(0.75, 0.5)", (0.23, 0.48, 0.27, 0.52), (0.73, 0.48, 0.77, 0.52)),
        ("segmentation", "(0.6, 0.6) (0.9, 0.6) (0.9, 0.9)",
         (0.25, 0.25, 0.5, 0.75), (0.6, 0.6, 0.9, 0.9)),
    ],
)  # fmt: skip
def test_truth_and_answer_stand_where_they_say(environment: str, answer: str, true, said):
    drawn = card(task(environment), rollout(answer))
    assert where(drawn, TRUE) == pytest.approx(true, abs=0.015)
    assert where(drawn, SAID) == pytest.approx(said, abs=0.015)


@pytest.mark.parametrize("answer", ["", "no box", "(0.4, 0.2, 0.2, 0.6)", "(0.1, 0.1"])
def test_an_answer_that_cannot_be_read_shows_the_truth_alone(answer: str):
    drawn = card(task("grounding"), rollout(answer))
    assert not (drawn[:SIDE] == SAID).all(axis=-1).any()
    assert (drawn[:SIDE] == TRUE).all(axis=-1).any()


@pytest.mark.parametrize(
    ("environment", "answer", "reward", "right"),
    [
        ("grounding", "(0.25, 0.25, 0.50, 0.75)", 0.0, True),  # two decimals are the truth
        ("grounding", "(0.25, 0.25, 0.50, 0.70)", 0.9, False),
        ("counting", "3", 0.5, True),  # right, if too long for a length rule
        ("counting", "There are 3.", 1.0, True),
        ("counting", "4", 0.7, False),
        ("segmentation", "", 0.0, False),
    ],
)
def test_what_was_said_is_green_where_it_is_right(environment, answer, reward: float, right: bool):
    words = card(task(environment), rollout(answer, reward))[SIDE + 2 * LINE_HEIGHT :]
    red, green, _ = np.moveaxis(words.astype(int), -1, 0)
    assert (red - green > 60).any() == (not right)  # letters have soft edges


def test_a_truth_is_written_at_two_decimals():
    assert rounded([[0.123456789, 0.5, 1.0]]) == [[0.12, 0.5, 1.0]]
    assert [rounded(truth) for truth in (3, "red", {"name": 0.12345})] == [
        3, "red", {"name": 0.12345},
    ]  # fmt: skip


def test_the_best_stands_above_the_worst_and_lost_ones_are_left_out():
    box = "(0.6, 0.1, 0.9, 0.2)"
    some = [rollout("?", 0.0), rollout(box, 0.9), rollout(box, 5.0, error="lost")]
    drawn = sheet([Group(task=task("grounding"), trajectories=some)])
    assert drawn is not None
    best, worst = np.split(drawn, 2)
    assert (best[:SIDE] == SAID).all(axis=-1).any()
    assert not (worst[:SIDE] == SAID).all(axis=-1).any()


def test_every_environment_comes_before_a_second_of_one():
    kinds = ["counting", "counting", "grounding", "pointing"]
    groups = [Group(task=task(kind), trajectories=[rollout("x")]) for kind in kinds]
    groups.append(Group(task=task("grounding", picture=False), trajectories=[rollout("x")]))
    groups.append(Group(task=task("segmentation"), trajectories=[rollout("x", error="lost")]))

    # Of equal groups too: two counting ones are alike to the last pixel.
    found = [group.task.environment for group in chosen(groups, 4)]
    assert found == ["counting", "grounding", "pointing", "counting"]
    assert sheet([]) is None


def test_sheets_come_to_tensorboard_when_they_are_due(tmp_path: Path):
    callback = RolloutPictures(every_n_iterations=2, max_groups=2)
    logger = TensorBoardLogger(tmp_path)
    groups = [Group(task=task("grounding", side=40), trajectories=[rollout("(0, 0, 1, 1)", 0.1)])]
    for step in range(4):
        trainer = Mock(Trainer, loggers=[logger], global_step=step, is_global_zero=True)
        phase = Mock(LightningModule)
        phase.last_groups = groups
        callback.on_train_batch_end(trainer, phase, None, None, 0)
    logger.experiment.flush()

    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0})
    events.Reload()
    assert [image.step for image in events.Images("rollouts/pictures")] == [0, 2]
    again = RolloutPictures(every_n_iterations=2, max_groups=2)
    again.load_state_dict(callback.state_dict())
    assert again.num_iterations == 4


def test_a_phase_without_rollouts_and_settings_without_sense():
    callback = RolloutPictures(every_n_iterations=1, max_groups=1)
    trainer = Mock(Trainer, loggers=[], global_step=0, is_global_zero=True)
    callback.on_train_batch_end(trainer, Mock(LightningModule), None, None, 0)
    assert callback.num_iterations == 0
    with pytest.raises(ValueError, match="max_groups=0"):
        RolloutPictures(every_n_iterations=1, max_groups=0)
