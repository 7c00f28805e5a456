# SPDX-License-Identifier: Apache-2.0
"""Wrong configurations, data sets, models and graders: each is one sentence, before anything is started."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from .conftest import World, config_with, row, rows

MODEL, BUCKET = "actor_rollout_ref.model.path", "actor_rollout_ref.rollout.checkpoint_engine"
GRADER = "reward.custom_reward_function"
ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"


@dataclasses.dataclass(frozen=True)
class Case:
    """``words`` of the command, or a function that makes files in a world and returns them; what the sentence says."""

    name: str
    words: tuple[str, ...] | Callable[[World], tuple[str, ...]]
    says: tuple[str, ...]


def wrong(name: str, words: str | Callable[[World], object], *says: str) -> Case:
    """``words``: separated by blanks, or from a function; what that returns beside text is the training file."""
    if isinstance(words, str):
        return Case(name, tuple(words.split()), says)

    def made(world: World) -> tuple[str, ...]:
        found = words(world)
        return (f"data.train_files={found}",) if isinstance(found, Path) else tuple(str(found).split("\n"))

    return Case(name, made, says)


def grader(source: str, name: str = "compute_score") -> Callable[[World], str]:
    return lambda world: f"{GRADER}.path={world.file('grader.py', source)}\n{GRADER}.name={name}"


def model(spoil: Callable[[Path], object]) -> Callable[[World], str]:
    return lambda world: f"{MODEL}={world.model(spoil)}"


def _user(text: str | None) -> list[dict]:
    return [{"role": "user", "content": text}]


VALUES = [
    wrong("a negative rate", f"{ACTOR}.optim.lr=-1e-5", "optim.lr=-1e-05", "at least 0"),
    wrong("a rate in words", f"{ACTOR}.optim.lr=fast", "optim.lr=fast", "a number"),
    wrong("negative steps", "trainer.total_training_steps=-3", "total_training_steps=-3", "at least 1"),
    wrong("no steps", "trainer.total_training_steps=0", "total_training_steps=0", "at least 1"),
    wrong("steps in words", "trainer.total_training_steps=ten", "total_training_steps=ten", "whole number"),
    wrong("half a step", "trainer.total_training_steps=2.5", "total_training_steps=2.5", "whole number"),
    wrong("neither steps nor epochs", "trainer.total_training_steps=null", "trainer.total_epochs=null", "epochs end"),
    wrong("checkpoints every abc", "trainer.save_freq=abc", "save_freq=abc", "-1 for off"),
    wrong("validation every 0 steps", "trainer.test_freq=0", "test_freq=0", "-1 for off"),
    wrong("a negative seed", "opd.seed=-1", "opd.seed=-1", "at least 0"),
    wrong("no rollout", f"{ROLLOUT}.n=0", "rollout.n=0", "at least 1"),
    wrong("a batch of nothing", "data.train_batch_size=0", "train_batch_size=0", "at least 1"),
    wrong("a negative batch", "data.train_batch_size=-8", "train_batch_size=-8", "at least 1"),
    wrong("a negative temperature", f"{ROLLOUT}.temperature=-1", "temperature=-1", "above 0"),
    wrong("a nucleus above 1", f"{ROLLOUT}.top_p=1.5", "top_p=1.5", "at most 1"),
    wrong("an unknown logger", "trainer.logger=[wandbb]", "trainer.logger=wandbb", "Did you mean wandb?"),
    wrong("a logger that is not installed", "trainer.logger=[clearml]", "clearml", "install it"),
    wrong("verl's own trainer", "trainer.v1.trainer_mode=sync", "trainer_mode=sync", "opd"),
    wrong("another of verl's", "trainer.v1.trainer_mode=separate_async", "separate_async", "know nothing of a teacher"),
    wrong("two nodes on one machine", "trainer.nnodes=2", "trainer.nnodes=2", "RAY_ADDRESS"),
    wrong("sixteen ranks on a laptop", "trainer.n_gpus_per_node=16", "n_gpus_per_node=16", "num_cpus"),
    wrong("a GPU that is not there", "opd.device=cuda", "opd.device=cuda", "0 are visible"),
    wrong("a device for the trainer alone", "trainer.device=cuda", "trainer.device=cuda must be opd.device=cpu"),
    wrong("a key that nothing reads", f"{ACTOR}.grad_clip=0.1", f"{ACTOR}.grad_clip", "optim.clip_grad"),
    wrong("a context text that is no text", "opd.context.text=5", "opd.context.text=5", "a text"),
    wrong("an ending that does not exist", "method=opsd opd.context.ending=studnet", "ending='studnet'", "text:"),
    wrong("a module that is no name", "opd.external_lib=7", "opd.external_lib=7", "name of a module"),
    wrong("a presets folder that is not there", "--config-dir /nowhere/at/all", "/nowhere/at/all", "no folder"),
    wrong(
        "a divergence that is always 0",
        "opd.divergence.support=topk opd.divergence.k=1 opd.divergence.tail=renorm",
        "k=1 with tail=renorm",
        "gradient 0",
    ),
    wrong(
        "self-distillation of one rollout that nobody answers",
        f"method=sdpo opd.context.include_feedback=false {ROLLOUT}.n=1",
        "rollout.n=1",
        "at least 2",
    ),
]

OWN_RECIPE = "# @package _global_\ndata: {train_max_sample: 8}\n"

WORDS = [
    wrong("a method misspelt, alone", "crips", "method=crips", "Did you mean crisp?"),
    wrong("a method misspelt", "method=crips", "method=crips", "Did you mean crisp?"),
    wrong("a scale misspelt", "scale=cpu_tny", "scale=cpu_tny", "Did you mean cpu_tiny?"),
    wrong("a group misspelt", "methd=crisp", "methd does not exist", "Did you mean method?"),
    wrong("a place misspelt", "opd.techer.interval=3", "opd.techer", "Did you mean opd.teacher?"),
    wrong("a key misspelt", "trainer.total_training_step=3", "Did you mean trainer.total_training_steps?"),
    wrong("an added key that nobody reads", "+trainer.foo=1", "trainer.foo=1 is no key of verl's", "take it out."),
    wrong("an added key misspelt", "++trainer.save_freqq=3", "Did you mean trainer.save_freq?"),
    wrong("an added field misspelt", f"+{ACTOR}.optim.clipgrad=1", f"Did you mean {ACTOR}.optim.clip_grad?"),
    wrong("an added dtype misspelt", f"+{ACTOR}.fsdp_config.mixed_precision.param=fp32", "mixed_precision.param="),
    wrong("an added group", "+foo.bar=1", 'foo={"bar": 1} is no key'),
    wrong(
        "a key misspelt in a recipe of one's own",
        lambda w: f"--config-dir\n{w.file('presets/recipe/own.yaml', OWN_RECIPE).parents[1]}\nrecipe=own",
        "data.train_max_sample=8",
        "Did you mean data.train_max_samples?",
    ),
    wrong("an option misspelt", "--dryrun", "--dryrun is no option", "Did you mean --dry-run?"),
    wrong("a word that means nothing", "quickly", "quickly cannot be read", "KEY=VALUE"),
    wrong("a comma in a path", "data.train_files=/a,b.parquet", "write a list as", "'A,B'"),
    wrong("an open bracket", "data.train_files=[/a.parquet", "close its brackets"),
]

DATA = [
    wrong("a file that is not there", "data.train_files=nowhere.parquet", "data.train_files=nowhere.parquet does not"),
    wrong("no validation file", "data.val_files=null", "data.val_files=None", "name a file"),
    wrong("a list of no validation files", "data.val_files=[]", "data.val_files=[]", "name a file"),
    wrong(
        "a validation set that is not there",
        "opd.validation.sets.aime24.n=32",
        "opd.validation.sets.aime24 is no data source of data.val_files",
        "set it to null",
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
    wrong("messages without content", lambda w: w.lines(rows(prompt=_user(None))), "a message without content"),
    wrong(
        "a system message alone",
        lambda w: w.lines(rows(prompt=[{"role": "system", "content": "Be brief."}])),
        "no message of the user's",
    ),
    wrong("prompts that are all too long", lambda w: w.lines(rows(prompt=_user("12+" * 400))), "max_prompt_length=192"),
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
    wrong("no weights", model(lambda m: (m / "model.safetensors").unlink()), "holds no weights"),
    wrong("weights of nothing", model(lambda m: (m / "model.safetensors").write_bytes(b"")), "is empty"),
    wrong("half the weights", model(lambda m: (m / "model.safetensors").write_bytes(b"0" * 99)), "no whole file"),
    wrong(
        "a weight file that an index names is missing",
        model(lambda m: (m / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')),
        "misses 1 of 1 weight files, first b.safetensors",
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

MACHINE = [
    wrong("a run folder that is a file", lambda w: f"opd.run_dir={w.file('run', 'x')}", "cannot be a folder"),
    wrong("a run folder within a file", lambda w: f"opd.run_dir={w.file('run', 'x')}/deep", "is a file"),
    wrong("a run folder that cannot be made", "opd.run_dir=/proc/opd", "opd.run_dir=/proc/opd cannot be written"),
]

# A logger must be one of verl's; some rows are wrong for what a model's tokenizer makes of them.
AFTER_VERL = (
    "an unknown logger",
    "a logger that is not installed",
    "prompts that are all too long",
    "teacher prompts that leave no room for a response",
    "solutions to show, but none there",
)
CASES = [*VALUES, *WORDS, *DATA, *MODELS, *GRADERS, *MACHINE]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_wrong_input_is_one_sentence_before_anything_is_started(case, world, start, monkeypatch, request):
    if case not in WORDS:  # what Hydra itself would say of those must be heard
        request.getfixturevalue("presets_composed_once")
    monkeypatch.syspath_prepend(world.folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    words = case.words(world) if callable(case.words) else case.words
    began = time.process_time()  # of this process: a machine may be busy
    status, said, started, _ = start(*words)
    seconds = time.process_time() - began
    assert (status, started) == (2, []), said
    refusal = [line for line in said.splitlines() if line.startswith("opd train: ")]
    assert len(refusal) == 1 and said.rstrip().endswith(refusal[0]), said
    assert all(words in refusal[0] for words in case.says), refusal[0]
    assert "Traceback" not in said and refusal[0].endswith((".", "?"))
    assert seconds < 5, f"{seconds:.1f} s"


def test_what_is_wrong_with_keys_data_and_machine_is_said_before_verl_is_imported(_right, tmp_path):
    """Which takes seconds; a test within this process cannot see it, since verl is there already."""
    first = [case for case in [*VALUES, *DATA, *MACHINE] if case.name not in AFTER_VERL]
    worlds = [World(tmp_path / str(i)) for i in range(len(first))]  # cases call their files alike
    words = [case.words(w) if callable(case.words) else case.words for case, w in zip(first, worlds, strict=True)]
    lines = [[*_right, *each] for each in words]
    code = (
        "import json, sys\nfrom opd_ext.train import main\n"
        "sys.modules['verl'] = None  # who imports it fails; nothing can start\n"
        "for words in json.load(sys.stdin):\n"
        "    print(main(words), words[4:])"
    )
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(lines), capture_output=True, text=True, env=environment
    )
    found = done.stdout.splitlines()
    assert len(found) == len(first) > 50 and all(line.startswith("2 ") for line in found), done


def test_sixty_cases_and_more():
    assert len({case.name for case in CASES}) == len(CASES) >= 60
