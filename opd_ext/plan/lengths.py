# SPDX-License-Identifier: Apache-2.0
"""Lengths of responses that nobody has sampled yet, and how long a server takes to write them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 3  # of a batch's lengths; variants of a run see the same ones, so that a difference is the variant's
CUT = 200  # in a batch of so many, one response reaches the limit
STRIDE = 64  # tokens of every sequence between two looks at who has finished
REPLICAS = 16  # that are played through: those with the most to write

_GiB = 2**30
_OVERHEAD_S = 1.3e-3  # of a decoding step, whatever it computes: scheduler, sampler, launch of a CUDA graph
_PRODUCTS = 0.6  # share of the peak FLOP/s that the products of large decoding batches reach
ACTIVATIONS = 4 * _GiB  # of vLLM's share, what is neither weights nor cache: activations of a prefill, sampler


@dataclass(frozen=True)
class Server:
    """A vLLM replica, as far as its speed goes.

    Attributes:
        weights: bytes of the model in the sampling dtype.
        active: of them, what one token reads; less than all in a mixture of experts.
        flops: per token.
        cache: bytes per token of keys and values.
        layers: which all-reduce twice per decoding step under tensor parallelism.
        tp: devices of a replica.
        share: bytes of one device that vLLM takes.
        bandwidth, peak: of one device, as reached and as stated.
        allreduce_s: seconds of one all-reduce.
        sequences: at most at a time.
    """

    weights: float
    active: float
    flops: float
    cache: float
    layers: int
    tp: int
    share: float
    bandwidth: float
    peak: float
    allreduce_s: float
    sequences: int
    reserve: float = ACTIVATIONS

    @property
    def room(self) -> float:
        """Tokens whose keys and values fit; 0 or less: the weights alone are too large."""
        return (self.share - self.weights / self.tp - self.reserve) * self.tp / self.cache

    def step_s(self, batch: int, context: float) -> float:
        """Seconds in which ``batch`` sequences, which have ``context`` tokens together, each get one more."""
        weights = min(self.weights, self.active * batch)  # other tokens read other experts
        read = (weights + context * self.cache) / self.tp / self.bandwidth
        computed = self.flops * batch / self.tp / (_PRODUCTS * self.peak)
        return read + computed + _OVERHEAD_S + (2 * self.layers * self.allreduce_s if self.tp > 1 else 0.0)


def draw(count: int, mean: float, limit: int, spread: float, seed: int) -> np.ndarray:
    """Log-normal lengths of ``count`` responses, cut at ``limit``; in a larger batch somebody always gets there."""
    generator = np.random.default_rng([seed, count, int(mean), limit])
    lengths = np.minimum(generator.lognormal(np.log(mean) - spread**2 / 2, spread, count), limit)
    if count >= 64:
        lengths[np.argsort(lengths)[-max(1, count // CUT) :]] = limit
    return np.maximum(lengths, min(16, limit)).astype(int)


def generation_s(server: Server, lengths: Sequence[int] | np.ndarray, replicas: int, prompt: int) -> float:
    """Seconds until the last of ``replicas`` servers has written its share of ``lengths``."""
    lengths = np.asarray(lengths)
    shares = [lengths[first::replicas] for first in range(min(replicas, len(lengths)))]
    # The last to finish has the longest response, or the most to write.
    slow = {id(share): share for key in (np.max, np.sum) for share in sorted(shares, key=key)[-REPLICAS // 2 :]}
    return max((written_s(server, share, prompt) for share in slow.values()), default=0.0)


def written_s(server: Server, lengths: np.ndarray, prompt: int) -> float:
    """Seconds in which one server writes responses of ``lengths`` tokens that it is given at once."""
    room, next_up, seconds = server.room, 0, 0.0
    left = np.empty(0, dtype=int)  # tokens that the running sequences still need
    done = np.empty(0, dtype=int)  # that they have
    while next_up < len(lengths) or len(left):
        used = len(left) * prompt + done.sum()
        started = 0
        while (
            next_up < len(lengths)
            and len(left) + started < server.sequences
            # One runs in any case: vLLM refuses to start where it could not, which the plan says elsewhere.
            and (used + prompt + 4 * STRIDE < room or len(left) + started == 0)
        ):
            used += prompt + 4 * STRIDE
            next_up, started = next_up + 1, started + 1
        left = np.concatenate([left, lengths[next_up - started : next_up]])
        done = np.concatenate([done, np.zeros(started, dtype=int)])
        tokens = int(min(STRIDE, left.min()))
        seconds += server.step_s(len(left), len(left) * prompt + done.sum()) * tokens
        left, done = left - tokens, done + tokens
        left, done = left[left > 0], done[left > 0]
    return seconds
