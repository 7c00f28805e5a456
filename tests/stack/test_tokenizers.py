# SPDX-License-Identifier: Apache-2.0
"""A teacher of another tokenizer on the whole stack: OPD with the miniature world's large model in other tokens.

Two copies of that model. One has its vocabulary in another order, so that its ids mean other tokens: what it says is
what the model itself says. The other has no words, only bytes: its tokens are other pieces of the text.
"""

import json

import pytest
import torch

from opd_ext import recorded
from tests.stack.conftest import metrics

pytestmark = pytest.mark.slow

SETTINGS = ["method=opd", "trainer.total_training_steps=1", "opd.teacher.tokenizer=own"]


def _copied(large, folder, change):
    """The model with its BPE vocabulary put through ``change`` (token -> id, of the same ids), its rows with it."""
    from transformers import AutoTokenizer, Qwen3ForCausalLM

    AutoTokenizer.from_pretrained(large).save_pretrained(folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    before = content["model"]["vocab"]
    content["model"]["vocab"] = after = change(before)
    file.write_text(json.dumps(content))
    model = Qwen3ForCausalLM.from_pretrained(large)
    moved = torch.arange(model.config.vocab_size)
    for token, i in after.items():
        moved[i] = before[token]
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.weight.copy_(module.weight[moved].clone())
            if model.config.tie_word_embeddings:
                break
    model.save_pretrained(folder)
    return folder


def _backwards(vocabulary):
    return {token: len(vocabulary) - 1 - i for token, i in vocabulary.items()}


def _without_words(vocabulary):
    return {token: i for token, i in vocabulary.items() if len(token) == 1}


@pytest.fixture(scope="module")
def runs(train, tmp_path_factory):
    base, large = tmp_path_factory.mktemp("tokenizers"), train.world / "tinymath" / "large"
    train(base / "alike", *SETTINGS[:2])
    for name, change in (("backwards", _backwards), ("bytes", _without_words)):
        teacher = _copied(large, base / f"teacher_{name}", change)
        train(base / name, *SETTINGS, f"opd.teacher.path={teacher}")
    return base


def test_all_have_the_same_rollouts(runs):
    texts = [[row["responses"] for row in recorded.read(runs / name, 1)] for name in ("alike", "backwards", "bytes")]
    assert texts[0] == texts[1] == texts[2] and len(texts[0]) >= 8


def test_other_ids_for_the_same_tokens_change_nothing(runs):
    """Responses in which a word was sampled in pieces apart, of which there are few: the teacher reads it as a word."""
    alike, other = (metrics(runs / name)[0] for name in ("alike", "backwards"))
    assert other["byte_spans/covered"] == 1.0 and 1.0 <= other["byte_spans/tokens"] < 1.02
    for name in ("opd/loss", "opd/divergence", "opd/grad_norm"):
        # float32 sums in another order, through softmax and spans
        assert other[name] == pytest.approx(alike[name], rel=1e-3 if other["byte_spans/tokens"] > 1 else 1e-5)
    assert other["opd/teacher_entropy"] == pytest.approx(alike["opd/teacher_entropy"], rel=1e-3)


def test_what_a_teacher_of_bytes_says_is_what_its_model_says_of_the_text(runs):
    """Without anything of the package: the text, the teacher's own tokenizer, both models' logits, sums by position."""
    from transformers import AutoTokenizer, Qwen3ForCausalLM

    student_path, teacher_path = _student(runs), runs / "teacher_bytes"
    student, teacher = (Qwen3ForCausalLM.from_pretrained(path).double().eval() for path in (student_path, teacher_path))
    mine, theirs = (AutoTokenizer.from_pretrained(path) for path in (student_path, teacher_path))
    total, tokens = 0.0, 0
    for row in recorded.read(runs / "bytes", 1):
        body = [i for i in row["responses"] if i != mine.eos_token_id]
        ids = theirs(mine.decode(body), add_special_tokens=False)["input_ids"]
        ids += [theirs.eos_token_id] * (len(row["responses"]) - len(body))
        asked = theirs.apply_chat_template(row["raw_prompt"], add_generation_prompt=True, return_dict=False)
        gap = _log_prob(student, row["prompts"], row["responses"]) - _log_prob(teacher, list(asked), ids)
        total, tokens = total + gap, tokens + len(row["responses"])
    said = metrics(runs / "bytes")[0]
    assert said["byte_spans/covered"] == 1.0 and 1.0 <= said["byte_spans/tokens"] < 1.02
    assert said["opd/divergence"] == pytest.approx(total / tokens, rel=1e-4)  # float32 beside float64


def _student(runs):
    import yaml

    return yaml.safe_load((runs / "bytes" / "config.yaml").read_text())["actor_rollout_ref"]["model"]["path"]


@torch.no_grad()
def _log_prob(model, prompt, response) -> float:
    logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logits.gather(-1, torch.tensor(response)[:, None]).sum().item()
