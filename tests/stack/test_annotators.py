# SPDX-License-Identifier: Apache-2.0
"""Annotators that are models, over the wire: vLLM's own OpenAI-compatible server with the tests' little model.

It has never seen such a request, so its free answers are no JSON; constrained to the schema they must be.
"""

import asyncio
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request

import pytest

from opd_ext.credit.annotate import AnnotatorConfig, Request, build_annotator
from opd_ext.launch import PATH_VARIABLE
from opd_ext.tinymath.tokenizer import make_tokenizer

TOKENIZER = make_tokenizer()
RIGHT = "ones: 7+6=13\ntens: 8+5+1=14\nhundreds: 4+3+1=8\nAnswer: 843"
START_S = 300  # of the server; about 40 s on four cores


@pytest.fixture(scope="module")
def endpoint(world, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "server.log"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1", "VLLM_NO_USAGE_STATS": "1"}
    arguments = [
        "--model", str(world / "tinymath" / "base"), "--served-model-name", "tiny", "--host", "127.0.0.1",
        "--port", str(port), "--dtype", "float32", "--enforce-eager",
        "--max-model-len", "2048", "--max-num-batched-tokens", "2048",
        "--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}',
    ]  # fmt: skip
    with log.open("w") as output:
        server = subprocess.Popen(
            [os.environ[PATH_VARIABLE], "-m", "vllm.entrypoints.openai.api_server", *arguments],
            env={**os.environ, **settings},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            _wait(server, f"http://127.0.0.1:{port}/health", log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            server.wait(60)


def _wait(server, url, log):
    for _ in range(START_S):
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            if urllib.request.urlopen(url, timeout=5).status == 200:
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    pytest.fail(f"no answer from {url} in {START_S} s\n{log.read_text()[-3000:]}")


def _request(correct=True):
    ids = tuple(TOKENIZER(RIGHT, add_special_tokens=False).input_ids) + (TOKENIZER.eos_token_id,)
    return Request("What is 487+356?", ids, correct)


def _annotate(*requests, **options):
    config = AnnotatorConfig(model="tiny", paragraph="line", min_tokens=1, **options)

    async def all_of_them():
        annotator = build_annotator(config, TOKENIZER)
        return await asyncio.gather(*(annotator.annotate(request) for request in requests))

    return asyncio.run(all_of_them())


def test_free_answers_of_a_model_that_knows_no_json_are_failures_and_never_errors(endpoint):
    for annotation in _annotate(*[_request()] * 4, kind="server", base_url=endpoint):
        assert annotation.status == "parse_error" and annotation.runs == ()
        assert annotation.tokens_in > 500 and 0 < annotation.tokens_out <= 256 and annotation.latency_s > 0


def test_answers_constrained_to_the_schema_can_be_read(endpoint):
    found = _annotate(_request(True), _request(False), kind="server", base_url=endpoint, structured=True)
    assert {annotation.status for annotation in found} <= {"ok", "empty"}


def test_an_api_is_asked_with_its_key_and_answers_are_kept(endpoint, monkeypatch, tmp_path):
    monkeypatch.setenv("OPD_TEST_KEY", "secret")
    options = {"base_url": endpoint, "structured": True, "api_key_env": "OPD_TEST_KEY", "cache_dir": str(tmp_path)}
    (first,) = _annotate(_request(), kind="api", **options)
    assert first.status in ("ok", "empty") and len(list(tmp_path.rglob("*.json"))) == 1
    assert "secret" not in next(tmp_path.rglob("*.json")).read_text()
    (again,) = _annotate(_request(), kind="api", **{**options, "base_url": "http://127.0.0.1:9/v1"})
    assert (again.status, again.types, again.runs) == (first.status, first.types, first.runs)


def test_slow_and_missing_endpoints_are_statuses(endpoint):
    (slow,) = _annotate(_request(), kind="server", base_url=endpoint, timeout_s=0.001, retries=0)
    (missing,) = _annotate(_request(), kind="server", base_url="http://127.0.0.1:9/v1", retries=0)
    assert (slow.status, missing.status) == ("timeout", "api_error")
