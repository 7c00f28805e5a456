# SPDX-License-Identifier: Apache-2.0
"""What a pipeline can be told, and the one sentence that it answers to nonsense with."""

import pytest

from opd_ext.errors import ConfigError
from opd_ext.pipelines.settings import CONFIG_DIR, check_inputs, compose_pipeline
from opd_ext.pipelines.ssd.config import SSDConfig
from opd_ext.pipelines.t3s.config import T3SConfig
from opd_ext.sampling.config import Decoding

KINDS = {"ssd": SSDConfig, "t3s": T3SConfig}
NODE = ["scale=node_8xh200", "model=m", "teacher=t"]

# arXiv 2604.01193, section 4: temperature, top-k, top-p of the samples and top-k, top-p of the evaluation.
PUBLISHED = {
    "llama3_1_8b_instruct": ((0.8, 20, 0.8), (20, 0.8), 2500),
    "qwen3_4b_instruct": ((1.6, 20, 0.8), (20, 0.8), 2500),
    "qwen3_30b_a3b_instruct": ((1.6, 20, 0.8), (20, 0.8), 2500),
    "qwen3_4b_thinking": ((1.1, 20, 0.95), (20, 0.95), 300),
    "qwen3_30b_a3b_thinking": ((1.2, 20, 0.95), (20, 0.95), 300),
    "gpt_oss_20b": ((1.2, -1, 1.0), (20, 0.95), 300),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("scale", ["cpu_tiny", "cpu_tiny_long", "node_8xh200", "gpu_1", "gpu_1_24gb"])
def test_every_scale_composes(name, scale):
    overrides = [f"scale={scale}", "model=m", *(["teacher=t"] if name == "t3s" else [])]
    config = compose_pipeline(name, KINDS[name], overrides)
    assert config.scale == scale and config.train.batch_size % config.train.ranks == 0


@pytest.mark.parametrize("preset", PUBLISHED)
def test_ssd_presets_are_the_published_settings(preset):
    decoding, evaluation, steps = PUBLISHED[preset]
    config = compose_pipeline("ssd", SSDConfig, ["scale=node_8xh200", "model=m", f"preset={preset}"])
    assert config.arms["ssd"] == Decoding(*decoding) and config.arms["control"] == Decoding(1.0, -1, 1.0)
    assert (config.evaluate.top_k, config.evaluate.top_p) == evaluation
    train = config.train
    assert (train.lr, train.min_lr, train.schedule, train.batch_size) == (5e-6, 1e-6, "cosine", 32)
    assert (train.steps, train.weight_decay, train.betas, train.max_length) == (steps, 0.1, [0.9, 0.95], 65536)
    assert train.warmup_steps == (250 if steps == 2500 else 50)


def test_t3s_is_the_published_setting():
    config = compose_pipeline("t3s", T3SConfig, NODE)
    assert (config.traces.n, config.traces.temperature, config.traces.max_tokens) == (16, 0.6, 32768)
    train = config.train
    assert (train.batch_size, train.lr, train.steps, train.schedule) == (64, 1e-5, 50, "constant")
    assert config.threshold == 0.0 and config.train.normalisation == "kept-token-mean"


def test_diffusion_preset_is_llada_2():
    config = compose_pipeline("t3s", T3SConfig, [*NODE, "preset=diffusion", "diffusion.model=d"])
    d = config.diffusion
    assert (d.tau, d.ratio, d.mask_token_id, d.attention, d.block_size) == (0.2, [0.3, 0.8], 156895, "block", 32)


def test_every_preset_file_is_tested():
    found = {path.stem for path in (CONFIG_DIR / "preset").glob("*.yaml")}
    assert found == {*PUBLISHED, "diffusion", "diffusion_tiny"}


REFUSED = {
    "no control": ("ssd", ["~arms.control"], "arms=.*named control"),
    "another control": ("ssd", ["arms.control.temperature=0.9"], "arms.control=0.9.*temperature=1"),
    "unknown key": ("ssd", ["train.learning_rate=1"], "train.learning_rate does not exist; see `opd ssd --cfg`"),
    "unknown arm": (
        "t3s",
        ["arms=[t3s,best]"],
        "arms=best does not exist; choose one of: inverse, lowest, random, t3s",
    ),
    "top-p": ("ssd", ["arms.ssd.top_p=1.5"], r"arms.ssd.top_p=1.5.*\(0, 1\]"),
    "schedule": (
        "ssd",
        ["train.schedule=linear"],
        "train.schedule=linear does not exist; choose one of: constant, cosine",
    ),
    "normalisation": (
        "t3s",
        ["train.normalisation=mean"],
        "train.normalisation=mean .* all-token-mean, kept-token-mean",
    ),
    "minimum": ("ssd", ["train.min_lr=1"], "train.min_lr=1.0.*between 0 and train.lr="),
    "length": ("ssd", ["max_tokens=600"], "max_tokens=600.*below vllm.max_model_len=512"),
    "pilot without checkpoints": ("t3s", ["train.save_every=50"], "train.save_every=50.*below train.steps=50"),
    "base as an arm": ("ssd", ["+arms.base={temperature: 1.0}"], "arms=base.*another name"),
    "greedy arm": ("ssd", ["arms.ssd.temperature=0"], "arms.ssd.temperature=0.* must be positive"),
    "adapter": ("ssd", ["train.verl.model.lora_rank=4"], "lora_rank=4.*adapters.*set it to 0"),
    "no engine": ("ssd", ["vllm.replicas=0"], "vllm.replicas=0 must be positive"),
    "ranks": ("t3s", ["train.ranks=3"], "train.batch_size=64.*multiple of train.ranks"),
    "no teacher": ("t3s", ["teacher=null"], "teacher is missing: set it to a model, or traces_column"),
    "ratio": ("t3s", ["preset=diffusion_tiny", "diffusion.ratio=[0.8,0.3]"], r"diffusion.ratio=\[0.8, 0.3\]"),
    "everything is short": ("ssd", ["drop_shortest=1"], r"drop_shortest=1.0 must be in \[0, 1\)"),
    "one wording of two": (
        "ssd",
        ["prompts.wording.stdin='{{ question }}'"],
        "prompts.wording has stdin: give it function and stdin, or drop it with ~prompts.wording",
    ),
    "wording without the problem": (
        "ssd",
        ["recipe=ssd/qwen3_4b_instruct", "prompts.wording.stdin=hello"],
        "prompts.wording.stdin must contain {{ question }} and no other variable",
    ),
    "wording without the signature": (
        "ssd",
        ["recipe=ssd/qwen3_4b_instruct", "evaluate.wording={stdin: '{{ question }}', function: '{{ question }}'}"],
        "evaluate.wording.function must contain {{ question }} and {{ starter_code }} and no other",
    ),
    "wording that is no file": (
        "ssd",
        ["recipe=ssd/qwen3_4b_instruct", "prompts.wording.stdin=file:/none.j2"],
        "prompts.wording.stdin is no template: .*No such file or directory: '/none.j2'.$",
    ),
    "recipe": (
        "t3s",
        ["recipe=t3s/none"],
        "recipe=t3s/none does not exist; choose one of: t3s/llada2_mini, t3s/qwen3_8b",
    ),
    "recipe of another": ("ssd", ["recipe=t3s/qwen3_8b"], "recipe=t3s/qwen3_8b is one of `opd t3s`, not of `opd ssd`"),
    "scale": (
        "ssd",
        ["scale=none"],
        "scale=none does not exist; choose one of: cpu, cpu_tiny, cpu_tiny_long, gpu_1, gpu_1_24gb, node_8xh200",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_nonsense_is_refused_in_one_sentence(case):
    name, overrides, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        compose_pipeline(name, KINDS[name], overrides)


def test_a_folder_is_made_absolute_and_a_name_that_is_nothing_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "p.parquet").touch()
    files = ["prompts.file=p.parquet", "evaluate.file=p.parquet", "evaluate.select_file=null"]
    config = compose_pipeline("ssd", SSDConfig, ["model=model", *files])
    assert config.model == str(tmp_path / "model") and config.prompts.file == str(tmp_path / "p.parquet")
    with pytest.raises(ConfigError, match="neither a hub id nor a folder with a config.json"):
        check_inputs(config)
    (tmp_path / "model" / "config.json").touch()
    check_inputs(config)
    check_inputs(compose_pipeline("ssd", SSDConfig, ["model=Qwen/Qwen3-8B", *files]))


def test_a_wording_is_read_from_the_file_that_it_names(tmp_path):
    (tmp_path / "f.j2").write_text("ä {{ question }}\n{{ starter_code }}\n", encoding="utf-8")
    overrides = ["recipe=ssd/qwen3_4b_instruct", f"prompts.wording.function=file:{tmp_path}/f.j2"]
    config = compose_pipeline("ssd", SSDConfig, overrides)
    assert config.prompts.wording["function"] == "ä {{ question }}\n{{ starter_code }}\n"
    config.check()
    assert (
        compose_pipeline("ssd", SSDConfig, ["recipe=ssd/qwen3_4b_instruct", "~prompts.wording"]).prompts.wording == {}
    )


def test_a_published_preset_is_not_overwritten_by_a_scale():
    config = compose_pipeline("ssd", SSDConfig, ["preset=qwen3_4b_thinking"])
    assert config.arms["ssd"] == Decoding(1.1, 20, 0.95) and config.train.steps == 300
    assert config.evaluate.temperatures[0] == 0.7


def test_missing_files_are_named(tmp_path):
    config = compose_pipeline("ssd", SSDConfig, [f"world={tmp_path}"])
    with pytest.raises(ConfigError, match="prompts.file=.*train.parquet is not a file.*opd data tinymath"):
        check_inputs(config)


def test_a_model_that_cannot_be_fine_tuned_is_refused_before_it_samples(tmp_path):
    (tmp_path / "p.parquet").touch()
    files = [f"prompts.file={tmp_path}/p.parquet", f"evaluate.file={tmp_path}/p.parquet"]
    files.append(f"evaluate.select_file={tmp_path}/p.parquet")
    with pytest.raises(ConfigError, match="gpt-oss-20b cannot be fine-tuned"):
        check_inputs(compose_pipeline("ssd", SSDConfig, ["recipe=ssd/gpt_oss_20b", *files]))
