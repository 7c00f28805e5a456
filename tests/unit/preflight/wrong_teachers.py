# SPDX-License-Identifier: Apache-2.0
"""Models that cannot teach from a server."""

from .conftest import config_with
from .wrong import wrong

TOPK = "opd.divergence={kind: forward_kl, support: topk"


def taught(server, *words, **config):
    """A run whose teacher is a model of another config, on a server."""
    said = ["method=opd", f"teacher_server={server}", *words]
    return lambda w: "\n".join([*said, f"opd.teacher.path={w.model(config_with(**config))}"])


TEACHERS = [
    wrong(
        "more tokens than a served teacher has positions",
        taught("cpu_tiny", max_position_embeddings=256),
        "teacher_model.inference.max_model_len=",
        "is more than the 256 positions of opd.teacher.path",
    ),
    wrong(
        "more likeliest tokens than the teacher has",
        taught("cpu_tiny", f"{TOPK}, k: 5000}}", vocab_size=4096),
        "opd.divergence.k=5000 is more than the 4096 tokens that opd.teacher.path has",
        "lower it",
    ),
    wrong(
        "a teacher on verl's servers with other rows than the student",
        taught("cpu_tiny", f"{TOPK}, k: 8}}", vocab_size=4096),
        "opd.teacher.path",
        "has 4096 rows of logits and the student",
        "set tail=renorm, or backend=vllm",
    ),
    wrong(
        "a pair that is longer than a served teacher has positions",
        taught("vllm_cpu", max_position_embeddings=256),
        "opd.max_pair_length=",
        "is more than the 256 positions of opd.teacher.path",
    ),
]
