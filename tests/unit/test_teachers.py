# SPDX-License-Identifier: Apache-2.0
"""`opd.teachers` in the configuration: what each teacher is, whose rows are its own, what is refused."""

import copy
from functools import cache

import pytest
import yaml
from omegaconf import OmegaConf

from opd_ext.config import checks
from opd_ext.config.compose import compose_config
from opd_ext.config.served import TOPK_LOSS
from opd_ext.config.teachers import UnknownKey, adapter_weights, model_weights, whose
from opd_ext.errors import ConfigError

KEY = "opd.teacher_key=difficulty"
THREE = (
    "opd.teachers={sums: {rows: [1, 2, 4]}, products: {path: /models/p, rows: [3], divergence: {kind: jsd, beta: 0.5}},"
    " own: {weights: periodic, interval: 7, rows: [5], weight: 0.5, context: {kind: instruction, text: v1}}}"
)


@cache
def _composed(method: str):
    return compose_config([f"method={method}", "scale=cpu_tiny"])


def _checked(*words: str, method: str = "opd"):
    config = copy.deepcopy(_composed(method))
    for key, _, value in (word.partition("=") for word in words):
        OmegaConf.update(config, key, yaml.safe_load(value), merge=False, force_add=True)
    return checks.check(config)


def test_what_a_teacher_leaves_out_is_the_methods():
    sums, products, own = _checked(KEY, THREE).views
    assert sums.opd.teacher.path.endswith("/large") and products.opd.teacher.path == "/models/p"
    assert sums.opd.divergence.sampled and str(products.opd.divergence) == "jsd(0.5), full"
    assert (str(own.opd.teacher), str(own.opd.context), own.weight) == ("periodic(7)", "instruction:v1", 0.5)
    assert sums.opd.context.kind == products.opd.context.kind == "same"
    assert own.opd.credit == sums.opd.credit and not own.opd.teachers


def test_one_teacher_is_the_case_of_one_view():
    opd = _checked()
    (view,) = opd.views
    assert view.opd is opd and (view.name, view.weight, view.weights) == ("", 1.0, "")
    assert _checked(method="grpo").views[0].weights is None


@pytest.mark.parametrize(
    ("second", "weights"),
    [
        ("path: /models/a", "a"),
        ("path: /models/a/", "a"),
        ("path: /models/b", "b"),
        ("weights: frozen", "b"),
        ("weights: live, context: {kind: instruction}", None),
    ],
)
def test_a_checkpoint_that_two_teachers_name_is_loaded_once(second, weights):
    opd = _checked(KEY, f"opd.teachers={{a: {{path: /models/a}}, b: {{{second}}}}}")
    assert opd.views[1].weights == weights and list(opd.teacher_weights) == sorted({"a", weights or "a"})


@pytest.mark.parametrize(
    ("second", "shared"),
    [("weights: ema, rate: 0.1", True), ("weights: ema, rate: 0.2", False), ("weights: frozen", False)],
)
def test_weights_that_move_are_shared_by_those_who_move_alike(second, shared):
    words = f"opd.teachers={{a: {{weights: ema, rate: 0.1}}, b: {{{second}, context: {{kind: solution}}}}}}"
    dtype = "actor_rollout_ref.ref.fsdp_config.model_dtype=fp32"
    assert (len(_checked(KEY, words, dtype, method="sdpo").teacher_weights) == 1) is shared


def test_initial_weights_that_never_move_are_shared_across_kinds():
    words = "opd.teachers={a: {weights: frozen}, b: {weights: trust_region, rate: 0.1}}"
    assert list(_checked(KEY, words, method="crisp").teacher_weights) == ["a"]


def test_a_server_serves_those_of_equal_weights_and_holds_none_here_that_do_not_move():
    words = (
        "opd.teachers={a: {path: /models/a, backend: vllm}, b: {path: /models/a/, backend: vllm}, c: {path: /models/a},"
        " past: {weights: ema, backend: vllm}, same: {weights: ema, backend: vllm, context: {kind: solution}}}"
    )
    opd = _checked(KEY, words, "actor_rollout_ref.ref.fsdp_config.model_dtype=fp32")
    assert [(view.weights, view.server) for view in opd.views] == [
        (None, "a"),
        (None, "a"),
        ("c", None),
        ("past", "past"),
        ("past", "past"),
    ]
    assert list(opd.teacher_servers) == ["a", "past"] and list(opd.teacher_weights) == ["c", "past"]
    assert opd.backends == {"engine", "vllm"} and opd.asks


SERVER = "teacher_server=cpu_tiny"


@pytest.mark.parametrize(
    ("words", "loss", "k"),
    [
        (["opd.teacher.path=/models/a"], "k3", None),
        (["opd.teacher.path=/models/a", "opd.divergence={kind: jsd, beta: 0.5, support: topk, k: 20}"], TOPK_LOSS, 20),
        (
            [
                "opd.teacher.path=/models/a",
                "opd.divergence={key: {kind: forward_kl, support: topk, k: 20}, error: {support: topk, k: 50}}",
                "opd.credit={kind: spans, annotator: {kind: rule}}",
                "opd.divergence.k=90",  # of no token
            ],
            TOPK_LOSS,
            50,
        ),
        (
            [
                "opd.teacher.path=/models/a",
                KEY,
                "opd.teachers={own: {weights: frozen, context: {kind: solution}, divergence: {kind: jsd, beta: 0.5,"
                " support: topk, k: 70}}, a: {divergence: {kind: forward_kl, support: topk, k: 30}}}",
            ],
            TOPK_LOSS,
            30,
        ),
    ],
    ids=["sampled", "one", "spans", "several"],
)
def test_verls_servers_are_asked_for_as_many_tokens_as_their_teacher_is_compared_on(words, loss, k):
    config = compose_config(["method=opd", SERVER, "~opd.credit.rollout_cap", *words])
    asked = config.distillation.distillation_loss
    assert asked.loss_mode == loss and (k is None or asked.topk == k)
    assert checks.check(config).served_topk == k


def test_beside_a_lora_student_its_own_past_is_an_adapter_and_another_model_a_model():
    large = {"weights": "external", "path": "/models/large"}
    teachers = {"past": {"interval": 3}, "first": {"weights": "frozen"}, "now": {"weights": "live"}, "large": large}
    config = copy.deepcopy(_composed("crisp"))
    OmegaConf.update(config, "opd.teacher_key", "data_source", force_add=True)
    OmegaConf.update(config, "opd.teachers", teachers, force_add=True)
    for rank, adapters, models in ((0, [], ["past", "first", "large"]), (4, ["past", "first"], ["large"])):
        config.actor_rollout_ref.model.lora_rank = rank
        config.actor_rollout_ref.model.lora.merge = rank > 0
        opd = checks.check(config)
        assert list(adapter_weights(opd, config)) == adapters and list(model_weights(opd, config)) == models


@pytest.mark.parametrize("method", ["crisp", "sdpo", "srpo", "rlsd", "trace", "opsd", "opd"])
def test_every_method_trains_an_adapter(method):
    """With its own teacher, and with each kind; a moving average of an adapter asks for no dtype of a model."""
    lora = ("actor_rollout_ref.model.lora_rank=4", "actor_rollout_ref.model.lora.merge=true")
    narrow = "actor_rollout_ref.ref.fsdp_config.model_dtype=bf16"
    assert _checked(*lora, narrow, method=method)
    for weights in ("frozen", "periodic", "ema", "trust_region", "base"):
        if method != "opd":
            assert _checked(*lora, narrow, f"opd.teacher.weights={weights}", method=method)


def test_rows_are_their_teachers_by_the_value_of_the_key():
    opd = _checked(KEY, THREE)
    rows = [{"difficulty": n} for n in (3, 5, 1, "2", 4)]
    assert whose(opd, ["x"] * 5, rows) == [1, 2, 0, 0, 0]
    by_source = _checked("opd.teacher_key=data_source", "opd.teachers={a: {rows: [x/y]}, b: {path: /models/b}}")
    assert whose(by_source, ["b", "x/y"], [{}, None]) == [1, 0]
    with pytest.raises(UnknownKey, match="row 1 has difficulty=9, and opd.teachers are for 1, 2, 4, 3, 5"):
        whose(opd, ["x"] * 2, [{"difficulty": 1}, {"difficulty": 9}])
    with pytest.raises(UnknownKey, match="row 0 has no difficulty"):
        whose(opd, ["x"], [None])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["opd.teachers={a: {rows: [1]}}"], "opd.teachers need opd.teacher_key"),
        ([KEY], "opd.teacher_key=difficulty chooses among opd.teachers"),
        ([KEY, "opd.teachers=3"], "opd.teachers=3 must be a section"),
        ([KEY, "opd.teachers={a: big}"], "opd.teachers.a=big must be a section"),
        ([KEY, "opd.teachers={a: {context: same}}"], "opd.teachers.a.context=same must be a section"),
        ([KEY, "opd.teachers={a/b: {rows: [1]}}"], "opd.teachers.a/b: a name has letters"),
        ([KEY, "opd.teachers={a: {rows: []}}"], r"opd.teachers.a.rows=\[\] gives it no row"),
        (
            [KEY, "opd.teachers={a: {rows: [1]}, b: {rows: ['1']}}"],
            "rows whose difficulty is 1 would have two teachers",
        ),
        ([KEY, "opd.teachers={a: {weight: -1}}"], "opd.teachers.a.weight=-1"),
        ([KEY, "opd.teachers={a: {weigths: live}}"], "opd.teachers.a.weigths does not exist"),
        ([KEY, "opd.teachers={a: {weights: external}}"], "opd.teachers.a.path belongs to weights=external"),
        ([KEY, "opd.teachers={a: {weights: stale}}"], "opd.teachers.a.weights=stale does not exist"),
        (
            [KEY, "opd.teachers={a: {weights: live}}"],
            "opd.teachers.a.context.kind=same with opd.teachers.a.weights=live",
        ),
        ([KEY, "opd.teachers={a: {divergence: {kind: jsd}}}"], "opd.teachers.a.divergence.beta belongs to kind=jsd"),
        ([KEY, "opd.teachers={a: {weights: base}}"], "opd.teachers.a.weights=base is the model without its adapter"),
        ([KEY, THREE, "opd.validation.prompt=teacher"], "opd.validation.prompt=teacher is of one teacher"),
    ],
)
def test_what_cannot_tell_teachers_apart_or_teach_is_refused_by_name(words, said):
    with pytest.raises(ConfigError, match=said):
        _checked(*words)
