# SPDX-License-Identifier: Apache-2.0
"""Seeds that depend on what is asked for, and on nothing else that runs beside it."""

import hashlib


def request_seed(identity: str, bits: int = 63) -> int:
    """Seed of one request to a sampler, in [0, 2^bits).

    Args:
        identity: everything that tells this request from others of the run, the run's seed included.
        bits: at most 63; 31 where the sampler takes a C int.
    """
    return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8], "big") >> (64 - bits)
