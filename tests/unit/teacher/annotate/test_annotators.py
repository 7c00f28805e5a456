# SPDX-License-Identifier: Apache-2.0
"""Annotators: what they mark, that they never fail a rollout, and that answers are kept."""

import asyncio
import dataclasses
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from opd_ext.credit.annotate import (
    STATUSES,
    AnnotatorConfig,
    Found,
    Request,
    annotation_metrics,
    annotator_names,
    build_annotator,
    get_annotator,
)
from opd_ext.tinymath import annotator  # noqa: F401  (registers `rule`)
from opd_ext.tinymath.tokenizer import make_tokenizer

QUESTION = "What is 487+356?"
RIGHT = "ones: 7+6=13\nHmm, right so far.\ntens: 8+5+1=14\nhundreds: 4+3+1=8\nAnswer: 843"
WRONG = "ones: 7+6=13\ntens: 8+5+1=15\nhundreds: 4+3+1=8\nAnswer: 853"
TOKENIZER = make_tokenizer()
KEY_ANSWER = json.dumps({"key_spans": [{"segment_ids": [2], "step_type": "case_split"}]})


def _request(response=RIGHT, correct=True, **changes):
    ids = tuple(TOKENIZER(response, add_special_tokens=False).input_ids) + (TOKENIZER.eos_token_id,)
    extra_info = {"question": QUESTION, "solution": "secret", "index": 0}
    return dataclasses.replace(Request(f"... {QUESTION}", ids, correct, extra_info=extra_info, seed=3), **changes)


def _config(kind, **options):
    return AnnotatorConfig(kind=kind, **{"paragraph": "line", "min_tokens": 1, "coverage": 1.0, **options})


def _annotate(config, request, generate=None):
    return asyncio.run(build_annotator(config, TOKENIZER, generate).annotate(request))


def _marked(annotation, request):
    return [TOKENIZER.decode(list(request.response_ids[start:end])) for start, end, _ in annotation.runs]


def _says(text, seen=None):
    async def generate(messages, max_tokens, temperature):
        assert temperature == 0.0
        if seen is not None:
            seen.append(messages)
        return text, 100, 20

    return generate


def test_the_rule_marks_decisive_steps_of_a_right_answer():
    request = _request()
    annotation = _annotate(_config("rule"), request)
    assert annotation.status == "ok"
    assert annotation.types == ("case_split",)
    assert _marked(annotation, request) == ["ones: 7+6=13\n", "tens: 8+5+1=14\nhundreds: 4+3+1=8\n"]
    assert {label for _, _, label in annotation.runs} == {1}


@pytest.mark.parametrize(
    "response, line, kind",
    [
        (WRONG, "tens: 8+5+1=15\n", "arithmetic_slip"),
        ("ones: 7+6=12\nWait, let me check again.\nones: 7+6=13\ntens: 8+5=13\n", "tens: 8+5=13\n", "wrong_constraint"),
        ("ones: 7+6=13\nAnswer: 13", "Answer: 13", "premature_conclusion"),
        (RIGHT.replace("843", "834"), "Answer: 834", "format_error"),
        (RIGHT.replace("Answer: 843", "thousands: 0+0=0"), "thousands: 0+0=0", "illegal_step"),
    ],
)
def test_the_rule_finds_where_a_wrong_answer_first_went_wrong(response, line, kind):
    request = _request(response, correct=False)
    annotation = _annotate(_config("rule"), request)
    assert (_marked(annotation, request), annotation.types) == ([line], (kind,))
    assert {label for _, _, label in annotation.runs} == {2}


def test_the_cap_keeps_the_first_tokens_and_says_so():
    request = _request()
    annotation = _annotate(_config("rule", coverage=0.25), request)
    kept = sum(end - start for start, end, _ in annotation.runs)
    assert kept == len(request.response_ids) // 4
    assert annotation.capped and annotation.coverage_precap > 0.25


def test_a_model_is_shown_the_attempt_in_numbers_and_nothing_that_it_must_not_know():
    seen = []
    request = _request()
    annotation = _annotate(_config("self"), request, _says(KEY_ANSWER, seen))
    assert _marked(annotation, request) == ["tens: 8+5+1=14\n"]
    assert (annotation.tokens_in, annotation.tokens_out) == (100, 20)
    (message,) = seen[0]
    assert "[2] tens: 8+5+1=14" in message["content"]
    assert "secret" not in message["content"]
    assert QUESTION in message["content"]


def test_outcomes_are_asked_about_in_their_own_prompts():
    seen = []
    for response, correct in ((RIGHT, True), (WRONG, False)):
        _annotate(_config("self"), _request(response, correct), _says("{}", seen))
    right, wrong = (messages[0]["content"] for messages in seen)
    assert "key_spans" in right and "error_spans" not in right and "arithmetic_slip" not in right
    assert "error_spans" in wrong and "key_spans" not in wrong and "case_split" not in wrong


async def _too_long(messages, max_tokens, temperature):
    raise ValueError("too long")


async def _breaks(messages, max_tokens, temperature):
    raise ConnectionError("gone")


async def _sleeps(messages, max_tokens, temperature):
    await asyncio.sleep(60)


@pytest.mark.parametrize(
    "generate, status, cause",
    [
        (_says("no JSON"), "parse_error", "the answer 'no JSON' holds no JSON"),
        (_says("x" * 99), "parse_error", f"the answer '{'x' * 80}...' holds no JSON"),
        (_says('{"error_spans": []}'), "wrong_schema", "is not of the form that it was asked for"),
        (_says('{"key_spans": []}'), "empty", ""),
        (_too_long, "skipped", "too long"),
        (_breaks, "api_error", "ConnectionError: gone"),
        (_sleeps, "timeout", "no answer in 0.02 s (opd.credit.annotator.timeout_s, .retries)"),
        (None, "api_error", "has no rollout servers here"),
    ],
)
def test_every_failure_is_a_rollout_without_spans_that_says_why(generate, status, cause):
    annotation = _annotate(_config("self", timeout_s=0.02, retries=0), _request(), generate)
    assert (annotation.status, annotation.runs, annotation.types) == (status, (), ())
    assert status in STATUSES
    assert annotation.cause.endswith(cause) and bool(annotation.cause) == bool(cause)


class _Refuses(BaseHTTPRequestHandler):
    def do_POST(self):
        self.send_response(401)
        self.end_headers()
        self.wfile.write(b'{"error": {"message": "this key is unknown"}}')

    def log_message(self, *_):
        pass


def test_an_endpoint_that_refuses_and_one_that_is_not_there_are_told_with_their_address():
    """The client's own words are "Connection error." for whatever it could not reach."""
    with HTTPServer(("127.0.0.1", 0), _Refuses) as endpoint:
        threading.Thread(target=endpoint.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{endpoint.server_port}/v1"
        asked = _config("server", model="m", base_url=url, retries=0)
        refused = _annotate(asked, _request())
        endpoint.shutdown()
    gone = _annotate(asked, _request())
    assert (refused.status, gone.status) == ("api_error", "api_error")
    assert f"{url}/ refuses the question: " in refused.cause and "this key is unknown" in refused.cause
    assert gone.cause.endswith(f"{url}/ cannot be reached: All connection attempts failed")


def test_truncated_rollouts_and_foreign_tokens_are_not_asked_about():
    seen = []
    cut = _annotate(_config("self"), _request(finished=False), _says(KEY_ANSWER, seen))
    foreign = _annotate(_config("self"), _request(response_ids=(9_999,)), _says(KEY_ANSWER, seen))
    assert (cut.status, foreign.status, seen) == ("skipped", "align_failure", [])
    assert not cut.called and not foreign.called


def test_answers_are_asked_for_once_and_replayed_without_a_model(tmp_path):
    seen = []
    kept = _config("self", cache_dir=str(tmp_path))
    first = _annotate(kept, _request(), _says(KEY_ANSWER, seen))
    second = _annotate(kept, _request(), _says("other", seen))
    replayed = _annotate(_config("replay", base="self", cache_dir=str(tmp_path)), _request())
    assert len(seen) == 1
    assert first.runs == second.runs == replayed.runs != ()
    unknown = _annotate(_config("replay", base="self", cache_dir=str(tmp_path)), _request(correct=False))
    assert unknown.status == "skipped"
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("kind", ["random25", "inverted25"])
def test_controls_move_the_spans_and_keep_the_types(kind):
    request = _request()
    real = _annotate(_config("rule", coverage=0.25), request)
    control = _annotate(_config(kind, base="rule", coverage=0.25), request)
    again = _annotate(_config(kind, base="rule", coverage=0.25), request)
    other = _annotate(_config(kind, base="rule", coverage=0.25), dataclasses.replace(request, seed=4))
    assert control.runs == again.runs != other.runs
    assert control.types == real.types
    count = len(request.response_ids) // 4
    assert sum(end - start for start, end, _ in control.runs) <= count
    if kind == "inverted25":
        whole = _annotate(_config("rule"), request)
        inside = {i for start, end, _ in whole.runs for i in range(start, end)}
        assert not inside & {i for start, end, _ in control.runs for i in range(start, end)}


def test_controls_mark_nothing_where_their_annotator_found_nothing():
    assert _annotate(_config("random25", base="none"), _request()).status == "empty"


@pytest.mark.parametrize(
    "config, sentence",
    [
        (_config("api", model="m", api_key_env="OPD_NO_SUCH_KEY"), "OPD_NO_SUCH_KEY: set that variable"),
        (_config("api"), "needs annotator.model"),
        (_config("server", model="m"), "needs annotator.base_url"),
        (_config("replay", base="self"), "needs annotator.cache_dir"),
        (_config("replay", base="rule", cache_dir="x"), "self, api or server"),
        (_config("random25"), "needs annotator.base"),
        (_config("inverted25", base="random25"), "needs annotator.base"),
        (_config("rule", coverage=0.0), "coverage=0.0 must be in"),
        (_config("rule", paragraph="page"), "paragraph='page' does not exist"),
        (_config("oracle"), "Unknown annotator 'oracle'"),
    ],
)
def test_options_are_refused_before_anything_is_asked(config, sentence):
    with pytest.raises(ValueError, match=sentence):
        build_annotator(config, TOKENIZER)


def test_every_annotator_of_the_specification_exists():
    expected = {"self", "api", "server", "replay", "rule", "none", "random25", "inverted25"}
    assert expected <= set(annotator_names())
    assert get_annotator("self").__doc__


def test_a_step_of_annotations_in_numbers():
    request = _request()
    whole = _annotate(_config("self", coverage=0.25), request, _says(KEY_ANSWER)).as_dict()
    failed = _annotate(_config("self"), request, _says("?")).as_dict()
    n = len(request.response_ids)
    metrics = annotation_metrics([whole, failed, None, None], [n] * 4)
    assert metrics["annotation/calls"] == 2
    assert metrics["annotation/failures"] == metrics["annotation/parse_error"] == metrics["annotation/ok"] == 0.5
    assert metrics["annotation/tokens_in"] == 200  # an answer that could not be read is still paid for
    assert metrics["spans/rollouts"] == 0.25
    assert metrics["spans/tokens_key"] == sum(end - start for start, end, _ in whole["runs"])
    assert metrics["spans/tokens_error"] == 0
    assert annotation_metrics([None], [5]) == {"annotation/calls": 0.0}


def test_finding_nothing_is_no_failure():
    assert Found("empty").spans == ()
    empty = _annotate(_config("self"), _request(), _says('{"key_spans": []}')).as_dict()
    assert annotation_metrics([empty], [10])["annotation/failures"] == 0
