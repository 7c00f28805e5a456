# SPDX-License-Identifier: Apache-2.0
"""`opd inspect` on a run folder: a small model, rollouts as ids, several methods on them."""

import asyncio
import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from transformers import Qwen3Config, Qwen3ForCausalLM
from typer.testing import CliRunner

from opd_ext import recorded
from opd_ext.alarms.record import Record, append
from opd_ext.checkpoints.layout import TrainerState
from opd_ext.checkpoints.source import Source
from opd_ext.cli import app
from opd_ext.config.compose import compose_config
from opd_ext.context.sequence import render
from opd_ext.files import write_jsonl
from opd_ext.inspection.methods import Method, Weights, method
from opd_ext.inspection.models import LocalModel
from opd_ext.objective.alignment import response_rows
from opd_ext.objective.head import chunked_divergence
from opd_ext.tinymath.tokenizer import make_tokenizer
from opd_ext.tokens.byte_spans import OUTSIDE, Reader, align
from tests.unit.inspection import browser
from tests.unit.inspection.folder import content, unpacked, whole

TOKENIZER = make_tokenizer()
BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
HEADER = "Solve the following math problem step by step. The last line of your response should be of the form "
HEADER += "Answer: $Answer (without quotes) where $Answer is the answer to the problem."


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two random models of one tokenizer."""
    folders = []
    for seed in range(2):
        torch.manual_seed(seed)
        config = Qwen3Config(
            vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3,
        )  # fmt: skip
        folders.append(tmp_path_factory.mktemp("models") / f"model{seed}")
        Qwen3ForCausalLM(config).save_pretrained(folders[-1])
        TOKENIZER.save_pretrained(folders[-1])
    return folders


@pytest.fixture(scope="module")
def run(models, tmp_path_factory):
    """Twelve rollouts of step 1: three problems, four samples each, of different lengths."""
    folder = tmp_path_factory.mktemp("run") / "crisp"
    asked = ["method=crisp", "scale=cpu_tiny", f"actor_rollout_ref.model.path={models[0]}", f"opd.run_dir={folder}"]
    folder.mkdir()
    OmegaConf.save(compose_config(asked), folder / "config.yaml")
    draws = torch.Generator().manual_seed(3)
    texts, ids = [], []
    for i in range(12):
        question = f"What is {i // 4}+1?"
        prompt = [
            {"role": "user", "content": f"{HEADER}\n\n{question}\n\nRemember to put your answer on its own line."}
        ]
        length = int(torch.randint(1, 30, (), generator=draws))
        responses = torch.randint(0, len(TOKENIZER), (length,), generator=draws).tolist()
        who = {"uid": f"t1p{i // 4}", "sample": i % 4}
        right = float(i % 4 == 0)
        texts.append({
            **who, "index": i // 4, "data_source": "tinymath", "output": TOKENIZER.decode(responses), "score": right,
            "acc": right, "feedback": "no", "truncated": False, "ground_truth": "1",
        })  # fmt: skip
        extra = {"question": question, "index": i // 4}
        sent = render(TOKENIZER, prompt, {"enable_thinking": True})
        ids.append({**who, "prompts": sent, "responses": responses, "raw_prompt": prompt, "extra_info": extra})
    write_jsonl(folder / "generations/train_1.jsonl", texts)
    recorded.write(folder, 1, ids)
    return folder


def opd(*words):
    return CliRunner().invoke(app, ["inspect", *map(str, words)])


@pytest.fixture(scope="module")
def shown(run, models):
    """The map of those rollouts by the initial model."""
    answer = opd(run, "--step", "0", "--methods", "crisp,opd,sdpo,opsd,grpo,trace,tip,srpo", "--teacher", models[1])
    assert answer.exit_code == 0, answer.output
    return run / "inspect/step_0", answer.stdout


def test_the_shown_divergences_are_those_of_two_forward_passes(run, models, shown):
    """The same number by another way: one sequence at a time, the public divergence, a plain mean."""
    model = Qwen3ForCausalLM.from_pretrained(models[0]).eval()
    teacher = Qwen3ForCausalLM.from_pretrained(models[1]).eval()
    total, tokens = 0.0, 0
    for row in recorded.read(run, 1):
        rows = response_rows(len(row["prompts"]), len(row["responses"]))
        sequence = torch.tensor([[*row["prompts"], *row["responses"]]])
        with torch.no_grad():
            student, other = (each.model(sequence).last_hidden_state[0, rows] for each in (model, teacher))
        weight = torch.ones(len(rows))
        loss, _ = chunked_divergence(student, model.lm_head.weight, other, teacher.lm_head.weight, weight)
        total += float(loss.detach())
        tokens += len(rows)
    folder, _ = shown
    divergence = unpacked(content(folder, "tip_0")["divergence"])
    assert divergence.sum() / tokens == pytest.approx(total / tokens, rel=1e-4)


def test_a_teacher_of_another_tokenizer_is_shown_by_spans_of_text(run, models, tmp_path):
    """Of random ids, so that there are control tokens and half characters; by both models' logits and plain sums."""
    torch.manual_seed(5)
    other = make_tokenizer([], ["Hello", " world"])
    config = Qwen3Config(
        vocab_size=len(other), hidden_size=16, intermediate_size=24, num_hidden_layers=1, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=1024, initializer_range=0.3,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    folder = tmp_path / "opd"
    shutil.copytree(run / "generations", folder / "generations")
    teacher = ["opd.teacher.tokenizer=own", f"opd.teacher.path={tmp_path / 'other'}"]
    asked = ["method=opd", "scale=cpu_tiny", f"actor_rollout_ref.model.path={models[0]}", f"opd.run_dir={folder}"]
    OmegaConf.save(compose_config([*asked, *teacher]), folder / "config.yaml")
    answer = opd(folder, "--step", "0", "--methods", "opd")
    assert answer.exit_code == 0, answer.output
    shown = folder / "inspect/step_0"
    low, high, _ = packed = content(shown, "opd_0")["divergence"]
    divergence, step = unpacked(packed), (high - low) / 65535  # between two numbers of the page
    mine, theirs = (Qwen3ForCausalLM.from_pretrained(path).eval() for path in (models[0], tmp_path / "other"))
    rows, at, read, total = recorded.read(run, 1), 0, 0, 0.0
    spans = align(
        Reader(TOKENIZER, "a"), Reader(other, "b"), [row["responses"] for row in rows], [TOKENIZER.eos_token_id]
    )
    for row, each in zip(rows, spans, strict=True):
        covered = [number != OUTSIDE for number in each.student]
        if not any(covered):
            continue  # nothing that both could read: it has no teacher, and so no signal
        assert np.abs(divergence[at : at + len(covered)][~np.array(covered)]).max(initial=0.0) <= step
        read += sum(covered)
        at += len(covered)
        kept = [i for i, used in zip(row["responses"], covered, strict=True) if used]
        assert kept == row["responses"][: len(kept)]
        prompt = render(other, row["raw_prompt"], {"enable_thinking": True})
        total += _log_prob(mine, row["prompts"], kept) - _log_prob(theirs, prompt, each.teacher_ids)
    assert at == len(divergence)
    assert 0 < read < at
    assert divergence.sum() == pytest.approx(total, rel=1e-4, abs=at * step)


@torch.no_grad()
def _log_prob(model, prompt, response) -> float:
    logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return float(logits.gather(-1, torch.tensor(response)[:, None]).sum())


def test_a_method_that_cannot_be_put_to_these_rollouts_is_named_with_the_reason(shown):
    folder, output = shown
    index = content(folder, "index")
    assert [said["name"] for said in index["methods"]] == ["crisp", "opd", "sdpo", "grpo", "tip", "srpo"]
    absent = dict(index["absent"])
    assert "extra_info['solution']" in absent["opsd"] and "no annotator" in absent["trace"]
    for name, why in absent.items():
        assert f"not shown: {name}: {why}" in output


def test_every_method_has_its_own_teacher_input(shown):
    folder, _ = shown
    crisp, sdpo, tip = (content(folder, f"{name}_0") for name in ("crisp", "sdpo", "tip"))
    sent = [row["prompt"] for row in content(folder, "rollouts_0")["rows"]]
    assert tip["prompts"] == sent and not set(crisp["prompts"]) & set(sent)
    assert sdpo["taught"] == [1] * 12  # the first of each group is right; it reads the feedback, the others its answer
    assert sdpo["prompts"][0] != sdpo["prompts"][1]


def test_advantages_and_weights_of_a_policy_term_are_those_of_the_groups(run, shown):
    """Four samples of a prompt, the first right: by hand. Tokens count alike, and these weights have sampled."""
    folder, rows = shown[0], recorded.read(run, 1)
    grpo, srpo, student = (content(folder, f"{name}_0") for name in ("grpo", "srpo", "rollouts"))
    scores = torch.tensor([1.0, 0, 0, 0])
    expected = ((scores - scores.mean()) / scores.std()).tolist()
    advantages = np.concatenate([[expected[row["sample"]]] * len(row["responses"]) for row in rows])
    reward, weight, push = (unpacked(grpo[name]) for name in ("reward", "policy", "push"))
    assert reward == pytest.approx(advantages, abs=1e-3) and weight == pytest.approx(advantages, abs=1e-3)
    assert unpacked(grpo["gate"]).tolist() == unpacked(grpo["ratio"]).tolist() == [1.0] * len(reward)
    chance = np.exp(unpacked(student["log_prob"]))
    assert push == pytest.approx(weight * (1 - chance), abs=1e-3)  # the gradient of the token's own logit
    assert grpo["there"] == [1] * 12 and grpo["taught"] == [0] * 12 and "divergence" not in grpo
    # SRPO: failures have a teacher in place of the reward.
    assert srpo["there"] == [1] * 12 and srpo["taught"] == [int(row["sample"] > 0) for row in rows]
    taught = np.concatenate([[row["sample"] > 0] * len(row["responses"]) for row in rows])
    assert not unpacked(srpo["reward"])[taught].any() and unpacked(srpo["reward"])[~taught] == pytest.approx(
        advantages[~taught], abs=1e-3
    )
    assert unpacked(srpo["weight"])[taught].mean() > 0.5 and not unpacked(srpo["weight"])[~taught].any()
    assert np.abs(unpacked(srpo["push"])[~taught]).max() > 0.1  # by the reward alone
    said = {method["name"]: method for method in content(folder, "index")["methods"]}
    assert said["grpo"]["stats"]["rewarded"] == 1.0 and said["grpo"]["stats"]["held"] == 0.0
    assert any("every ratio is 1" in note for note in said["grpo"]["notes"])


def test_alarms_of_a_run_are_on_its_map(run, tmp_path):
    copy = tmp_path / "crisp"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("inspect"))
    raised = [
        Record(1, "entropy", "entropy is a tenth of the first steps'", "warn"),
        Record(4, "divergence", "divergence is 9 times the window's", "rollback", to=0),
    ]
    append(copy, raised)
    assert opd(copy, "--step", "0", "--methods", "crisp", "--limit", 2).exit_code == 0
    found = content(copy / "inspect/step_0", "index")["alarms"]
    assert [(alarm["step"], alarm["alarm"], alarm["done"], alarm["undone"]) for alarm in found] == [
        (1, "entropy", "warn", False),
        (4, "divergence", "rollback to step 0", True),
    ]


def test_a_map_is_not_overwritten_unless_one_says_so(run, shown, tmp_path):
    again = opd(run, "--step", "0", "--methods", "crisp")
    assert again.exit_code == 2 and "--force" in again.stderr and len(again.stderr.strip().splitlines()) == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    foreign = opd(run, "--step", "0", "--methods", "crisp", "--out", tmp_path / "mine", "--force")
    assert foreign.exit_code == 2 and (tmp_path / "mine/notes.txt").read_text() == "mine"


def test_a_limit_cuts_what_is_shown_and_not_what_a_step_divides_by(run, shown, tmp_path):
    assert opd(run, "--step", "0", "--methods", "crisp", "--limit", 5, "--out", tmp_path / "map").exit_code == 0
    few, all_of_them = (content(folder, "crisp_0") for folder in (tmp_path / "map", shown[0]))
    weights = unpacked(few["weight"])
    assert few["taught"] == [1] * 5
    assert weights == pytest.approx(unpacked(all_of_them["weight"])[: len(weights)], abs=1e-4)
    assert json.loads((tmp_path / "map/inspect.json").read_text())["rollouts"] == 5
    assert "100% (5 of 5 rollouts)" in (tmp_path / "map.log").read_text()


@pytest.mark.parametrize(
    "words, said",
    [
        (["--methods", "crips"], "Did you mean crisp?"),
        (["--rollouts", "7"], "there are step 1"),
        (["--rollouts", "x"], "must be a step"),
        (["--limit", "0"], "at least 1"),
        (["--methods", "opsd"], "None of the methods"),
        (["--methods", "opd"], "--teacher MODEL"),
        (["--device", "tpu"], "cpu, cuda"),
    ],
)
def test_what_cannot_be_shown_is_refused_in_one_sentence(run, tmp_path, words, said):
    answer = opd(run, "--step", "0", "--out", tmp_path / "map", *words)
    assert answer.exit_code == 2 and answer.stderr.startswith("opd inspect: ") and said in answer.stderr
    assert not (tmp_path / "map").exists()


def test_a_folder_without_ids_is_refused(run, tmp_path):
    (tmp_path / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    answer = opd(tmp_path, "--step", "0")
    assert answer.exit_code == 2 and "before rollouts were kept as token ids" in answer.stderr
    assert opd(run).exit_code == 2 and "no checkpoints" in opd(run).stderr


def test_a_teacher_that_no_run_kept_is_mixed_of_what_was_saved_and_that_is_said(run, monkeypatch):
    config = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
    root = run / "mixed" / "checkpoints"
    for step in (10, 20):
        (root / f"global_step_{step}").mkdir(parents=True)
    weights = Weights(run, Source(run, 20, root / "global_step_20", config), config)
    monkeypatch.setattr(weights, "student", lambda step: f"step {step}")
    sdpo: Method = method("sdpo", config, None)
    mixture = weights.teacher(sdpo, own=False)
    assert sum(mixture.values()) == pytest.approx(1.0)
    assert mixture["step 0"] == pytest.approx(0.95**20 + sum(0.05 * 0.95 ** (20 - s) for s in range(1, 6)))
    assert "not keep this teacher's weights" in sdpo.notes[-1]
    crisp = method("crisp", config, None)  # copied every 20th step
    assert weights.teacher(crisp, own=False) == {"step 20": 1.0} and crisp.notes == []
    TrainerState(20, teacher_version=0).write(root / "global_step_20")
    assert weights.teacher(crisp, own=True) == {weights.initial: 1.0}


def test_a_mixture_of_models_has_the_mean_of_their_weights(models):
    mixed = LocalModel({str(models[0]): 0.25, str(models[1]): 0.75}, "cpu").model.state_dict()
    first, second = (LocalModel({str(path): 1.0}, "cpu").model.state_dict() for path in models)
    for name, tensor in mixed.items():
        torch.testing.assert_close(tensor, 0.25 * first[name] + 0.75 * second[name])


def test_rows_of_a_padded_batch_are_those_of_each_sequence_alone(models):
    model = LocalModel({str(models[0]): 1.0}, "cpu")
    sequences = [([5, 6, 7, 8], 2), (None, 3), ([9, 5], 1), (list(range(30, 70)), 33), ([4, 4], 0)]
    together = model.response_rows(sequences)
    assert [len(rows) for rows in together] == [2, 0, 1, 33, 0]
    for sequence, rows in zip(sequences, together, strict=True):
        (alone,) = model.response_rows([sequence])
        torch.testing.assert_close(rows, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(browser.PROGRAM is None, reason="no Chromium here (Debian: apt-get install chromium)")
def test_the_map_opens_and_is_clicked_through_without_an_error(shown):
    folder, _ = shown

    async def look():
        async with browser.browser() as tab:
            await tab.open(folder / "index.html", "typeof current !== 'undefined' && current !== null")
            for key in ("2", "3", "5", "]", "]", "ArrowRight", "d"):
                await tab.press(key)
            for method in ("4", "6", "1"):  # with a reward alone, with both, with a teacher alone
                await tab.press(method)
                seen = []
                for button in range(await tab.ask("$('signals').children.length")):
                    await tab.ask(f"$('signals').children[{button}].click()")
                    seen.append(await tab.ask("$('tokens').firstChild.tagName !== 'EM'"))
                dim = await tab.ask("[...$('signals').children].map((each) => !each.classList.contains('none'))")
                assert seen == dim and 0 < sum(seen) <= len(seen)
            await tab.until("state.at === 1 && current.row.sample === 1")
            await tab.ask("document.querySelector('#tokens span').click()")
            assert await tab.ask("$('tip').hidden") is False
            assert await tab.ask("document.querySelectorAll('#tip .bar').length") == 10
            assert await tab.ask("document.querySelectorAll('.strip').length") == 7
            return tab.errors, await tab.ask("document.querySelectorAll('#tokens span').length")

    errors, tokens = asyncio.run(look())
    assert errors == []
    assert tokens == content(folder, "rollouts_0")["lengths"][1]
    assert len(whole(content(folder, "rollouts_0")["ids"])) == sum(content(folder, "rollouts_0")["lengths"])


@pytest.mark.skipif(browser.PROGRAM is None, reason="no Chromium here (Debian: apt-get install chromium)")
def test_the_time_that_a_browser_takes_is_measured(run, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("credit_map")
    out = tmp_path / "result.json"
    module.main(run, 30, 12, ["crisp"], "0", 1, "2026-01-01", out)
    result = json.loads(out.read_text())
    assert result["rollouts"] == 30 and result["distinct"] == 12 and min(result["seconds_median"].values()) > 0
