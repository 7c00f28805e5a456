# SPDX-License-Identifier: Apache-2.0
"""Contracts of what a user's files become before a run: data sets, steps, graders, tools, loggers."""

import dataclasses
import importlib
import re
from types import SimpleNamespace

import pandas as pd
import pytest
from hydra.utils import get_class
from omegaconf import OmegaConf
from transformers import PretrainedConfig
from verl.trainer.ppo.reward import get_custom_reward_fn
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.dataset.rl_dataset import RLHFDataset

from opd_ext.bridge import datasets, inputs, sources
from opd_ext.rewards.load import load_function

from .seams import bare, resolve, seam

REWARD = "verl.trainer.ppo.reward:"
TOOL = """
from verl.tools.function_tool import function_tool

@function_tool()
def add(a: int, b: int) -> int:
    '''Add two numbers.

    Args:
        a: one.
        b: the other.
    '''
    return a + b
"""


def _without_answers(config, tmp_path, rows, filter_overlong_prompts=False, last=None):
    """verl's data sets and loaders over a file that has prompts and nothing else."""
    prompts = [{"prompt": [{"role": "user", "content": f"{i} + 1"}]} for i in range(rows)]
    if last is not None:
        prompts[-1] = {"prompt": last}
    pd.DataFrame(prompts).to_parquet(tmp_path / "data.parquet")
    files = {name: str(tmp_path / "data.parquet") for name in ("train_files", "val_files")}
    config.data = OmegaConf.merge(config.data, files | {"train_batch_size": 2})
    config.data.filter_overlong_prompts = filter_overlong_prompts
    trainer = bare(PPOTrainerSync, config=config, trainer_mode="sync", parameter_sync_step=1, global_steps=1)
    trainer._init_tokenizer()
    trainer._init_dataloader()
    return trainer


@seam(
    "bridge/datasets.py",
    covers="dataset.dataframe",
    pins={
        "verl.utils.dataset.rl_dataset:RLHFDataset": None,
        "verl.utils.dataset.rl_dataset:RLHFDataset.__len__": "self",
    },
)
def columns(config, tmp_path):
    """``dataframe`` of a data set may be exchanged: its loader hands out the columns that were added."""
    trainer = _without_answers(config, tmp_path, rows=4)
    datasets.complete(trainer.train_dataset, trainer.val_dataset, SimpleNamespace(whose="the user's"))
    assert isinstance(trainer.train_dataset, RLHFDataset)
    for batch in (next(iter(trainer.train_dataloader)), next(iter(trainer.val_dataloader))):
        assert set(batch["data_source"]) == {"data"}
        assert batch["reward_model"][0] == {"ground_truth": None}


@seam("bridge/datasets.py")
def dropped_prompts(config, tmp_path):
    """The table below a filtered data set has the rows that verl's filter has dropped without a word."""
    config.data.max_prompt_length, config.data.max_response_length = 24, 8
    long = [{"role": "user", "content": "1 + " * 40 + "1"}]
    trainer = _without_answers(config, tmp_path, rows=4, filter_overlong_prompts=True, last=long)
    words, share = datasets.counts(trainer.train_dataset, trainer.val_dataset, config.data)
    assert words.startswith("3 of 4 (1 too long, or refused by the chat template) prompts to train on, 3 of 4 (1 ")
    assert share == 0.25


@seam("bridge/datasets.py", covers="optim.total_training_steps")
def steps(config, tmp_path):
    """Steps come from ``trainer.total_training_steps``; the optimiser's horizon is ``optim.total_training_steps``."""
    config.trainer = OmegaConf.merge(config.trainer, {"total_training_steps": 5, "total_epochs": 5})
    trainer = _without_answers(config, tmp_path, rows=4)
    assert (trainer.total_training_steps, trainer.steps_per_epoch) == (5, 2)
    optim = config.actor_rollout_ref.actor.optim
    for epochs, wanted in ((5, 5), (1, 2)):
        config.trainer.total_epochs = epochs
        assert datasets.settle_steps(config, trainer.train_dataset, 5) == wanted == optim.total_training_steps
    config.data.train_batch_size = 8
    with pytest.raises(ValueError, match="4 prompts are left to train on, fewer than one batch"):
        datasets.settle_steps(config, trainer.train_dataset, 5)


@seam(
    "bridge/inputs.py",
    pins={f"{REWARD}get_custom_reward_fn": "config", f"{REWARD}resolve_reward_manager_cls": "config"},
)
def reward_function(config, tmp_path):
    """A custom function comes as a ``partial`` over itself and its keywords, None without one; managers go by name.

    What we load without verl is what verl loads.
    """
    (tmp_path / "mine.py").write_text("def grade(data_source, **kwargs): return kwargs['bonus']")
    OmegaConf.set_struct(config, False)
    custom = config.reward.custom_reward_function
    paths = (
        str(tmp_path / "mine.py"),
        f"file://{tmp_path}/mine.py",
        "pkg://opd_ext/rewards/mcq",
        "pkg://opd_ext.rewards.mcq",
    )
    for path in paths:
        name = "compute_score" if path.startswith("pkg") else "grade"
        custom.path, custom.name, custom.reward_kwargs = path, name, {"bonus": 2.0}
        theirs, always = get_custom_reward_fn(config).args
        assert always == {"bonus": 2.0}
        assert load_function(path, name).__code__ == theirs.__code__
    custom.path = None
    assert get_custom_reward_fn(config) is None and inputs.default_grader(config) is inputs.default_compute_score
    config.reward.reward_manager.name = "nobody"
    with pytest.raises(Exception, match="nobody"):
        inputs.default_grader(config)


@seam("bridge/inputs.py", pins={"verl.tools.tool_registry:load_all_tools": "tool_config_path function_tool_path"})
def tools(config, tmp_path):
    """Tools come from the paths of ``data``, each with the schema that a chat template renders."""
    assert inputs.tool_schemas(config) is None
    (tmp_path / "tools.py").write_text(TOOL)
    config.data.function_tool_path = str(tmp_path / "tools.py")
    (schema,) = inputs.tool_schemas(config)
    assert schema["function"]["name"] == "add"


@seam(
    "bridge/inputs.py",
    pins={
        "verl.workers.rollout.utils:get_max_position_embeddings": "hf_config",
        "verl.workers.rollout.vllm_rollout.vllm_async_server:vLLMHttpServer": None,
    },
)
def positions():
    """A server is refused whose ``max_model_len`` is above the positions that a config, or its text's, has."""
    text = PretrainedConfig(max_position_embeddings=64)
    assert inputs.longest_sequence(text) == 64
    both = PretrainedConfig(text_config=text)
    assert inputs.longest_sequence(both) == 64
    server = resolve("verl.workers.rollout.vllm_rollout.vllm_async_server:vLLMHttpServer")
    parts = {"model_config": SimpleNamespace(hf_config=both), "config": SimpleNamespace(max_model_len=65)}
    with pytest.raises(ValueError, match=r"max_position_embeddings \(64\)"):
        server._validate_configs(SimpleNamespace(**parts))


@seam("bridge/sources.py", pins={"verl.utils.tracking:Tracking": None})
def loggers():
    """``Tracking.supported_backend`` lists what ``trainer.logger`` may name."""
    assert sources.loggers() == list(resolve("verl.utils.tracking:Tracking").supported_backend)


@seam("bridge/sources.py", pins={"verl.experimental.agent_loop.agent_loop:_agent_loop_registry": None})
def agent_loops():
    """The text names the loops that are registered once verl's package of loops is imported."""
    importlib.import_module("verl.experimental.agent_loop")
    registry = resolve("verl.experimental.agent_loop.agent_loop:_agent_loop_registry")
    verls = {name for name, entry in registry.items() if entry["_target_"].startswith("verl.experimental.agent_loop")}
    assert set(sources.agent_loops()) == verls and len(verls) >= 2


@seam("bridge/sources.py")
def fields_without_an_import():
    """The fields that the text of verl's dataclasses gives are those that they have."""
    text = (sources.folder() / "trainer" / "config" / "_generated_ppo_trainer.yaml").read_text()
    targets = set(re.findall(r"_target_: (\S+)", text))
    assert len(targets) > 30
    for target in targets:
        assert sources.fields(target) == {field.name for field in dataclasses.fields(get_class(target))}, target
    assert sources.fields("verl.workers.config.NoSuchConfig") is None
    assert sources.fields("somebody.elses.Config") is None
