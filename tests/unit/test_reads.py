# SPDX-License-Identifier: Apache-2.0
"""What a preset or a recipe sets is read by somebody on the way of a run: a setting that nobody reads is a bug.

``read_keys.txt`` holds what verl and this package read in a real run of TRACE, which has a teacher, an RL term and an
annotator (:mod:`tests.stack.test_reads` runs it again). What that run has not is listed here, with the line that reads.
"""

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import opd_ext
from opd_ext.config import checks, unread
from opd_ext.config.compose import CONFIG_DIR, compose_config
from opd_ext.errors import ConfigError

PACKAGE = Path(opd_ext.__file__).parent
VERL = Path(importlib.util.find_spec("verl").origin).parent
READ = {key.removesuffix(".*") for key in (Path(__file__).parent / "read_keys.txt").read_text().split()}
YAML = [
    CONFIG_DIR / "opd.yaml",
    *(
        path
        for group in ("method", "world", "scale", "tuning", "teacher_server", "asynchronous", "recipe")
        for path in sorted((CONFIG_DIR / group).rglob("*.yaml"))
    ),
]
PIPELINES = sorted((CONFIG_DIR / "pipelines").rglob("*.yaml"))
# To verl, to vLLM, to every process, to the chat template.
HANDED_ON = r"^(diffusion\.)?train\.verl\.|^vllm\.args\.|^environment\.|^(prompts\.)?template\.|^graders\.|^samples\."

SEPARATE = VERL / "trainer/ppo/v1/trainer_separate_async.py"
# Key or section: file and words that read it, and why the traced run does not.
ELSEWHERE = {
    "actor_rollout_ref.actor.fsdp_config.seed": (
        VERL / "workers/engine/fsdp/transformer_impl.py",
        "enable_full_determinism(seed=self.engine_config.seed)",
        "only with full_determinism",
    ),
    **{
        f"actor_rollout_ref.rollout.multi_turn.{name}": (
            VERL / "experimental/agent_loop/tool_agent_loop.py",
            f"self.rollout_config.multi_turn.{name}",
            "the traced run has one turn",
        )
        for name in ("format", "max_assistant_turns", "max_parallel_calls", "max_tool_response_length")
    },
    "actor_rollout_ref.model.lora_alpha": (
        VERL / "workers/engine/fsdp/transformer_impl.py",
        '"lora_alpha": self.model_config.lora_alpha',
        "the run trains all weights",
    ),
    "actor_rollout_ref.ref.strategy": (
        VERL / "workers/config/actor.py",
        'object.__setattr__(self.engine, "strategy", self.strategy)',
        "handed on by the dataclass itself",
    ),
    "data.max_response_length": (
        VERL / "trainer/config/rollout/rollout.yaml",
        "response_length: ${oc.select:data.max_response_length",
        "read as rollout.response_length",
    ),
    "distillation.teacher_models.teacher_model.inference": (
        VERL / "experimental/teacher_loop/teacher_model.py",
        "rollout_config = teacher_model_config.inference",
        "the run's teacher is in the trainer",
    ),
    "distillation.teacher_models.teacher_model.model_path": (
        VERL / "experimental/teacher_loop/teacher_model.py",
        "teacher_model_config.model_path",
        "likewise",
    ),
    "distillation.teacher_models.teacher_model.num_replicas": (
        VERL / "workers/config/distillation.py",
        "self.num_replicas",
        "likewise",
    ),
    "trainer.v1.colocate_async.num_warmup_batches": (
        VERL / "trainer/ppo/v1/trainer_colocate_async.py",
        "self.config.trainer.v1.colocate_async.num_warmup_batches",
        "the traced run is synchronous",
    ),
    "trainer.v1.separate_async.num_warmup_batches": (
        SEPARATE,
        "self.config.trainer.v1.separate_async.num_warmup_batches",
        "likewise",
    ),
    "trainer.v1.separate_async.parameter_sync_step": (
        SEPARATE,
        "config.trainer.v1.separate_async.parameter_sync_step",
        "likewise",
    ),
    "actor_rollout_ref.hybrid_engine": (SEPARATE, 'config.actor_rollout_ref.get("hybrid_engine", True)', "likewise"),
    "actor_rollout_ref.rollout.nnodes": (SEPARATE, "config.actor_rollout_ref.rollout.nnodes > 0", "likewise"),
    "distillation.distillation_loss.loss_mode": (
        VERL / "workers/config/distillation.py",
        "get_distillation_loss_settings(self.loss_mode)",
        "likewise",
    ),
    "distillation.distillation_loss.topk": (
        VERL / "experimental/teacher_loop/teacher_manager.py",
        "distillation_loss_config.topk if distillation_loss_config.loss_settings.use_topk",
        "likewise",
    ),
    "distillation.n_gpus_per_node": (
        VERL / "trainer/ppo/v1/trainer_base.py",
        "distillation_config.n_gpus_per_node",
        "likewise",
    ),
    "distillation.nnodes": (VERL / "trainer/ppo/v1/trainer_base.py", "distillation_config.nnodes", "likewise"),
    "ray_kwargs.ray_init.runtime_env.env_vars": (
        PACKAGE / "train.py",
        'runtime_env.get("env_vars")',
        "the environment of every process, not a key",
    ),
    "transfer_queue.backend.SimpleStorage.num_data_storage_units": (
        VERL.parent / "transfer_queue/storage/simple_storage.py",
        'config.get("num_data_storage_units"',
        "a package of its own, which takes the section whole",
    ),
}


def leaves(node: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in node.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{key}.")
        else:
            yield key, value


def settings(file: Path) -> dict[str, object]:
    content = OmegaConf.to_container(OmegaConf.load(file))
    content.pop("defaults", None)
    return dict(leaves(content))


def among(key: str, keys) -> bool:
    """Whether ``keys`` has this one or a section around it, of which every key is read."""
    parts = key.split(".")
    return any(".".join(parts[:n]) in keys for n in range(1, len(parts) + 1))


@pytest.mark.parametrize("file", YAML, ids=lambda path: str(path.relative_to(CONFIG_DIR)))
def test_every_key_of_verls_that_we_set_is_read_in_a_run(file):
    for key, value in settings(file).items():
        if key.startswith("opd."):
            continue
        if key in unread.NEVER:  # said out loud, so that any other value can be refused
            assert (file.name, value) == ("opd.yaml", unread.NEVER[key][0])
        else:
            assert among(key, READ) or among(key, ELSEWHERE), f"{file.name} sets {key}, which nothing reads"


@pytest.mark.parametrize("key", ELSEWHERE)
def test_what_the_traced_run_does_not_read_has_a_line_that_reads_it(key):
    file, words, _ = ELSEWHERE[key]
    assert words in file.read_text()
    assert not among(key, READ), "the run reads it now: no exception is needed"
    assert any(among(name, [key]) for path in YAML for name in settings(path)), "nobody sets it any more"


def test_every_key_of_ours_that_we_set_is_read():
    """Typed, so that an unknown one is refused; here it must be the name of an attribute or argument that is used."""
    used: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name in ("reference", "report"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                used.add(node.attr)
            elif isinstance(node, ast.arg):
                used.add(node.arg)
            elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
                used.add(node.slice.value)
    set_here = {key for file in YAML for key in settings(file) if key.startswith("opd.")}
    set_here |= {key for file in PIPELINES for key in settings(file) if not re.search(HANDED_ON, key)}
    interpolated = {"opd.world", "world"}  # a folder that other values begin with
    assert {key for key in set_here if key.rpartition(".")[2] not in used} <= interpolated


@pytest.mark.parametrize("file", PIPELINES, ids=lambda path: str(path.relative_to(CONFIG_DIR)))
def test_what_a_pipeline_hands_on_is_read_by_verl_and_vllm(file):
    """The engine of a fine-tuning is that of a training run; a server's arguments are fields of vLLM's class."""
    engine_arguments = (VERL.parent / "vllm/engine/arg_utils.py").read_text()
    for key in settings(file):
        if found := re.fullmatch(r"(?:diffusion\.)?train\.verl\.(engine|model)\.(.+)", key):
            section = {"engine": "actor_rollout_ref.actor.fsdp_config", "model": "actor_rollout_ref.model"}[found[1]]
            assert among(f"{section}.{found[2]}", READ), f"{file.name} sets {key}, which nothing reads"
        elif found := re.fullmatch(r"(?:diffusion\.)?train\.verl\.data\.(\w+)", key):
            assert f"config.data.{found[1]}" in (VERL / "trainer/sft_trainer.py").read_text(), key
        elif found := re.fullmatch(r"vllm\.args\.(\w+)", key):
            assert re.search(rf"^    {found[1]}\b.*[:=]", engine_arguments, re.MULTILINE), key
        else:
            assert not re.search(r"\.verl\.|\.args\.", key), f"{key}: say here who reads it"


# ---------------------------------------------------------------------- keys that nobody reads


@pytest.mark.parametrize("key", [*unread.NEVER, *unread.WITH_TEACHER])
def test_what_is_refused_as_unread_is_not_read(key):
    assert key not in READ or key == "trainer.critic_warmup"  # waits for a critic, which is not there


OTHER = {None: "5", True: "false", False: "true", 0.2: "0.1", 3.0: "9", "token-mean": "token-sum"}
LEAVES = {
    "custom_reward_function": "custom_reward_function.path",
    "reward_model": "reward_model.reward_manager",
    "sandbox_fusion": "sandbox_fusion.url",
}


@pytest.mark.parametrize("key", [*unread.NEVER, *unread.WITHOUT_POLICY, *unread.WITH_TEACHER])
def test_a_key_that_would_change_nothing_is_refused_by_name(key, presets_composed_once):
    table = unread.NEVER | unread.WITHOUT_POLICY | unread.WITH_TEACHER
    left, instead = table[key]
    name = LEAVES.get(key, key)
    with pytest.raises(ConfigError) as refusal:
        other = (
            "token"
            if name.endswith("rollout_is")
            else "3"
            if isinstance(left, int) and not isinstance(left, bool)
            else OTHER.get(left, "other")
        )
        checks.check(compose_config(["method=crisp", f"{name}={other}"]))
    message = str(refusal.value)
    assert message.startswith(f"{name}=") and instead in message and "\n" not in message


def test_a_dead_clip_names_the_one_that_clips(presets_composed_once):
    with pytest.raises(ConfigError, match=r"grad_clip=0.1 .* set actor_rollout_ref\.actor\.optim\.clip_grad;"):
        checks.check(compose_config(["method=opsd", "actor_rollout_ref.actor.grad_clip=0.1"]))


def test_keys_of_the_rl_term_work_where_there_is_one(presets_composed_once):
    term = ["actor_rollout_ref.actor.entropy_coeff=0.01", "actor_rollout_ref.actor.clip_ratio_high=0.3"]
    checks.check(compose_config(["method=grpo", *term, "actor_rollout_ref.actor.shuffle=true"]))
    with pytest.raises(ConfigError) as refusal:
        checks.check(compose_config(["method=crisp", *term]))
    assert "entropy_coeff=0.01" in str(refusal.value) and "clip_ratio_high" in str(refusal.value)
