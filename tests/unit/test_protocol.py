# SPDX-License-Identifier: Apache-2.0
"""Which problems a validation asks, how often, when; and that two questions never share a draw."""

import random
from collections import Counter

import pytest

from opd_ext.config import checks
from opd_ext.config.compose import compose_config
from opd_ext.errors import ConfigError
from opd_ext.protocol import MonitorConfig, Protocol, SetConfig, ValidationConfig

ROWS = [("math500", f"m{i}") for i in range(20)] + [("aime24", f"a{i}") for i in range(5)]
SETS = {"aime24": SetConfig(n=32, every=50), "math500": SetConfig(n=4)}


def protocol(monitor=None, sets=SETS, rows=ROWS, default=8):
    return Protocol(ValidationConfig(dict(sets), monitor), default, rows)


def by_set(plan, asked):
    return dict(Counter((plan.problems[i].source, n) for i, n in asked.items()))


def test_without_settings_all_problems_are_sampled_alike_at_every_validation():
    plan = protocol(sets={})
    assert plan.due(20, whole=False) == plan.due(0, whole=True) == {"math500", "aime24"}
    assert plan.asked(plan.sources) == dict.fromkeys(range(25), 8)
    assert plan.told() == "200 samples of 25 problems"
    assert not any(plan.monitors(i, 0) for i in range(25))


def test_a_set_has_its_own_number_of_samples_and_its_own_rhythm():
    plan = protocol()
    assert by_set(plan, plan.asked(plan.due(0, whole=True))) == {("math500", 4): 20, ("aime24", 32): 5}
    assert plan.due(20, whole=False) == {"math500"}  # no rhythm of its own: at every validation
    assert plan.due(50, whole=False) == plan.sources
    assert plan.due(70, whole=True) == plan.sources


def test_a_monitor_stands_for_the_sets_while_training():
    plan = protocol(MonitorConfig(problems=6, n=2))
    assert by_set(plan, plan.asked(plan.due(20, whole=False))) == {("math500", 2): 6, ("aime24", 2): 5}
    # A set with a rhythm of its own is validated in full besides, and is asked once.
    assert by_set(plan, plan.asked(plan.due(50, whole=False))) == {("math500", 2): 6, ("aime24", 32): 5}
    assert by_set(plan, plan.asked(plan.due(100, whole=True))) == {("math500", 4): 20, ("aime24", 32): 5}
    assert plan.told() == "240 samples of 25 problems before and after, 22 samples of the monitor meanwhile"


def test_the_monitor_is_part_of_the_full_protocol():
    """So its curve has a point at a full validation, from the same requests with the same seeds."""
    plan = protocol(MonitorConfig(problems=6, n=2))
    few, full = plan.asked(()), plan.asked(plan.sources)
    assert {(i, k) for i, n in few.items() for k in range(n)} == {
        (i, k) for i, n in full.items() for k in range(n) if plan.monitors(i, k)
    }


def test_the_monitor_looks_at_the_same_problems_whatever_the_order_of_rows():
    monitor = MonitorConfig(problems=6)
    shuffled = random.Random(0).sample(ROWS, len(ROWS))

    def chosen(rows):
        return {rows[i] for i in protocol(monitor, rows=rows).asked(())}

    assert chosen(ROWS) == chosen(shuffled)
    assert chosen(ROWS) != {*ROWS[:6], *ROWS[20:]}, "not the first ones, which may be the easy ones"


def test_equal_prompts_never_share_a_draw_even_if_two_sets_sample_them_differently():
    rows = [("a", "q"), ("b", "q"), ("a", "q"), ("b", "other"), ("b", "q")]
    plan = protocol(sets={"a": SetConfig(n=3), "b": SetConfig(n=2)}, rows=rows)
    draws = [(rows[i][1], p.first_draw + k) for i, p in enumerate(plan.problems) for k in range(p.n)]
    assert len(draws) == len(set(draws)) == 3 + 2 + 3 + 2 + 2
    assert sorted(draw for question, draw in draws if question == "q") == list(range(10))


def test_a_set_that_the_data_do_not_have_is_refused_and_null_takes_it_out():
    with pytest.raises(ConfigError) as refusal:
        protocol(sets={"aime_24": SetConfig(n=32)})
    assert "opd.validation.sets.aime_24" in str(refusal.value) and "aime24, math500" in str(refusal.value)
    assert "Did you mean aime24?" in str(refusal.value) and "\n" not in str(refusal.value)
    assert protocol(sets={"aime_24": None}).asked(()) == {}


V = "opd.validation"
TINY = ["method=crisp", "scale=cpu_tiny", "trainer.test_freq=20"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([f"{V}.sets.tinymath.n=0"], [f"{V}.sets.tinymath.n=0", "positive"]),
        ([f"{V}.sets.tinymath.every=30"], [f"{V}.sets.tinymath.every=30", "multiple of trainer.test_freq=20"]),
        ([f"{V}.sets.tinymath.often=3"], [f"{V}.sets.tinymath.often"]),
        ([f"{V}.sets.tinymath=3"], [f"{V}.sets.tinymath: "]),
        ([f"{V}.monitor={{problems: 0}}"], [f"{V}.monitor.problems=0", "positive"]),
        ([f"{V}.monitor={{n: 2}}"], [f"{V}.monitor.n=2", "val_kwargs.n=1", "first samples"]),
        ([f"{V}.monitor={{size: 2}}"], [f"{V}.monitor.size"]),
        (
            [f"{V}.monitor={{n: 3}}", f"{V}.sets.tinymath.n=2", "actor_rollout_ref.rollout.val_kwargs.n=4"],
            [f"{V}.monitor.n=3", f"{V}.sets.tinymath.n=2"],
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_one_sentence(words, says, presets_composed_once):
    with pytest.raises(ConfigError) as refusal:
        checks.check(compose_config([*TINY, *words]))
    assert all(each in str(refusal.value) for each in says), refusal.value
    assert "\n" not in str(refusal.value)
