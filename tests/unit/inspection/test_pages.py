# SPDX-License-Identifier: Apache-2.0
"""The folder that a browser opens: nothing of a rollout is ever markup, and ten thousand rollouts are paged."""

import asyncio
import json

import numpy as np
import pytest

from opd_ext.inspection import pages
from opd_ext.inspection.pages import Pages, as_script, pack, whole_numbers
from tests.unit.inspection import browser
from tests.unit.inspection.folder import content, unpacked, whole

HOSTILE = [
    "</script><script>window.hacked=1</script>",
    "<img src=x onerror=window.hacked=1>",
    "a\u2028b\u2029c",
    "<|im_end|>",
    "\u202egnp.exe\u202c",
    "\x00\x1b[31m\ufeff",
    "`${window.hacked=1}`\\\"'",
    "\ud800",
]
WORDS = dict(enumerate([*HOSTILE, "\n", " plain"]))
ABOUT = {
    "run": HOSTILE[0], "step": 3, "of": "step 4", "absent": [["grpo", HOSTILE[1]]],
    "methods": [
        {"name": "crisp", "places": HOSTILE[1], "notes": [HOSTILE[0]]},
        {"name": "opd", "places": "p", "notes": []},
        {"name": "trace", "places": "p", "notes": [], "distils": True, "rewarded": True},
    ],
    "alarms": [
        {"step": 4, "alarm": "entropy", "why": HOSTILE[0], "done": "warn", "undone": False},
        {"step": 4, "alarm": "length", "why": HOSTILE[1], "done": "rollback to step 2", "undone": True},
    ],
}  # fmt: skip
chromium = pytest.mark.skipif(browser.PROGRAM is None, reason="no Chromium here (Debian: apt-get install chromium)")


def rewarded(rng, length):
    """A method with a policy term: the first half of the tokens has an advantage, a quarter of all is clipped."""
    place = np.arange(length)
    found = {"reward": np.where(place < length // 2, 1.0, 0.0), "ratio": np.full(length, 1.5)}
    return found | {"gate": np.where(place < length // 4, 0.0, 1.5), "policy": rng.normal(size=length)}


def numbers(rng, length, student=False):
    found = {name: rng.normal(size=length) for name in ("log_prob", "entropy")}
    found |= {"top": rng.integers(0, len(WORDS), (length, 5)), "top_p": rng.random((length, 5))}
    if not student:
        names = ("push", "per_token", "divergence", "weight", "advantage", "clipped", "overlap")
        found |= {name: rng.normal(size=length) for name in names}
        found["distilled"] = np.ones(length, dtype=bool)
    return found


def made(folder, lengths):
    """A map of as many rollouts as there are ``lengths``; every fifth has no teacher with ``opd`` and ``trace``."""
    rng = np.random.default_rng(0)
    writer, kept = Pages(folder, ["crisp", "opd", "trace"], ["trace"]), []
    for i, length in enumerate(lengths):
        row = {
            "uid": f"t{i}", "sample": 0, "index": i, "step": 4, "data_source": HOSTILE[1], "score": i % 2, "acc": i % 2,
            "output": f"{HOSTILE[i % len(HOSTILE)]} needle{i}", "ground_truth": HOSTILE[0], "feedback": HOSTILE[1],
            "extra_info": {"question": f"{HOSTILE[i % len(HOSTILE)]} {i}"}, "truncated": False,
            "responses": [int(t) for t in rng.integers(0, len(WORDS), length)], "loss_mask": [1] * length,
            "prompt_text": HOSTILE[0], "teacher_prompts": {"crisp": HOSTILE[1], "opd": HOSTILE[2]},
        }  # fmt: skip
        signals = {"crisp": numbers(rng, length), "opd": numbers(rng, length) if i % 5 else None}
        signals["trace"] = numbers(rng, length) | rewarded(rng, length) | {"taught": np.array(i % 5 > 0)}
        student = numbers(rng, length, student=True)
        writer.add(row, student, signals)
        kept.append((row, student, signals))
    writer.finish(ABOUT, WORDS, HOSTILE[0])
    return kept


def test_a_script_is_ascii_without_a_tag():
    text = as_script({HOSTILE[0]: HOSTILE})
    assert text.isascii() and not set("<>&") & set(text)
    assert json.loads(text) == {HOSTILE[0]: HOSTILE}


def test_numbers_come_back_within_a_65535th_of_their_range():
    values = np.random.default_rng(1).normal(size=1000) * 7
    assert np.abs(unpacked(pack(values)) - values).max() <= np.ptp(values) / 131070 * 1.001
    assert unpacked(pack(np.array([3.0, 3.0]))).tolist() == [3.0, 3.0] and len(unpacked(pack(np.zeros(0)))) == 0
    assert whole(whole_numbers([0, 70000])).tolist() == [0, 70000]


def test_every_rollout_is_on_its_page_with_its_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "PAGE_TOKENS", 100)
    kept = made(tmp_path, [30, 0, 60, 200, 5, 90, 20])
    index = content(tmp_path, "index")
    assert index["starts"] == [0, 3, 4, 6] and index["rollouts"] == 7
    for page, (start, end) in enumerate(zip(index["starts"], [*index["starts"][1:], 7], strict=True)):
        part = kept[start:end]
        shown, crisp, opd = (content(tmp_path, f"{name}_{page}") for name in ("rollouts", "crisp", "opd"))
        assert whole(shown["ids"]).tolist() == [token for row, _, _ in part for token in row["responses"]]
        pushes = np.concatenate([signals["crisp"]["push"] for _, _, signals in part])
        assert np.abs(unpacked(crisp["push"]) - pushes).max() < 1e-3
        assert opd["taught"] == opd["there"] == [int(signals["opd"] is not None) for _, _, signals in part]
    surprises = [-student["log_prob"].mean() if len(row["responses"]) else 0 for row, student, _ in kept]
    assert np.abs(unpacked(index["columns"]["surprise"]) - surprises).max() < 1e-3


def test_of_a_policy_term_is_counted_what_has_an_advantage_and_what_is_clipped_of_it(tmp_path):
    lengths = [40, 80]
    made(tmp_path, lengths)
    (stats,) = [said["stats"] for said in content(tmp_path, "index")["methods"] if said["name"] == "trace"]
    assert stats["rewarded"] == 0.5 and stats["held"] == 0.5 and stats["taught"] == 0.5
    page = content(tmp_path, "trace_0")
    assert page["there"] == [1, 1] and page["taught"] == [0, 1]
    assert "reward" not in content(tmp_path, "crisp_0")


@chromium
def test_policy_terms_and_alarms_are_seen_and_switched_between(tmp_path):
    made(tmp_path, [12] * 8)

    async def look():
        async with browser.browser() as tab:
            await tab.open(tmp_path / "index.html", "typeof current !== 'undefined' && current !== null")
            painted = "[...document.querySelectorAll('#tokens span')].filter((s) => s.style.background).length"
            button = "document.querySelector('#signals [data-signal={}]').click()".format
            await tab.press("3")
            for signal in ("policy", "reward", "gate"):
                await tab.ask(button(signal))
                assert await tab.ask(painted) == 12
            await tab.ask(button("divergence"))  # the first has no teacher
            assert await tab.ask(painted) == 0 and "no teacher for this rollout" in await tab.ask(
                "$('tokens').innerText"
            )
            await tab.ask("hold(0)")
            told = await tab.ask("$('tip').innerText")
            assert "0.000 clipped" in told and "teacher log-prob" not in told
            assert "of these clipped or capped" in await tab.ask("$('numbers').innerText")
            await tab.press("1")
            await tab.ask(button("gate"))
            assert "crisp has no RL term" in await tab.ask("$('tokens').innerText")
            alarms = await tab.ask("$('alarms').innerText")
            assert HOSTILE[0] in alarms and "rollback to step 2" in alarms and "entropy" in alarms
            buttons = "[...document.querySelectorAll('#alarmed button')]"
            assert await tab.ask(f"{buttons}.map((each) => each.disabled)") == [False, True]
            await tab.press("ArrowRight")
            await tab.until("state.at === 1")
            await tab.ask(f"{buttons}[0].click()")
            await tab.until("state.at === 0")
            assert "alarm at step 4: entropy, warn" in await tab.ask("$('facts').innerText")
            await tab.ask("$('filter').value = 'alarm'; select()")
            await tab.until("state.shown.length === 8")
            return tab.errors

    assert asyncio.run(look()) == []


@chromium
def test_what_stands_in_rollouts_is_text_and_nothing_else(tmp_path):
    made(tmp_path, [12] * 40)

    async def look():
        async with browser.browser() as tab:
            await tab.open(tmp_path / "index.html", "typeof current !== 'undefined' && current !== null")
            for _ in range(39):
                place = await tab.ask("state.at")
                await tab.press("ArrowRight")
                await tab.until(f"state.at === {place + 1} && current.row.uid === 't{place + 1}'")
                await tab.ask("hold(3)")
            assert await tab.ask("typeof window.hacked") == "undefined"
            assert await tab.ask("document.querySelectorAll('img, main script').length") == 0
            text = await tab.ask("document.body.innerText")
            assert HOSTILE[0] in text and "⟨U+202E⟩" in text and "\u202e" not in text and "\x1b" not in text
            return tab.errors

    assert asyncio.run(look()) == []


@chromium
def test_one_finds_filters_sorts_and_switches_by_keyboard(tmp_path):
    kept = made(tmp_path, [int(n) for n in np.random.default_rng(2).integers(1, 60, 300)])

    async def look():
        async with browser.browser() as tab:
            await tab.open(tmp_path / "index.html", "typeof current !== 'undefined' && current !== null")
            colours = "[...document.querySelectorAll('#tokens span')].map((s) => s.style.background).join()"
            first = await tab.ask(colours)
            await tab.press("2")
            assert await tab.ask("document.querySelector('#methods .on').firstChild.data") == "opd"
            assert "no teacher" in await tab.ask("$('tokens').textContent")  # the first has none
            await tab.press("1")
            await tab.press("]")
            assert await tab.ask("state.signal") == "loss" and await tab.ask(colours) != first
            await tab.press("/")
            for letter in "needle123":
                await tab.press(letter)
            await tab.until("state.shown.length === 1")
            await tab.until("current?.row.uid === 't123'")
            await tab.press("Escape")
            await tab.ask("$('search').value = ''; $('filter').value = 'untaught'; state.method = 1; select()")
            await tab.until("state.shown.length === 60")
            await tab.ask("$('filter').value = 'all'; $('sort').value = 'surprise'; select()")
            await tab.until("state.shown.length === 300")
            surprise = [-student["log_prob"].mean() for _, student, _ in kept]
            assert await tab.ask("state.shown[0]") == int(np.argmax(surprise))
            await tab.press("ArrowDown")
            await tab.until("state.at === 1")
            before = await tab.ask("document.documentElement.dataset.theme")
            await tab.press("d")
            assert await tab.ask("document.documentElement.dataset.theme") != before
            rows = await tab.ask("document.querySelectorAll('.item').length")
            assert 0 < rows < 60  # of 300: the others are not in the document
            return tab.errors

    assert asyncio.run(look()) == []


@chromium
def test_a_map_without_one_of_its_files_says_so(tmp_path):
    made(tmp_path, [12] * 3)
    (tmp_path / "data" / "opd_0.js").unlink()

    async def look():
        async with browser.browser() as tab:
            await tab.open(tmp_path / "index.html", "document.body?.innerText.includes('opd_0.js is missing')")

    asyncio.run(look())
