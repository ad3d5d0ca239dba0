"""Watches what the model says about held-out pictures: picture, question, answer and truth."""

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image, ImageDraw, ImageFont

from moonlit.batch import Task
from moonlit.chat.messages import Image as ImagePart
from moonlit.chat.template import render
from moonlit.chat.tokenizer import Tokenizer
from moonlit.chat.vision_processing import pack_media

CARD_WIDTH, PICTURE_HEIGHT, LINE_HEIGHT = 260, 200, 15


class SamplePictures(Callback):
    """Draws a sheet of held-out tasks with the model's greedy answers, after each validation.

    The data module gives the tasks (``sample_tasks``) and the tokenizer.

    Args:
        num_tasks: cards on the sheet.
        max_new_tokens: an answer is cut at this length [tokens].
    """

    def __init__(self, *, num_tasks: int, max_new_tokens: int) -> None:
        self.num_tasks = num_tasks
        self.max_new_tokens = max_new_tokens

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answer the tasks and add the sheet to TensorBoard.

        All ranks answer, because a sharded model needs them all; the first one draws.
        """
        loggers = [lg for lg in trainer.loggers if isinstance(lg, TensorBoardLogger)]
        if trainer.sanity_checking or not loggers:
            return
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        tasks: Sequence[Task] = data.sample_tasks(self.num_tasks)
        if not tasks:
            return
        answers = [self.answer(pl_module, task, data.tokenizer) for task in tasks]
        if not trainer.is_global_zero:
            return
        sheet_yx3 = np.concatenate(
            [card(task, answer) for task, answer in zip(tasks, answers, strict=True)], axis=1
        )
        for logger in loggers:
            logger.experiment.add_image(
                "held_out/samples", sheet_yx3, trainer.global_step, dataformats="HWC"
            )

    def answer(self, phase: Any, task: Task, tokenizer: Tokenizer) -> str:
        """Return the model's most likely answer as text."""
        prompt = render(task.prompt, tokenizer, add_generation_prompt=True)
        ids = phase.greedy_answer(
            torch.tensor(prompt.input_ids),
            pack_media(prompt.media) if prompt.media else None,
            max_new_tokens=self.max_new_tokens,
            stop_ids={tokenizer.special.im_end_id},
        )
        return tokenizer.decode([i for i in ids if i != tokenizer.special.im_end_id])


def card(task: Task, answer: str) -> np.ndarray:
    """Draw one task, [y, x, 3] uint8: its picture, the question, the answer and the truth."""
    pictures = [
        part.image
        for message in task.prompt
        if not isinstance(message.content, str)
        for part in message.content
        if isinstance(part, ImagePart)
    ]
    sheet = Image.new("RGB", (CARD_WIDTH, PICTURE_HEIGHT + 8 * LINE_HEIGHT), "white")
    if pictures:
        scale = min(CARD_WIDTH / pictures[0].width, PICTURE_HEIGHT / pictures[0].height)
        size = (int(pictures[0].width * scale), int(pictures[0].height * scale))
        sheet.paste(pictures[0].resize(size, Image.Resampling.NEAREST), (0, 0))
    is_right = answer.strip() == str(task.answer).strip()
    lines = [
        *((line, "black") for line in textwrap.wrap(question_of(task), 38)[:4]),
        (f"model: {answer[:60]}", "darkgreen" if is_right else "firebrick"),
        (f"truth: {str(task.answer)[:60]}", "black"),
    ]
    pen = ImageDraw.Draw(sheet)
    for row, (line, colour) in enumerate(lines):
        where = (4, PICTURE_HEIGHT + 4 + row * LINE_HEIGHT)
        pen.text(where, line, fill=colour, font=ImageFont.load_default(12))
    return np.asarray(sheet)


def question_of(task: Task) -> str:
    """Return the text of the last user turn."""
    content = task.prompt[-1].content
    if isinstance(content, str):
        return content
    return " ".join(part.text for part in content if hasattr(part, "text"))
