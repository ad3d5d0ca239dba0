"""Sharing out visual items, and moving them there and back."""

import random

import pytest
import torch
from ranks import Ranks

from moonlit.distributed.item_exchange import ItemExchange
from moonlit.distributed.vision_balance import assign, chunks, encoding_cost
from moonlit.models.shapes import EncoderShape

SHAPE = EncoderShape(num_layers=1, width=16, mlp_width=28, num_heads=2)  # P0 = 60 patches


def test_the_cost_grows_with_the_square_of_an_item():
    assert encoding_cost((1, 2, 3), SHAPE) == pytest.approx(6 * (1 + 6 / 60))
    assert encoding_cost((4, 10, 6), SHAPE) == pytest.approx(240 * 5)


def test_the_longest_go_first_and_the_lightest_rank_takes_them():
    assert assign([1.0, 5.0, 2.0, 3.0], homes=[0, 0, 0, 0], num_ranks=2) == [0, 0, 1, 1]


def test_an_item_stays_at_home_when_loads_are_equal():
    assert assign([2.0, 2.0, 2.0], homes=[2, 0, 1], num_ranks=3) == [2, 0, 1]
    assert assign([1.0, 1.0], homes=[1, 1], num_ranks=2) == [1, 0]


def test_one_item_larger_than_the_rest_has_a_rank_to_itself():
    owners = assign([1.0, 1.0, 9.0, 1.0], homes=[0, 0, 0, 0], num_ranks=2)
    assert owners.count(owners[2]) == 1


@pytest.mark.parametrize("seed", range(5))
def test_no_rank_is_loaded_beyond_four_thirds_of_the_best(seed: int):
    generator = random.Random(seed)
    num_ranks = generator.randint(2, 7)
    costs = [generator.uniform(1, 40) for _ in range(generator.randint(1, 60))]
    homes = [generator.randrange(num_ranks) for _ in costs]

    loads = [0.0] * num_ranks
    for cost, owner in zip(costs, assign(costs, homes, num_ranks), strict=True):
        loads[owner] += cost

    at_best = max(sum(costs) / num_ranks, max(costs))
    if len(costs) > num_ranks:  # two of the largest n + 1 must share a rank
        largest = sorted(costs, reverse=True)
        at_best = max(at_best, largest[num_ranks - 1] + largest[num_ranks])
    assert max(loads) <= 4 / 3 * at_best + 1e-9


def test_chunks_keep_the_budget_and_lose_nothing():
    assert chunks([3, 3, 9, 1, 2], budget=6) == [range(2), range(2, 3), range(3, 5)]
    assert chunks([], budget=6) == []
    assert chunks([7], budget=6) == [range(1)]


GRIDS = [  # by home rank: none, one large item, many small ones, a clip
    [],
    [(1, 8, 10)],
    [(1, 2, 2)] * 5,
    [(3, 2, 4), (1, 4, 4)],
]


def there_and_back() -> tuple[list[int], bool, bool]:
    """Patches carry their item's name; features and gradients must meet them again."""
    rank = torch.distributed.get_rank()
    grids = torch.tensor(GRIDS[rank], dtype=torch.int64).view(-1, 3)
    group = torch.distributed.group.WORLD
    exchange = ItemExchange.plan(grids, SHAPE, group)

    names = [torch.full((exchange.patches(i), 2), i, dtype=torch.uint8) for i in exchange.at_home]
    sent = exchange.pixels_to_owners(torch.cat([torch.zeros(0, 2, dtype=torch.uint8), *names]))
    owned = sent.arrived()
    expected = [i for i in exchange.owned for _ in range(exchange.patches(i))]
    arrived = owned[:, 0].tolist() == expected

    features = [torch.full((exchange.tokens(i), 3), i + 0.5) for i in exchange.owned]
    home = exchange.features_home(torch.cat([torch.zeros(0, 3), *features]))
    expected = [i + 0.5 for i in exchange.at_home for _ in range(exchange.tokens(i))]
    returned = home[:, 0].tolist() == expected
    again = exchange.gradients_to_owners(home)
    returned = returned and torch.equal(again, torch.cat([torch.zeros(0, 3), *features]))
    return exchange.owned, arrived, returned


def test_items_find_their_encoders_and_their_features_come_home(four_ranks: Ranks):
    answers = four_ranks(there_and_back)
    assert sorted(item for owned, _, _ in answers for item in owned) == list(range(8))
    assert all(owned for owned, _, _ in answers)  # the rank without media works too
    assert all(arrived and returned for _, arrived, returned in answers)


def nothing_at_all() -> bool:
    group = torch.distributed.group.WORLD
    exchange = ItemExchange.plan(torch.zeros(0, 3, dtype=torch.int64), SHAPE, group)
    sent = exchange.pixels_to_owners(torch.zeros(0, 3, 14, 14, dtype=torch.uint8))
    moved = sent.arrived()
    return exchange.grids == [] and moved.shape == (0, 3, 14, 14)


def test_a_step_without_media_moves_nothing(four_ranks: Ranks):
    assert all(four_ranks(nothing_at_all))
