"""What fills the rows of a step: text that flows, and documents with media that are picked."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from data_modules.components.shuffle import Order

LOOK_AHEAD = 16
"""Documents of each source among which one that fits is sought (our default)."""

Piece = tuple[int, int, int, int]
"""Source, document, start, stop: a row of ``PIECE_DTYPE``."""


@dataclass(slots=True)
class Row:
    """A row being filled with documents that have media."""

    space: int
    """Tokens still free."""
    num_patches: int = 0
    pieces: list[Piece] = field(default_factory=list)


class Shares:
    """Keeps sources at their shares by always serving the one furthest behind."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.weights = dict(weights)
        self.served = dict.fromkeys(weights, 0)

    def behind_first(self) -> list[str]:
        """Sources, the one furthest behind first; ties keep the order of the mixture."""
        return sorted(self.served, key=lambda name: self.served[name] / self.weights[name])


class TextFlow:
    """Text documents end to end, cut wherever a row is full."""

    def __init__(
        self,
        index: Mapping[str, np.ndarray],
        orders: Mapping[str, Order],
        numbers: Mapping[str, int],
    ) -> None:
        self.lengths = {name: np.asarray(index[name]["num_tokens"]) for name in orders}
        self.orders, self.numbers = orders, numbers
        self.shares = Shares({})
        self.source, self.document, self.start, self.stop = 0, 0, 0, 0

    def mix(self, weights: Mapping[str, float]) -> None:
        """Draw by these shares from now on; a document that was begun is finished first."""
        self.shares = Shares(weights)

    def fill(self, space: int) -> list[Piece]:
        """Return the pieces of the next ``space`` tokens."""
        pieces = []
        while space > 0:
            if self.start == self.stop:
                self.open_next()
            end = min(self.start + space, self.stop)
            pieces.append((self.source, self.document, self.start, end))
            space -= end - self.start
            self.start = end
        return pieces

    def open_next(self) -> None:
        """Begin the next document of the source that is furthest behind."""
        name = self.shares.behind_first()[0]
        self.source, self.document = self.numbers[name], self.orders[name].next()
        self.start, self.stop = 0, int(self.lengths[name][self.document])
        self.shares.served[name] += self.stop


@dataclass(frozen=True, slots=True)
class Candidate:
    """A document that could be taken."""

    name: str
    document: int
    num_tokens: int
    num_vision_tokens: int
    num_patches: int


class VisionPicker:
    """Takes documents with media until a step holds its vision tokens."""

    def __init__(
        self,
        index: Mapping[str, np.ndarray],
        orders: Mapping[str, Order],
        numbers: Mapping[str, int],
    ) -> None:
        columns = ("num_tokens", "num_vision_tokens", "num_patches")
        self.costs = {
            name: tuple(np.asarray(index[name][column]) for column in columns) for name in orders
        }
        self.orders, self.numbers = orders, numbers
        self.shares = Shares({})

    def mix(self, weights: Mapping[str, float]) -> None:
        """Draw by these shares from now on."""
        self.shares = Shares(weights)

    def fill(self, rows: Sequence[Row], wanted: float, step: int) -> int:
        """Place documents until as near to ``wanted`` vision tokens as those in sight allow.

        Returns:
            The vision tokens placed.

        Raises:
            ValueError: if the rows have no space left for what is wanted.
        """
        taken: list[Candidate] = []
        missing = wanted
        while candidate := self.first_fit(rows, missing) or self.nearest(rows, missing):
            self.take(candidate)
            put(candidate, self.numbers, rows)
            taken.append(candidate)
            missing -= candidate.num_vision_tokens
        smallest = min(
            c.num_vision_tokens for name in self.shares.weights for c in self.in_sight(name)
        )
        if missing >= smallest:
            raise ValueError(
                f"step {step} has no space for {missing:.0f} of its {wanted:.0f} vision tokens: "
                "the documents with media are too long for what is left of its rows; lower "
                "vision_share, raise row_tokens, or use sources with more vision tokens a token"
            )
        balance(taken, self.numbers, rows)
        return sum(candidate.num_vision_tokens for candidate in taken)

    def in_sight(self, name: str) -> Iterator[Candidate]:
        """Yield the documents of a source that may be taken now, in order."""
        for document in islice(self.orders[name].look(LOOK_AHEAD), LOOK_AHEAD):
            yield Candidate(name, document, *(int(cost[document]) for cost in self.costs[name]))

    def first_fit(self, rows: Sequence[Row], missing: float) -> Candidate | None:
        """Return the first document in sight that is neither too large nor too long."""
        space = max(row.space for row in rows)
        for name in self.shares.behind_first():
            for candidate in self.in_sight(name):
                if candidate.num_vision_tokens <= missing and candidate.num_tokens <= space:
                    return candidate
        return None

    def nearest(self, rows: Sequence[Row], missing: float) -> Candidate | None:
        """Return the smallest document in sight if the step is nearer its share with it."""
        space = max(row.space for row in rows)
        sources = self.shares.weights
        fitting = [c for name in sources for c in self.in_sight(name) if c.num_tokens <= space]
        smallest = min(fitting, key=lambda c: c.num_vision_tokens, default=None)
        if smallest is None or smallest.num_vision_tokens - missing >= missing:
            return None
        return smallest

    def take(self, candidate: Candidate) -> None:
        """Remove a document from its source's order."""
        self.orders[candidate.name].look(LOOK_AHEAD).remove(candidate.document)
        self.shares.served[candidate.name] += candidate.num_vision_tokens


def put(candidate: Candidate, numbers: Mapping[str, int], rows: Sequence[Row]) -> bool:
    """Put a document into the row with the fewest patches of those with space; False: none has."""
    with_space = [row for row in rows if row.space >= candidate.num_tokens]
    if not with_space:
        return False
    row = min(with_space, key=lambda row: row.num_patches)
    row.pieces.append((numbers[candidate.name], candidate.document, 0, candidate.num_tokens))
    row.space -= candidate.num_tokens
    row.num_patches += candidate.num_patches
    return True


def balance(taken: Sequence[Candidate], numbers: Mapping[str, int], rows: Sequence[Row]) -> None:
    """Deal a step's documents anew, the most patches first, so that rows cost about the same.

    Where that leaves one without space, the rows stay as they were filled.
    """
    capacity = rows[0].space + sum(stop - start for _, _, start, stop in rows[0].pieces)
    dealt = [Row(space=capacity) for _ in rows]
    by_cost = sorted(taken, key=lambda candidate: -candidate.num_patches)
    if all(put(candidate, numbers, dealt) for candidate in by_cost):
        for row, new in zip(rows, dealt, strict=True):
            row.space, row.num_patches, row.pieces = new.space, new.num_patches, new.pieces
