# SPDX-License-Identifier: Apache-2.0
"""Situations that end, or are told, before Ray starts; and a run that goes wrong later."""

import json
from pathlib import Path
from types import SimpleNamespace

from omegaconf import OmegaConf
from transfer_queue import KVBatchMeta
from transformers import AutoTokenizer

from opd_ext.bridge import checkpoint
from opd_ext.bridge.console import RunLog
from opd_ext.checkpoints import best
from opd_ext.checkpoints.layout import TrainerState
from opd_ext.config import schema
from tests.gauntlet.rollouts import CHATS, put_rollouts
from tests.unit.bridge.contract.seams import bare
from tests.unit.preflight.conftest import rows


def other_end_of_a_turn(start, world) -> None:
    def base(folder) -> None:
        path = folder / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [371]}))

    status, said, started, printed = start("method=opd", f"opd.teacher.path={world.model(base)}")
    assert (status, len(started)) == (0, 1), said
    assert "note: The student ends with <|im_end|>, the teacher with <|endoftext|>" in printed


def distillation_and_rewards(start, world) -> None:
    """Nobody needs a grade to distil, and no other trainer takes over in silence."""
    plain = world.parquet(rows(reward_model=..., data_source=...))
    status, said, started, printed = start(f"data.train_files={plain}", f"data.val_files={plain}")
    assert (status, len(started)) == (0, 1), said
    assert "has no reward_model, so it is not graded and no accuracy is reported" in printed
    for mode in ("sync", "separate_async"):
        status, said, started, _ = start(f"trainer.v1.trainer_mode={mode}")
        assert status == 2 and "know nothing of a teacher" in said and len(started) == 1


def collapse(config, queue, monkeypatch, model, tmp_path) -> None:
    """verl's loop with our validation, right until step 2 and then at 0: the run ends at 3 of 9, and 2 is kept."""
    from opd_ext.bridge import evaluation
    from opd_ext.bridge.trainer import SyncTrainer

    class Trainer(SyncTrainer):
        def _step_once(self, metrics, timing_raw, sample_batch_size):
            queue.kv_batch_put(keys=[f"t{self.global_steps}"], partition_id="train", tags=[{}])
            return KVBatchMeta(partition_id="train", keys=[f"t{self.global_steps}"], tags=[{}])

        def take(self, partition, prompts):
            async def graded(loop, outputs, kwargs):
                right = float(self.global_steps <= 2)
                outputs[-1].reward_score, outputs[-1].extra_fields["reward_extra_info"] = right, {"acc": right}

            names = sorted(queue.kv_list("val")["val"])
            queue.kv_clear(keys=names, partition_id="val")  # as verl's replay buffer does with prompts
            return put_rollouts(config, queue, monkeypatch, tokenizer, graded, validation_of=names), {}

        def prepare_step(self):
            pass

        on_step_end = on_train_begin = on_train_end = prepare_step

    def save(folder, *_):
        Path(folder).mkdir()
        for part in ("model", "optim", "extra_state"):
            (Path(folder) / f"{part}_world_size_1_rank_0.pt").write_bytes(b"shard")

    tokenizer, root = AutoTokenizer.from_pretrained(model), tmp_path / "checkpoints"
    settings = {"logger": [], "save_freq": 1, "test_freq": 1, "max_actor_ckpt_to_keep": 1, "val_before_train": True}
    config.trainer = OmegaConf.merge(config.trainer, settings | {"default_local_dir": str(root)})
    config.opd.run_dir, config.data.val_batch_size = str(tmp_path), len(CHATS)
    rows = [{"raw_prompt": chat, "data_source": "s"} for chat in CHATS] * 2
    parts = {"config": config, "opd": schema.load(config.opd), "run_dir": tmp_path, "tokenizer": tokenizer}
    parts |= {
        "stops": [tokenizer.eos_token_id],
        "adapters": {},
        "val_dataset": rows,
        "global_steps": 0,
        "steps_per_epoch": 10,
    }
    parts |= {"total_training_steps": 9, "parameter_sync_step": 1, "trainer_mode": "sync", "log": RunLog(tmp_path, 9)}
    trainer = bare(Trainer, **parts, state=TrainerState(method="crisp", context="", grader=""))
    trainer.actor_rollout_wg = SimpleNamespace(world_size=1, save_checkpoint=save)
    trainer.train_dataloader = SimpleNamespace(state_dict=dict)
    trainer.checkpoint_callback = SimpleNamespace(on_save=lambda **_: None)
    trainer.protocol = evaluation.protocol(trainer)
    trainer._init_dump_executor()
    trainer.reward_loop_manager, trainer.teacher_servers = SimpleNamespace(reward_loop_worker_handles=None), {}
    trainer.teacher_model_manager = None
    trainer.llm_server_manager = SimpleNamespace(get_replicas=list)
    trainer.actor_rollout_wg.workers, trainer.filtered = [], 0.0  # no process is watched, no prompt was dropped
    trainer.watch = SimpleNamespace(look=lambda *_, **__: {})  # alarms have tests of their own
    loops = {"generate_sequences": lambda batch: None, "first_exception": lambda: None, "agent_loop_workers": []}
    trainer.fit(SimpleNamespace(**loops))
    assert best.validations(tmp_path) == {0: 1.0, 1: 1.0, 2: 1.0, 3: 0.0}
    assert checkpoint.steps(root) == [2, 3]
    assert "collapsed: accuracy is 0.0% at step 3 and was 100.0% at step 2" in (tmp_path / "console.log").read_text()


def thinking_switch_without_effect(start) -> None:
    _, _, started, printed = start("data.apply_chat_template_kwargs={enable_thinking: false}")
    assert len(started) == 1 and "note: The chat template has no enable_thinking" in printed
