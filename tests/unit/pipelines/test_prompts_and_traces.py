# SPDX-License-Identifier: Apache-2.0
"""Prompts become ids once, duplicates are one, and a trace is the student's ids whoever wrote it."""

import pandas as pd
import pytest

from opd_ext.errors import ConfigError
from opd_ext.pipelines import problems, traces
from opd_ext.pipelines.settings import PromptsConfig, RewardConfig
from opd_ext.sampling.jobs import Job, sample_seed
from opd_ext.tinymath.tokenizer import make_tokenizer
from opd_ext.tokens.tables import PROMPTS, TableError, content_key, write_table


def chat(text):
    return [{"role": "user", "content": text}]


@pytest.fixture
def file(tmp_path):
    rows = {
        "prompt": [chat("What is 1+2?"), chat("What is  1+2?"), chat("What is 3+4?")],
        "data_source": "tinymath",
        "reward_model": [{"ground_truth": answer} for answer in ("3", "3", "7")],
        "extra_info": [{"question": question} for question in ("What is 1+2?", "What is 1+2?", "What is 3+4?")],
    }
    pd.DataFrame(rows).to_parquet(tmp_path / "problems.parquet")
    return str(tmp_path / "problems.parquet")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_duplicates_are_told_by_their_statement(file):
    assert problems.read_problems(PromptsConfig(file))["uid"].tolist() == ["000000", "000002"]
    assert len(problems.read_problems(PromptsConfig(file, deduplicate=False))) == 3
    assert len(problems.read_problems(PromptsConfig(file, count=1))) == 1
    with pytest.raises(ConfigError, match="leaves no prompt"):
        problems.read_problems(PromptsConfig(file, count=0))


def test_rendering_ends_where_the_assistant_begins(file, tokenizer):
    rows = problems.read_problems(PromptsConfig(file))
    rendered = problems.render_prompts(rows, tokenizer, PromptsConfig(file))
    text = tokenizer.decode(rendered["prompt_ids"][0])
    assert "What is 1+2?" in text and text == tokenizer.apply_chat_template(
        chat("What is 1+2?"), add_generation_prompt=True, tokenize=False
    )
    with pytest.raises(ConfigError, match="raise that or lower max_tokens"):
        problems.check_lengths(rendered, 512, 512, "max_tokens")


def test_a_template_that_refuses_a_row_is_one_sentence(file, tokenizer, monkeypatch):
    """As Gemma-2's does of a system turn; the exception is Jinja's own."""
    rows = problems.read_problems(PromptsConfig(file))
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('System role not supported') }}")
    with pytest.raises(ConfigError, match=r"the chat template refuses row 000000: System role not supported\.$"):
        problems.render_prompts(rows, tokenizer, PromptsConfig(file))


WORDING = {"function": "Solve {{ question }}\nwith {{ starter_code }}!", "stdin": "Read, solve {{ question }}\n"}


@pytest.mark.parametrize(
    ("code", "asked"),
    [
        ("def f(a):\n    ", "Solve <{{ q }}> & {starter_code}\n\nwith def f(a):\n    !"),
        (" \n", "Read, solve <{{ q }}> & {starter_code}\n\n"),
        (None, "Read, solve <{{ q }}> & {starter_code}\n\n"),
    ],
)
def test_a_program_is_asked_for_as_its_starter_code_says_and_nothing_in_a_problem_is_a_template(code, asked):
    earlier = {"role": "system", "content": "s"}
    question = {"role": "user", "content": "<{{ q }}> & {starter_code}\n"}
    rows = pd.DataFrame({"prompt": [[earlier, question]], "extra_info": [{"starter_code": code}]})
    ((first, last),) = problems.worded(rows, PromptsConfig(wording=WORDING))
    assert first == earlier and last == {"role": "user", "content": asked}
    assert problems.worded(rows, PromptsConfig()) == [[earlier, question]]


def samples(tokenizer, *texts, uids=None, reason="stop"):
    ids = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in texts]
    return pd.DataFrame(
        {
            "uid": uids or ["000000"] * len(texts),
            "sample": range(len(texts)),
            "prompt_ids": [[1]] * len(texts),
            "response_ids": ids,
            "finish_reason": reason,
        }
    )


def test_grades_are_those_of_the_grader(file, tokenizer):
    rows = problems.read_problems(PromptsConfig(file))
    drawn = samples(tokenizer, "ones: 1+2=3\nAnswer: 3", "ones: 1+2=4\nAnswer: 4")
    graded = problems.grade(drawn, rows, tokenizer, RewardConfig("pkg://opd_ext.tinymath.grader"))
    assert graded["acc"].tolist() == [1.0, 0.0]
    assert graded["tokens"].tolist() == [len(ids) for ids in drawn["response_ids"]]
    with pytest.raises(ConfigError, match="reward.path=pkg://nowhere"):
        problems.load_grader(RewardConfig("pkg://nowhere"))


def test_one_right_and_finished_trace_per_prompt_whatever_the_order(tokenizer):
    drawn = samples(tokenizer, "a", "b", "c", "d", uids=["0", "0", "0", "1"])
    drawn["finish_reason"] = ["length", "stop", "stop", "stop"]
    grades = pd.DataFrame({"acc": [1.0, 1.0, 1.0, 0.0]})
    chosen = traces.choose(drawn, grades, seed=1)
    assert chosen["uid"].tolist() == ["0"] and chosen["sample"].iloc[0] in (1, 2)
    again = traces.choose(drawn[::-1], grades[::-1], seed=1)
    assert again["sample"].tolist() == chosen["sample"].tolist()
    assert len({traces.choose(drawn, grades, seed)["sample"].iloc[0] for seed in range(20)}) == 2
    with pytest.raises(TableError, match="raise traces.n"):
        traces.choose(drawn, grades * 0, seed=1)


def test_a_trace_that_is_trained_on_is_right_by_the_strict_rule_where_the_grader_has_one(tokenizer):
    """The project's rule: CRISP's dual verdict measures, and what is trained on states one final answer."""
    drawn = samples(tokenizer, "a guess", "an answer", uids=["0", "0"])
    grades = pd.DataFrame({"acc": [1.0, 1.0], "acc_strict": [0.0, 1.0]})
    assert {traces.choose(drawn, grades, seed)["sample"].iloc[0] for seed in range(20)} == {1}


def test_a_trace_keeps_its_ids_where_it_can(tokenizer):
    prompts = pd.DataFrame({"uid": ["000000"], "prompt_ids": [[5, 6]]})
    drawn = samples(tokenizer, "Answer: 3")
    (kept,) = traces.as_students_ids(drawn, prompts, tokenizer, tokenizer, "", 9).to_dict(orient="records")
    assert kept["response_ids"] == [*drawn["response_ids"][0][:-1], 9]
    assert kept["prompt_ids"] == [5, 6] and kept["key"] == content_key([5, 6], kept["response_ids"])
    prefixed = traces.as_students_ids(drawn, prompts, tokenizer, tokenizer, "ones: ", 9)["response_ids"][0]
    assert tokenizer.decode(prefixed[:-1]) == "ones: Answer: 3"
    texts = pd.DataFrame({"uid": ["000000"], "text": ["Answer: 3"]})
    assert traces.as_students_ids(texts, prompts, tokenizer, None, "", 9)["response_ids"][0] == kept["response_ids"]


def test_every_request_has_a_seed_of_its_own():
    seeds = {sample_seed(seed, uid, sample) for seed in range(3) for uid in "abc" for sample in range(50)}
    assert len(seeds) == 450 and all(0 <= seed < 2**31 for seed in seeds)
    assert sample_seed(1, "a", 0) == sample_seed(1, "a", 0)


def test_a_job_knows_its_samples_from_those_of_another(tmp_path):
    write_table(tmp_path / "p.parquet", pd.DataFrame({"uid": ["a"], "prompt_ids": [[1]]}), PROMPTS)

    def job(**changes):
        settings = dict(temperature=1.0, top_k=-1, top_p=1.0, n=2, max_tokens=4, seed=1, stop_ids=(9,), shard=3)
        paths = dict(
            model="m", weights="w", engine="fp32", prompts=str(tmp_path / "p.parquet"), out=str(tmp_path / "o.parquet")
        )
        return Job(**{**paths, **settings, **changes})

    others = [job(weights="v"), job(temperature=0.9), job(top_k=5), job(seed=2), job(n=3), job(shard=4)]
    others.append(job(engine="bf16"))
    assert len({each.digest for each in (job(), *others)}) == 8
    assert job(out="elsewhere").digest == job(model="moved").digest == job().digest
    before = job().digest
    write_table(tmp_path / "p.parquet", pd.DataFrame({"uid": ["a"], "prompt_ids": [[2]]}), PROMPTS)
    assert job().digest != before


def test_a_model_is_known_by_what_it_holds(tmp_path):
    for name, content in (("a", b"1" * 3_000_000), ("b", b"1" * 3_000_000), ("c", b"1" * 2_999_999 + b"2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(content)
    a, b, c = (problems.fingerprint(str(tmp_path / name)) for name in "abc")
    assert a == b != c
    assert problems.fingerprint("Qwen/Qwen3-8B") == "Qwen/Qwen3-8B"


def test_what_is_graded_must_say_how(tmp_path, file):
    problems.check_columns(file, graded=True)
    pd.DataFrame({"prompt": [chat("hello")]}).to_parquet(tmp_path / "plain.parquet")
    problems.check_columns(str(tmp_path / "plain.parquet"), graded=False)
    with pytest.raises(ConfigError, match="no column data_source"):
        problems.check_columns(str(tmp_path / "plain.parquet"), graded=True)


def test_a_file_without_starter_code_would_lose_signatures_and_is_refused_before_anything_is_sampled(tmp_path, file):
    problems.check_columns(file, graded=True)
    with pytest.raises(ConfigError, match="no extra_info.starter_code.*~prompts.wording"):
        problems.check_columns(file, graded=True, worded=True)
    row = {"prompt": [chat("Add.")], "extra_info": [{"starter_code": None}]}
    pd.DataFrame(row).to_parquet(tmp_path / "programs.parquet")
    problems.check_columns(str(tmp_path / "programs.parquet"), graded=False, worded=True)
