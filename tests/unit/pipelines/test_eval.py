# SPDX-License-Identifier: Apache-2.0
"""What `opd eval` makes of what is typed, and of the grades."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import yaml

from opd_ext.data.catalogue import SETS
from opd_ext.errors import ConfigError
from opd_ext.estimators import majority
from opd_ext.pipelines.eval.command import _run_defaults
from opd_ext.pipelines.eval.config import EvalConfig
from opd_ext.pipelines.eval.graders import with_own
from opd_ext.pipelines.eval.models import Evaluated, evaluated
from opd_ext.pipelines.eval.votes import voted
from opd_ext.pipelines.graded import check_rows
from opd_ext.pipelines.problems import _Grading, read_problems
from opd_ext.pipelines.settings import CONFIG_DIR, PromptsConfig, RewardConfig, compose_pipeline
from opd_ext.report.bootstrap import holm, sign_flip_p
from opd_ext.report.evaluation import AVERAGE, accuracies, comparison, sections


def settings(*overrides: str) -> EvalConfig:
    return compose_pipeline("eval", EvalConfig, ["model=m", "sets=[val]", *overrides])


def grades(acc: list[list[float]], votes: list[list[str]] | None = None, **more) -> pd.DataFrame:
    """One row per sample; ``acc`` by problem."""
    rows = [
        {"uid": f"{i:06d}", "sample": j, "acc": value, "tokens": 10 * (i + 1), "truncated": False}
        | {"vote": votes[i][j] if votes else "", "data_source": "s", "difficulty": None, **more}
        for i, row in enumerate(acc)
        for j, value in enumerate(row)
    ]
    return pd.DataFrame(rows)


# ---------------------------------------------------------------------- what is typed


def test_a_scale_says_how_to_sample_and_an_evaluation_has_no_key_of_a_training():
    assert settings("scale=node_8xh200").vllm.replicas == 8
    with pytest.raises(ConfigError, match="train"):
        settings("train.lr=1e-5")


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIG_DIR / "protocol").glob("*.yaml")))
def test_a_protocol_samples_as_the_document_says(name):
    config = settings(f"protocol={name}", "scale=node_8xh200")
    page = (CONFIG_DIR.parents[2] / "docs" / "evaluation.md").read_text()
    (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}`")]
    _, _, n, decoding, tokens, _ = (cell.strip() for cell in row.split("|"))
    asked = config.sampling
    top_k = "all" if asked.top_k < 0 else str(asked.top_k)
    assert n.split(",")[0].split(";")[0] == str(asked.n) and tokens == f"{asked.max_tokens:,}"
    assert decoding.startswith(f"{asked.temperature}, {asked.top_p}, {top_k}")
    assert ("thinking" in n) == bool(config.template.get("enable_thinking"))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sets=[]", "must name what is evaluated on"),
        ("sets=[a/val.parquet,b/val.parquet]", "sets has val twice"),
        ("sampling.n=0", "sampling.n=0"),
        ("sampling.max_tokens=0", "sampling.max_tokens=0"),
        ("samples.val=0", "samples.val=0"),
        ("count=0", "count=0"),
        ("sampling.top_p=0", "sampling.top_p=0"),
        ("against=m", "is the model itself"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_sentence(override, said):
    with pytest.raises(ConfigError, match=said) as refused:
        settings(override)
    assert "\n" not in str(refused.value)


def test_a_set_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    (tmp_path / "aime25.parquet").write_bytes(b"")
    config = settings(f"data_dir={tmp_path}", "sets=[aime24]")
    with pytest.raises(
        ConfigError, match=r"nothing can be evaluated on aime24.*There are aime25. Did you mean aime25\?"
    ):
        config.check_files()


def test_sets_of_opd_data_are_found_by_name_and_bear_it(tmp_path):
    for name in ("math500", "aime24-boxed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.parquet").write_bytes(b"")
    config = settings(f"data_dir={tmp_path}", f"sets=[math500,{tmp_path}/aime24-boxed/test.parquet]")
    assert list(config.files) == ["math500", "aime24-boxed"]
    config.check_files()
    with pytest.raises(ConfigError, match=r"on hmmt25: make it \(`opd data hmmt25`\).*There are aime24-boxed, math500"):
        settings(f"data_dir={tmp_path}", "sets=[hmmt25]").check_files()


@pytest.mark.parametrize(
    ("name", "split"), [("livecodebench", "v6"), ("sciknoweval", "chemistry_test"), ("dapo_math_17k", "val")]
)
def test_a_set_without_a_split_called_test_is_found_by_its_name_too(name, split, tmp_path):
    """As published: SSD and SDPO report v6 and chemistry, DAPO's questions have a held-out fifth."""
    for each in SETS[name].splits:
        (tmp_path / name / f"{each.name}.parquet").parent.mkdir(exist_ok=True)
        (tmp_path / name / f"{each.name}.parquet").write_bytes(b"")
    config = settings(f"data_dir={tmp_path}", f"sets=[{name},{name}/{SETS[name].splits[0].name}]")
    config.check_files()
    assert list(config.files) == [name, SETS[name].splits[0].name]
    assert config.files[name] == tmp_path / name / f"{split}.parquet"


def test_every_set_by_its_name_has_one_split_that_is_made_for_evaluation_or_none():
    for published in SETS.values():
        trained = all(split.asks for split in published.splits)
        assert published.evaluated in [split.name for split in published.splits] or trained or not published.grader


def test_a_set_to_train_on_and_a_split_that_is_not_made_are_refused_with_what_to_say(tmp_path):
    (tmp_path / "openthoughts").mkdir()
    (tmp_path / "openthoughts" / "train.parquet").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"openthoughts has no split .*name one, --on openthoughts/train\."):
        settings(f"data_dir={tmp_path}", "sets=[openthoughts]").check_files()
    with pytest.raises(ConfigError, match=r"`opd data sciknoweval --split physics_test`.*There are openthoughts/train"):
        settings(f"data_dir={tmp_path}", "sets=[sciknoweval/physics_test]").check_files()


def test_the_grader_follows_the_data_source_and_a_path_stands_above():
    config = settings()
    assert config.grader_of("gym/gcd").path == "pkg://opd_ext.rewards.gym"
    assert config.grader_of("math500").path == config.grader_of("aime25").path == "pkg://opd_ext.rewards.math_dual"
    assert settings("reward.path=mine.py").grader_of("gym/gcd").path == "mine.py"
    with pytest.raises(ConfigError, match="Nothing says how poems is graded"):
        config.grader_of("poems")


@pytest.mark.parametrize("value", ["nothing", "/not/there", "./x/y"])
def test_a_model_that_is_none_is_refused(value):
    with pytest.raises(ConfigError, match="neither a run folder, nor a folder with a model, nor a hub id"):
        evaluated("model", value, None)


def test_a_hub_id_has_no_steps_and_a_run_without_checkpoints_is_no_model(tmp_path):
    assert evaluated("model", "org/name", None) == Evaluated("org/name", "org/name")
    with pytest.raises(ConfigError, match="has no steps"):
        evaluated("model", "org/name", "best")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="no run that could become one: .*has no checkpoints"):
        evaluated("model", str(tmp_path), None)


def test_a_run_is_evaluated_as_it_validated(tmp_path, composed_run):
    arguments = {"closed": True, "choices": 10, "note": "it's 1, or {2}"}
    composed_run["reward"]["custom_reward_function"]["reward_kwargs"] = arguments
    folder = tmp_path / "run" / "checkpoints" / "global_step_2" / "actor"
    folder.mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(composed_run))
    model = evaluated("model", str(tmp_path / "run"), "2")
    assert model.name == "run, step 2" and model.path == str(tmp_path / "run" / "export" / "step_2")
    config = compose_pipeline("eval", EvalConfig, ["model=m", *_run_defaults(model, protocol=False)])
    validation = composed_run["actor_rollout_ref"]["rollout"]["val_kwargs"]
    assert config.sampling.temperature == validation["temperature"] and config.sampling.n == validation["n"]
    assert config.sampling.max_tokens == composed_run["opd"]["rollout"]["val_tokens"]
    # The family of reasoning-gym's tasks has the run's grader, whichever of them the run knows.
    own = with_own(config.graders, model.config)["gym/*"]
    assert own == RewardConfig("pkg://opd_ext.rewards.gym", "last_number", arguments)
    assert config.scale == "cpu" and [path.name for path in config.files.values()] == ["val.parquet"]
    assert config.template == {"enable_thinking": False}
    with_protocol = _run_defaults(model, protocol=True)
    assert not [each for each in with_protocol if each.startswith("sampling")]


def rows_of(file, *sources: str, truth: str = "7"):
    """A file in verl's format, with a question of each data source."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"data_source": source, "prompt": [{"role": "user", "content": "q"}], "reward_model": {"ground_truth": truth}}
        for source in sources
    ]
    pd.DataFrame(rows).to_parquet(file)
    return file


def run_that_knows(folder, path: str, train: list, val: list):
    """What an evaluation reads of the configuration of a run."""
    files = {"train_files": [str(rows_of(folder / "train.parquet", *train))]}
    files["val_files"] = str(rows_of(folder / "val.parquet", *val))
    custom = {"path": path, "name": "compute_score", "reward_kwargs": {"mine": 1}}
    return {"data": files, "reward": {"custom_reward_function": custom}}


def test_a_run_grades_the_data_that_it_knows_and_published_sets_have_their_own_graders(tmp_path):
    """The miniature world's grader refuses MATH-500's answers, and a mathematical one calls a right option wrong."""
    config = settings()
    config.graders = with_own(config.graders, run_that_knows(tmp_path, "world.py", ["tinymath"], ["poems"]))
    paths = {source: config.grader_of(source).path for source in ("tinymath", "poems", "math500", "gpqa_diamond")}
    dual, choices = "pkg://opd_ext.rewards.math_dual", "pkg://opd_ext.rewards.mcq"
    assert paths == {"tinymath": "world.py", "poems": "world.py", "math500": dual, "gpqa_diamond": choices}
    maths = settings()
    maths.graders = with_own(maths.graders, run_that_knows(tmp_path, dual, ["math_dapo"], ["aime24"]))
    assert maths.grader_of("math500").kwargs == maths.grader_of("aime24").kwargs == {"mine": 1}
    assert maths.grader_of("gpqa_diamond").path == choices
    assert with_own(config.graders, {}) == config.graders


def test_a_grader_that_is_set_for_a_source_stands_above_patterns_and_a_runs_own(tmp_path):
    config = settings("graders.math500.path=mine.py")
    assert config.grader_of("math500").path == "mine.py"
    run = run_that_knows(tmp_path, "world.py", ["math500"], ["math500"])
    assert with_own(config.graders, run)["math500"].path == "mine.py"


def test_a_row_that_its_grader_refuses_is_told_before_anything_is_sampled(tmp_path):
    file = rows_of(tmp_path / "val.parquet", "tinymath", "math500", truth="\\frac{1}{2}")
    rows = read_problems(PromptsConfig(file=str(file), deduplicate=False))
    world = RewardConfig("pkg://opd_ext.tinymath.grader")
    with pytest.raises(ConfigError, match=r"row 0 of tinymath cannot be graded by .*are whole numbers") as refused:
        check_rows(str(file), rows, settings().grader_of)
    assert "\n" not in str(refused.value)
    check_rows(str(file), rows[1:], settings().grader_of)
    with pytest.raises(ConfigError, match="row 1 of math500 cannot be graded by pkg://opd_ext.tinymath.grader"):
        check_rows(str(file), rows[1:], lambda _: world)
    with pytest.raises(ConfigError, match=r"does not load"):
        check_rows(str(file), rows, lambda _: RewardConfig("pkg://nobody.has.it"))


def test_a_row_that_is_refused_while_graded_is_one_sentence_too():
    grading = _Grading(RewardConfig("pkg://opd_ext.tinymath.grader"))
    assert grading(("tinymath", "Answer: 7", "7", {}))["acc"] == 1.0
    with pytest.raises(
        ConfigError, match="A row of math500 cannot be graded by pkg://opd_ext.tinymath.grader: the min"
    ):
        grading(("math500", "Answer: 7", "x", {}))


@pytest.fixture
def composed_run():
    from omegaconf import OmegaConf

    from opd_ext.config.compose import compose_config

    return OmegaConf.to_container(compose_config(["recipe=sdpo/smollm2_cpu"]), resolve=True)


# ---------------------------------------------------------------------- statistics


def test_the_majority_by_hand():
    assert majority(["a", "a", "b"], [0.0, 0.0, 1.0]) == 0.0
    assert majority(["a", "b", ""], [1.0, 0.0, 1.0]) == 0.5
    assert majority(["", ""], [0.0, 0.0]) == 0.0
    assert majority(["a", "b", "b", "c", "c"], [1.0, 1.0, 1.0, 0.0, 0.0]) == 0.5


def test_the_sign_flip_test_equals_the_count_over_all_signs():
    differences = np.array([0.5, 0.25, 0.25, -0.25, 1.0, 0.75, 0.5, -0.5])
    sums = [abs(np.dot(signs, differences)) for signs in itertools.product((-1, 1), repeat=len(differences))]
    exact = np.mean([value >= abs(differences.sum()) - 1e-12 for value in sums])
    # 10,000 draws: a standard deviation of 0.003 at most at this p-value; four of them.
    assert sign_flip_p(differences) == pytest.approx(exact, abs=0.013)
    assert sign_flip_p(np.zeros(5)) == 1.0
    assert 0 < sign_flip_p(np.ones(40)) < 2e-4


def test_holm_by_hand():
    """0.01 x 3, then 0.03 x 2, and 0.04 cannot fall below it."""
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_accuracies_and_their_average_weigh_sets_alike():
    one = grades([[1, 1], [0, 0], [1, 0], [0, 0]], [["7", "7"], ["", ""], ["1", "2"], ["3", "3"]])
    two = grades([[1, 1]] * 10)
    records = {record["set"]: record for record in accuracies("m", {"one": one, "two": two})}
    assert records["one"]["accuracy"] == 37.5 and records["one"]["pass"] == 50.0
    assert records["one"]["maj"] == pytest.approx(100 * (1 + 0 + 0.5 + 0) / 4)
    assert records["two"]["accuracy_low"] == records["two"]["accuracy_high"] == 100.0
    average = records[AVERAGE]
    assert average["accuracy"] == pytest.approx(68.75) and average["problems"] == 14
    # Half the width of set one: the other one has none.
    width = records["one"]["accuracy_high"] - records["one"]["accuracy_low"]
    assert average["accuracy_high"] - average["accuracy_low"] == pytest.approx(width / 2, rel=1e-6)


def test_two_models_are_compared_by_problem():
    ours, theirs = grades([[1, 1]] * 12), grades([[0, 0]] * 12)
    (record,) = comparison({"s": ours}, {"s": theirs})
    assert record["change"] == 100.0 and record["p_holm"] < 0.01 and record["reduction"] == 0.0
    (same,) = comparison({"s": ours}, {"s": ours})
    assert same["change"] == 0.0 and same["p"] == 1.0
    with pytest.raises(ValueError, match="different problems of s"):
        comparison({"s": ours}, {"s": grades([[1, 1]] * 11)})


def test_the_report_has_a_table_of_rules_and_levels_where_there_are_some():
    table = grades([[1.0, 0.0], [1.0, 1.0]], acc_strict=0.5)
    table["difficulty"] = np.where(table["uid"] == "000000", "10", "9")
    found, numbers = sections({"a": {"s": table}, "b": {"s": grades([[1.0, 1.0], [0.0, 1.0]])}})
    titles = [section.title for section in found]
    assert titles == ["Accuracy", "a against b", "pass@k", "By difficulty", "By rule of the grader"]
    assert [row[2] for row in found[3].rows] == ["9", "10"]  # numbers in their order
    # Means by problem are 0.5 and 1: resamples of two problems have those two and 0.75. The rule says 0.5 of both.
    assert [row[4] for row in found[3].rows] == ["100.0", "50.0"]  # one problem has no interval
    ours, theirs = ["a", "s", "75.0 [50.0, 100.0]", "50.0 [50.0, 50.0]"], ["b", "s", "75.0 [50.0, 100.0]", "-"]
    assert found[4].rows == [ours, theirs]
    assert numbers["pass"][0] == {"model": "a", "set": "s", "k": [1, 2], "pass": [75.0, 100.0]}
    assert all(math.isfinite(value) for value in numbers["accuracy"][0].values() if isinstance(value, float))


def test_levels_have_intervals_and_truncated_responses_an_accuracy_of_their_own():
    """By hand: one of three cut responses is right; a level with 0 and 1 has means of 0, 50 and 100 % in resamples."""
    table = grades([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    table["truncated"] = [True, True, True, False, False, False]
    table["difficulty"] = ["1", "1", "1", "1", "2", "2"]
    found, _ = sections({"a": {"s": table}})
    assert found[0].head[-1] == "of truncated %" and found[0].rows[0][-1].startswith("33.3 [0.0, ")
    (levels,) = [section for section in found if section.title == "By difficulty"]
    assert levels.rows[0][4:] == ["25.0 [0.0, 50.0]", "15.0 [10.0, 20.0]"] and levels.rows[1][4:] == ["100.0", "30.0"]
    whole, _ = sections({"a": {"s": grades([[1.0, 0.0], [0.0, 0.0]])}})
    assert whole[0].rows[0][-1] == "-"


def test_where_nobody_votes_there_is_no_majority():
    """As of programs, which are not compared as texts; where some vote, a problem without a vote is not solved."""
    shown = {
        name: sections({"a": {"s": grades([[1.0, 1.0], [0.0, 1.0]], votes)}})[0][0].rows[0]
        for name, votes in (("none", None), ("some", [["7", "7"], ["", ""]]))
    }
    place = 6  # of maj@n
    assert shown["none"][place] == "-" and shown["some"][place].startswith("50.0")


def test_votes_are_spelled_alike_and_a_grader_may_read_its_own():
    dual = RewardConfig("pkg://opd_ext.rewards.math_dual")
    assert voted(dual, [r"\boxed{ 1{,}000 }", "Answer: $1000$", "no"])[2] == ""
    half = ["Answer: 1/2", r"\boxed{0.50}", r"Answer: $\frac12$", r"\boxed{x = \dfrac{1}{2}}"]
    assert voted(dual, half) == ["1/2"] * 4, "one number, as four texts"
    assert voted(dual, ["Answer: x = 5", "Answer: 5.0", "Answer: 50%", "Answer: x^2 = 4"])[:2] == ["5", "5"]
    mcq, tools = RewardConfig("pkg://opd_ext.rewards.mcq"), RewardConfig("pkg://opd_ext.rewards.tools")
    assert voted(mcq, ["<answer>\nB\n</answer>", "<answer>B", "no idea"]) == ["B", "B", ""]
    calls = [
        'Action: f\nAction Input: {"x": 1, "y": 2}',
        'Action: f\nAction Input: {"y": 2.0, "x": 1}',
        "Action: f\nno",
    ]
    first, second, none = voted(tools, calls)
    assert first == second != "" == none
    gym = RewardConfig("pkg://opd_ext.rewards.gym", "last_number")
    assert voted(gym, ["so it is 12", "Answer: 12", "<think>5</think> nothing"]) == ["12", "12", ""]
