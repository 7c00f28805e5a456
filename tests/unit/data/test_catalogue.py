# SPDX-License-Identifier: Apache-2.0
"""Published sets: each is read in its own columns, filtered as published, written in one schema, and accounted for."""

import json
from pathlib import Path

import datasets
import pandas as pd
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from opd_ext.cli import app
from opd_ext.context.prompts import boxed_prompt, student_prompt
from opd_ext.data.catalogue import SETS
from opd_ext.data.prepare import CARD, Wording, prepare
from opd_ext.data.reading import digest_of
from opd_ext.data.rows import SCHEMA
from opd_ext.reference.data_page import with_tables
from opd_ext.rewards import code, mcq
from tests.unit.data.published_rows import PUBLISHED, called, contents, contest, packed, write

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_set_is_read_in_its_published_columns(name, tmp_path):
    rows, left, expected = PUBLISHED[name]
    source = write(called(name, tmp_path), rows)
    split = SETS[name].splits[0].name
    made = prepare(SETS[name], source, tmp_path / "out", splits=[split])
    assert list(made) == [split]
    found = contents(made[split])
    assert len(found) == (4 if name == "dapo_math_17k" else left)  # of DAPO a fifth is held out
    assert {key: found[0][key] for key in expected} == expected
    schema, extra = pq.read_schema(made[split]).remove_metadata(), ["trace"] if SETS[name].has_traces else []
    assert schema.names == [*SCHEMA.names, *extra] and schema.field("extra_info") == SCHEMA.field("extra_info")


def test_every_set_of_the_catalogue_is_tested():
    assert set(PUBLISHED) == set(SETS) - {"aime"}  # which is two of them


def test_sets_concatenate_as_verl_concatenates_them(tmp_path):
    names = ["math500", "toolalpaca", "livecodebench", "rstar_coder"]
    made = [
        *(prepare(SETS[n], write(called(n, tmp_path / n), PUBLISHED[n][0]), tmp_path / "out" / n,
                  splits=[SETS[n].splits[0].name]) for n in names)
    ]  # fmt: skip
    files = [str(file) for found in made for file in found.values()]
    joined = datasets.concatenate_datasets([datasets.Dataset.from_parquet(file) for file in files])
    assert set(joined["data_source"]) == {"math500", "tooluse", "livecodebench", "rstar_coder"}


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "json", "csv", "jsonl.gz", "json.gz", "csv.gz"])
def test_every_format_gives_the_same_rows(ending, tmp_path):
    rows = [{"problem": "1 + 1,\n\u2028 \x85 ü?", "answer": 2, "id": "0"}, {"problem": "q", "answer": 3, "id": "1"}]
    made = prepare(SETS["aime25"], write(tmp_path / f"rows.{ending}", rows), tmp_path / "out")
    assert [(row["question"], row["answer"]) for row in contents(made["test"])] == [
        ("1 + 1,\n\u2028 \x85 ü?", "2"),
        ("q", "3"),
    ]


def test_both_files_of_dapo_give_questions_once_and_the_split_of_the_distinct_one_is_the_published(tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": student_prompt(f"{i}?")}], "reward_model": {"ground_truth": str(i)}}
        for i in range(50)
    ]
    distinct = prepare(SETS["dapo_math_17k"], write(tmp_path / "a" / "dapo.parquet", rows), tmp_path / "distinct")
    shuffled = pd.Series(range(50)).sample(frac=1, random_state=42).tolist()
    places = [[row["index"] for row in contents(distinct[split])] for split in ("train", "val")]
    assert places == [shuffled[:40], shuffled[40:]]
    rows[0] = {**rows[0], "reward_model": {"ground_truth": "7"}}
    copies = prepare(SETS["dapo_math_17k"], write(tmp_path / "b" / "dapo.parquet", rows * 3), tmp_path / "copies")
    train, val = ({row["question"] for row in contents(copies[split])} for split in ("train", "val"))
    assert (len(train), len(val), train & val) == (40, 10, set())
    dropped = json.loads((tmp_path / "copies" / CARD).read_text())["splits"]["train"]["dropped"]
    assert dropped == {"a copy of an earlier question": 100}


def test_sciknoweval_of_the_hub_is_filtered_and_split_as_sdpo_does(tmp_path):
    row = {
        "question": "Q", "choices": {"text": ["1", "2"], "label": ["A", "B"]}, "answerKey": "B", "answer": "",
        "type": "mcq-4-choices", "domain": "Chemistry", "details": {"level": "L3", "task": "t"},
    }  # fmt: skip
    others = [{**row, "domain": "Physics"}, {**row, "details": {"level": "L2"}}, {**row, "type": "open-ended-qa"}]
    source = write(tmp_path / "sciknoweval_chemistry_train_and_test.jsonl",
                   [{**row, "question": f"Q{i}"} for i in range(20)] + others)  # fmt: skip
    made = prepare(SETS["sciknoweval"], source, tmp_path / "out", splits=["chemistry_train", "chemistry_test"])
    train, test = (contents(made[f"chemistry_{part}"]) for part in ("train", "test"))
    order = datasets.Dataset.from_dict({"i": range(20)}).train_test_split(test_size=0.1, seed=42)
    assert [row["question"] for row in test] == [f"Q{i}\n\nA: 1\nB: 2{mcq.STEP_BY_STEP}" for i in order["test"]["i"]]
    assert len(train) == 18 and test[0]["system"] == mcq.SYSTEM_PROMPT
    dropped = json.loads((tmp_path / "out" / CARD).read_text())["splits"]["chemistry_test"]["dropped"]
    assert sum(dropped.values()) == 3


def test_both_years_of_aime_become_one_file_with_a_group_each(tmp_path):
    write(tmp_path / "aime24.parquet", PUBLISHED["aime24"][0])
    write(tmp_path / "aime_2025.jsonl", PUBLISHED["aime25"][0])
    made = prepare(SETS["aime"], tmp_path, tmp_path / "out")
    assert [row["difficulty"] for row in contents(made["test"])] == ["2024", "2025"]


def test_the_right_option_has_the_letter_that_is_the_reference(tmp_path):
    rows = [{**PUBLISHED["gpqa_diamond"][0][0], "Question": f"Question {i}?"} for i in range(12)]
    made = prepare(SETS["gpqa_diamond"], write(tmp_path / "gpqa_diamond.csv", rows), tmp_path / "out")
    found = contents(made["test"])
    assert all(f"\n{row['answer']}: red" in row["text"] for row in found)
    assert len({row["answer"] for row in found}) > 1  # not always A
    again = prepare(SETS["gpqa_diamond"], tmp_path / "gpqa_diamond.csv", tmp_path / "again")
    assert digest_of(again["test"]) == digest_of(made["test"])


@pytest.mark.parametrize("name", ["humaneval", "humaneval_plus", "mbpp", "mbpp_plus"])
def test_programs_are_graded_by_the_tests_that_are_published(name, tmp_path):
    """A program that looks right on the first input, leaves before the tests, or has no such function does not pass."""
    source = write(called(name, tmp_path), PUBLISHED[name][0])
    (row,) = contents(prepare(SETS[name], source, tmp_path / "out")["test"])
    assert "half" in row["text"] and row["text"].count("```") == 2
    asks = "Complete this function" if name.startswith("humaneval") else "Write a Python function for this"
    assert asks in row["text"] and asks not in row["question"] and "half" in row["question"]

    def graded(program: str) -> dict:
        return code.compute_score(name, f"So:\n```python\n{program}\n```", row["answer"])

    assert graded("def half(x):\n    return x // 2")["score"] == 1.0
    assert graded("def half(x):\n    return 2 if x == 4 else 0")["score"] == (1.0 if name == "humaneval" else 0.0)
    for wrong in ("def half(x):\n    return x", "raise SystemExit(0)", "def other(x):\n    return 1"):
        told = graded(wrong)
        assert told["score"] == 0.0 and told["feedback"]


def test_another_wording_lies_beside_the_set(tmp_path, monkeypatch):
    monkeypatch.setenv("OPD_HOME", str(tmp_path))
    source = write(tmp_path / "test.jsonl", PUBLISHED["math500"][0])
    for wording in (Wording(), Wording("boxed"), Wording(eval_suffix=True), Wording(teacher_prompt="v2")):
        prepare(SETS["math500"], source, wording=wording)
    texts = {path.parent.name: contents(path)[0]["text"] for path in (tmp_path / "data").rglob("*.parquet")}
    assert sorted(texts) == ["math500", "math500-boxed", "math500-reminder", "math500_v2"]
    assert texts["math500-boxed"] == boxed_prompt("1 + 1?") and texts["math500-reminder"] == student_prompt("1 + 1?")
    assert pq.read_table(tmp_path / "data/math500_v2/test.parquet")["data_source"].to_pylist() == ["math500_v2"]


# ---------------------------------------------------------------------- accounts


def test_the_card_accounts_for_every_row_and_file(tmp_path):
    rows = [*PUBLISHED["deepmath"][0], {"question": "", "final_answer": "1", "difficulty": 7.0}]
    source = write(tmp_path / "train-0.jsonl", rows)
    made = prepare(SETS["deepmath"], source, tmp_path / "out")
    prepare(SETS["deepmath"], source, tmp_path / "out", splits=["all"], count=1)
    card = json.loads((tmp_path / "out" / CARD).read_text())
    train = card["splits"]["train"]
    assert (train["rows_read"], train["rows"], train["questions"]) == (3, 1, 1)
    assert train["dropped"] == {"not: difficulty >= 6": 1, "empty question": 1}
    assert train["sha256"] == digest_of(made["train"]) and card["licence"] == "MIT"
    assert train["sources"] == [{"file": "train-0.jsonl", "sha256": digest_of(source), "bytes": source.stat().st_size}]
    assert card["splits"]["all"]["rows"] == 1  # what was made before stays in it


def test_other_content_is_replaced_only_by_force(tmp_path):
    first, second = (write(tmp_path / f"{a}.jsonl", [{"problem": "q", "answer": a}]) for a in (1, 2))
    out = tmp_path / "out"
    prepare(SETS["aime25"], first, out)
    before = (out / "test.parquet").stat().st_mtime_ns
    prepare(SETS["aime25"], first, out)
    assert (out / "test.parquet").stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="--force"):
        prepare(SETS["aime25"], second, out)
    assert contents(out / "test.parquet")[0]["answer"] == "1"
    prepare(SETS["aime25"], second, out, force=True)
    assert contents(out / "test.parquet")[0]["answer"] == "2"
    assert sorted(path.name for path in out.iterdir()) == [CARD, "test.parquet"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]  # no scratch stays


class Evil:
    def __reduce__(self):
        return (print, ("it ran",))


REFUSED = {
    "no such split": ("math500 --from @good.jsonl --split train", "math500 has no split train: it has test"),
    "no such file": ("math500 --from @none", "none does not exist"),
    "nothing in the folder": ("math500 --from @empty", "empty has no file of math500's test"),
    "another set": ("math500 --from @calls.json", "calls.json does not look like math500: it needs a column"),
    "unreadable reference": ("aime25 --from @bad.jsonl", "bad.jsonl: row 1 cannot be graded: "),
    "tools without a call": ("toolalpaca --split test --from @calls.json", "row 0 cannot be graded: "),
    "no letter": ("sciknoweval --split chemistry_test --from @letters.json", "row 0 cannot be graded: "),
    "nothing usable": ("aime25 --from @void.jsonl", "void.jsonl gives no row to test: no answer in answer (1)"),
    "no column to filter by": ("deepmath --from @deep.jsonl", "no column difficulty, which the published filter reads"),
    "which split": ("toolalpaca --from @calls.json", "say which it is, --split train or test"),
    "wording": ("toolalpaca --split test --from @calls.json --prompt boxed", "leave --prompt out"),
    "a file for two": ("aime --from @good.jsonl", "aime is made of 2 files"),
    "not on the hub": ("toolalpaca", "toolalpaca is not on the hub: get https://github.com/lasgroup/SDPO"),
    "a pickle that runs": ("livecodebench --split v6 --from @evil.jsonl", "only text is unpickled"),
    "count": ("aime25 --from @good.jsonl --count 0", "--count 0 must be at least 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_gets_one_sentence_and_writes_nothing(case, tmp_path, capfd):
    write(tmp_path / "good.jsonl", [{"problem": "q", "answer": "1"}])
    write(tmp_path / "bad.jsonl", [{"problem": "q", "answer": "1"}, {"problem": "r", "answer": "\\frac{1}{2"}])
    write(tmp_path / "calls.json", [{"prompt": "q", "answer": "[]", "system": None, "idx": 1}])
    write(tmp_path / "letters.json", [{"prompt": "q", "answer": "Z", "system": None, "idx": 1}])
    write(tmp_path / "void.jsonl", [{"problem": "q", "answer": None}])
    write(tmp_path / "deep.jsonl", [{"question": "q", "final_answer": "1"}])
    write(tmp_path / "evil.jsonl", [contest("2025-03-01", private=packed(Evil()))])
    (tmp_path / "empty").mkdir()
    command, sentence = REFUSED[case]
    arguments = command.replace("@", f"{tmp_path}/").split()
    answer = CliRunner().invoke(app, ["data", *arguments, "--out", str(tmp_path / "out")])
    assert answer.exit_code == 2, answer.output
    assert answer.stderr.startswith(f"opd data {arguments[0]}: ") and sentence in answer.stderr
    assert len(answer.stderr.splitlines()) == 1 and "it ran" not in answer.output + capfd.readouterr().out
    assert not (tmp_path / "out").exists()


def test_rows_that_cannot_be_graded_are_left_out_and_counted_if_that_is_asked_for(tmp_path):
    rows = [{"problem": "q", "answer": "1"}, {"problem": "r", "answer": "\\frac{1}{2"}]
    prepare(SETS["aime25"], write(tmp_path / "bad.jsonl", rows), tmp_path / "out", drop_bad=True)
    card = json.loads((tmp_path / "out" / CARD).read_text())["splits"]["test"]
    assert card["rows"] == 1 and card["dropped"] == {"a reference that the grader cannot read": 1}


# ---------------------------------------------------------------------- the hub


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """The hub's cache, in an empty folder, on a machine that may not ask the hub."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_without_a_network_the_sentence_names_the_way_around(hub_cache, tmp_path):
    answer = CliRunner().invoke(app, ["data", "hmmt25", "--out", str(tmp_path / "out")])
    assert answer.exit_code == 2 and len(answer.stderr.splitlines()) == 1
    assert "hmmt25 cannot be had from the hub" in answer.stderr and "MathArena/hmmt_feb_2025" in answer.stderr
    assert "with --from" in answer.stderr and not (tmp_path / "out").exists()


def test_a_node_without_a_network_takes_what_the_hubs_cache_has(hub_cache, tmp_path):
    repository = hub_cache / "datasets--math-ai--aime25"
    commit = SETS["aime25"].splits[0].origins[0].revision
    write(repository / "snapshots" / commit / "test.jsonl", PUBLISHED["aime25"][0])
    prepare(SETS["aime25"], out=tmp_path / "out")
    (source,) = json.loads((tmp_path / "out" / CARD).read_text())["splits"]["test"]["sources"]
    assert (source["repository"], source["revision"], source["file"]) == ("math-ai/aime25", commit, "test.jsonl")


# ---------------------------------------------------------------------- what is said of them


def test_the_page_of_data_sets_is_what_the_catalogue_says():
    page = (ROOT / "docs" / "data.md").read_text()
    assert with_tables(page) == page, "run python -m opd_ext.reference"
    for published in SETS.values():
        assert f"| `{published.name}` |" in page
        for recipe in published.recipes:
            assert (ROOT / "recipes" / recipe / "README.md").is_file()


def test_the_list_names_every_set_and_marks_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setenv("OPD_HOME", str(tmp_path))
    prepare(SETS["math500"], write(tmp_path / "test.jsonl", PUBLISHED["math500"][0]))
    said = CliRunner().invoke(app, ["data", "list"]).output
    assert all(name in said for name in SETS) and "test (500) *" in said and "test (30) *" not in said
