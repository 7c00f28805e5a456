# SPDX-License-Identifier: Apache-2.0
"""Memory and time of the chunked head against a dense head under autograd, in one run on one machine.

    python benchmarks/head.py                          # CPU; N 4096, V 32000, H 512, float32
    python benchmarks/head.py --device cuda --n 8192 --v 151936 --h 4096 --dtype bfloat16

All arms compute the token mean of the full-vocabulary reverse KL and its gradients for hidden states and
head weight. The dense arm is a lean one: float32 logits of both sides, teacher under no_grad, nothing held
that autograd does not hold. Where ``liger-kernel`` is installed (0.8.5 was tried), its chunked loss is a third arm:
``LigerFusedLinearJSDLoss`` with beta 1, which is this divergence, compiled on CUDA; the loss of labels that it computes
besides, at weight 0, is small. *Extra* memory is the peak above the inputs, less the two gradients that every
implementation must return.

How memory is measured. CPU: each arm runs once in a fresh process; the kernel's high-water mark of its
resident set (VmHWM), less the resident set just before the call. Large tensors are mapped and unmapped one by
one, so that mark follows live tensors, and it includes what an allocator hook would miss (workspaces of the
matrix products). CUDA: the caching allocator's peak of allocated bytes. Times come from interleaved calls in
a third process: the median, and the fastest, which tells more on a machine that does other work as well. ``time /
products`` is the fastest against four matrix products of that size and dtype, without which no arm can be done: logits
of two sides and two gradients.
"""

import dataclasses
import functools
import importlib.util
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from measure import RESULTS, in_fresh_process, provenance, resident, timed, write_json
from rich.table import Table

from opd_ext.divergence.divergences import reverse_kl
from opd_ext.objective.head import chunked_divergence
from opd_ext.terminal import terminal

LIGER = "liger"


def arms() -> tuple[str, ...]:
    """What is compared: the dense arm first, the others against it."""
    return ("dense", "head", *((LIGER,) if importlib.util.find_spec("liger_kernel") else ()))


@dataclasses.dataclass(frozen=True)
class Setting:
    """Sizes of one run: N rows, vocabulary V, hidden size H of both models."""

    n: int
    v: int
    h: int
    dtype: str
    chunk_size: int
    device: str
    repeats: int


class Problem:
    """Random inputs with logits of about unit scale, the same in every process."""

    def __init__(self, setting: Setting):
        generator = torch.Generator().manual_seed(0)
        dtype = getattr(torch, setting.dtype)

        def normal(*shape: int, scale: float) -> torch.Tensor:
            return (scale * torch.randn(*shape, generator=generator)).to(setting.device, dtype)

        self.setting = setting
        self.hidden = normal(setting.n, setting.h, scale=1.0).requires_grad_()
        self.weight = normal(setting.v, setting.h, scale=setting.h**-0.5).requires_grad_()
        self.teacher_hidden = normal(setting.n, setting.h, scale=1.0)
        self.teacher_weight = normal(setting.v, setting.h, scale=setting.h**-0.5)
        self.token_weight = torch.full((setting.n,), 1.0 / setting.n, device=setting.device)

    def dense(self) -> torch.Tensor:
        with torch.no_grad():
            teacher_logits = (self.teacher_hidden @ self.teacher_weight.T).float()
        return (self.token_weight * reverse_kl((self.hidden @ self.weight.T).float(), teacher_logits)).sum()

    def head(self) -> torch.Tensor:
        sides = (self.hidden, self.weight, self.teacher_hidden, self.teacher_weight)
        return chunked_divergence(*sides, self.token_weight, chunk_size=self.setting.chunk_size)[0]

    @functools.cached_property
    def _liger(self) -> Callable[..., torch.Tensor]:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        compiled, size = self.setting.device == "cuda", self.setting.chunk_size
        weights = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0}
        return LigerFusedLinearJSDLoss(beta=1.0, compiled=compiled, chunk_size=size, **weights)

    def liger(self) -> torch.Tensor:
        labels = torch.zeros(self.setting.n, dtype=torch.long, device=self.setting.device)
        return self._liger(self.hidden, self.weight, self.teacher_hidden, self.teacher_weight, labels)

    def gradients(self, arm: str) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.autograd.grad(getattr(self, arm)(), (self.hidden, self.weight))


def extra_memory(setting: Setting, arm: str) -> int:
    """Peak bytes of one call above its inputs and its two gradients; run in a fresh process."""
    # Loads kernels and thread pools, and compiles on CUDA, at a size that does not move the high-water mark.
    Problem(dataclasses.replace(setting, n=64, v=256, h=64)).gradients(arm)
    problem = Problem(setting)
    if setting.device == "cuda":
        problem.gradients(arm)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated
    else:
        before, peak = resident("VmRSS"), lambda: resident("VmHWM")
    gradients = problem.gradients(arm)
    return peak() - before - sum(g.numel() * g.element_size() for g in gradients)


def _fastest(call: Callable[[], object], setting: Setting) -> float:
    timed(call, setting.device)
    return min(timed(call, setting.device) for _ in range(setting.repeats))


def _difference(problem: Problem, arm: str) -> dict[str, float]:
    """Of the gradients from the dense arm's, the largest, relative to the largest of these."""
    expected, actual = problem.gradients("dense"), problem.gradients(arm)
    return {
        name: ((a.float() - e.float()).abs().max() / e.float().abs().max()).item()
        for name, a, e in zip(("hidden", "weight"), actual, expected, strict=True)
    }


def compare(setting: Setting) -> dict:
    """Times of all arms (interleaved), ceilings of the machine, and the difference of gradients."""
    problem, there = Problem(setting), arms()
    difference = {arm: _difference(problem, arm) for arm in there[1:]}  # compiles, too
    times = {arm: [] for arm in there}
    for _ in range(setting.repeats):
        for arm in there:
            times[arm].append(timed(lambda arm=arm: problem.gradients(arm), setting.device))
    median = {arm: statistics.median(values) for arm, values in times.items()}
    fastest = {arm: min(values) for arm, values in times.items()}
    with torch.no_grad():
        product = _fastest(lambda: problem.hidden @ problem.weight.T, setting)
        source = torch.empty(2**28 if setting.device == "cuda" else 2**26, device=setting.device)
        target = torch.zeros_like(source)
        copied = _fastest(lambda: target.copy_(source), setting)
    flop = 2 * setting.n * setting.v * setting.h
    return {
        "max_relative_gradient_difference": difference["head"],
        "max_relative_gradient_difference_of": difference,
        "seconds_median": median,
        "seconds_fastest": fastest,
        "time_ratio_median": median["head"] / median["dense"],
        "time_ratio_fastest": fastest["head"] / fastest["dense"],
        "matmul_ceiling_tflops": flop / product / 1e12,
        "copy_ceiling_gb_per_s": 2 * source.numel() * source.element_size() / copied / 1e9,
        # Logits of two sides and two gradients: four products of the same size.
        "time_over_products": {arm: seconds / (4 * product) for arm, seconds in fastest.items()},
        "head_tflops_in_products": 4 * flop / fastest["head"] / 1e12,
    }


def _table(result: dict) -> Table:
    setting, memory = result["setting"], result["extra_memory_bytes"]
    sizes = ", ".join(f"{key} {setting[key]}" for key in ("n", "v", "h", "dtype", "chunk_size", "device"))
    table = Table(title=f"Chunked head against dense head\n{result['hardware']['name']} | {sizes}")
    against = [(arm, other) for arm, other in (("head", "dense"), ("head", LIGER)) if other in memory]
    for column in ("", *memory, *(f"{arm} / {other}" for arm, other in against)):
        table.add_column(column, justify="left" if not column else "right")

    def add(name: str, values: dict[str, float], shown: Callable[[float], str]) -> None:
        ratios = [f"{values[arm] / values[other]:.1%}" if values[other] else "" for arm, other in against]
        table.add_row(name, *map(shown, values.values()), *ratios)

    add("peak extra memory", memory, lambda size: f"{size / 2**20:,.0f} MiB")
    for which in ("median", "fastest"):
        add(f"time, {which}", result[f"seconds_{which}"], lambda seconds: f"{seconds:.3f} s")
    over = result["time_over_products"]
    table.add_row("time / products", *(f"{over[arm]:.2f}" for arm in memory))
    table.add_section()
    for name in ("hidden", "weight"):
        found = result["max_relative_gradient_difference_of"]
        table.add_row(f"gradient diff, {name}", "", *(f"{found[arm][name]:.1e}" for arm in found))
    table.add_row("products", f"ceiling {result['matmul_ceiling_tflops']:.2f} TFLOP/s")
    table.add_row("copy", f"ceiling {result['copy_ceiling_gb_per_s']:.0f} GB/s")
    return table


def main(
    n: int = 4096,
    v: int = 32000,
    h: int = 512,
    dtype: str = "float32",
    chunk_size: int = 1024,
    device: str = "cpu",
    repeats: Annotated[int, typer.Option(help="Timed calls per arm.")] = 5,
    date: Annotated[str, typer.Option(help="Date to record; today by default.")] = "",
    out: Annotated[Path | None, typer.Option(help="JSON file; results/head_<device>_<sizes>.json.")] = None,
    force: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
) -> None:
    """Measure peak extra memory, time and gradients of the head against a dense one."""
    setting = Setting(n, v, h, dtype, chunk_size, device, repeats)
    out = out or RESULTS / f"head_{device}_n{n}_v{v}_h{h}_{dtype}.json"
    if out.exists() and not force:
        raise typer.BadParameter(f"{out} exists; choose another --out or pass --force.")
    console = terminal(120)
    with console.status("") as status:
        memory = {}
        for arm in arms():
            status.update(f"memory of the {arm} arm")
            memory[arm] = in_fresh_process(extra_memory, setting, arm)
        status.update("gradients and times")
        compared = in_fresh_process(compare, setting)
    result = {
        **provenance(device, date),
        "setting": dataclasses.asdict(setting),
        "extra_memory_bytes": memory,
        "memory_ratio": memory["head"] / max(memory["dense"], 1),
        **compared,
    }
    console.print(_table(result))
    if LIGER not in memory:
        console.print("No arm of liger-kernel, because it is not installed: pip install liger-kernel.")
    write_json(out, result)
    console.print(f"written to {out}")


if __name__ == "__main__":
    typer.run(main)
