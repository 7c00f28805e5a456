# SPDX-License-Identifier: Apache-2.0
"""Contracts of what a user's files become before a run: data sets, steps, graders, tools, loggers."""

from types import SimpleNamespace

import pandas as pd
import pytest
from omegaconf import OmegaConf
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.dataset.rl_dataset import RLHFDataset

from opd_ext.bridge import datasets, inputs

from .seams import bare, seam

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


def _without_answers(config, tmp_path, rows):
    """verl's data sets and loaders over a file that has prompts and nothing else."""
    prompts = [{"prompt": [{"role": "user", "content": f"{i} + 1"}]} for i in range(rows)]
    pd.DataFrame(prompts).to_parquet(tmp_path / "data.parquet")
    files = {name: str(tmp_path / "data.parquet") for name in ("train_files", "val_files")}
    config.data = OmegaConf.merge(config.data, files | {"train_batch_size": 2, "filter_overlong_prompts": False})
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
    """A custom function comes as a ``partial`` over itself and its keywords, None without one; managers go by name."""
    (tmp_path / "mine.py").write_text("def grade(data_source, **kwargs): return kwargs['bonus']")
    OmegaConf.set_struct(config, False)
    custom = config.reward.custom_reward_function
    custom.path, custom.name, custom.reward_kwargs = str(tmp_path / "mine.py"), "grade", {"bonus": 2.0}
    function, always = inputs.reward_function(config)
    assert (function("d", **always), always) == (2.0, {"bonus": 2.0})
    custom.path = None
    assert inputs.reward_function(config) == (inputs.default_compute_score, {})
    config.reward.reward_manager.name = "nobody"
    with pytest.raises(Exception, match="nobody"):
        inputs.reward_function(config)


@seam("bridge/inputs.py", pins={"verl.tools.tool_registry:load_all_tools": "tool_config_path function_tool_path"})
def tools(config, tmp_path):
    """Tools come from the paths of ``data``, each with the schema that a chat template renders."""
    assert inputs.tool_schemas(config) is None
    (tmp_path / "tools.py").write_text(TOOL)
    config.data.function_tool_path = str(tmp_path / "tools.py")
    (schema,) = inputs.tool_schemas(config)
    assert schema["function"]["name"] == "add"


@seam("bridge/inputs.py", pins={"verl.utils.tracking:Tracking": None})
def loggers():
    """``Tracking.supported_backend`` lists what ``trainer.logger`` may name."""
    assert {"tensorboard", "console", "wandb"} <= set(inputs.loggers())
