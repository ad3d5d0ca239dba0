"""The page in a real browser: quick, usable by keyboard, and deaf to what it shows."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, sync_playwright
from torch.utils.tensorboard import SummaryWriter

from moonlit.report.page import newest, rollouts_of, write_page
from moonlit.rl.records import PICTURES, ROLLOUTS, read_records

CHROMIUM = shutil.which("chromium")
HACK = "document.title='hacked'"
SCRIPT = f"</script><script>{HACK}</script><img src=x onerror={HACK}>"
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c489"
    "0000000d49444154789c63f8cfc0f01f00050001ff56c7c2310000000049454e44ae426082"
)
QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


def turn(rollout: str, number: int, role: str, text: str, **more: Any) -> dict[str, Any]:
    blank = {"thinking": None, "calls": [], "pictures": [], "num_tokens": None}
    blank |= {"policy_versions": [], "began_s": None, "ended_s": None, "agent_name": None}
    return {"kind": "turn", "rollout": rollout, "turn": number, "role": role, "text": text} | {
        **blank, **more
    }  # fmt: skip


def end(rollout: str, **more: Any) -> dict[str, Any]:
    return {
        "kind": "end", "rollout": rollout, "parent": None, "called_by_turn": None, "step": 7,
        "agent": "policy", "domain": "perception", "environment": "counting", "truth": 4,
        "answer": "4", "reward": 1.0, "rewards": {"exact": 1.0}, "stop_reason": "answer",
        "error": None, "num_tokens": 3, "metrics": {"num_calls": 0},
    } | more  # fmt: skip


def rollout(number: int) -> list[dict[str, Any]]:
    """A rollout that asks two sub-agents; every tenth loses one."""
    name = f"7/{number}/0"
    reward = (number % 11) / 10
    lost = number % 10 == 0
    records = [
        turn(name, 0, "user", f"How many, question {number}? {SCRIPT}", pictures=["dot.png"]),
        turn(name, 1, "assistant", "", num_tokens=9, policy_versions=[3, 4], began_s=10.0,
             ended_s=11.0, calls=[{"name": "assign_task", "arguments": '{"agent": "a"}'}]),
        turn(name, 2, "tool", "the agent says four", began_s=11.0, ended_s=14.0),
        turn(name, 3, "assistant", str(number % 7), num_tokens=2, policy_versions=[4, 4],
             began_s=14.0, ended_s=14.5),
        end(name, reward=reward, answer=str(number % 7),
            stop_reason="budget" if number % 100 == 3 else "answer",
            environment="pointing" if number % 200 == 3 else "counting"),
    ]  # fmt: skip
    for child in range(2):
        inner = f"{name}.{child}"
        records += [
            turn(inner, 0, "user", f"look at {number}."),
            turn(inner, 1, "assistant", "four", began_s=11.0, ended_s=13.0 + child),
            end(inner, parent=name, called_by_turn=1, agent=f"agent {child}",
                error="crashed" if lost and child else None),
        ]  # fmt: skip
    return records


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    (folder / PICTURES).mkdir(parents=True)
    (folder / PICTURES / "dot.png").write_bytes(PIXEL)
    lines = [json.dumps(record) for number in range(1000) for record in rollout(number)]
    (folder / ROLLOUTS / "step_000007.jsonl").write_text("\n".join(lines) + "\n")
    with SummaryWriter(folder) as writer:  # a run that was stopped past step 3 ...
        for step in range(5):
            writer.add_scalar("rl/reward", 5.0 - step, step)
            writer.add_scalar("perf/rollout_s", 1.0, step)
    with SummaryWriter(folder) as writer:  # ... and goes on from there
        for step in range(3, 8):
            writer.add_scalar("rl/reward", step / 2 if step != 6 else float("nan"), step)
    return folder


@pytest.fixture(scope="module")
def page(run: Path) -> Iterator[Page]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    write_page(run, run / "report.html", max_rollouts=1000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = browser.new_context(offline=True).new_page()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto((run / "report.html").as_uri())
        page.wait_for_selector("#list li")
        page.asked = asked  # pyright: ignore[reportAttributeAccessIssue]
        yield page
        browser.close()


@pytest.mark.browser
def test_it_shows_a_thousand_rollouts_and_asks_the_network_for_nothing(page: Page):
    assert page.locator("#list li").count() == 1000
    assert page.locator("#count").inner_text() == "1000 of 1000 rollouts"
    assert all(url.startswith(("file:", "data:")) for url in page.asked)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.browser
def test_what_a_model_wrote_stays_text(page: Page):
    page.reload()

    assert page.title().startswith("moonlit: ")
    assert SCRIPT in page.locator("#detail .turn pre").first.inner_text()


@pytest.mark.browser
def test_a_thousand_rollouts_open(page: Page):
    """How fast is printed, not asserted: up to the end of the script that draws."""
    page.reload()
    assert page.locator("#list [role=option]").count() == 1000
    seconds = "performance.getEntriesByType('navigation')[0].loadEventEnd / 1000"
    print(f"opened within {page.evaluate(seconds):.2f} s")


@pytest.mark.browser
def test_it_opens_at_its_top_and_the_keyboard_brings_rows_into_view(page: Page, run: Path):
    """A tall page: the list lies below the first screen, as with a dozen curves."""
    tall = (run / "report.html").read_text().replace("</style>", "#curves{height:2000px}</style>")
    (run / "tall.html").write_text(tall)
    page.goto((run / "tall.html").as_uri())
    page.wait_for_selector("#list li", state="attached")
    assert page.evaluate("scrollY") == 0

    page.locator("#list").focus()
    for key in ("End", "Home", "ArrowDown"):
        page.keyboard.press(key)
        seen = """() => {
            const row = document.querySelector('#list [aria-selected=true]');
            const box = row.getBoundingClientRect();
            return row.checkVisibility() && box.top >= 0 && box.bottom <= innerHeight;
        }"""
        page.wait_for_function(seen, timeout=5000)
    assert page.evaluate("scrollY") > 0
    page.goto((run / "report.html").as_uri())


@pytest.mark.browser
def test_the_keyboard_is_enough(page: Page):
    page.reload()
    page.locator("#list").focus()

    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowUp")

    selected = page.locator('#list [aria-selected="true"]')
    assert selected.count() == 1
    assert "rollout 7/1/0" in selected.inner_text()
    assert page.locator("#list").get_attribute("aria-activedescendant") == selected.get_attribute(
        "id"
    )
    assert "rollout 7/1/0" in page.locator("#detail h3").inner_text()
    page.keyboard.press("End")
    assert "rollout 7/999/0" in page.locator("#detail h3").inner_text()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "detail"


@pytest.mark.browser
def test_everything_that_can_be_used_has_a_name(page: Page):
    nameless = page.evaluate("""() => [...document.querySelectorAll(
        'input, select, [role=listbox], [role=img], article, img')].filter((node) =>
        !(node.labels?.length || node.getAttribute('aria-label') || node.alt)).length""")

    assert nameless == 0
    assert page.locator("#detail [role=img]").count() == 1
    timeline = page.locator(".timeline").get_attribute("aria-label") or ""
    assert "3 agents over 4.500 seconds" in timeline


@pytest.mark.browser
def test_filters_by_reward_failure_and_words(page: Page):
    page.reload()

    page.fill("#min-reward", "0.95")
    assert page.locator("#list li").count() == 90  # number % 11 == 10
    page.check("#failed")
    assert page.locator("#list li").count() == 9
    page.fill("#min-reward", "")
    page.fill("#words", "question 990?")
    assert page.locator("#list li").count() == 1
    page.fill("#words", "no such words")
    assert page.locator("#detail").inner_text() == "No rollout fits."


@pytest.mark.browser
def test_filters_by_how_it_ended_where_it_was_and_what_sub_agents_said(page: Page):
    page.reload()

    page.fill("#max-reward", "0")
    assert page.locator("#list li").count() == 91  # number % 11 == 0
    page.fill("#max-reward", "")
    page.select_option("#stop-reason", "budget")
    assert page.locator("#list li").count() == 10
    page.select_option("#environment", "pointing")
    assert page.locator("#list li").count() == 5
    page.fill("#words", "Look at 203.")
    assert page.locator("#list li").count() == 1


@pytest.mark.browser
def test_a_curve_says_where_it_begins_ends_and_has_been(page: Page):
    """The resumed run's points stand in for the first one's; the one that is no number is not."""
    told = page.locator("#curves figcaption").all_inner_texts()
    assert told == [
        "rl/reward 5 to 3.500 (1.500 to 5), steps 0 to 7",
        "perf/rollout_s 1 to 1 (1 to 1), steps 0 to 4",
    ]


@pytest.mark.browser
def test_a_rollouts_facts_stand_beside_their_names(page: Page):
    page.reload()
    page.fill("#words", "question 103?")
    facts = page.evaluate("""() => [...document.querySelectorAll('#detail > dl dt')].map(
        (name) => [name.textContent, name.nextSibling.textContent])""")
    assert facts == [
        ["reward", "0.4000"], ["exact", "1"], ["ended by", "budget"], ["truth", "4"],
        ["sampled tokens", "3"], ["num_calls", "0"],
    ]  # fmt: skip


@pytest.mark.browser
def test_sub_agents_stand_below_the_turn_that_called_them(page: Page):
    page.reload()

    children = page.locator("#detail li:has(> article[aria-label='Turn 1, assistant']) > details")
    assert children.count() == 2
    assert "crashed" in children.nth(1).inner_text()
    assert "reward" not in children.first.inner_text()
    assert not children.first.evaluate("node => node.open")
    page.locator(".timeline rect").nth(3).dispatch_event("click")
    assert children.first.evaluate("node => node.open")


def test_pictures_of_rollouts_that_are_left_out_are_left_out_too(run: Path, tmp_path: Path):
    summary = write_page(run, tmp_path / "small.html", max_rollouts=2)

    page = (tmp_path / "small.html").read_text()
    assert "2 rollouts (the newest; 998 older ones are left out" in summary
    assert page.count('"kind": "end"') == 6
    assert "question 998" in page
    assert "question 997" not in page


def test_no_rollouts_may_be_asked_for(run: Path):
    rollouts, num_left_out = newest(rollouts_of(read_records(run)), 0)
    assert (rollouts, num_left_out) == ([], 1000)


def test_the_newest_come_with_all_that_is_below_them():
    parents = {"a": None, "a.0": "a", "b": None, "b.0": "b", "b.0.0": "b.0"}
    rollouts = [{"name": name, "parent": parent} for name, parent in parents.items()]
    shown, num_left_out = newest(rollouts, 1)
    assert ([one["name"] for one in shown], num_left_out) == (["b", "b.0", "b.0.0"], 1)


def test_a_run_without_anything_is_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="neither a curve nor a rollout"):
        write_page(tmp_path, tmp_path / "report.html", max_rollouts=10)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        write_page(tmp_path / "gone", tmp_path / "report.html", max_rollouts=10)


def test_a_last_line_that_was_cut_off_is_left_out_and_told(tmp_path: Path):
    """A killed run's: of its last rollout the sub-agents are whole, the end is not."""
    lines = [json.dumps(record, ensure_ascii=False) for n in range(2) for record in rollout(n)]
    root = lines.pop(-7)  # its end comes after its sub-agents', as it is written
    text = "\n".join([*lines, root.replace("exact", "\u00e9")]).encode()
    (tmp_path / PICTURES).mkdir(parents=True)
    (tmp_path / PICTURES / "dot.png").write_bytes(PIXEL)
    path = tmp_path / ROLLOUTS / "step_000007.jsonl"
    path.write_bytes(text[: text.rindex("\u00e9".encode()) + 1])

    told = write_page(tmp_path, tmp_path / "report.html", max_rollouts=9)

    assert told.endswith("1 rollouts; left out, as their writing was cut off: "
                         f"step_000007.jsonl, line {len(lines) + 1}")  # fmt: skip
    page = (tmp_path / "report.html").read_text()
    assert told in page
    assert page.count('"kind": "end"') == 3
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(ValueError, match=r"step_000007\.jsonl, line 22: no record"):
        write_page(tmp_path, tmp_path / "report.html", max_rollouts=9)


@pytest.mark.parametrize("most", [0, -3])
def test_a_page_without_a_rollout_to_show_is_refused(run: Path, most: int, tmp_path: Path):
    with pytest.raises(ValueError, match=f"max_rollouts={most}: want a whole number, at least 1"):
        write_page(run, tmp_path / "report.html", max_rollouts=most)


def test_a_broken_line_is_named(run: Path, tmp_path: Path):
    (tmp_path / ROLLOUTS).mkdir(parents=True)
    (tmp_path / ROLLOUTS / "step_000001.jsonl").write_text('{"kind": "end"\n')

    with pytest.raises(ValueError, match=r"step_000001\.jsonl, line 1"):
        write_page(tmp_path, tmp_path / "report.html", max_rollouts=10)
