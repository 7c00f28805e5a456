# SPDX-License-Identifier: Apache-2.0
"""Updates of the engine, one per thing that a method or a setting may change, and how two of them are compared."""

import dataclasses

import torch

from opd_ext.divergence.config import Branch
from opd_ext.divergence.sampled import Surrogate
from opd_ext.objective.objective import Objective
from opd_ext.policy import Shaping
from tests.stack.engine_inputs import WHOLE, Sample, Update, heard_by_another, make_samples

# fp32 engine against a float64 reference, relative to a parameter's largest gradient: fp32 holds 7 digits, and the
# sums over 50 positions and two layers lose one of them (measured: up to 2.4e-6). A wrong row, mask or weight shows
# at 1e-2 and above.
FP32 = 2e-5
# Two fp32 computations of the same sums in another order (measured: 3e-7 to 1.4e-6).
REORDERED = 1e-5

SAMPLES = make_samples([7, 12, 1, 9, 5, 15, 3, 8])  # masked tokens inside rows 1, 4 and 7; a response of one token
PADDING = Sample([2, 2], [2], [2], [0], [0.0], [0.0], [0], taught=False)  # the row with which verl fills a batch
UNTRAINED = dataclasses.replace(SAMPLES[3], mask=[0] * len(SAMPLES[3].mask))
EMPTY = Sample([5, 6, 7], [8, 9], [], [], [], [], [])
NOTHING = [PADDING, UNTRAINED, EMPTY, PADDING]
SAME_PROMPTS = [dataclasses.replace(s, teacher_prompt=s.prompt) for s in SAMPLES]
REDUCTIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum")
RATIO = (Shaping("teacher_ratio", {"bound": 0.2}),)
SPLITS = {
    "whole": {"budget": WHOLE, "teacher_budget": WHOLE},
    "tight": {"budget": 40, "teacher_budget": 50},
    "pairs": {"rows": 2},
    "singles": {"rows": 1},
}
DIVERGENCES = {
    "forward_kl": Objective((Branch("forward_kl"),)),
    "jsd": Objective((Branch("jsd", {"beta": 0.3}),)),
    "temperature": Objective((Branch(kind_args={"temperature": 2.0}),)),
}
# Every third sample has no teacher; the old policy is not the current one, so that ratios, clips and caps all bind.
SOME = [dataclasses.replace(s, taught=i % 3 != 2) for i, s in enumerate(SAMPLES)]
# A teacher that has other tokens, and other numbers of them, for the same text.
HEARD = [dataclasses.replace(s, taught=i % 3 != 2) for i, s in enumerate(heard_by_another(SAMPLES))]
SPANS = tuple(Branch(kind, {}, label) for kind, label in (("forward_kl", 1), ("reverse_kl", 2)))
CLIPPED_SPANS = tuple(dataclasses.replace(branch, kind_args={"entry_clip": 0.05}) for branch in SPANS)
POSITION = {"credit": "position", "credit_args": {"gamma": 0.5}}
METHODS = {
    "some taught": Update(SOME),
    "some taught, by sequence": Update(SOME, objective=Objective(reduction="seq-mean-token-mean")),
    "only the taught count": Update(SOME, denominator="distilled"),
    "position credit": Update(SAMPLES, objective=Objective(**POSITION)),
    "surrogate": Update(SOME, objective=Objective(surrogate=Surrogate(), rollout_cap=1.5, **POSITION)),
    "surrogate off-policy": Update(
        SOME, objective=Objective(surrogate=Surrogate(), rollout_cap=1.5, **POSITION), old_policy=True
    ),
    "other tokens": Update(HEARD, objective=Objective(surrogate=Surrogate()), foreign=(0,)),
    "other tokens off-policy": Update(
        HEARD,
        teacher="wide",
        objective=Objective(surrogate=Surrogate(), rollout_cap=1.5, temperature=0.7, **POSITION),
        old_policy=True,
        foreign=(0,),
    ),
    "other tokens beside a policy": Update(
        HEARD, objective=Objective(surrogate=Surrogate()), policy=True, distillation_weight=0.1, foreign=(0,)
    ),
    "warm surrogate": Update(SAMPLES, objective=Objective(surrogate=Surrogate(), temperature=0.7)),
    "capped": Update(SOME, objective=Objective(importance_cap=1.2, rollout_cap=1.5), old_policy=True),
    "spans": Update(SOME, objective=Objective(SPANS, credit="spans"), distillation_weight=0.3),
    "clipped spans": Update(SOME, objective=Objective(CLIPPED_SPANS, credit="spans")),
    "key spans": Update(SOME, objective=Objective(SPANS[:1], credit="spans")),
    "mixed": Update(SOME, policy=True, distillation_weight=0.1),
    "gated spans": Update(
        SOME,
        objective=Objective(
            SPANS[:1], credit="spans", shapings=(Shaping("complement"),), active_spans=frozenset({SPANS[0].label})
        ),
        policy=True,
        distillation_weight=0.5,
        gate=0.3,
    ),
    "spans beside a policy": Update(
        SOME, objective=Objective(SPANS, credit="spans"), policy=True, distillation_weight=0.5
    ),
    "policy for the untaught": Update(SOME, objective=Objective(shapings=(Shaping("untaught"),)), policy=True),
    "shaped": Update(
        SOME,
        objective=Objective(surrogate=Surrogate(), shapings=RATIO),
        policy=True,
        distillation_weight=0.5,
    ),
    "trust region": Update(SAMPLES, trust=0.25),
    "external": Update(SAMPLES, teacher="wide"),
    "taller student": Update(SAMPLES, model="tall", teacher="untied_teacher"),
    "taller student and a policy": Update(SOME, model="tall", teacher="untied_teacher", policy=True),
}
# Two by two they are the next teacher's; of the last one a rank may have none.
CUT = [dataclasses.replace(s, lesson=i // 2 % 3) for i, s in enumerate(SOME)]
LATE = [dataclasses.replace(s, lesson=max(0, i - 5)) for i, s in enumerate(SAMPLES)]
EQUAL = (("untied_teacher", Objective(), 1.0),) * 3
MIXED = (
    ("untied_teacher", Objective(), 1.0),
    ("wide", Objective((Branch("jsd", {"beta": 0.3}),)), 0.5),
    (None, Objective((Branch("forward_kl", {"entry_clip": 0.05}),)), 2.0),
)
# The second of three has other tokens.
TONGUES = [dataclasses.replace(s, heard=h.heard if s.lesson == 1 else None) for s, h in zip(CUT, HEARD, strict=True)]
SPOKEN = (MIXED[0], ("wide", Objective(surrogate=Surrogate()), 0.5), MIXED[2])
SEVERAL = {
    "three equal": Update(CUT, several=EQUAL),
    "three equal and a policy": Update(CUT, several=EQUAL, policy=True, distillation_weight=0.1),
    "mixed": Update(CUT, several=MIXED),
    "mixed, late": Update(LATE, several=MIXED),
    "mixed, pairs": Update(CUT, several=MIXED, rows=2),
    "mixed, tight": Update(CUT, several=MIXED, **SPLITS["tight"]),
    "one of other tokens": Update(TONGUES, several=SPOKEN, foreign=(1,)),
    "one of other tokens, pairs": Update(TONGUES, several=SPOKEN, foreign=(1,), rows=2),
}
SPOKEN_APART = {
    f"spoken, {i} alone": Update(
        [dataclasses.replace(s, lesson=0, taught=s.taught and s.lesson == i) for s in TONGUES],
        teacher=model,
        objective=objective,
        distillation_weight=weight,
        foreign=(0,) if i == 1 else (),
    )
    for i, (model, objective, weight) in enumerate(SPOKEN)
}
APART = {
    f"mixed, {i} alone": Update(
        [dataclasses.replace(s, lesson=0, taught=s.taught and s.lesson == i) for s in CUT],
        teacher=model,
        objective=objective,
        distillation_weight=weight,
    )
    for i, (model, objective, weight) in enumerate(MIXED)
}
# In front of later turns, which begin behind tokens that do not train, a teacher is told something.
TOLD = [
    dataclasses.replace(
        s,
        told=tuple(
            (j, [3 + (i + j) % 60, 5, 7][: 1 + (i + j) % 3])
            for j in range(1, len(s.mask))
            if s.mask[j] and not s.mask[j - 1]
        ),
    )
    for i, s in enumerate(SOME)
]
TURNS = {
    "told in turns": Update(TOLD),
    "told in turns, tight": Update(TOLD, **SPLITS["tight"]),
    "told in turns beside a policy": Update(TOLD, policy=True, distillation_weight=0.1),
    "told in turns, off-policy surrogate": Update(
        TOLD, objective=Objective(surrogate=Surrogate(), rollout_cap=1.5, **POSITION), old_policy=True
    ),
    "told in turns, trust region": Update(TOLD, trust=0.25),
}
USUAL = Update(SAMPLES)
TIED = Update(SAMPLES, model="tied", teacher="tied_teacher")

ON_ONE_RANK = {
    "untied": USUAL,
    "tied": TIED,
    **{
        f"{reduction} {split}": Update(SAMPLES, objective=Objective(reduction=reduction), **sizes)
        for reduction in REDUCTIONS
        for split, sizes in SPLITS.items()
    },
    **{
        f"{reduction} with nothing": Update(SAMPLES + NOTHING, objective=Objective(reduction=reduction), rows=1)
        for reduction in REDUCTIONS
    },
    "nothing packed": Update(SAMPLES + NOTHING),
    "only nothing": Update(NOTHING),
    "own teacher": Update(SAME_PROMPTS, teacher="untied", teacher_budget=WHOLE),
    "own teacher, live": Update(SAME_PROMPTS, teacher=None, teacher_budget=WHOLE),
    "copied": Update(SAMPLES, teacher="untied"),
    "official": Update(SAMPLES, objective=Objective(reduction="official"), rows=2),
    "checkpointed": Update(SAMPLES, gradient_checkpointing=True),
    "live": Update(SAMPLES, teacher=None),
    "chunk of 1": Update(SAMPLES, objective=Objective(chunk_size=1)),
    "chunk of 5": Update(SAMPLES, objective=Objective(chunk_size=5)),
    "bf16": Update(SAMPLES, param_dtype="bf16"),
    "bf16, fp32 head": Update(SAMPLES, param_dtype="bf16", objective=Objective(fp32=True)),
    "fp32 head": Update(SAMPLES, objective=Objective(fp32=True)),
    "hot rollout": Update(SAMPLES, rollout_temperature=0.6),
    **{name: Update(SAMPLES, objective=objective) for name, objective in DIVERGENCES.items()},
    **METHODS,
    **TURNS,
    **{f"several: {name}": update for name, update in {**SEVERAL, **APART, **SPOKEN_APART}.items()},
    **{f"{name}, tight": dataclasses.replace(update, **SPLITS["tight"]) for name, update in METHODS.items()},
}
ON_TWO_RANKS = {
    "untied": USUAL,
    "tied": TIED,
    **{f"{r} tight": Update(SAMPLES, objective=Objective(reduction=r), **SPLITS["tight"]) for r in REDUCTIONS},
    "one rank has nothing": Update(SAMPLES[:4] + NOTHING, rows=1),
    "only nothing": Update(NOTHING),
    "live": Update(SAMPLES, teacher=None),
    **METHODS,
    **TURNS,
    **{f"several: {name}": update for name, update in SEVERAL.items()},
    **{f"{m} after a refresh": Update(make_samples([4, 6]), model=m, teacher=m) for m in ("untied", "tied")},
}


def distance(actual: dict, expected: dict) -> float:
    """Largest difference of two updates: of the losses, and of each gradient over that gradient's largest entry."""
    assert actual["grads"].keys() == expected["grads"].keys()
    parts = [abs(actual["loss"] - expected["loss"]) / max(abs(expected["loss"]), 1e-30)]
    for name, grad in expected["grads"].items():
        scale = grad.abs().max()
        assert scale > 0, f"{name} has no gradient"
        parts.append(((actual["grads"][name].double() - grad.double()).abs().max() / scale).item())
    return max(parts)


def identical(a: dict, b: dict) -> bool:
    return a["loss"] == b["loss"] and all(torch.equal(a["grads"][n], b["grads"][n]) for n in a["grads"])
