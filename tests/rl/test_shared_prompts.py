"""A prompt stands in a row once, before all answers to it; what is trained stays the same."""

import pytest
import torch

from moonlit.batch import PackedBatch, PackedMedia, Segment
from moonlit.rl.packing import pack
from moonlit.rl.trained_segments import TrainedSegment

PAD = 9
SETTINGS = {"num_rows": None, "filler_id": 0}


@pytest.fixture(autouse=True)
def share_whatever_it_saves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Rows by hand are short."""
    if request.node.name != "test_a_prompt_that_saves_too_little_is_not_shared":
        monkeypatch.setattr("moonlit.rl.shared_prompts.MIN_SAVED", 0)


def picture(*values: int) -> PackedMedia:
    """One placeholder token for each."""
    return PackedMedia(
        pixel_values=torch.cat(
            [torch.full((4, 3, 14, 14), value, dtype=torch.uint8) for value in values]
        ),
        grid_thw=torch.tensor([[1, 2, 2]] * len(values)),
    )


def answer(
    prompt: list[int], sampled: list[int], media: PackedMedia | None = None, worth: float = 1.0
) -> TrainedSegment:
    """Ids above 100 were given by a tool."""
    is_sampled = [False] * len(prompt) + [i < 100 and i != PAD for i in sampled]
    segment = Segment(
        input_ids=prompt + sampled,
        is_sampled=is_sampled,
        behavior_logprobs=[-float(s) for s in is_sampled],
        policy_versions=[0 if s else -1 for s in is_sampled],
        media=media,
    )
    return TrainedSegment(segment, worth, is_sampled)


def trained_tokens(rows: list[PackedBatch]) -> list[tuple]:
    """What the loss sees: target, position, log-prob, advantage, in any order."""
    return sorted(
        (target, position, logprob, advantage)
        for row in rows
        for target, position, logprob, advantage, trained in zip(
            row.target_ids.tolist(),
            row.position_ids.tolist(),
            row.behavior_logprobs.tolist(),
            row.advantages.tolist(),
            row.loss_mask.tolist(),
            strict=True,
        )
        if trained
    )


def test_a_row_by_hand():
    answers = [answer([1, 2, 3], [7, 8], worth=0.5), answer([1, 2, 3], [4], worth=-0.5)]

    (row,) = pack(answers, row_tokens=20, media_pad_id=PAD, **SETTINGS)

    # The prompt's last token stays with each answer: from it the first token is predicted.
    assert row.input_ids.tolist() == [1, 2, 3, 7, 8, 3, 4]
    assert row.target_ids.tolist() == [2, 3, 7, 8, 0, 4, 0]
    assert row.position_ids.tolist() == [0, 1, 2, 3, 4, 2, 3]
    assert row.loss_mask.tolist() == [False, False, True, True, False, True, False]
    assert row.cu_seqlens.tolist() == [0, 2, 5, 7]
    assert row.prefix_of_document.tolist() == [-1, 0, 0]
    assert row.advantages.tolist()[2:] == [0.5, 0.5, 0.5, -0.5, -0.5]


@pytest.mark.parametrize("row_tokens", [8, 13, 1000])
def test_rows_train_the_same_tokens_with_and_without(row_tokens: int):
    prompts = [[1, 2, 3], [1, 2, 4], [5, 6], [5]]
    answers = [answer(p, [n, 10, *[11] * n]) for p in prompts for n in (1, 3, 2, 1)]

    shared = pack(answers, row_tokens=row_tokens, media_pad_id=PAD, **SETTINGS)
    copied = pack(answers, row_tokens=row_tokens, **SETTINGS)

    assert trained_tokens(shared) == trained_tokens(copied)
    assert max(row.num_tokens for row in shared) <= row_tokens
    assert sum(row.num_tokens for row in shared) <= sum(row.num_tokens for row in copied)
    assert all(row.prefix_of_document is None for row in copied)


def test_who_shares_with_nobody_stands_alone():
    answers = [answer([1, 2, 3], [7]), answer([2, 2, 3], [7]), answer([5], [7]), answer([5], [8])]
    (row,) = pack(answers, row_tokens=20, media_pad_id=PAD, **SETTINGS)
    assert row.prefix_of_document is None
    assert row.num_tokens == 4 + 4 + 2 + 2


def test_one_picture_is_shared_and_another_is_not():
    prompt = [1, PAD, 2, 3]
    answers = [answer(prompt, [n], picture(value)) for n, value in ((4, 8), (5, 6), (6, 8))]

    (row,) = pack(answers, row_tokens=20, media_pad_id=PAD, **SETTINGS)

    assert row.input_ids.tolist() == [1, PAD, 2, 3, 4, 3, 6, 1, PAD, 2, 3, 5]
    assert row.prefix_of_document.tolist() == [-1, 0, 0, -1]
    assert row.media.pixel_values[::4, 0, 0, 0].tolist() == [8, 6]


def test_what_a_tool_shows_stays_with_its_answer():
    """Catches: pictures in another order than their placeholders."""
    prompt = [1, PAD, 2, 3]
    answers = [
        answer(prompt, [4, 101, PAD, 102, 5], picture(8, 20)),
        answer(prompt, [4], picture(8)),
        answer(prompt, [6, 101, PAD, 102, 7], picture(8, 30)),
    ]

    (row,) = pack(answers, row_tokens=30, media_pad_id=PAD, **SETTINGS)

    assert row.media.pixel_values[::4, 0, 0, 0].tolist() == [8, 20, 30]
    assert row.media.grid_thw.tolist() == [[1, 2, 2]] * 3
    assert (row.input_ids == PAD).sum() == 3
    assert row.num_tokens == 3 + 6 + 2 + 6
    assert trained_tokens([row]) == trained_tokens(pack(answers, row_tokens=30, **SETTINGS))


def test_an_item_on_both_sides_of_the_cut_is_not_shared():
    two_tokens = PackedMedia(
        pixel_values=torch.zeros(8, 3, 14, 14, dtype=torch.uint8),
        grid_thw=torch.tensor([[1, 2, 4]]),
    )
    answers = [answer([1, PAD, PAD], [n], two_tokens) for n in (4, 5)]
    (row,) = pack(answers, row_tokens=20, media_pad_id=PAD, **SETTINGS)
    assert row.prefix_of_document is None
    assert row.num_tokens == 8


def test_a_silent_segment_shares_nothing():
    silent = answer([1, 2, 3], [])
    (row,) = pack([silent, silent], row_tokens=20, media_pad_id=PAD, **SETTINGS)
    assert row.prefix_of_document is None
    assert not row.loss_mask.any()


def test_a_prompt_that_saves_too_little_is_not_shared():
    """Six of the prompt's tokens are saved, of 17 or of 20 in all."""
    for lengths, is_shared in (((1, 2), True), ((3, 3), False)):
        answers = [answer([1, 2, 3, 4, 5, 6, 7], [8] * length) for length in lengths]
        (row,) = pack(answers, row_tokens=40, media_pad_id=PAD, **SETTINGS)
        assert (row.prefix_of_document is not None) == is_shared
