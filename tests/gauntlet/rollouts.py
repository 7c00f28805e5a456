# SPDX-License-Identifier: Apache-2.0
"""Situations between a prompt and a batch: verl's own agent loops, its data set and its queue, our teacher's side."""

import asyncio
from types import SimpleNamespace

import pandas as pd
from tokenizers import Tokenizer, models
from transfer_queue import KVBatchMeta
from transformers import AutoTokenizer
from transformers.utils import get_json_schema

from opd_ext.bridge.agent_loop import OPDAgentLoopWorker
from opd_ext.bridge.rollouts import read_rows
from opd_ext.bridge.teacher_inputs import Desk, plan_teacher_inputs, put_teacher_inputs
from opd_ext.config import schema
from opd_ext.context.base import get_context
from opd_ext.context.sequence import render
from opd_ext.tokens.dataset import TokenDataset
from opd_ext.tokens.tables import TRAINING, content_key, write_table
from tests.gauntlet.engines import agrees
from tests.stack.engine_harness import Rank
from tests.stack.engine_inputs import Sample, Update
from tests.unit.bridge.contract.seams import bare

CHATS = [[{"role": "user", "content": f"What is {'1+' * n}1?"}] for n in (0, 3, 9, 20)]
RESPONSES = ["4.", "It is 4, since 2+2 is 4 and nothing else.", "", "Answer: 4"]


async def graded_right(self, outputs, kwargs):
    outputs[-1].reward_score = 1.0


def put_rollouts(
    config, queue, monkeypatch, tokenizer, score=graded_right, tools=None, end=None, validation_of=None
) -> KVBatchMeta:
    """What the agent loop puts into the queue for the chats and responses above, sent with ``tools``.

    ``validation_of``: the names of four prompts that are validated instead.
    """
    from verl.experimental.agent_loop.agent_loop import AgentLoopOutput
    from verl.trainer.ppo.v1 import agent_loop_tq

    async def put(keys, fields, tags, partition_id):
        queue.kv_batch_put(keys=keys, fields=fields, tags=tags, partition_id=partition_id)

    monkeypatch.setattr(agent_loop_tq.tq, "async_kv_batch_put", put)
    monkeypatch.setattr(OPDAgentLoopWorker.__mro__[1], "_compute_score", score)
    parts = {"config": config, "processor": None, "hf_model_type": None}
    worker = bare(
        OPDAgentLoopWorker,
        **parts,
        distillation_enabled=False,
        annotator=None,
        stop_ids=[370],
        opd=schema.load(config.opd),
    )
    for i, (chat, text) in enumerate(zip(CHATS, RESPONSES, strict=True)):
        prompt = render(tokenizer, chat, {"tools": tools})
        response = [*tokenizer.encode(text), tokenizer.eos_token_id if end is None else end]
        output = AgentLoopOutput(
            prompt_ids=prompt, response_ids=response, response_mask=[1] * len(response), metrics={}
        )
        uid = f"t1p{i}" if validation_of is None else validation_of[i]
        sample = {"uid": uid, "session_id": 0, "raw_prompt": chat, "global_steps": 1, "data_source": "sums"}
        sample |= {"extra_info": {"index": i, "solution": "Count."}, "reward_model": {"ground_truth": "4"}, "index": i}
        asyncio.run(worker._agent_loop_postprocess(output, validation_of is not None, **sample))
    partition = "train" if validation_of is None else "val"
    keys = sorted(queue.kv_list(partition)[partition])
    return KVBatchMeta(partition_id=partition, keys=keys, tags=[{} for _ in keys])


def plan(batch, tokenizer, text: str, limit: int):
    context = get_context("instruction")(text=text)
    rows = read_rows(batch, tokenizer, max_tokens=64, stops=[tokenizer.eos_token_id])
    inputs, metrics = plan_teacher_inputs(
        rows,
        batch,
        [Desk(context)],
        tokenizer,
        template_kwargs={},
        tools=None,
        max_pair_length=limit,
        step=1,
    )
    wanted = [render(tokenizer, context.messages({"raw_prompt": chat})) for chat in CHATS]
    return inputs, metrics, wanted


def padding_between_prompt_and_answer(config, queue, monkeypatch, rank: Rank, model) -> None:
    """Four rollouts of verl's agent loop, as the engine reads them: no pad anywhere, and float64's loss."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    batch = put_rollouts(config, queue, monkeypatch, tokenizer)
    inputs, _, _ = plan(batch, tokenizer, "v2", 2048)
    put_teacher_inputs(batch, inputs, tokenizer.eos_token_id)
    data = queue.kv_batch_get(keys=batch.keys, partition_id="train")
    columns = {name: [row.tolist() for row in data[name].unbind()] for name in COLUMNS}
    samples = []
    for i, (chat, text) in enumerate(zip(CHATS, RESPONSES, strict=True)):
        prompt, response = render(tokenizer, chat), [*tokenizer.encode(text), tokenizer.eos_token_id]
        mine = {name: column[i] for name, column in columns.items()}
        assert mine["input_ids"] == prompt + response and mine["loss_mask"] == [1] * len(response)
        n = len(response)
        teacher = mine["teacher_input_ids"][:-n]
        assert mine["teacher_input_ids"][-n:] == response and tokenizer.pad_token_id not in mine["input_ids"]
        samples.append(Sample(prompt, teacher, response, mine["loss_mask"], [0.0] * n, [0.0] * n, [0] * n))
    agrees(rank, Update(samples, model="base", teacher="base", budget=2048, teacher_budget=2048))


COLUMNS = ("input_ids", "prompts", "responses", "loss_mask", "teacher_input_ids")


def long_teacher_prompts(config, queue, monkeypatch, model) -> None:
    """The student's limit is no limit of the teacher's, and what does not fit its own is left out whole."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    config.data.max_prompt_length = config.actor_rollout_ref.rollout.prompt_length = 64
    batch = put_rollouts(config, queue, monkeypatch, tokenizer)
    text = "text:" + "Be brief, and say why. " * 60
    inputs, metrics, wanted = plan(batch, tokenizer, text, 4096)
    assert min(map(len, wanted)) > 4 * 64 and metrics["rollout/too_long"] == 0.0
    for found, prompt, answer in zip(inputs, wanted, RESPONSES, strict=True):
        assert found.ids == [*prompt, *tokenizer.encode(answer), tokenizer.eos_token_id]
    limit = len(wanted[0]) + len(tokenizer.encode(RESPONSES[0])) + 1
    inputs, metrics, _ = plan(batch, tokenizer, text, limit)
    assert [found.ids is None for found in inputs] == [False, True, True, True]
    assert (metrics["rollout/too_long"], metrics["teacher/samples"]) == (0.75, 0.25)


# ---------------------------------------------------------------------- several turns

THOUGHTLESS = (  # as Qwen3's: thoughts of earlier turns leave the history
    "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = '<think>I add.</think><tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>'


def thoughts_that_leave_the_history(config, model) -> None:
    """verl's tool loop goes on from the sampled ids: the second request has the first in front, thoughts included."""
    from verl.experimental.agent_loop.agent_loop import DictConfigWrap
    from verl.experimental.agent_loop.tool_agent_loop import ToolAgentLoop, ToolListWrap
    from verl.tools.function_tool import FunctionTool
    from verl.tools.schemas import OpenAIFunctionToolSchema
    from verl.utils.dataset.rl_dataset import RLHFDataset
    from verl.workers.rollout.replica import TokenOutput

    def add(a: int, b: int) -> int:
        """Add.

        Args:
            a: one.
            b: other.
        """
        return a + b

    schema = OpenAIFunctionToolSchema.model_validate(get_json_schema(add))
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = THOUGHTLESS
    end, requests = [tokenizer.eos_token_id], []
    replies = [[*tokenizer.encode(text), *end] for text in (CALL, "<think>Now I know.</think>3")]

    async def generate(prompt_ids, **_):
        requests.append(list(prompt_ids))
        return TokenOutput(token_ids=replies[len(requests) - 1])

    async def run():
        loop = ToolAgentLoop(
            DictConfigWrap(config),
            SimpleNamespace(generate=generate),
            tokenizer,
            None,
            RLHFDataset,
            DictConfigWrap(config.data),
            tools=ToolListWrap([FunctionTool("add", add, schema)]),
        )
        return await loop.run({}, raw_prompt=[{"role": "user", "content": "1+2?"}])

    config.actor_rollout_ref.rollout.response_length = 512
    output = asyncio.run(run())
    first, second = requests
    assert second[: len(first) + len(replies[0])] == first + replies[0]
    assert output.prompt_ids == first and output.prompt_ids + output.response_ids == second + replies[1]
    trained = [token for token, mask in zip(output.response_ids, output.response_mask, strict=True) if mask]
    assert trained == replies[0] + replies[1]


TOOL = """
from verl.tools.function_tool import function_tool

@function_tool()
def add_up(a: int, b: int) -> int:
    '''Add two numbers, which is what most of the questions here ask for.

    Args:
        a: one of the two numbers, as a whole number and without a sign.
        b: the other of the two numbers, as a whole number and without a sign.
    '''
    return a + b
"""


# ---------------------------------------------------------------------- text and its tokens


def line_breaks_that_merge(tmp_path) -> None:
    """A prompt that ends with a line break, a response that begins with two: as text, three of them are other ids."""
    vocabulary = {"a": 0, "b": 1, "\n": 2, "\n\n": 3, "$": 4}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("\n", "\n")]))
    prompt, response = tokenizer.encode("a\n").ids, [*tokenizer.encode("\n\nb").ids, 4]
    assert tokenizer.encode(tokenizer.decode(prompt + response)).ids != prompt + response
    row = {"key": content_key(prompt, response), "prompt_ids": prompt, "response_ids": response}
    write_table(tmp_path / "samples.parquet", pd.DataFrame([row | {"finish_reason": "stop"}]), TRAINING)
    (item,) = TokenDataset(tmp_path / "samples.parquet", 16, stop_ids=[4])
    assert item["input_ids"].tolist() == prompt + response
    assert item["input_ids"][item["loss_mask"].bool()].tolist() == response


def overlong_prompts(config, model, tmp_path) -> None:
    """verl's filter keeps exactly the prompts that fit as they are sent: in their template, with their tools."""
    from verl.utils.dataset.rl_dataset import RLHFDataset

    from opd_ext.bridge.inputs import tool_schemas

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = THOUGHTLESS  # it shows tools
    chats = [[{"role": "user", "content": f"What is {'1+' * n}1?"}] for n in range(60)]
    path = tmp_path / "data.parquet"
    pd.DataFrame([{"prompt": chat, "data_source": "sums"} for chat in chats]).to_parquet(path)
    (tmp_path / "tools.py").write_text(TOOL)
    for tools in (None, str(tmp_path / "tools.py")):
        config.data.function_tool_path = tools
        sent = [len(render(tokenizer, chat, {"tools": tool_schemas(config)})) for chat in chats]
        text = [len(tokenizer.encode(chat[0]["content"])) for chat in chats]
        config.data.max_prompt_length = limit = sorted(sent)[30]
        kept = RLHFDataset(str(path), tokenizer, config.data)
        fitting = [chat for chat, n in zip(chats, sent, strict=True) if n <= limit]
        assert [list(map(dict, row["raw_prompt"])) for row in kept] == fitting
        assert len(kept) < sum(n <= limit for n in text)
    assert limit > len(render(tokenizer, chats[-1]))  # without their tools all would have fitted
