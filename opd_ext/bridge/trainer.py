# SPDX-License-Identifier: Apache-2.0
"""The on-policy distillation trainer: verl's synchronous trainer with a teacher in place of advantages.

One step: sample rollouts, drop pairs that are too long, build the teacher's sequences, update the student, refresh the
teacher on schedule, save, sync the weights to vLLM. Everything that verl does around it (placement, data loading,
generation, rewards, weight sync) is inherited.
"""

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import transfer_queue as tq
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils import tensordict_utils as tu
from verl.utils.debug import marked_timer
from verl.utils.metric import reduce_metrics

from opd_ext.bridge import checkpoint, rollouts
from opd_ext.bridge.worker import OPDWorker
from opd_ext.config import schema
from opd_ext.objective.loss import Objective, means
from opd_ext.report.console import StepPrinter
from opd_ext.teacher.context import build_context, build_teacher_sequence, render

# What the workers read of a rollout; everything else stays in the queue.
_UPDATE_FIELDS = ["input_ids", "position_ids", "prompts", "responses", "loss_mask", "rollout_log_probs"]


@register_trainer("opd")
class OPDTrainer(PPOTrainerSync):
    """See the module's docstring. Configured by ``config.opd`` (:class:`opd_ext.config.schema.OPDConfig`)."""

    def __init__(self, config: DictConfig):
        self.opd = schema.load(config.opd)
        self.run_dir = Path(self.opd.run_dir)
        # The base class branches on this string; the queue, the replay buffer and resume must behave as in `sync`.
        config.trainer.v1.trainer_mode = "sync"
        super().__init__(config)
        self.state = checkpoint.TrainerState(
            method=self.opd.method,
            context=f"{self.opd.context.kind}:{self.opd.context.text}",
            grader=str(config.reward.custom_reward_function.path),
        )
        self.context = build_context(self.opd.context)

    # ------------------------------------------------------------------ set-up

    def _init_dataloader(self) -> None:
        super()._init_dataloader()
        # Line buffered and appended to: `opd train` follows this file, and a resumed run continues it.
        self.console = Console(file=(self.run_dir / "console.log").open("a", buffering=1), width=120)
        self.printer = StepPrinter(self.total_training_steps, self.console)

    def _build_replay_buffer(self) -> ReplayBuffer:
        buffer = super()._build_replay_buffer()
        buffer.poll_interval = self.opd.rollout.poll_interval
        return buffer

    def _init_resource_pool_mgr(self) -> None:
        """Place our worker where verl places its own, with a reference engine if the teacher has its own weights."""
        super()._init_resource_pool_mgr()
        role = Role.ActorRolloutRef if self.opd.needs_teacher_engine else Role.ActorRollout
        self.role_worker_mapping = {role: ray.remote(OPDWorker)}
        self.mapping.pop(Role.ActorRollout, None)
        self.mapping[role] = "global_pool"
        self.resource_pool_manager.mapping = self.mapping

    def on_init_end(self) -> None:
        divergence = self.opd.divergence
        kind_args = {"temperature": divergence.temperature, "beta": divergence.beta, "entry_clip": divergence.clip}
        objective = Objective(
            kind=divergence.kind,
            kind_args={name: value for name, value in kind_args.items() if value is not None},
            reduction=self.opd.reduction,
            chunk_size=self.opd.head.chunk_size,
            fp32=self.opd.head.fp32,
            token_classes=self._token_classes(),
        )
        self.actor_rollout_wg.configure(objective, self.opd.external_libs)
        super().on_init_end()

    def _token_classes(self) -> dict[str, list[int]]:
        vocabulary = self.tokenizer.get_vocab()
        think = [vocabulary[token] for token in ("<think>", "</think>") if token in vocabulary]
        return {"eos": [self.tokenizer.eos_token_id], **({"think": think} if think else {})}

    # ------------------------------------------------------------------ one step

    def _fetch_one_gen_batch(self) -> Any:
        """verl's batch with names that a rerun reproduces; replay and order of the batch depend on them."""
        batch = super()._fetch_one_gen_batch()
        uids = [f"t{self.global_steps:06d}p{i:05d}" for i in range(len(batch))]
        batch.update(tu.get_tensordict({"uid": np.array(uids, dtype=object)}))
        return batch

    def _step_once(self, metrics: dict, timing_raw: dict, sample_batch_size: int) -> KVBatchMeta:
        with marked_timer("gen", timing_raw, color="red"):
            self.on_sample_begin()
            batch, sampling = self.replay_buffer.sample(
                global_steps=self.global_steps, partition_id="train", batch_size=sample_batch_size
            )
            metrics.update(sampling)
            self.on_sample_end()
        batch.reorder(sorted(range(len(batch.keys)), key=batch.keys.__getitem__))  # arrival order is not reproducible
        rows = rollouts.read_rows(batch, self.tokenizer, self.opd.rollout.train_tokens)
        metrics.update(rollouts.summarise(rows, "rollout"))
        rollouts.write_jsonl(self.run_dir / "generations" / f"train_{self.global_steps}.jsonl", rows)
        with marked_timer("teacher_context", timing_raw, color="olive"):
            batch = self._add_teacher_sequences(batch, metrics)
        if not batch.keys:
            metrics["opd/skipped"] = 1.0
            return batch
        batch = self._balance_batch(batch, metrics)
        self._shorten_padding(batch)
        with marked_timer("update_actor", timing_raw, color="red"):
            batch = self._update_actor(batch, metrics)
        with marked_timer("refresh_teacher", timing_raw, color="olive"):
            self._refresh_teacher(metrics)
        self._guard_teacher(metrics)
        return batch

    def _add_teacher_sequences(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """Put ``teacher_input_ids`` beside every pair that fits and remove the others from the batch.

        The length tag, by which verl balances ranks, becomes student + teacher tokens.
        """
        fields = ["prompts", "responses", "raw_prompt", "extra_info"]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        kwargs = OmegaConf.to_container(self.config.data.apply_chat_template_kwargs)
        prompts, responses = data["prompts"].unbind(), data["responses"].unbind()
        raw_prompts, extra_infos = list(data["raw_prompt"]), list(data["extra_info"])
        kept, sequences = [], []
        for i in range(len(batch.keys)):
            sample = {"raw_prompt": list(_data(raw_prompts[i])), "extra_info": _data(extra_infos[i])}
            teacher_prompt = render(self.tokenizer, self.context.messages(sample), kwargs)
            ids = build_teacher_sequence(
                teacher_prompt,
                responses[i].tolist(),
                self.opd.max_pair_length,
                student_prompt_ids=prompts[i].tolist(),
            )
            if ids is not None:
                kept.append(i)
                sequences.append(torch.tensor(ids))
        dropped = [key for i, key in enumerate(batch.keys) if i not in set(kept)]
        metrics["rollout/dropped"] = len(dropped) / len(batch.keys)
        metrics["opd/skipped"] = 0.0
        if dropped:
            tq.kv_clear(keys=dropped, partition_id=batch.partition_id)
        batch = KVBatchMeta(
            partition_id=batch.partition_id,
            keys=[batch.keys[i] for i in kept],
            tags=[dict(batch.tags[i]) for i in kept],
            extra_info=batch.extra_info,
        )
        for tag, ids in zip(batch.tags, sequences, strict=True):
            tag["seq_len"] += len(ids)
        if sequences:
            self._put_teacher_ids(batch.keys, sequences, batch.partition_id)
        return batch

    @staticmethod
    def _put_teacher_ids(keys: list[str], sequences: list[torch.Tensor], partition_id: str) -> None:
        ids = torch.nested.as_nested_tensor(sequences, layout=torch.jagged)
        tq.kv_batch_put(keys=keys, partition_id=partition_id, fields=tu.get_tensordict({"teacher_input_ids": ids}))

    def _shorten_padding(self, batch: KVBatchMeta) -> None:
        """verl fills a batch up to a multiple of the ranks with copies of a row whose mask is zero; the copies carry
        that row's teacher sequence, so give them the shortest one that is possible."""
        padding = [key for key, tag in zip(batch.keys, batch.tags, strict=True) if tag.get("is_padding")]
        if padding:
            eos = torch.full((2,), self.tokenizer.eos_token_id)  # one prompt token, one response token
            self._put_teacher_ids(padding, [eos] * len(padding), batch.partition_id)

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        actor = self.config.actor_rollout_ref.actor
        mini_batch_size = actor.ppo_mini_batch_size * self.config.actor_rollout_ref.rollout.n
        batch.fields = [*_UPDATE_FIELDS, "teacher_input_ids"]
        batch.extra_info.update(
            {
                "global_batch_size": mini_batch_size,
                "mini_batch_size": mini_batch_size,
                "epochs": 1,
                "seed": actor.data_loader_seed,
                "dataloader_kwargs": {"shuffle": False},
                "temperature": 1.0,
            }
        )
        output = reduce_metrics(self.actor_rollout_wg.update_actor(batch)["metrics"])
        batch.fields = None
        metrics.update({f"opd/{name}": float(value) for name, value in means(output).items()})
        if "opd/teacher_entropy" in metrics:  # absent if no token of the batch is trained
            metrics["opd/entropy_diff"] = metrics["opd/student_entropy"] - metrics["opd/teacher_entropy"]
        metrics["opd/response_tokens"] = float(output["divergence:count"] * self._dp_size())
        for name in ("loss", "grad_norm", "lr"):
            metrics[f"opd/{name}"] = float(output[name])
        for name in ("max_memory_allocated_gb", "max_memory_reserved_gb", "cpu_memory_used_gb"):
            metrics[f"memory/{name}"] = float(output[f"perf/{name}"])
        return batch

    def _dp_size(self) -> int:
        return max(self.actor_rollout_wg._dispatch_info["actor"]) + 1

    # ------------------------------------------------------------------ teacher

    def _refresh_teacher(self, metrics: dict) -> None:
        """After the optimiser step, before saving and weight sync; used from the next step on (released CRISP code)."""
        teacher, step = self.opd.teacher, self.global_steps
        metrics["teacher/version"] = float(step - 1 if teacher.weights == "live" else self.state.teacher_version)
        metrics["teacher/age"] = step - 1 - metrics["teacher/version"]
        refreshed = False
        if teacher.weights == "ema":
            self.actor_rollout_wg.refresh_teacher(teacher.rate)
            refreshed = True
        elif teacher.weights == "periodic" and teacher.interval and step % teacher.interval == 0:
            self.actor_rollout_wg.refresh_teacher()
            refreshed = True
        if refreshed:
            self.state.teacher_version = step
        metrics["teacher/refreshed"] = float(refreshed)

    def _guard_teacher(self, metrics: dict) -> None:
        """Stop on a teacher that predicts next to nothing: its weights were lost on the way.

        Raises:
            RuntimeError: the mean entropy is close to that of the uniform distribution.
        """
        share = metrics.get("opd/teacher_entropy", 0.0) / math.log(len(self.tokenizer))
        if self.opd.max_teacher_entropy is not None and share > self.opd.max_teacher_entropy:
            raise RuntimeError(
                f"The teacher's entropy is {share:.0%} of log V at step {self.global_steps}: its weights are not those "
                "of a trained model. Check the model path or the checkpoint, or raise opd.max_teacher_entropy."
            )

    # ------------------------------------------------------------------ checkpoints

    def _save_checkpoint(self) -> None:
        root, step = Path(self.config.trainer.default_local_dir).absolute(), self.global_steps
        folder = checkpoint.begin(root, step)
        self.actor_rollout_wg.save_checkpoint(str(folder / "actor"), None, step)
        if self.opd.needs_teacher_engine and self.state.teacher_version > 0:
            self.actor_rollout_wg.save_teacher(str(folder / "teacher"))
        torch.save(self.train_dataloader.state_dict(), folder / "data.pt")
        self.state.global_step = step
        self.state.write(folder)
        final = checkpoint.commit(folder, root, step, self.config.trainer.max_actor_ckpt_to_keep)
        self.checkpoint_callback.on_save(trainer=self, global_step=step, checkpoint_dir=str(final), async_save=False)

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        rollouts.drop_lines_after(self.run_dir / "metrics.jsonl", self.global_steps)
        if self.global_steps == 0:
            return
        explicit = self.config.trainer.resume_mode == "resume_path"
        root = Path(self.config.trainer.default_local_dir).absolute()
        folder = Path(self.config.trainer.resume_from_path) if explicit else root / f"global_step_{self.global_steps}"
        self.state = checkpoint.TrainerState.read(folder)
        if self.opd.needs_teacher_engine and self.state.teacher_version > 0:
            self.actor_rollout_wg.load_teacher(str(folder.absolute() / "teacher"))
        self.console.print(
            f"resumed from {folder}: step {self.global_steps}, teacher version {self.state.teacher_version} "
            f"(age {self.global_steps - self.state.teacher_version} steps)"
        )

    # ------------------------------------------------------------------ validation and metrics

    def _validate(self) -> dict[str, float]:
        rows: list[dict[str, Any]] = []
        for batch_dict in self.val_dataloader:
            uids = [f"v{self.global_steps:06d}p{len(rows) + i:05d}" for i in range(len(batch_dict["raw_prompt"]))]
            batch_dict["uid"] = np.array(uids, dtype=object)
            batch = tu.get_tensordict(batch_dict)
            tu.assign_non_tensor_data(batch, "global_steps", self.global_steps)
            tu.assign_non_tensor_data(batch, "validate", True)
            tags = [{"is_prompt": True, "status": "pending", "global_steps": self.global_steps} for _ in uids]
            tq.kv_batch_put(keys=uids, partition_id="val", tags=tags)
            self.agent_loop_manager.generate_sequences(batch)
            done, _ = self.replay_buffer.sample(
                global_steps=self.global_steps, partition_id="val", batch_size=len(uids)
            )
            rows += rollouts.read_rows(done, self.tokenizer, self.opd.rollout.val_tokens)
            tq.kv_clear(keys=done.keys, partition_id=done.partition_id)
        rows.sort(key=lambda row: (row["uid"], row["sample"]))
        rollouts.write_jsonl(self.run_dir / "generations" / f"val_{self.global_steps}.jsonl", rows)
        metrics = rollouts.summarise(rows, "val")
        sources = sorted({row["data_source"] for row in rows})
        if len(sources) > 1:
            for source in sources:
                part = [row for row in rows if row["data_source"] == source]
                metrics.update(rollouts.summarise(part, f"val/{source}"))
        self._record("val", metrics)
        return metrics

    def _compute_metrics(self, batch: KVBatchMeta, metrics: dict, timing_raw: dict, global_steps: int, epoch: int):
        metrics.update({f"timing_s/{name}": seconds for name, seconds in timing_raw.items()})
        metrics.update({"training/global_step": global_steps, "training/epoch": epoch})
        self._record("train", {name: value for name, value in metrics.items() if not name.startswith("val/")})

    def _record(self, phase: str, metrics: dict[str, float]) -> None:
        """Append one line to ``metrics.jsonl`` and one row to the console."""
        numbers = {name: float(value) for name, value in metrics.items()}
        line = json.dumps({"step": self.global_steps, "phase": phase, "time": time.time(), **numbers})
        with (self.run_dir / "metrics.jsonl").open("a") as file:
            file.write(line + "\n")
        (self.printer.train if phase == "train" else self.printer.validation)(self.global_steps, numbers)


def _data(value: Any) -> Any:
    """The object inside tensordict's non-tensor wrapper, or the value itself."""
    return getattr(value, "data", value)
