# SPDX-License-Identifier: Apache-2.0
"""What Hydra and OmegaConf refuse is said in our words: the key, what to change, nothing of their insides."""

import pytest

from opd_ext.config.checks import check
from opd_ext.config.compose import compose_config
from opd_ext.errors import ConfigError
from opd_ext.pipelines.settings import compose_pipeline
from opd_ext.pipelines.ssd.config import SSDConfig

TRAIN = {
    "method=nope": "method=nope does not exist; choose one of: cispo, crisp,",
    "scale=nope": "scale=nope does not exist; choose one of: cluster, cpu,",
    "recipe=crisp/nope": "recipe=crisp/nope does not exist; choose one of: ",
    "methd=crisp": "methd does not exist; see `opd train --cfg` for the keys that do",
    "trainer.foo=1": r"trainer.foo does not exist; see `opd train --cfg` for the keys that do\.$",
    "trainer.total_training_step=1": r"keys that do\. Did you mean trainer\.total_training_steps\?$",
    "trianer.test_freq=1": r"Did you mean trainer\.test_freq\?$",
    "actor_rollout_ref.actor.lr=1": r"Did you mean actor_rollout_ref\.actor\.optim\.lr\?$",
    "actor_rollout_ref.model.override_config.rope_theta=1": r"override_config.rope_theta does not .*[+]actor.* adds it",
    "+data.train_batch_size=4": r"^[+]data.train_batch_size adds a key that is there already: leave the [+] out\.$",
    "data.train_batch_size": "data.train_batch_size cannot be read: write KEY=VALUE",
    "data.train_files=[a": r"data.train_files=\[a cannot be read",
    "opd.max_pair_length=${nope}": r"refers to \$\{nope\}, which does not exist",
    "opd.max_pair_length=long": "opd.max_pair_length: Value 'long' .* could not be converted to Integer",
    "opd.head.chunks=3": "opd.head.chunks does not exist; see `opd train --cfg`",
}
PIPELINE = {
    "preset=nope": "preset=nope does not exist; choose one of: diffusion,",
    "train.learning_rate=1": "train.learning_rate does not exist; see `opd ssd --cfg`",
    "train.steps=many": "train.steps: Value 'many' .* could not be converted to Integer; see `opd ssd --cfg`",
}
INSIDES = ("hydra", "omegaconf", "search path", "reference_type", "object_type", "full_key", "not in struct", "\n")


def _one_sentence(refused):
    told = str(refused.value)
    assert not any(inside in told.lower() for inside in INSIDES), told


@pytest.mark.parametrize("override", TRAIN)
def test_a_wrong_override_of_a_run_is_one_sentence(override):
    with pytest.raises(ConfigError, match=TRAIN[override]) as refused:
        check(compose_config([override]))
    _one_sentence(refused)


@pytest.mark.parametrize("override", PIPELINE)
def test_a_wrong_override_of_a_pipeline_is_one_sentence(override):
    with pytest.raises(ConfigError, match=PIPELINE[override]) as refused:
        compose_pipeline("ssd", SSDConfig, [override])
    _one_sentence(refused)
