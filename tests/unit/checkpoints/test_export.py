# SPDX-License-Identifier: Apache-2.0
"""`opd export`: real FSDP2 shards of two ranks become folders that transformers loads and that answer alike."""

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch
import yaml
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from typer.testing import CliRunner

from opd_ext.checkpoints.layout import MODEL, TEACHER, TrainerState, shard_name
from opd_ext.cli import app
from opd_ext.tinymath.shipped import FOLDER

IDS = torch.tensor([[3, 5, 7, 11, 13]])
RANKS, STEP = 2, 2
LORA = {"lora_rank": 2, "lora_alpha": 6, "target_modules": "all-linear"}
MODELS = {"untied": {}, "tied": {}, "lora": LORA, "lora-periodic": LORA}


def build(name: str, teacher: bool = False):
    """A random Qwen3, odd in its vocabulary so that shards differ; with an adapter that is not zero.

    With ``teacher`` it has the adapter of the teacher: half of B, and A the other way round.
    """
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(5)
    sizes = {"vocab_size": 373, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3}
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, tie_word_embeddings=name == "tied", eos_token_id=370))
    if name in ("lora", "lora-periodic"):
        config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=2, lora_alpha=6, target_modules="all-linear", bias="none")
        model = get_peft_model(model, config)
        for key, weight in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(weight, std=0.3)
        for key, weight in model.named_parameters() if teacher else ():
            weight.data = weight.data / 2 if "lora_B" in key else weight.data.flip(1) if "lora_A" in key else weight
    return model.eval()


def answers(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float().log_softmax(-1)


def job(rank: int, port: int, base: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    for name, lora in MODELS.items():
        run = base / name
        folder = run / "checkpoints" / f"global_step_{STEP}"
        (folder / "actor").mkdir(parents=True, exist_ok=True)
        model = build(name)
        if rank == 0:
            torch.save(answers(model), run / "answers.pt")
            write_run(run, folder, model, lora, moved=name != "lora")
        for block in (model.base_model.model if lora else model).model.layers:
            fully_shard(block)
        fully_shard(model)
        torch.save(model.state_dict(), folder / "actor" / shard_name(MODEL, RANKS, rank))
        if name == "lora-periodic":  # an adapter alone, cut as the student's
            (folder / "teacher").mkdir(exist_ok=True)
            cut, local = model.state_dict(), {}
            for key, value in build(name, teacher=True).state_dict().items():
                if "lora_" in key:
                    local[key] = value.tensor_split(_bounds(cut[key]))[rank].clone()
            torch.save(local, folder / "teacher" / shard_name(TEACHER, RANKS, rank))
        if name == "tied":  # plain tensors, a tied one once; twice the student's
            (folder / "teacher").mkdir(exist_ok=True)
            local = {
                key: 2 * (value.to_local() if isinstance(value, DTensor) else value)
                for key, value in model.state_dict().items()
                if key != "lm_head.weight"
            }
            torch.save(local, folder / "teacher" / shard_name(TEACHER, RANKS, rank))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _bounds(tensor: DTensor) -> list[int]:
    """Where FSDP2 cuts the rows of a tensor for two ranks."""
    return [-(-tensor.shape[0] // RANKS)]


def write_run(run: Path, folder: Path, model, lora: dict, moved: bool) -> None:
    """What the trainer writes once: config, tokenizer, generation config, the state, the run's configuration."""
    from transformers import AutoTokenizer

    template = folder / "actor" / "huggingface"
    base = model.get_base_model() if lora else model
    base.config.save_pretrained(template)
    saved = json.loads((template / "config.json").read_text())
    saved["attn_implementation"] = "flash_attention_2"  # the trainer's kernel, which verl leaves there
    (template / "config.json").write_text(json.dumps(saved))
    AutoTokenizer.from_pretrained(FOLDER / "base").save_pretrained(template)
    (template / "generation_config.json").write_text('{"eos_token_id": [370, 371]}')
    TrainerState(global_step=STEP, teacher_version=int(moved), method="crisp").write(folder)
    (run / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(str(STEP))
    teacher = {"weights": "periodic" if moved else "base"}
    said = {"actor_rollout_ref": {"model": {"path": "the/model", **lora}, "rollout": {"dtype": "float32"}}}
    (run / "config.yaml").write_text(yaml.dump(said | {"opd": {"teacher": teacher}}))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    base = tmp_path_factory.mktemp("runs")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(job, (port, base), nprocs=RANKS)
    return base


def export(*words) -> str:
    """What the command printed; it must succeed."""
    done = CliRunner().invoke(app, ["export", *map(str, words)])
    assert done.exit_code == 0, done.output
    return done.output


def refused(*words) -> str:
    done = CliRunner().invoke(app, ["export", *map(str, words)])
    assert done.exit_code == 2, done.output
    return done.output


def loaded(folder: Path, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


ROUNDING = 1e-5  # nats, of log-probs down to -10 in fp32: other threads, and a merged adapter, sum in another order


@pytest.mark.parametrize("name", MODELS)
def test_the_exported_student_answers_like_the_trained_one(runs, tmp_path, name):
    from transformers import AutoTokenizer

    export(runs / name, "--out", tmp_path / "model")
    model = loaded(tmp_path / "model")
    assert model.dtype == torch.float32, "as the rollouts had it"
    assert (answers(model) - torch.load(runs / name / "answers.pt")).abs().max() < ROUNDING
    if not MODELS[name]:
        assert all(torch.equal(model.state_dict()[key], weight) for key, weight in build(name).state_dict().items())
    tied = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert tied == (name == "tied")
    assert AutoTokenizer.from_pretrained(tmp_path / "model").eos_token == "<|im_end|>"
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text()) == {"eos_token_id": [370, 371]}
    assert "attn_implementation" not in json.loads((tmp_path / "model" / "config.json").read_text())


def test_an_adapter_comes_by_itself(runs, tmp_path):
    from peft import PeftModel

    export(runs / "lora", "--adapter", "--out", tmp_path / "adapter")
    base = build("lora").unload()
    found = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert (answers(found.eval()) - torch.load(runs / "lora" / "answers.pt")).abs().max() < ROUNDING
    assert (answers(found.unload()) - torch.load(runs / "lora" / "answers.pt")).abs().max() > 0.1, "the adapter counts"
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["base_model_name_or_path"]) == (2, 6, "the/model")
    assert not (tmp_path / "adapter" / "config.json").exists(), "vLLM would take it for a whole model"


@pytest.mark.parametrize("alone", [False, True])
def test_the_teacher_of_a_lora_run_is_its_base_with_the_teachers_adapter(runs, tmp_path, alone):
    """Merged, or as an adapter; and of a checkpoint that has the student's adapter alone, too."""
    from peft import PeftModel

    run, base = shutil.copytree(runs / "lora-periodic", tmp_path / "run"), build("lora-periodic").unload()
    expected = answers(build("lora-periodic", teacher=True))
    if alone:  # verl's checkpoint.save_lora_only
        base.save_pretrained(tmp_path / "base")
        for path in run.glob(f"checkpoints/*/actor/{MODEL}*.pt"):
            kept = {name: tensor for name, tensor in torch.load(path, weights_only=False).items() if "lora_" in name}
            torch.save(kept, path)
        config = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(config.replace("the/model", str(tmp_path / "base")))
    assert "teacher of step 2" in export(run, "--teacher")
    assert (answers(loaded(run / "export" / "step_2-teacher")) - expected).abs().max() < ROUNDING
    assert "teacher adapter of step 2" in export(run, "--teacher", "--adapter")
    found = PeftModel.from_pretrained(base, run / "export" / "step_2-teacher-adapter").eval()
    assert (answers(found) - expected).abs().max() < ROUNDING
    assert (expected - torch.load(run / "answers.pt")).abs().max() > 0.1, "it is another than the student"


def test_a_checkpoint_of_the_adapter_alone_is_merged_into_the_model_that_it_was_trained_on(runs, tmp_path):
    """verl's ``checkpoint.save_lora_only``."""
    build("lora").unload().save_pretrained(tmp_path / "base")
    run = shutil.copytree(runs / "lora", tmp_path / "run")
    for path in run.glob(f"checkpoints/*/actor/{MODEL}*.pt"):
        weights = torch.load(path, weights_only=False)
        torch.save({name: tensor for name, tensor in weights.items() if "lora_" in name}, path)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("the/model", str(tmp_path / "base")))
    export(run, "--out", tmp_path / "model")
    assert (answers(loaded(tmp_path / "model")) - torch.load(runs / "lora" / "answers.pt")).abs().max() < ROUNDING


def test_the_teacher_comes_if_asked(runs, tmp_path):
    export(runs / "tied", "--teacher", "--out", tmp_path / "teacher")
    for name, weight in loaded(tmp_path / "teacher").state_dict().items():
        assert torch.equal(weight, 2 * build("tied").state_dict()[name])


def test_a_dtype_can_be_chosen(runs, tmp_path):
    export(runs / "untied", "--dtype", "bfloat16", "--out", tmp_path / "model")
    expected = {name: weight.bfloat16() for name, weight in build("untied").state_dict().items()}
    found = loaded(tmp_path / "model").state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_nothing_is_overwritten_without_being_asked(runs):
    out = runs / "untied" / "export" / "step_2"
    assert f"model: {out}" in export(runs / "untied").replace("\n", "")
    before = (out / "model.safetensors").stat().st_mtime_ns
    assert "nothing to do" in export(runs / "untied")
    assert "holds something else" in refused(runs / "untied", "--dtype", "bfloat16")
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    export(runs / "untied", "--dtype", "bfloat16", "--force")
    assert loaded(out).dtype == torch.bfloat16
    assert [path.name for path in out.parent.iterdir()] == ["step_2"], "no scratch is left"


def test_best_is_the_checkpoint_with_the_best_validation(runs, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for step in (2, 4, 6):
        (run / "checkpoints" / f"global_step_{step}").symlink_to(runs / "untied" / "checkpoints" / "global_step_2")
    lines = [{"phase": "val", "step": step, "val/accuracy": score} for step, score in ((0, 0.9), (2, 0.5), (4, 0.4))]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "student of step 2," in export(run, "--step", "best")
    assert "student of step 6," in export(run), "the newest"
    (run / "metrics.jsonl").unlink()
    assert "No checkpoint" in refused(run, "--step", "best")


def test_a_checkpoint_that_lacks_a_shard_is_one_sentence(runs, tmp_path):
    run = tmp_path / "run"
    actor = run / "checkpoints" / "global_step_2" / "actor"
    actor.mkdir(parents=True)
    whole = runs / "untied" / "checkpoints" / "global_step_2"
    (actor / "huggingface").symlink_to(whole / "actor" / "huggingface")
    (actor.parent / "state.json").symlink_to(whole / "state.json")
    name = shard_name(MODEL, RANKS, 0)
    (actor / name).symlink_to(whole / "actor" / name)
    assert "187 of 373 rows" in refused(run, "--out", tmp_path / "out").replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_exported_is_said_in_one_sentence(runs, tmp_path):
    assert "There is no folder" in refused(runs / "nothing")
    assert "has no checkpoints" in refused(tmp_path)
    assert "there are 2, and best" in refused(runs / "untied", "--step", "7")
    assert "needs a LoRA adapter" in refused(runs / "untied", "--adapter")
    assert "is still the initial model, the/model" in refused(runs / "lora", "--teacher").replace("\n", " ")
    assert "choose one of" in refused(runs / "untied", "--dtype", "int8")


def test_a_fine_tuning_of_a_pipeline_is_a_folder_already(tmp_path):
    for name in ("pilot", "second"):
        folder = tmp_path / "run" / "train" / name / "checkpoints" / "global_step_5" / "huggingface"
        folder.parent.mkdir(parents=True)
        shutil.copytree(FOLDER / "base", folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))  # verl's word; it saves fp32
        said = {"model": "the/model", "trust_remote_code": False}
        (folder.parents[2] / "finetuning.json").write_text(json.dumps(said))
    assert "several fine-tunings" in refused(tmp_path / "run")
    export(tmp_path / "run" / "train" / "second", "--out", tmp_path / "model")
    found, given = loaded(tmp_path / "model"), loaded(FOLDER / "base")
    assert found.dtype == torch.float32
    assert all(torch.equal(found.state_dict()[name], weight) for name, weight in given.state_dict().items())
    assert json.loads((tmp_path / "model" / "opd_export.json").read_text())["initial_model"] == "the/model"
    assert "has no teacher" in refused(tmp_path / "run" / "train" / "second", "--teacher")
