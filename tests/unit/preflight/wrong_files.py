# SPDX-License-Identifier: Apache-2.0
"""Wrong data, models and graders."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .conftest import World, config_with, row, rows
from .wrong import GRADER, MODEL, ROLLOUT, grader, model, user, wrong


def _lower_case(folder: Path) -> None:
    """A tokenizer that reads every text in lower case."""
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": {"type": "Lowercase"}}))


def _in_an_older_format(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _without_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def _without_tools(folder: Path) -> None:
    """A chat template that knows two roles, and says so."""
    file = folder / "chat_template.jinja"
    refusal = "{%- if message.role == 'tool' -%}{{- raise_exception('who is that') -}}{%- endif -%}"
    opening = "{%- for message in messages -%}"
    file.write_text(file.read_text().replace(opening, opening + refusal))


TOOL_FILE = """
from verl.tools.function_tool import function_tool

@function_tool()
def bill_of(a: int) -> int:
    '''The bill.

    Args:
        a: of whom.
    '''
    return a
"""


DATA = [
    wrong(
        "a question that is empty",
        lambda w: w.parquet(rows(prompt=[{"role": "user", "content": "  "}])),
        "64 of 64 rows ask nothing",
    ),
    wrong("a file that is not there", "data.train_files=nowhere.parquet", "data.train_files=nowhere.parquet does not"),
    wrong("no validation file", "data.val_files=null", "data.val_files=None", "name a file"),
    wrong("a validation file that is null", "data.val_files=[null]", "data.val_files=[None]", "name a file"),
    wrong("a list of no validation files", "data.val_files=[]", "data.val_files=[]", "name a file"),
    wrong(
        "a validation set that is not there",
        "opd.validation.sets.aime24.n=32",
        "opd.validation.sets.aime24 is no data source of data.val_files",
        "set it to null",
    ),
    wrong(
        "an agent loop in a row that is not there",
        lambda w: w.lines([*rows(3, agent_name="tool_agent"), *rows(agent_name="mine")]),
        "row 3 has agent_name=mine",
        "single_turn_agent, tool_agent",
    ),
    wrong(
        "an agent loop in some rows alone",
        lambda w: w.parquet([*rows(3, agent_name="tool_agent"), *rows()]),
        "row 3 has agent_name=None",
    ),
    wrong(
        "a file of agent loops without names",
        lambda w: f"{ROLLOUT}.agent.agent_loop_config_path={w.file('a.yaml', '[{_target_: a.B}]')}",
        "agent_loop_config_path=",
        "must be a list of {name: ..., _target_: module.Class}",
    ),
    wrong(
        "a file of agent loops that is not there",
        f"{ROLLOUT}.agent.agent_loop_config_path=nowhere.yaml",
        "agent_loop_config_path=nowhere.yaml is not there",
    ),
    wrong("a folder", lambda w: w.folder, "is a folder"),
    wrong("a table of commas", lambda w: w.file("a.csv", "prompt\nx\n"), "suffix '.csv'", ".parquet"),
    wrong("a file of nothing", lambda w: w.file("a.parquet"), "is an empty file"),
    wrong("a page instead of parquet", lambda w: w.file("a.parquet", "<html>404</html>"), "no parquet file"),
    wrong(
        "half a parquet file", lambda w: w.file("b.parquet", w.parquet(rows()).read_bytes()[:900]), "no parquet file"
    ),
    wrong(
        "a pointer of Git LFS",
        lambda w: w.file("a.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "git lfs pull",
    ),
    wrong("a table without rows", lambda w: w.table(w.parquet(rows()), 0), "train_files=", "has no rows: fill it"),
    wrong(
        "a validation table without rows",
        lambda w: f"data.val_files={w.table(w.parquet(rows()), 0)}",
        "data.val_files=",
        "has no rows: fill it",
    ),
    wrong("lines of which one is broken", lambda w: w.file("a.jsonl", '{"prompt": []}\n{"pro\n'), "line 2 is no JSON"),
    wrong("lines that are no objects", lambda w: w.lines(["a", "b"]), "row 0 is no object"),
    wrong("text of another encoding", lambda w: w.file("a.jsonl", '{"p": "é"}'.encode("latin-1")), "in UTF-8"),
    wrong("questions without prompts", lambda w: w.lines([{"question": "1+1"}] * 64), "no column prompt", "question"),
    wrong("prompts of text", lambda w: w.parquet(rows(prompt="What is 1+1?")), "64 of 64 rows", "prompt that is text"),
    wrong("one prompt of nothing", lambda w: w.parquet([*rows(63), row(prompt=None)]), "1 of 64 rows", "row 63"),
    wrong("messages without role", lambda w: w.lines(rows(prompt=[{"content": "x"}])), "a message without role"),
    wrong("messages without content", lambda w: w.lines(rows(prompt=user(None))), "a message without content"),
    wrong("extra_info of text", lambda w: w.lines(rows(extra_info="x")), "64 of 64 rows", "extra_info that holds no"),
    wrong("extra_info of a list", lambda w: w.lines(rows(extra_info=[1])), "extra_info that holds no"),
    wrong("one row of no set", lambda w: w.lines([*rows(63), row(data_source=None)]), "row 63", "that is no text"),
    wrong("sets in a list", lambda w: w.lines(rows(data_source=["a"])), "data_source that is no text"),
    wrong(
        "a system message alone",
        lambda w: w.lines(rows(prompt=[{"role": "system", "content": "Be brief."}])),
        "no message of the user's",
    ),
    wrong(
        "a row of no teacher, behind those that are looked at",
        lambda w: (
            f"data.train_files={w.parquet([*rows(2050), row(1, data_source='riddles')])}\nopd.teacher_key=data_source\n"
            "opd.teachers={sums: {interval: 2}, own: {weights: live}}"
        ),
        "row 2050 has data_source=riddles, and opd.teachers are for sums, own",
    ),
    wrong(
        "rows without the field that names their teacher",
        "opd.teacher_key=subject opd.teachers={sums:{interval:2},own:{weights:live}}",
        "row 0 has no subject",
    ),
    wrong(
        "one of several teachers that is not there",
        "opd.teacher_key=data_source opd.teachers={sums:{weights:external,path:/nowhere/model}}",
        "opd.teachers.sums.path=/nowhere/model does not exist",
    ),
    wrong("prompts that are all too long", lambda w: w.lines(rows(prompt=user("12+" * 400))), "max_prompt_length=192"),
    wrong(
        "teacher prompts that leave no room for a response",
        lambda w: f"opd.context.text=text:{'Be brief. ' * 400}",
        "opd.max_pair_length=384 leaves no room",
    ),
    wrong("fewer rows than one batch", lambda w: w.parquet(rows(20)), "20 usable rows", "train_batch_size=32"),
    wrong(
        "grades to train on, but no answers",
        lambda w: f"method=grpo\ndata.train_files={w.parquet(rows(reward_model=...))}",
        "no column reward_model",
        "trains on grades",
    ),
    wrong(
        "grades to train on, but no source",
        lambda w: f"method=grpo\ndata.train_files={w.parquet(rows(data_source=...))}",
        "no column data_source",
    ),
    wrong(
        "an answer that is null",
        lambda w: w.lines([*rows(63), row(reward_model={"ground_truth": None})]),
        "1 of 64 rows have no reward_model.ground_truth",
    ),
    wrong(
        "an answer that is not a number",
        lambda w: (
            w.parquet([*rows(63), row(reward_model={"ground_truth": float("nan")})], "n.parquet")
            and w.lines([*rows(63), row(reward_model={"ground_truth": float("nan")})])
        ),
        "no reward_model.ground_truth",
    ),
    wrong("answers as text", lambda w: w.lines(rows(reward_model="5")), "reward_model must be"),
    wrong(
        "files that differ in their columns",
        lambda w: (
            f"data.train_files=[{w.parquet(rows(), 'a.parquet')},{w.parquet(rows(data_source=...), 'b.parquet')}]"
        ),
        "no column data_source, but",
    ),
    wrong(
        "solutions to show, but none there",
        lambda w: f"method=opsd\ndata.train_files={w.parquet(rows(extra_info={'index': 0}))}",
        "opd.context.kind=solution cannot show row 0",
    ),
]

W = "model.safetensors"
SHARED = "trainer.n_gpus_per_node=2\nactor_rollout_ref.actor.ulysses_sequence_parallel_size=2"
MODELS = [
    wrong("a folder that is not there", f"{MODEL}=/nowhere/model", "/nowhere/model does not exist"),
    wrong("a relative folder that is not there", f"{MODEL}=nowhere/model", "no folder here", "hub"),
    wrong("a model of the hub, and no hub", f"{MODEL}=Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B is no folder here", "hub"),
    wrong("a file", lambda w: f"{MODEL}={w.file('model.bin', 'x')}", "is a file"),
    wrong("an empty folder", lambda w: f"{MODEL}={World(w.folder / 'empty').folder}", "no config.json"),
    wrong("a config that is no JSON", model(lambda m: (m / "config.json").write_text("{oops")), "config.json"),
    wrong(
        "logits that change behind the head",
        model(config_with(logits_scaling=8.0)),
        "changes logits after its lm_head (logits_scaling=8.0)",
    ),
    wrong(
        "a head with a bias",
        model(lambda m: save_file(load_file(m / W) | {"lm_head.bias": torch.zeros(4)}, m / W, {"format": "pt"})),
        "has a bias in its lm_head",
    ),
    wrong(
        "a model that verl builds without a head",
        model(config_with(model_type="gpt2", architectures=["GPT2LMHeadModel"])),
        "(gpt2) is GPT2LMHeadModel, which verl builds without an lm_head",
    ),
    wrong(
        "a model whose positions are a grid",
        model(config_with(model_type="qwen2_vl", architectures=["Qwen2VLForConditionalGeneration"])),
        "(qwen2_vl) takes positions in a grid",
        "text-only sibling",
    ),
    wrong(
        "a model without this attention",
        model(config_with(model_type="gpt_oss", architectures=["GptOssForCausalLM"], num_local_experts=4)),
        "(gpt_oss) has no sdpa in transformers",
        "attn_implementation=eager",
    ),
    wrong(
        "more tokens than the model has positions",
        model(config_with(max_position_embeddings=256)),
        "rollout.max_model_len=",
        "is more than the 256 positions",
    ),
    wrong(
        "weights of which a projection cannot be read alone",
        lambda w: f"method=opd\nteacher_server=vllm_cpu\nopd.teacher.path={w.model(_in_an_older_format)}",
        "opd.teacher.path=",
        "has no safetensors",
    ),
    wrong(
        "a served teacher with code of its own",
        lambda w: (
            "method=opd\nteacher_server=vllm_cpu\nactor_rollout_ref.model.trust_remote_code=true\n"
            f"opd.teacher.path={w.model(config_with(auto_map={'AutoModelForCausalLM': 'modeling.Mine'}))}"
        ),
        "opd.teacher.path=",
        "code of its own",
        "backend=engine",
    ),
    wrong(
        "heads that ranks cannot share",
        lambda w: f"{MODEL}={w.model(config_with(num_attention_heads=3, num_key_value_heads=3))}\n{SHARED}",
        "has 3 heads of queries and 3 of keys",
        "size=2 ranks cannot share",
    ),
    wrong(
        "a teacher's heads that ranks cannot share",
        lambda w: (
            f"method=opd\n{SHARED}\n"
            f"opd.teacher.path={w.model(config_with(num_attention_heads=3, num_key_value_heads=3))}"
        ),
        "opd.teacher.path=",
        "has 3 heads of queries and 3 of keys",
    ),
    wrong(
        "layers that ranks cannot share",
        lambda w: (
            f"{MODEL}={w.model(config_with(model_type='nemotron', architectures=['NemotronForCausalLM']))}\n{SHARED}"
        ),
        "has nemotron attention layers, which ranks cannot share",
        "ulysses_sequence_parallel_size=1",
    ),
    wrong("a config without architectures", model(config_with(architectures=None)), "names no architectures"),
    wrong(
        "activations that leave where the head is computed again",
        lambda w: (
            f"{MODEL}={w.model(config_with(tie_word_embeddings=False))}\n"
            "actor_rollout_ref.model.enable_activation_offload=true\n"
            "actor_rollout_ref.model.enable_gradient_checkpointing=true"
        ),
        "enable_activation_offload=true",
        "set the former to false",
    ),
    wrong("an architecture that nobody knows", model(config_with(model_type="nope")), "transformers can read"),
    wrong(
        "no tokenizer",
        model(lambda m: [file.unlink() for file in m.glob("*token*")]),
        "no tokenizer",
    ),
    wrong("half a tokenizer", model(lambda m: (m / "tokenizer.json").write_text('{"a":')), "no tokenizer that loads"),
    wrong("no chat template", model(lambda m: (m / "chat_template.jinja").unlink()), "custom_chat_template"),
    wrong(
        "a chat template that is broken",
        model(lambda m: (m / "chat_template.jinja").write_text("{% for x in %}")),
        "cannot render a question",
    ),
    wrong(
        "a chat template that leaves the question out",
        model(lambda m: (m / "chat_template.jinja").write_text("foo")),
        "renders a question without its text",
    ),
    wrong(
        "an adapter for a module that is not there",
        lambda w: (
            f"{MODEL}={w.model()}\nactor_rollout_ref.model.lora_rank=4\nopd.teacher.weights=live\n"
            "actor_rollout_ref.model.lora.merge=true\nactor_rollout_ref.model.target_modules=[nope]"
        ),
        "target_modules names nope",
        "all-linear",
    ),
    wrong("no weights", model(lambda m: (m / "model.safetensors").unlink()), "holds no weights"),
    wrong("weights of nothing", model(lambda m: (m / "model.safetensors").write_bytes(b"")), "is empty"),
    wrong("half the weights", model(lambda m: (m / "model.safetensors").write_bytes(b"0" * 99)), "no whole file"),
    wrong(
        "a weight file that an index names is missing",
        model(lambda m: (m / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')),
        "misses 1 of 1 weight files, first b.safetensors",
    ),
    wrong(
        "a teacher that reads another text",
        lambda w: f"method=opd\nopd.teacher.tokenizer=own\nopd.teacher.path={w.model(_lower_case)}",
        "does not give back",
        "byte by byte",
    ),
    wrong(
        "a template that cannot go on behind a tool's answer",
        lambda w: (
            f"{ROLLOUT}.agent.default_agent_loop=tool_agent\n"
            f"{ROLLOUT}.multi_turn.function_tool_path={w.file('tools.py', TOOL_FILE)}\n"
            f"{MODEL}={w.model(_without_tools)}"
        ),
        "cannot go on behind a tool's answer: choose another chat template",
    ),
    wrong(
        "a teacher of another tokenizer that nobody can ask",
        lambda w: f"method=opd\nopd.teacher.tokenizer=own\nopd.teacher.path={w.model(_without_template)}",
        "has no chat template, by which it would be asked",
    ),
    wrong(
        "a teacher without a tokenizer",
        lambda w: f"method=opd\nopd.teacher.path={w.model(lambda m: [f.unlink() for f in m.glob('*token*')])}",
        "opd.teacher.path",
        "no tokenizer",
    ),
]

GRADERS = [
    wrong("a grader that is not there", f"{GRADER}.path=/nowhere/grader.py", "grader.py", "cannot be loaded"),
    wrong("a grader of another name", grader("def grade(**kwargs): return 0.0"), "compute_score", "cannot be loaded"),
    wrong("a grader with a syntax error", grader("def compute_score(:"), "cannot be loaded", "SyntaxError"),
    wrong("a grader of other arguments", grader("def compute_score(text): return 0.0"), "must take data_source"),
    wrong(
        "a grader that fails",
        grader("def compute_score(extra_info, **kwargs): return extra_info['unit_tests']"),
        "fails on the first row",
        "KeyError: 'unit_tests'",
    ),
    wrong("a grader without a score", grader("def compute_score(**kwargs): return {'acc': 1.0}"), "without 'score'"),
    wrong("a grader of words", grader("def compute_score(**kwargs): return 'good'"), "finite number"),
    wrong("a manager that is not there", "reward.reward_manager.name=nobody", "cannot be loaded", "nobody"),
    wrong(
        "the toy's grader on real answers",
        lambda w: w.parquet(rows(reward_model={"ground_truth": "\\frac{1}{2}"})),
        "fails on the first row",
        "whole numbers",
    ),
    wrong(
        "a reference in a later row that no response can match",
        lambda w: (
            f"data.train_files={w.parquet([*rows(63), row(reward_model={'ground_truth': 'nan'})])}\n"
            f"{GRADER}.path=pkg://opd_ext.rewards.math_dual"
        ),
        "1 of 64 rows cannot be graded, the first is row 63",
        "'nan' says that there is none",
    ),
    wrong(
        "a module of the user's with a syntax error",
        lambda w: f"opd.external_lib=broken_module{w.file('broken_module.py', 'def (') and ''}",
        "broken_module cannot be imported",
        "SyntaxError",
    ),
]
