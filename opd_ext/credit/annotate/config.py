# SPDX-License-Identifier: Apache-2.0
"""The options of an annotator: ``opd.credit.annotator`` in the configuration."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class AnnotatorConfig:
    """Who marks the spans, how it is asked, and how much of a response may be marked.

    Every other key is an option of a registered annotator.
    """

    kind: str = "none"  # a registered annotator
    model: str | None = None  # api, server: name of the model at the endpoint
    base_url: str | None = None  # api, server: of an OpenAI-compatible endpoint; null (api only): OpenAI's own
    api_key_env: str = "OPENAI_API_KEY"  # api: environment variable that holds the key
    max_concurrency: int = 64  # requests in flight per agent-loop worker
    timeout_s: float = 120.0  # seconds for one answer
    retries: int = 2  # api, server: after rate limits, server errors and timeouts, with growing pauses
    failed: str = "stop"  # not one annotation of a step arrived: stop: ends the run; plain: the step has no spans
    max_tokens: int = 256  # of an answer
    extra_body: dict[str, Any] = field(default_factory=dict)  # api, server: sent along, e.g. {enable_thinking: false}
    structured: bool = False  # api, server: constrain the answer to the JSON schema, where the endpoint can
    cache_dir: str | None = None  # folder that keeps every answer; `replay` reads it
    base: str | None = None  # replay: whose answers; random25, inverted25: whose types
    coverage: float = 0.25  # at most this share of a response's tokens is marked
    paragraph: str = "blank"  # segments end at a blank line, or at every line (`line`)
    min_tokens: int = 8  # shorter segments are merged
    max_tokens_per_segment: int = 96  # longer paragraphs are split at sentence ends
    args: dict[str, Any] = field(default_factory=dict)  # options of the annotator, by name
