"""Watches rollouts about pictures: what was pointed to, boxed or outlined, beside the truth."""

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image, ImageDraw, ImageFont

from moonlit.batch import Group, Task, Trajectory
from moonlit.chat.messages import Image as ImagePart
from moonlit.chat.messages import Text
from moonlit.rl.rewards.exact import DECIMALS, is_comparable, is_exact
from moonlit.rl.rewards.parsing import boxes, points, tuples

SIDE, LINE_HEIGHT, NUM_LINES = 240, 14, 8
TRUE, SAID = (0, 150, 60), (215, 30, 30)
"""Colours of the truth and of what the policy said."""
Shapes = Sequence[Sequence[float]] | Sequence[Sequence[Sequence[float]]]


class RolloutPictures(Callback):
    """Adds a sheet to TensorBoard: groups with pictures, each with its best and its worst rollout.

    The phase keeps what it collected in ``last_groups``; a phase without is left alone. True boxes,
    points and outlines are green, those of the answer red; an answer that cannot be read has none.
    The answer's words are green where it is right, else red.

    Args:
        every_n_iterations: the first, and every so many after it.
        max_groups: on the sheet, one of each environment first.
    """

    def __init__(self, *, every_n_iterations: int, max_groups: int) -> None:
        if min(every_n_iterations, max_groups) < 1:
            raise ValueError(
                f"every_n_iterations={every_n_iterations}, max_groups={max_groups}: want at least 1"
            )
        self.every_n_iterations, self.max_groups = every_n_iterations, max_groups
        self.num_iterations = 0

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Draw the iteration's rollouts; the first rank its own."""
        groups: list[Group] = getattr(pl_module, "last_groups", [])
        if not groups:
            return
        due = self.num_iterations % self.every_n_iterations == 0
        self.num_iterations += 1
        if not due or not trainer.is_global_zero:
            return
        sheet_yx3 = sheet(chosen(groups, self.max_groups))
        loggers = [lg for lg in trainer.loggers if isinstance(lg, TensorBoardLogger)]
        for logger in loggers if sheet_yx3 is not None else []:
            logger.experiment.add_image(
                "rollouts/pictures", sheet_yx3, trainer.global_step, dataformats="HWC"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return how many iterations were seen."""
        return {"num_iterations": self.num_iterations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.num_iterations = state_dict["num_iterations"]


def chosen(groups: Sequence[Group], num: int) -> list[Group]:
    """Return judged groups with pictures: one of each environment, then more."""
    fit = [
        group
        for group in groups
        if picture_of(group.task) is not None
        and any(one.error is None for one in group.trajectories)
    ]
    turn: dict[str, int] = {}
    order = []
    for place, group in enumerate(fit):
        kind = group.task.environment
        order.append((turn.setdefault(kind, 0), place))
        turn[kind] += 1
    return [fit[place] for _, place in sorted(order)][:num]


def sheet(groups: Sequence[Group]) -> np.ndarray | None:
    """Draw a column for each group, best rollout above the worst, [y, x, 3] uint8."""
    columns = []
    for group in groups:
        judged = [one for one in group.trajectories if one.error is None]
        ends = (max(judged, key=reward_of), min(judged, key=reward_of))
        columns.append(np.concatenate([card(group.task, one) for one in ends], axis=0))
    return np.concatenate(columns, axis=1) if columns else None


def reward_of(one: Trajectory) -> float:
    """Return what a rollout earned."""
    return one.reward


def card(task: Task, one: Trajectory) -> np.ndarray:
    """Draw a rollout, [y, x, 3] uint8: its picture with what was said and what is true on it."""
    picture = picture_of(task)
    assert picture is not None
    scale = SIDE / max(picture.size)
    width, height = (max(1, round(edge * scale)) for edge in picture.size)
    paper = Image.new("RGB", (SIDE + 8, SIDE + NUM_LINES * LINE_HEIGHT), "white")
    shown = picture.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(shown)
    mark(pen, task.environment, task.answer, (width, height), TRUE)
    mark(pen, task.environment, said(task.environment, one.text), (width, height), SAID)
    paper.paste(shown, (0, 0))
    lines = [
        *((line, (0, 0, 0)) for line in textwrap.wrap(question_of(task), 38)[:3]),
        (f"truth: {rounded(task.answer)}"[:42], TRUE),
        *(
            (line, TRUE if is_right(task, one) else SAID)
            for line in textwrap.wrap(f"said: {one.text[:100]}", 40)[:3]
        ),
        (f"reward {one.reward:.2f} ({one.stop_reason})", (0, 0, 0)),
    ]
    pen = ImageDraw.Draw(paper)
    for row, (line, colour) in enumerate(lines):
        where = (3, SIDE + row * LINE_HEIGHT)
        pen.text(where, line, fill=colour, font=ImageFont.load_default(11))
    return np.asarray(paper)


def is_right(task: Task, one: Trajectory) -> bool:
    """Whether an answer is verified right, or is the truth, coordinates at two decimals."""
    return one.is_correct or (is_comparable(task.answer) and is_exact(one.text, task.answer))


def rounded(truth: Any) -> Any:
    """Return a truth with coordinates as answers write them."""
    if isinstance(truth, list | tuple):
        return [rounded(part) for part in truth]
    return round(truth, DECIMALS) if isinstance(truth, float) else truth


def said(environment: str, answer: str) -> Shapes:
    """Return what an answer shows; nothing where it shows nothing, or cannot be read."""
    if environment == "grounding":
        return boxes(answer) or []
    if environment == "pointing":
        return points(answer) or []
    return [tuples(answer, 2) or []] if environment == "segmentation" else []


def mark(
    pen: ImageDraw.ImageDraw,
    environment: str,
    shapes: Any,
    size: tuple[int, int],
    colour: tuple[int, int, int],
) -> None:
    """Draw boxes, points or outlines in [0, 1] on a picture of a size."""
    width, height = size
    if environment == "grounding":
        for x1, y1, x2, y2 in shapes:
            pen.rectangle((x1 * width, y1 * height, x2 * width, y2 * height), None, colour, 2)
    elif environment == "pointing":
        for x, y in shapes:
            at = (x * width - 4, y * height - 4, x * width + 4, y * height + 4)
            pen.ellipse(at, None, colour, 2)
    elif environment == "segmentation":
        for outline in shapes:
            corners = [(x * width, y * height) for x, y in outline]
            if len(corners) > 1:
                pen.line([*corners, corners[0]], colour, 2)


def picture_of(task: Task) -> Image.Image | None:
    """Return the first picture of a task."""
    parts = (part for message in task.prompt for part in message.parts)
    return next((part.image for part in parts if isinstance(part, ImagePart)), None)


def question_of(task: Task) -> str:
    """Return the words of the last turn of a task."""
    return " ".join(part.text for part in task.prompt[-1].parts if isinstance(part, Text))
