# SPDX-License-Identifier: Apache-2.0
"""What a plan warns of, and which setting is better; every proposal has been reckoned through."""

from collections.abc import Iterator
from dataclasses import replace

from opd_ext.plan.machines import GiB
from opd_ext.plan.memory import SERVERS, generation, machine_uses, phases
from opd_ext.plan.run import Run
from opd_ext.plan.timing import Times, server, times

FULL = 0.97  # of a device's memory: what is beyond is lost to fragments
_WORTH = 0.9  # of a step's time: a proposal that leaves more is none
_MUCH = 0.3  # of a run's time
_ROLLOUT, _ACTOR = "actor_rollout_ref.rollout", "actor_rollout_ref.actor"


def advice(run: Run, taken: Times) -> list[str]:
    """Sentences, the gravest first."""
    return [*grave(run), *_parallel(run, taken), *_validation(run, taken), *_head(run, taken)]


def grave(run: Run) -> list[str]:
    """Of what will end the run: memory that is not there."""
    return [*_overflows(run), *_cache(run)]


def _fits(run: Run, name: str) -> bool:
    return all(p.bytes <= FULL * run.machine.memory for p in phases(run) if p.name == name)


def _overflows(run: Run) -> Iterator[str]:
    if run.device == "cpu":
        uses = machine_uses(run)
        if sum(uses.values()) > FULL * run.machine.memory:
            made = ", ".join(f"{name} {size / GiB:.1f}" for name, size in uses.items())
            yield (
                f"OUT OF MEMORY on this machine: {made} are {sum(uses.values()) / GiB:.1f} of "
                f"{run.machine.memory / GiB:.1f} GiB; lower {_ACTOR}.ppo_max_token_len_per_gpu or "
                "ray_kwargs.ray_init.runtime_env.env_vars.VLLM_CPU_KVCACHE_SPACE, or train a smaller model."
            )
        return
    for phase in phases(run):
        if phase.bytes <= FULL * run.machine.memory:
            continue
        remedies = [words for words, other in _remedies(run, phase.name) if _fits(other, phase.name)]
        when = " from step 2 on, when the optimiser's moments exist" if phase.name == "generation" else ""
        other = "use more GPUs or a smaller model." if run.adapter else "use more GPUs, a smaller model or LoRA."
        yield (
            f"OUT OF MEMORY in {phase.name}{when}: {phase.bytes / GiB:.0f} of {run.machine.memory / GiB:.0f} GiB; "
            + (f"set {' or '.join(remedies[:2])}." if remedies else other)
        )


def _remedies(run: Run, phase: str) -> Iterator[tuple[str, Run]]:
    if phase == SERVERS:
        for tp in (2, 4, 8):
            wider = tuple(replace(each, tp=max(tp, each.tp)) for each in run.servers)
            yield f"opd.teacher.vllm.tensor_parallel_size={tp}", replace(run, servers=wider)
        return
    sharding = run.sharding
    moments = replace(sharding, offloaded=sharding.offloaded | {"optimizer"})
    if phase in ("generation", "weight sync"):
        if run.vllm_share is not None:
            together = 2 if run.tp < 2 and run.gpus_per_node % 2 == 0 else run.tp
            for share in (0.5, 0.4, 0.3):
                smaller = replace(run, vllm_share=share, tp=together)
                if share < run.vllm_share and server(smaller).room > run.vllm_length and _fits(smaller, phase):
                    tp = f" with {_ROLLOUT}.tensor_model_parallel_size=2" if run.tp < together else ""
                    yield f"{_ROLLOUT}.gpu_memory_utilization={share}{tp}", smaller
                    break
        yield f"{_ACTOR}.fsdp_config.optimizer_offload=true", replace(run, sharding=moments)
        yield from _teachers_away(run)
        return
    if not run.checkpointing:
        key = "actor_rollout_ref.model.enable_gradient_checkpointing=true"
        yield key, replace(run, checkpointing=True)
    if run.budget > run.rank_pair:
        pair = run.rank_pair
        smaller = replace(run, budget=pair, teacher_budget=pair, score_budget=pair)
        yield f"{_ACTOR}.ppo_max_token_len_per_gpu={pair}", smaller
    if run.sequence_parallel == 1:
        shapes = (run.student, *run.teachers)
        for ranks in (each for each in (2, 4, 8) if all(shape.shared_by(each) for shape in shapes)):
            if run.gpus_per_node % ranks:
                continue
            shared = replace(run, sequence_parallel=ranks)
            pair = shared.rank_pair
            smaller = replace(shared, budget=pair, score_budget=pair)
            if _fits(smaller, phase):
                keys = f"{_ACTOR}.ppo_max_token_len_per_gpu={pair}"
                yield f"{_ACTOR}.ulysses_sequence_parallel_size={ranks} with {keys}", smaller
                break
    yield from _teachers_away(run)
    yield f"{_ACTOR}.fsdp_config.offload_policy=true", replace(run, sharding=replace(sharding, streamed=True))


def _teachers_away(run: Run) -> Iterator[tuple[str, Run]]:
    """Teachers wait in the host's memory, and are streamed through their passes."""
    own = run.teacher_sharding
    if run.teachers and not (own.streamed or "weights" in own.offloaded):
        away = replace(own, offloaded=own.offloaded | {"weights"})
        yield "actor_rollout_ref.ref.fsdp_config.param_offload=true", replace(run, teacher_sharding=away)


def _cache(run: Run) -> Iterator[str]:
    room = server(run).room
    if run.vllm_share is not None and room < run.vllm_length:
        yield (
            f"vLLM WILL NOT START: beside the weights its share holds {max(0, room):,.0f} tokens, and one sequence may "
            f"have {run.vllm_length:,}; raise {_ROLLOUT}.gpu_memory_utilization or .tensor_model_parallel_size."
        )


def _parallel(run: Run, taken: Times) -> Iterator[str]:
    """A few long sequences do not fill a GPU: reading its share of the weights is all that one decoding step does."""
    if run.device != "cuda" or run.tp > 1 or run.gpus_per_node % 4:
        return
    other = times(replace(run, tp=4))
    if other.step < _WORTH * taken.step and generation(run).bytes <= FULL * run.machine.memory:
        yield (
            f"generation waits for its longest responses: {_ROLLOUT}.tensor_model_parallel_size=4 takes it from "
            f"{taken.phases['generation']:.0f} to {other.phases['generation']:.0f} s, a step from {taken.step:.0f} to "
            f"{other.step:.0f} s."
        )


def _validation(run: Run, taken: Times) -> Iterator[str]:
    if not run.steps or not taken.total or taken.validating < _MUCH * taken.total or not run.validation:
        return
    largest = max(run.validation, key=lambda each: each.samples)
    in_full = [sets for _, sets in run.meanwhile if sets == run.validation]
    fewer = ", or look at a few problems while training ('opd.validation.monitor={problems: 64, n: 1}')"
    yield (
        f"validation is {taken.validating / taken.total:.0%} of the run; {largest.samples:,} of its "
        f"{sum(each.samples for each in run.validation):,} samples are {largest.name}: sample fewer per problem there "
        f"(opd.validation.sets.{largest.name}.n){fewer if in_full else ''}."
    )


def _head(run: Run, taken: Times) -> Iterator[str]:
    if not run.fp32_head or run.device != "cuda":
        return
    other = times(replace(run, fp32_head=False))
    if other.step < _WORTH * taken.step:
        yield (
            f"opd.head.fp32=true costs {taken.step - other.step:.0f} of {taken.step:.0f} s per step in fp32 products."
        )
