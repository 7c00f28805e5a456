# SPDX-License-Identifier: Apache-2.0
"""One CRISP update against one GRPO update of the same model on the same rollouts, in one run on one machine.

    python benchmarks/step.py                          # CPU, a small Qwen3
    python benchmarks/step.py --device cuda --dtype bfloat16 --vocab 151936 --hidden 4096 --layers 8 --response 4096 \\
        --budget 20480 --gradient-checkpointing
    python benchmarks/step.py --model Qwen3-1.7B --device cuda --dtype bfloat16 --response 4096 --budget 20480 \\
        --gradient-checkpointing                       # sizes of a real model, random weights

GRPO is verl's stock FSDP engine with verl's ``ppo_loss``: one pass over the batch, logits at every position. verl's
trainer runs a forward pass for the old log-probs before it; that is measured apart (``log_probs``). ``own_old`` is our
engine's GRPO update that needs no such pass: it takes its own log-probs for the old ones (config/old_policy.py); the
entropies that the pass would have brought are computed within it. CRISP is our engine with a teacher: a forward pass of
the teacher (weights of its own, longer prompts), the student's pass, the chunked head on response rows only. An update
is everything in ``train_batch``: both passes, clipping, AdamW.

What to expect, from the matrix products (attention's quadratic part left out). Let P be the trunk's parameters, T and
T' the student's and the teacher's tokens, N the response tokens. GRPO needs 3 (P + V H) T multiply-adds (forward and
two backward products), CRISP 3 P T + P T' + 4 V H N: the teacher's trunk adds a third of forward + backward, and the
head, with its second set of logits, is dearer per row but sees fewer rows. So: 1 + T' / 3T where the trunk dominates,
about 1.33 for short prompts; towards (4 / 3) N / T where the vocabulary does. With its pass for old log-probs GRPO
needs a third more, and the two come out even or better. ``predicted_ratio`` in the result is this formula at the
sizes of the run. Extra memory should be smaller for CRISP wherever logits dominate activations, because GRPO holds
several [tokens, V] tensors per micro-batch. What was measured is in ``results/``.

Extra memory is the peak of one update above what stays (weights, optimiser state, teacher), after a first small update
that creates the optimiser state; each arm in a fresh process. CPU: the resident set's high-water mark (VmHWM), reset
before the update, with every tensor of a megabyte mapped on its own so that the mark follows live tensors. CUDA: the
caching allocator's peak. Times come from interleaved calls in another process, medians after a warm-up round.
"""

import dataclasses
import functools
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from measure import RESULTS, in_fresh_process, provenance, reset_resident_peak, resident, timed, write_json
from rich.table import Table

from opd_ext.plan.shapes import known_config
from opd_ext.terminal import terminal

ARMS = ("grpo", "crisp", "log_probs", "own_old")
_HEAD_DIM = 64
# Without it the allocator keeps freed tensors of up to 32 MiB, and the resident set tells more of it than of us.
_MAP_TENSORS = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
_VERL_DTYPE = {"float32": "fp32", "bfloat16": "bf16"}


@dataclasses.dataclass(frozen=True)
class Setting:
    """Sizes of one run: sequences and their lengths (tokens), the model, tokens per micro-batch."""

    batch: int
    prompt: int
    teacher_prompt: int
    response: int
    vocab: int
    hidden: int
    layers: int
    budget: int
    dtype: str
    device: str
    gradient_checkpointing: bool
    repeats: int
    model: str = ""  # a known one, whose sizes these are

    @property
    def student_tokens(self) -> int:
        return self.batch * (self.prompt + self.response)


def save_model(setting: Setting, folder: Path) -> int:
    """A random model of the setting's sizes; returns the parameters of its trunk (norms and embedding left out)."""
    from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    if setting.model:
        sizes = vars(known_config(setting.model)) | {"max_position_embeddings": 40960}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes), dtype=torch.float32)
        model.save_pretrained(folder)
        return sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)
    heads = setting.hidden // _HEAD_DIM
    config = Qwen3Config(
        vocab_size=setting.vocab,
        hidden_size=setting.hidden,
        intermediate_size=3 * setting.hidden,
        num_hidden_layers=setting.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(heads // 4, 1),
        head_dim=_HEAD_DIM,
        max_position_embeddings=40960,
        tie_word_embeddings=False,
    )
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)


def predicted_ratio(setting: Setting, trunk: int) -> float:
    """CRISP / GRPO in multiply-adds; see the module's docstring. Checkpointing repeats the trunk's forward pass."""
    passes = 4 if setting.gradient_checkpointing else 3
    head, student = setting.vocab * setting.hidden, setting.student_tokens
    teacher, rows = setting.batch * (setting.teacher_prompt + setting.response), setting.batch * setting.response
    grpo = passes * trunk * student + 3 * head * student
    return (passes * trunk * student + trunk * teacher + 4 * head * rows) / grpo


class Arms:
    """The engines that some arms need, on one rank, and what each arm calls."""

    def __init__(self, setting: Setting, folder: Path, arms: tuple[str, ...] = ARMS):
        if setting.device == "cpu":
            os.environ["VERL_PLATFORM"] = "cpu"
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        from opd_ext import plugin

        plugin.register()
        backend = "gloo" if setting.device == "cpu" else "nccl"
        if not torch.distributed.is_initialized():
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

        from opd_ext.bridge.engine import OPDEngine
        from opd_ext.bridge.teachers import Tutor
        from opd_ext.teacher.kinds import Frozen

        self.setting, self.folder = setting, folder
        if {"grpo", "log_probs"} & set(arms):
            self.stock = self._engine(FSDPEngineWithLMHead)
        if "own_old" in arms:
            self.own = self._engine(OPDEngine)
        if "crisp" in arms:
            self.student = self._engine(OPDEngine)
            self.student.tutors = (Tutor(Frozen(), self._engine(OPDEngine, forward_only=True)),)

    def _engine(self, kind: type, forward_only: bool = False) -> Any:
        from verl.trainer.config import CheckpointConfig
        from verl.workers.config import FSDPOptimizerConfig, HFModelConfig

        attention = "sdpa" if self.setting.device == "cpu" else "flash_attention_2"
        model = HFModelConfig(
            path=str(self.folder),
            load_tokenizer=False,
            override_config={"attn_implementation": attention},
            enable_gradient_checkpointing=self.setting.gradient_checkpointing,
            use_remove_padding=True,
        )
        optimizer = FSDPOptimizerConfig(lr=1e-6, total_training_steps=1)
        engine = kind(model, self._engine_config(forward_only), optimizer, CheckpointConfig())
        engine.initialize()
        return engine

    def _engine_config(self, forward_only: bool = False) -> Any:
        from verl.workers.config import FSDPEngineConfig

        dtype = _VERL_DTYPE[self.setting.dtype]
        return FSDPEngineConfig(
            strategy="fsdp2",
            forward_only=forward_only,
            model_dtype=dtype if forward_only else "fp32",
            mixed_precision={"param_dtype": dtype, "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
            max_token_len_per_gpu=self.setting.budget,
            infer_max_token_len_per_gpu=self.setting.budget,
            use_torch_compile=False,
        )

    @functools.cached_property
    def _ppo_loss(self) -> Callable:
        from verl.workers.config import FSDPActorConfig
        from verl.workers.utils.losses import ppo_loss

        config = FSDPActorConfig(strategy="fsdp2", rollout_n=1, use_dynamic_bsz=True, fsdp_config=self._engine_config())
        return functools.partial(ppo_loss, config=config)

    def batch(self, sequences: int, teacher: bool, own_old: bool = False, **non_tensors: Any) -> Any:
        """The same random rollouts every time, with the fields that either loss reads.

        Args:
            own_old: the update takes its own log-probs for the old ones.
        """
        from verl.utils import tensordict_utils as tu

        from opd_ext.bridge.old_policy import CURRENT

        setting, generator = self.setting, torch.Generator().manual_seed(0)

        def jagged(rows: list[torch.Tensor]) -> torch.Tensor:
            return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

        def ids(length: int) -> list[torch.Tensor]:
            return [torch.randint(setting.vocab, (length,), generator=generator) for _ in range(sequences)]

        prompts, teacher_prompts, responses = ids(setting.prompt), ids(setting.teacher_prompt), ids(setting.response)
        log_probs = [-torch.rand(setting.response, generator=generator) for _ in range(sequences)]
        fields = {
            "input_ids": jagged([torch.cat(pair) for pair in zip(prompts, responses, strict=True)]),
            "position_ids": jagged([torch.arange(setting.prompt + setting.response)] * sequences),
            "prompts": jagged(prompts),
            "responses": jagged(responses),
            "loss_mask": jagged([torch.ones_like(r) for r in responses]),
            "rollout_log_probs": jagged(log_probs),
        }
        if teacher:  # without advantages: they would bring a policy term along
            pairs = zip(teacher_prompts, responses, strict=True)
            fields["teacher_input_ids"] = jagged([torch.cat(pair) for pair in pairs])
            fields["has_teacher"] = torch.ones(sequences, dtype=torch.bool)
            non_tensors |= {"opd_distillation_weight": 1.0, "opd_gate": 0.0}
        else:
            fields["response_mask"] = jagged([torch.ones_like(r) for r in responses])
            if own_old:
                non_tensors[CURRENT] = True
            else:
                fields["old_log_probs"] = jagged(log_probs)
            fields["advantages"] = jagged([torch.ones(setting.response) * (-1) ** i for i in range(sequences)])
        batching = {"use_dynamic_bsz": True, "max_token_len_per_gpu": setting.budget, "global_batch_size": sequences}
        return tu.get_tensordict(fields, {"temperature": 1.0, **batching, **non_tensors})

    def run(self, arm: str, sequences: int | None = None) -> None:
        """One call of an arm on ``sequences`` rollouts, the whole batch by default."""
        sequences = sequences or self.setting.batch
        if arm == "log_probs":
            with self.stock.eval_mode():
                self.stock.infer_batch(self.batch(sequences, teacher=False, calculate_entropy=True))
            return
        if arm == "crisp":
            engine, loss = self.student, None
        else:
            engine, loss = self.own if arm == "own_old" else self.stock, self._ppo_loss
        with engine.train_mode():
            engine.train_batch(self.batch(sequences, arm == "crisp", own_old=arm == "own_old"), loss)


def extra_memory(setting: Setting, folder: Path, arm: str) -> dict:
    """Bytes that stay between updates, and the peak of one update above them; run in a fresh process."""
    arms = Arms(setting, folder, (arm,))
    arms.run(arm, sequences=1)
    if setting.device == "cuda":
        arms.run(arm)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated
    else:
        reset_resident_peak()
        before, peak = resident("VmRSS"), lambda: resident("VmHWM")
    arms.run(arm)
    return {"resident": before, "extra": peak() - before}


def times(setting: Setting, folder: Path) -> dict:
    """Seconds of every arm, interleaved."""
    arms, seconds = Arms(setting, folder), {arm: [] for arm in ARMS}
    for repeat in range(setting.repeats + 1):
        for arm in ARMS:
            spent = timed(lambda arm=arm: arms.run(arm), setting.device)
            if repeat > 0:
                seconds[arm].append(spent)
    median = {arm: statistics.median(values) for arm, values in seconds.items()}
    return {
        "seconds_median": median,
        "seconds_fastest": {arm: min(values) for arm, values in seconds.items()},
        "student_tokens_per_second": {
            arm: setting.student_tokens / median[arm] for arm in ("grpo", "crisp", "own_old")
        },
    }


def ratios(measured: dict, predicted: float) -> dict:
    """CRISP over GRPO, without and with verl's pass for old log-probs; GRPO without that pass over GRPO with it."""
    result = {"predicted_ratio": predicted}
    for which in ("median", "fastest"):
        seconds = measured[f"seconds_{which}"]
        result[f"time_ratio_{which}"] = seconds["crisp"] / seconds["grpo"]
        result[f"time_ratio_with_log_probs_{which}"] = seconds["crisp"] / (seconds["grpo"] + seconds["log_probs"])
        result[f"time_ratio_own_old_{which}"] = seconds["own_old"] / (seconds["grpo"] + seconds["log_probs"])
    return result


def _table(result: dict) -> Table:
    setting, memory, median = result["setting"], result["memory_bytes"], result["seconds_median"]
    table = Table(title=f"One update: CRISP against GRPO\n{result['hardware']['name']}", caption=str(setting))
    for column in ("", "GRPO", "CRISP", "CRISP / GRPO"):
        table.add_column(column, justify="left" if not column else "right")
    for which in ("median", "fastest"):
        seconds = result[f"seconds_{which}"]
        row = [f"{seconds[arm]:.3f} s" for arm in ("grpo", "crisp")]
        table.add_row(f"time, {which}", *row, f"{result[f'time_ratio_{which}']:.1%}")
    table.add_row("predicted from matrix products", "", "", f"{result['predicted_ratio']:.1%}")
    with_pass = f"{median['grpo'] + median['log_probs']:.3f} s"
    share = f"{result['time_ratio_with_log_probs_median']:.1%}"
    table.add_row("time, median, with old log-probs", with_pass, f"{median['crisp']:.3f} s", share)
    share = f"{result['time_ratio_own_old_median']:.1%}"
    table.add_row(
        "GRPO as its own old policy, median", f"{median['own_old']:.3f} s", "", f"{share} of GRPO with the pass"
    )
    speed = result["student_tokens_per_second"]
    table.add_row("student tokens/s", f"{speed['grpo']:,.0f}", f"{speed['crisp']:,.0f}", "")
    for name in ("extra", "resident"):
        row = [f"{memory[arm][name] / 2**20:,.0f} MiB" for arm in ("grpo", "crisp")]
        label = {"extra": "peak extra memory", "resident": "memory between updates"}[name]
        table.add_row(label, *row, f"{memory['crisp'][name] / max(memory['grpo'][name], 1):.1%}")
    return table


def main(
    batch: Annotated[int, typer.Option(help="Rollouts per update.")] = 8,
    prompt: Annotated[int, typer.Option(help="Tokens of the student's prompt.")] = 64,
    teacher_prompt: Annotated[int, typer.Option(help="Tokens of the teacher's prompt.")] = 96,
    response: Annotated[int, typer.Option(help="Tokens of every response.")] = 192,
    vocab: int = 8192,
    hidden: Annotated[int, typer.Option(help=f"A multiple of {_HEAD_DIM}.")] = 256,
    layers: int = 4,
    model: Annotated[str, typer.Option(help="Sizes of a dense model that opd plan knows, e.g. Qwen3-1.7B.")] = "",
    budget: Annotated[int, typer.Option(help="Tokens per micro-batch, in every pass.")] = 1024,
    dtype: Annotated[str, typer.Option(help="Compute dtype: float32 or bfloat16.")] = "float32",
    device: str = "cpu",
    gradient_checkpointing: bool = False,
    repeats: Annotated[int, typer.Option(help="Timed rounds over the arms.")] = 7,
    date: Annotated[str, typer.Option(help="Date to record; today by default.")] = "",
    out: Annotated[Path | None, typer.Option(help="JSON file; results/step_<device>_<sizes>.json.")] = None,
    force: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
) -> None:
    """Measure time, tokens per second and peak extra memory of both updates."""
    if dtype not in _VERL_DTYPE or hidden % _HEAD_DIM:
        raise typer.BadParameter(f"dtype must be one of {', '.join(_VERL_DTYPE)} and hidden a multiple of {_HEAD_DIM}.")
    if model:
        config = known_config(model)
        if config is None or hasattr(config, "num_experts") or hasattr(config, "num_local_experts"):
            raise typer.BadParameter(f"{model} is no dense model that is known by name, e.g. Qwen3-1.7B.")
        vocab, hidden, layers = config.vocab_size, config.hidden_size, config.num_hidden_layers
    if budget < max(prompt, teacher_prompt) + response:
        raise typer.BadParameter("budget must hold the longest sequence; raise --budget or shorten the sequences.")
    sizes = (batch, prompt, teacher_prompt, response, vocab, hidden, layers, budget)
    setting = Setting(*sizes, dtype, device, gradient_checkpointing, repeats, model)
    name = f"step_{device}_b{batch}_r{response}_v{vocab}_h{hidden}_l{layers}_{dtype}.json"
    out = out or RESULTS / name
    if out.exists() and not force:
        raise typer.BadParameter(f"{out} exists; choose another --out or pass --force.")
    console = terminal()
    with tempfile.TemporaryDirectory() as folder, console.status("") as status:
        status.update("building the model")
        trunk = in_fresh_process(save_model, setting, Path(folder))
        memory = {}
        for arm in ("grpo", "crisp"):
            status.update(f"memory of the {arm} arm")
            memory[arm] = in_fresh_process(extra_memory, setting, Path(folder), arm, environment=_MAP_TENSORS)
        status.update("times")
        measured = in_fresh_process(times, setting, Path(folder))
    result = {
        **provenance(device, date, "verl", "transformers"),
        "setting": dataclasses.asdict(setting),
        "trunk_parameters": trunk,
        **measured,
        **ratios(measured, predicted_ratio(setting, trunk)),
        "memory_bytes": memory,
        "memory_ratio": memory["crisp"]["extra"] / max(memory["grpo"]["extra"], 1),
    }
    console.print(_table(result))
    write_json(out, result)
    console.print(f"written to {out}")


if __name__ == "__main__":
    typer.run(main)
