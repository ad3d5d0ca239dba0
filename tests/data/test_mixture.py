"""Nested mixtures and stages: shares as declared, or refused with the numbers."""

import re
from typing import Any

import numpy as np
import pytest
from test_plan import SIZES, synthetic

from data_modules.components.document import INDEX_DTYPE
from data_modules.components.mixture import Geometry, Stage, flat
from data_modules.components.plan import Plan, plan_stages
from data_modules.components.plan_checks import (
    check_contract,
    check_feasible,
    epochs_needed,
    stages_fingerprint,
)
from data_modules.components.plan_report import imbalance, report
from data_modules.corpora import longest_run, scheduled

SHORT, LONG = Geometry(row_tokens=97, rows_per_step=4), Geometry(row_tokens=388, rows_per_step=2)


def stage(first_step: int = 0, share: float = 0.2, **changes: Any) -> Stage:
    settings: dict[str, Any] = {
        "first_step": first_step,
        "text": {"prose": 0.7, "code": 0.3},
        "vision": {"scenes": 0.6, "pages": 0.4},
        "vision_share": share,
        "geometry": SHORT,
    }
    return Stage(**settings | changes)


def planned(stages: list[Stage], num_steps: int = 30, **changes: Any) -> Plan:
    index, chunk_starts = synthetic()
    return plan_stages(index, chunk_starts, stages, seed=1, num_steps=num_steps, **changes)


def test_nested_shares_multiply_and_sum_to_one():
    nested = {
        "web": {"share": 3, "of": {"english": {"share": 2, "of": {"a": 1, "b": 3}}, "chinese": 2}},
        "code": 1,
        "none": 0,
    }
    shares = flat(nested, "text_mixture")
    assert shares == pytest.approx({"a": 3 / 32, "b": 9 / 32, "chinese": 3 / 8, "code": 1 / 4})
    assert list(shares) == ["a", "b", "chinese", "code"]
    assert flat({}, "vision_mixture") == {}


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ({"a": -1}, r"m\.a=-1"),
        ({"a": "much"}, r"m\.a='much'"),
        ({"a": True}, r"m\.a=True"),
        ({"a": 0, "b": 0}, "a share above 0"),
        ({"a": {"share": 1}}, r"m\.a=\{'share': 1\}: want a share, or share and of"),
        ({"a": {"share": 1, "of": {"b": -2}}}, r"m\.a\.of\.b=-2"),
        ({"a": 1, "g": {"share": 1, "of": {"a": 1}}}, "names the source 'a' twice"),
    ],
)
def test_a_mixture_that_is_none_is_refused_by_its_key(mixture: dict, message: str):
    with pytest.raises(ValueError, match=message):
        flat(mixture, "m")


def test_nested_shares_are_realised():
    index, _ = synthetic()
    text = flat({"books": {"share": 0.4, "of": {"prose": 1}}, "code": 0.6}, "text")
    counts = report(planned([stage(text=text)], num_steps=60), index)
    tokens = counts.tokens_of_source
    # Error feedback: a source is never further from its share than one document.
    assert abs(tokens["prose"] - 0.4 * (tokens["prose"] + tokens["code"])) <= 260


def test_stages_change_share_length_and_mixture_at_their_step():
    index, _ = synthetic()
    stages = scheduled(
        stage(share=0.0),
        {
            7: {"vision_share": 0.2, "vision_mixture": {"pages": 1}},
            19: {"row_tokens": 388, "rows_per_step": 2, "text_mixture": {"code": 1}},
        },
    )
    plan = planned(stages)
    counts = report(plan, index)

    assert [plan.num_rows(step) for step in (0, 18, 19, 29)] == [4, 4, 2, 2]
    assert counts.tokens_of_step.tolist() == [388] * 19 + [776] * 11
    assert not counts.vision_tokens_of_step[:7].any()
    wanted = np.array([0.2 * 388] * 12 + [0.2 * 776] * 11)
    missed = np.cumsum(wanted - counts.vision_tokens_of_step[7:])
    # Half of the smallest document in sight, where few are left of an epoch the largest one.
    assert np.abs(missed).max() <= max(SIZES) / 2 + 1e-6
    assert counts.tokens_of_source["scenes"] == 0
    begun = plan.pieces[plan.row_starts[plan.step_starts[19]] :]
    texts = begun[(begun["start"] == 0) & (begun["source"] < 2)]
    assert {plan.sources[number] for number in texts["source"]} == {"code"}


def test_a_longer_schedule_leaves_the_steps_before_it_alone():
    one = planned([stage()], num_steps=12)
    two = planned([stage(), stage(12, share=0.05, geometry=LONG)], num_steps=20)
    np.testing.assert_array_equal(one.pieces, two.pieces[: len(one.pieces)])
    np.testing.assert_array_equal(one.step_starts, two.step_starts[:13])


def test_no_document_comes_back_early_where_another_stage_begins():
    index, _ = synthetic()
    plan = planned([stage(share=0.1), stage(9, share=0.15), stage(20, geometry=LONG)], 45)
    for number, name in enumerate(plan.sources):
        begun = plan.pieces[(plan.pieces["source"] == number) & (plan.pieces["start"] == 0)]
        times = np.bincount(begun["document"], minlength=len(index[name]))
        assert times.max() - times.min() <= 1


def test_one_source_gives_text_and_vision_each_of_its_own_documents():
    index, _ = synthetic()
    index = {"web": np.concatenate([index["prose"], index["scenes"], index["code"]])}
    starts = {"web": np.array([0, 9, 30, 50, len(index["web"])])}
    only = stage(text={"web": 1.0}, vision={"web": 1.0})
    plan = plan_stages(index, starts, [only], seed=0, num_steps=60)

    assert plan.sources == ["web"]
    has_media = index["web"]["num_vision_tokens"][plan.pieces["document"]] > 0
    lengths = plan.pieces["stop"] - plan.pieces["start"]
    whole = lengths == index["web"]["num_tokens"][plan.pieces["document"]]
    assert whole[has_media].all()
    assert not whole[~has_media].all()
    counts = report(plan, index)
    np.testing.assert_allclose(counts.vision_share_of_step, 0.2, atol=3 / 388)
    begun = plan.pieces[plan.pieces["start"] == 0]["document"]
    assert len(np.unique(begun)) == len(index["web"])


def test_a_source_that_would_be_read_too_often_is_refused_with_the_numbers():
    index, _ = synthetic()
    counts = report(planned([stage()], num_steps=40), index)
    needed = epochs_needed(index, [stage()], 40)
    for kind in needed.values():
        for name, epochs in kind.items():
            assert counts.epochs_of_source[name] == pytest.approx(epochs, abs=0.2)

    epochs = needed["text"]["code"]
    planned([stage()], num_steps=40, max_epochs={"code": epochs + 0.01})
    said = rf"40 steps would read the text of source 'code' {epochs:.2f} times, max_epochs.code=0.4"
    with pytest.raises(ValueError, match=re.escape(said)):
        planned([stage()], num_steps=40, max_epochs={"code": 0.4})
    with pytest.raises(ValueError, match="max_epochs names 'film'"):
        planned([stage()], max_epochs={"film": 1.0})
    longest = longest_run(
        index, [stage()], {"code": 3.0, "prose": 99.0, "scenes": 99.0, "pages": 99.0}
    )
    assert epochs_needed(index, [stage()], longest)["text"]["code"] <= 3
    assert epochs_needed(index, [stage()], longest + 1)["text"]["code"] > 3


def documents(*tokens_and_vision: tuple[int, int]) -> np.ndarray:
    """An index of documents of so many tokens and vision tokens."""
    rows = np.zeros(len(tokens_and_vision), INDEX_DTYPE)
    rows["num_tokens"], rows["num_vision_tokens"] = zip(*tokens_and_vision, strict=True)
    return rows


def test_each_kind_of_a_source_has_epochs_of_its_own_documents():
    """Catches: text read over all of a source's tokens, its documents with media included."""
    index = {"web": documents((10, 0), (10, 0), (10, 0), (20, 10))}
    only = stage(
        text={"web": 1.0}, vision={"web": 1.0}, share=0.25,
        geometry=Geometry(row_tokens=40, rows_per_step=1),
    )  # fmt: skip

    # 120 tokens: 30 of vision in 60 of their documents, and 60 of text of the 30 there are.
    assert epochs_needed(index, [only], 3) == {"text": {"web": 2.0}, "vision": {"web": 3.0}}


def test_the_largest_share_counts_the_tokens_around_every_vision_token():
    """Catches: a mean of the sources' densities, 3/8, where two and four tokens make it 2/6."""
    index = {"words": documents((9, 0)), "a": documents((4, 2)), "b": documents((8, 2))}
    settings = {"text": {"words": 1.0}, "vision": {"a": 0.5, "b": 0.5}}

    check_feasible(index, [stage(share=0.33, **settings)])
    with pytest.raises(ValueError, match=r"asks for 35\.0% vision tokens .* only 33\.3%"):
        check_feasible(index, [stage(share=0.35, **settings)])


def test_a_step_that_misses_its_share_is_refused_with_the_numbers():
    tokens = np.full(200, 1000)
    good = np.full(200, 100)
    check_contract(good, tokens, np.full(200, 0.1))
    bad = good.copy()
    bad[7] = 111
    with pytest.raises(ValueError, match=r"step 7 would hold 11\.10% .* vision_share is 10\.00%"):
        check_contract(bad, tokens, np.full(200, 0.1))
    with pytest.raises(ValueError, match=r"after 101 steps .* 0\.100% of all tokens away"):
        check_contract(good + 1, tokens, np.full(200, 0.1))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([stage(3)], "begin at the steps [3]"),
        ([stage(), stage(9), stage(9)], "begin at the steps [0, 9, 9]"),
        ([stage(), stage(5, share=0.45)], "45.0% vision tokens in each step from step 5 on"),
        ([stage(), stage(5, geometry=Geometry(row_tokens=20, rows_per_step=9))], "row_tokens=20"),
    ],
)
def test_stages_that_cannot_be_are_refused(stages: list[Stage], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        planned(stages)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({0: {"vision_share": 0.1}}, "schedule.0="),
        ({5: {"seed": 1}}, "schedule.5="),
        ({5: {"vision_share": 1.5}}, "vision_share=1.5"),
        ({5: {"text_mixture": {"prose": -1}}}, "schedule.5.text_mixture.prose=-1"),
    ],
)
def test_schedules_that_make_no_sense_are_refused_by_key(schedule: dict, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        scheduled(stage(), schedule)


def test_the_fingerprint_names_the_source_and_the_stage_that_changed():
    def of(stages: list[Stage], flip: str | None = None, **most: float) -> dict[str, str]:
        index, _ = synthetic()
        if flip:
            index[flip]["crc32"][2] ^= 1
        return stages_fingerprint(index, stages, most, seed=1)

    def changed(one: dict[str, str], two: dict[str, str]) -> list[str]:
        return sorted(key for key in one if one[key] != two.get(key))

    before = [stage(), stage(9, share=0.1)]
    assert changed(of(before), of(before, flip="pages")) == ["corpus.pages"]
    assert changed(of(before), of(before, code=2.0)) == ["max_epochs"]
    after = [stage(), stage(9, share=0.12)]
    assert changed(of(before), of(after)) == ["vision_share from step 9"]


def test_the_report_counts_lengths_and_the_balance_of_ranks():
    index, _ = synthetic()
    plan = planned([stage()])
    counts = report(plan, index)
    assert set(counts.work_max_over_mean) == {2, 4}
    text, patches = counts.work_max_over_mean[2]
    assert 1 <= text < 1.5
    # Of two ranks the busier one has less above the mean than of four.
    assert 1 <= patches <= counts.work_max_over_mean[4][1] < 1.08
    assert counts.lengths_of_source["scenes"][2] <= 2 * max(SIZES) + 11
    columns = [str(column.header) for column in counts.tables()[0].columns]
    assert columns[:2] == ["source", "tokens"]


def test_the_balance_is_that_of_the_rows_a_rank_is_given():
    """Catches: ranks that are taken to own neighbouring rows."""
    plan = planned([stage()], num_steps=1)
    work = np.array([4.0, 0.0, 4.0, 0.0])
    assert imbalance(work, plan, 2) == 2.0  # rank 0 has rows 0 and 2
    assert imbalance(work[[0, 1, 3, 2]], plan, 2) == 1.0
