"""The sources of the embedded world: what a document of each looks like, and what is held out.

A document is a pure function of the seed, the source's name, the split and a number. Held-out
pictures come from another stream of random numbers; ``unseen_pairs`` also from other compositions.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from data_modules.components.corpus import SourceRecipe
from data_modules.components.document import (
    Document,
    dialogue_document,
    interleaved_document,
    text_document,
)
from data_modules.world import charts, clips, referring, scenes, sequences
from data_modules.world.docs import Docs
from data_modules.world.pages import Pages
from data_modules.world.question import Item
from data_modules.world.scenes import Family
from data_modules.world.things import COLOURS, SEEN_PAIRS, SHAPES
from moonlit.chat.messages import Image as ImagePart
from moonlit.chat.messages import Text
from moonlit.chat.tokenizer import Tokenizer

TRAIN, HELD_OUT = 0, 1
FAMILIES: dict[str, Family] = {
    "counting": scenes.counting,
    "attributes": scenes.attributes,
    "grounding": scenes.grounding,
    "boxes": scenes.boxes,
    "polygons": scenes.polygons,
    "captions": scenes.captions,
    "digits": scenes.digits,
    "puzzles": scenes.puzzles,
    "clips": clips.clips,
}
HELD_OUT_FAMILIES: dict[str, Family] = {
    "counting": scenes.counting,
    "colours": scenes.colours,
    "shapes": scenes.shapes,
    "unseen_pairs": scenes.unseen_pairs,
    "digits": scenes.digits,
    "positions": scenes.grounding,
    "boxes": scenes.boxes,
    "puzzles": scenes.odd_one_out,
    "motion": clips.motion,
}
TASK_FAMILIES: dict[str, Family] = {
    "attributes": scenes.attributes,
    "pointing": referring.pointing,
    "every_point": referring.every_point,
    "every_box": referring.every_box,
    "outlines": scenes.polygons,
    "charts": charts.charts,
    "sequences": sequences.sequences,
}
"""Families that reinforcement learning asks for in either split; all but one it alone."""
CHANCE = {
    "counting": 1 / scenes.MAX_COUNT,
    "colours": 1 / len(COLOURS),
    "shapes": 1 / len(SHAPES),
    "unseen_pairs": (1 / len(COLOURS) + 1 / len(SHAPES)) / 2,
    "digits": (1 / 10 + 1 / 90) / 2,
    "positions": 1 / 9,
    "puzzles": 1 / len(SHAPES),
    "motion": 1 / len(clips.DIRECTIONS),
}
"""Accuracy of guessing among a question's possible answers, where these are few."""
PAGES_PER_DOCUMENT = 2
INPUTS_PER_CHUNK = 256


@dataclass(frozen=True, kw_only=True)
class World:
    """Makes items and documents.

    Args:
        seed: of everything random.
        tokenizer: whose ids the documents hold.
        picture_side: of scenes and clips [px]; 28 px are one vision token's side.
        questions_per_picture: at most so many in a training dialogue.
        docs: the texts.
    """

    seed: int
    tokenizer: Tokenizer
    picture_side: int
    questions_per_picture: int
    docs: Docs

    @cached_property
    def pages(self) -> dict[int, Pages]:
        """Pages of each split; their texts are the topics, which need no parsing."""
        return {
            split: Pages(self.docs.topics_of(held_out=split == HELD_OUT))
            for split in (TRAIN, HELD_OUT)
        }

    def item(self, name: str, number: int, split: int) -> Item:
        """Return item ``number`` of a family."""
        rng = np.random.default_rng([self.seed, zlib.crc32(name.encode()), split, number])
        if name == "pages":
            return self.pages[split].page(rng)
        families = TASK_FAMILIES | (HELD_OUT_FAMILIES if split == HELD_OUT else FAMILIES)
        return families[name](rng, SEEN_PAIRS, self.picture_side)

    def document(self, name: str, number: int) -> Document:
        """Return a training document of a source with media."""
        item = self.item(name, number, TRAIN)
        if name == "captions":
            caption = Text(item.questions[0].answer)
            return interleaved_document([item.media, caption], self.tokenizer)
        if name == "pages" and number % 2:
            return self.interleaved_pages(number)
        messages = item.dialogue(self.questions_per_picture)
        return dialogue_document(messages, self.tokenizer)

    def interleaved_pages(self, number: int) -> Document:
        """Return pages, each followed by its text."""
        parts: list[ImagePart | Text] = []
        for place in range(PAGES_PER_DOCUMENT):
            rng = np.random.default_rng([self.seed, 1, TRAIN, number, place])
            page = self.pages[TRAIN].page(rng)
            parts += [ImagePart(page.frames[0]), Text(page.questions[0].answer + "\n")]
        return interleaved_document(parts, self.tokenizer)

    def held_out_document(self, name: str, number: int) -> Document:
        """Return a held-out question: one turn, scored on the answer only."""
        messages = self.item(name, number, HELD_OUT).dialogue(1)
        return dialogue_document(messages, self.tokenizer)

    def recipes(self, num_pictures: Mapping[str, int], num_held_out: int) -> list[SourceRecipe]:
        """Return every source: texts, pictures, and what is held out of either.

        Args:
            num_pictures: training documents of each source with media.
            num_held_out: items of each held-out set.
        """
        return [
            *self.text_recipes(),
            *(
                SourceRecipe(
                    name=name,
                    num_inputs=num,
                    make=lambda number, name=name: [self.document(name, number)],
                    inputs_per_chunk=INPUTS_PER_CHUNK,
                )
                for name, num in num_pictures.items()
            ),
            *(
                SourceRecipe(
                    name=held_out_source(name),
                    num_inputs=num_held_out,
                    make=lambda number, name=name: [self.held_out_document(name, number)],
                )
                for name in (*HELD_OUT_FAMILIES, "pages")
            ),
        ]

    def text_recipes(self) -> list[SourceRecipe]:
        """Return prose and code, for training and held out."""
        kinds = {
            "prose": (self.docs.num_prose_inputs, self.docs.prose),
            "code": (self.docs.num_code_inputs, self.docs.code),
        }
        return [
            SourceRecipe(
                name=held_out_source(name) if held_out else name,
                num_inputs=num_inputs,
                make=lambda number, texts=texts, held_out=held_out: [
                    text_document(text, self.tokenizer) for text in texts(number, held_out=held_out)
                ],
                inputs_per_chunk=INPUTS_PER_CHUNK // 8,
            )
            for name, (num_inputs, texts) in kinds.items()
            for held_out in (False, True)
        ]


def held_out_source(name: str) -> str:
    """Name of the corpus' source that holds a held-out set."""
    return f"held_out_{name}"
