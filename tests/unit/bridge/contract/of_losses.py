# SPDX-License-Identifier: Apache-2.0
"""Contracts of verl's policy losses."""

import pytest
import torch
from omegaconf import OmegaConf
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.metric.utils import Metric
from verl.workers.utils.losses import ppo_loss

from opd_ext.bridge.sources import policy_loss_source

from .seams import seam

OURS = ("vanilla", "cispo", "gspo")


def _policy_loss(actor, jagged, factor: float):
    """verl's loss of two rows, the second of one token, with advantages times ``factor``."""
    real = {"dtype": torch.float32}
    log_probs = jagged([[-9.0, -0.5, -0.7, -9.0], [-0.2, -9.0]], **real)
    fields = {
        "prompts": jagged([[1, 2], [3]]),
        "responses": jagged([[4, 5], [6]]),
        "response_mask": jagged([[1, 1], [1]]),
        "old_log_probs": jagged([[-0.4, -0.9], [-0.3]], **real),
        "advantages": jagged([[factor, factor], [-0.5 * factor]], **real),
    }
    data = tu.get_tensordict(fields, {"dp_size": 1, "batch_num_tokens": 3, "global_batch_size": 2})
    return ppo_loss(actor, model_output={"log_probs": log_probs}, data=data)


@seam(
    "bridge/engine.py",
    pins={"verl.workers.utils.losses:ppo_loss": "config model_output data dp_group="},
)
def policy_loss(config, jagged):
    """The policy loss takes log-probs jagged like ``input_ids``, and scales with the advantages."""
    section = config.actor_rollout_ref.actor
    for name in OURS:
        section.policy_loss.loss_mode = name
        actor = omega_conf_to_dataclass(OmegaConf.create(OmegaConf.to_container(section)))
        loss, metrics = _policy_loss(actor, jagged, 1.0)
        assert loss.ndim == 0 and loss.item() != 0
        assert isinstance(metrics["actor/pg_loss"], Metric), "metrics of a micro-batch, under verl's names"
        assert _policy_loss(actor, jagged, 3.0)[0].item() == pytest.approx(3 * loss.item(), rel=1e-5), name
        assert _policy_loss(actor, jagged, 0.0)[0].item() == 0, name


@seam("bridge/sources.py", pins={"verl.trainer.ppo.core_algos:POLICY_LOSS_REGISTRY": None})
def policy_loss_text():
    """A policy loss of verl's registry is decorated with its name in ``core_algos.py``, where its text is looked up."""
    assert set(OURS) <= set(POLICY_LOSS_REGISTRY)
    for name in OURS:
        file, line = policy_loss_source(name)
        assert file.name == "core_algos.py" and name in file.read_text().splitlines()[line - 1]
