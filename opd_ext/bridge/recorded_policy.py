# SPDX-License-Identifier: Apache-2.0
"""The policy term of rollouts that a run has kept: verl's advantages and loss as the trainer calls them.

Nothing is computed in another way than in training: advantages come from verl's estimator and
:func:`opd_ext.bridge.advantages.weighed`, the loss from :func:`opd_ext.bridge.layout.policy_term`.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDict
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from verl.protocol import DataProto
from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.utils.losses import ppo_loss

from opd_ext.bridge import old_policy
from opd_ext.bridge.advantages import weighed
from opd_ext.bridge.layout import packed_rows, policy_term
from opd_ext.config.old_policy import sampler_cap
from opd_ext.objective.batch import PolicyTerm
from opd_ext.policy import PolicyConfig

Rows = Sequence[Mapping[str, Any]]
"""Rollouts as :func:`opd_ext.recorded.read` returns them."""


class Advantages(NamedTuple):
    """Per rollout, one value per response token: as verl makes them, and as the policy term weighs them."""

    plain: list[Float[Tensor, " R"]]
    weighed: list[Float[Tensor, " R"]]


class Terms(NamedTuple):
    """The policy term of a micro-batch, as functions of the log-probs.

    Attributes:
        full: as it trains.
        uncorrected: without the weights that correct for the sampler.
        neutral: as at a ratio of exactly 1, where no clip and no cap acts, and without these weights.
        old_log_prob: of the policy that ratios are to; None: the ratio is 1.
    """

    full: PolicyTerm
    uncorrected: PolicyTerm
    neutral: PolicyTerm
    old_log_prob: Float[Tensor, " N"] | None


class RecordedPolicy:
    """The policy term of one method.

    Args:
        config: of a run of the method, whole and resolved.
        policy: its ``opd.policy``.
    """

    def __init__(self, config: DictConfig, policy: PolicyConfig) -> None:
        self.config, self.policy = config, policy
        section = OmegaConf.to_container(config.actor_rollout_ref.actor, resolve=True)
        # A KL penalty needs a reference's log-probs, which nobody computes here.
        self.actor = omega_conf_to_dataclass(OmegaConf.merge(section, {"use_kl_loss": False}))
        self.bonus = bool(self.actor.entropy_coeff)

    def advantages(self, rows: Rows) -> Advantages:
        """Of all rollouts of a step, which are taken to be one batch with one update.

        Raises:
            KeyError, AssertionError: the estimator needs what rollouts do not keep.
        """
        mask = pad_sequence([torch.tensor(row["loss_mask"]) for row in rows], batch_first=True)
        rewards = torch.zeros(mask.shape)
        for i, row in enumerate(rows):
            rewards[i, max(len(row["responses"]) - 1, 0)] = float(row["score"])
        groups, algorithm = [row["uid"] for row in rows], self.config.algorithm
        data = DataProto(
            batch=TensorDict({"response_mask": mask, "token_level_rewards": rewards}, batch_size=len(rows)),
            non_tensor_batch={"uid": np.array(groups, dtype=object)},
        )
        data = compute_advantage_for_multi_trajectories(
            data,
            batch_keys=[f"{row['uid']}_{row['sample']}_0" for row in rows],
            adv_estimator=algorithm.adv_estimator,
            gamma=algorithm.gamma,
            lam=algorithm.lam,
            num_repeat=self.config.actor_rollout_ref.rollout.n,
            norm_adv_by_std_in_grpo=algorithm.get("norm_adv_by_std_in_grpo", True),
            config=algorithm,
        )
        found = data.batch["advantages"].float()
        scaled = weighed(found, mask, groups, self.policy, mini_batches=1)
        lengths = [len(row["responses"]) for row in rows]
        return Advantages(*([row[:n] for row, n in zip(each, lengths, strict=True)] for each in (found, scaled)))

    def terms(
        self,
        rows: Rows,
        advantages: Sequence[Float[Tensor, " R"]],
        num_tokens: int,
        num_sequences: int,
        current: bool,
        corrected: bool,
    ) -> Terms:
        """The policy term of a micro-batch.

        Args:
            rows: its rollouts, none without a token.
            advantages: of theirs, weighed.
            num_tokens, num_sequences: of the whole batch, what its means divide by.
            current: the policy at hand is the one before the update; else ratios are to the sampler's log-probs.
            corrected: weigh tokens for the sampler, as the update does where ``current``.
        """
        device = advantages[0].device
        mask = [torch.tensor(row["loss_mask"], device=device) for row in rows]
        responses = [torch.tensor(row["responses"], device=device) for row in rows]
        fields = {
            # Of a prompt the layout alone matters: one token.
            "input_ids": _jagged([torch.cat([ids.new_zeros(1), ids]) for ids in responses]),
            "prompts": _jagged([ids.new_zeros(1) for ids in responses]),
            "responses": _jagged(responses),
            "response_mask": _jagged(mask),
            "advantages": _jagged(list(advantages)),
        }
        if not current or corrected:
            sampled = [torch.tensor(row["rollout_log_probs"], device=device) for row in rows]
            fields["rollout_log_probs"] = _jagged(sampled)
        neutral = {"dp_size": 1, "batch_num_tokens": num_tokens, "global_batch_size": num_sequences}
        neutral |= {"calculate_entropy": self.bonus, old_policy.CURRENT: True}
        cap = {old_policy.CAP: sampler_cap(self.config)} if corrected else {}
        if current:
            return Terms(self._term(fields, neutral | cap), *[self._term(fields, neutral)] * 2, None)
        to_sampler = {name: value for name, value in neutral.items() if name != old_policy.CURRENT}
        term = self._term(fields | {"old_log_probs": fields["rollout_log_probs"]}, to_sampler)
        return Terms(term, term, self._term(fields, neutral), fields["rollout_log_probs"].values())

    def _term(self, fields: dict[str, Tensor], settings: dict[str, Any]) -> PolicyTerm:
        data = tu.get_tensordict(fields, settings)
        rows = packed_rows(data["input_ids"], data["responses"].offsets().diff())
        return policy_term(data, rows, partial(ppo_loss, config=self.actor), {})


def _jagged(rows: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)
