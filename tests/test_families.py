"""Qwen2 and Mistral folders, and contexts stretched by YaRN: transformers' numbers, both ways.

Run: python -m pytest tests/test_families.py -q
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_level import byte_level
from launch import succeed

import puna
from puna.core import ops, parallel, tensor_parallel
from puna.core.checkpoint.convert import convert
from puna.core.checkpoint.folder import load_model, open_source, save_model
from puna.core.generation.generate import generate
from puna.core.model import Transformer

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "vocab_size": 280, "max_position_embeddings": 128,
    "initializer_range": 0.15, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
LONG = {"max_position_embeddings": 1024}


def random_peer(kind: str, **settings: Any) -> torch.nn.Module:
    """A random model of transformers, its biases and norms not what they begin with."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **settings})
    made = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.rand_like(parameter) - 0.5)
    return made


def tokens(length: int = 100) -> torch.Tensor:
    return torch.randint(3, 280, (2, length), generator=torch.Generator().manual_seed(5))


def ours(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
    return model.logits(model(ids))


def edit(folder: Path, **changes: Any) -> None:
    document = json.loads((folder / "config.json").read_text()) | changes
    document = {key: value for key, value in document.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(document))


def same_numbers(model: Transformer, peer: torch.nn.Module, length: int = 100) -> None:
    """Logits, gradients of a loss and the tokens drawn from a prompt."""
    ids = tokens(length)
    found, expected = ours(model, ids), peer(ids).logits
    # transformers' angles are of fp32 frequencies: 1e-4 of a turn off at position 800
    assert (found - expected).abs().max() < (2e-4 if length <= 128 else 2e-3)
    for logits in (found, expected):
        torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        ).backward()
    gradients = {name: parameter.grad for name, parameter in peer.named_parameters()}
    head = gradients.get("lm_head.weight")
    tied = head is None or peer.config.tie_word_embeddings
    for name, parameter in model.named_parameters():
        if tied and name in ("lm_head.weight", "model.embed_tokens.weight"):
            continue  # ours are two, whose gradients add up to theirs
        expected = gradients[name]
        assert (parameter.grad - expected).abs().max() <= 2e-3 * expected.abs().max() + 1e-7, name
    if tied:
        both = model.lm_head.weight.grad + model.model.embed_tokens.weight.grad
        expected = gradients["model.embed_tokens.weight"]
        assert (both - expected).abs().max() <= 2e-3 * expected.abs().max()
    prompt = ids[:1, : length - 30]
    peer.generation_config.eos_token_id = None
    wanted = peer.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)
    for backend in ("auto", "reference"):
        with ops.use_backend(backend):
            drawn = generate(
                model, prompt.tolist(), max_new_tokens=20, eos_id=None, temperature=0.0
            )
        assert drawn[0].tokens == wanted[0, prompt.shape[1] :].tolist(), backend


# -- Qwen2 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_qwen2_there_and_back(tied: bool, tmp_path: Path) -> None:
    peer = random_peer("Qwen2", tie_word_embeddings=tied)
    peer.save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs")
    assert model.config.qkv_bias and model.config.biased == ("q_proj", "k_proj", "v_proj")
    same_numbers(model, peer)
    save_model(tmp_path / "ours", model)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(again) is type(peer)
    assert torch.equal(again(tokens()).logits, peer(tokens()).logits)
    assert load_model(tmp_path / "ours").config == model.config


def test_a_qwen2_reward_model(tmp_path: Path) -> None:
    peer = random_peer("Qwen2")
    peer.save_pretrained(tmp_path / "theirs")
    judge = Transformer(load_model(tmp_path / "theirs").config, "score")
    judge.init_weights(3)
    save_model(tmp_path / "judge", judge)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "judge")
    assert type(theirs).__name__ == "Qwen2ForSequenceClassification"
    assert load_model(tmp_path / "judge").head == "score"
    ids = tokens()[:1]
    found = theirs(ids).logits[0, 0]
    assert torch.allclose(ours(judge, ids)[0, -1, 0], found, atol=1e-4)


def test_a_released_qwen2_config(tmp_path: Path) -> None:
    """As Qwen's own folders write it: a window that is not used, no head_dim, eos beside."""
    folder = byte_level(tmp_path / "model", bos_token=None, eos_token="<|im_end|>")
    peer = random_peer("Qwen2", tie_word_embeddings=True)
    peer.save_pretrained(folder)
    edit(
        folder, sliding_window=131072, use_sliding_window=False, max_window_layers=21,
        rope_theta=1000000.0, rope_parameters=..., layer_types=..., dtype=..., rope_scaling=...,
    )  # fmt: skip
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    llama = puna.load(folder, device="cpu")
    assert llama.model.config.rope_theta == 1e6
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert (ours(llama.model, tokens()) - theirs(tokens()).logits).abs().max() < 2e-4
    assert llama.tokenizer is not None and list(llama.tokenizer.eos_ids) == [2, 0]
    assert llama.generate([{"role": "user", "content": "hello"}], max_new_tokens=4) is not None
    llama.save(tmp_path / "saved")
    said = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert said["architectures"] == ["Qwen2ForCausalLM"] and said["model_type"] == "qwen2"
    ends = json.loads((tmp_path / "saved" / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [2, 0]


def test_qwen2_as_gguf(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    folder = byte_level(tmp_path / "model")
    peer = random_peer("Qwen2")
    peer.save_pretrained(folder)
    file = convert(folder, tmp_path / "m.gguf")
    stored = {each.name: each for each in gguf.GGUFReader(file).tensors}
    k_proj = peer.model.layers[1].self_attn.k_proj
    # llama.cpp turns a Qwen2's halves, not its pairs: rows stay as they are.
    assert torch.equal(torch.from_numpy(stored["blk.1.attn_k.weight"].data.copy()), k_proj.weight)
    assert torch.equal(torch.from_numpy(stored["blk.1.attn_k.bias"].data.copy()), k_proj.bias)
    assert "blk.0.attn_output.bias" not in stored
    back, first = load_model(file), load_model(folder)
    assert back.config == first.config
    assert torch.equal(ours(back, tokens()), ours(first, tokens()))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.float32
    )
    assert type(theirs) is type(peer)
    assert (theirs(tokens()).logits - peer(tokens()).logits).abs().max() < 1e-4


def in_two(out: Path) -> None:
    torch.set_num_threads(1)
    parallel.init()
    found = {}
    for name in ("Qwen2", "Llama"):
        source = open_source(out / name)
        model = tensor_parallel.load(source, 2, torch.device("cpu"), torch.float32, "tp")
        found[name] = ours(model, tokens()).tolist()
    if parallel.rank() == 1:
        (out / "found.json").write_text(json.dumps(found))
    parallel.close()


def test_biases_over_two_ranks(tmp_path: Path) -> None:
    peers = {"Qwen2": random_peer("Qwen2"), "Llama": random_peer("Llama", attention_bias=True)}
    for name, peer in peers.items():
        peer.save_pretrained(tmp_path / name)
    succeed(2, in_two, tmp_path, folder=tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())
    for name, peer in peers.items():
        assert (torch.tensor(found[name]) - peer(tokens()).logits).abs().max() < 2e-4, name


# -- Mistral, and windows -----------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 128])
def test_mistral_is_a_llama_within_its_window(window: int | None, tmp_path: Path) -> None:
    peer = random_peer("Mistral", sliding_window=window, head_dim=32)
    peer.save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs")
    same_numbers(model, peer)
    save_model(tmp_path / "ours", model)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(again).__name__ == "LlamaForCausalLM"
    assert (again(tokens()).logits - peer(tokens()).logits).abs().max() < 1e-4


REFUSED = {
    "a window": ("Mistral", {"sliding_window": 64}, "sliding_window is 64, and Puna looks at all"),
    "a window unsaid": (
        "Mistral", {"sliding_window": ..., "max_position_embeddings": 8192},
        "sliding_window is 4096, .* set max_position_embeddings to 4096",
    ),
    "a window in use": (
        "Qwen2", {"use_sliding_window": True, "sliding_window": 64}, "sliding_window is 64",
    ),
    "another head": (
        "Qwen2", {"architectures": ["Qwen2ForTokenClassification"]},
        "the architecture is Qwen2ForTokenClassification .qwen2.; Puna reads Llama, Qwen2, Mistral",
    ),
    "a name of another family": (
        "Qwen2", {"architectures": ["LlamaForCausalLM"]}, "the architecture is LlamaForCausalLM",
    ),
    "dynamic": (
        "Qwen2", {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "of the type dynamic .* leave rope_scaling out",
    ),
    "no use of a type": (
        "Qwen2", {"use_sliding_window": "no"}, "use_sliding_window is .no., expected true or false",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_llama_is_one_sentence(name: str, tmp_path: Path) -> None:
    kind, changes, message = REFUSED[name]
    random_peer(kind, sliding_window=None).save_pretrained(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as raised:
        load_model(tmp_path)
    assert "config.json" in str(raised.value) and "\n" not in str(raised.value)


# -- YaRN ---------------------------------------------------------------------------------------

STRETCHED = {
    "plain": YARN,
    "its own attention factor": {**YARN, "attention_factor": 1.3},
    "mscale": {**YARN, "mscale": 1.2, "mscale_all_dim": 0.8},
    "other turns": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0},
    "between pairs": {**YARN, "truncate": False},
    "all in one pair": {**YARN, "original_max_position_embeddings": 4, "factor": 512.0},
}


@pytest.mark.parametrize("name", STRETCHED)
def test_yarn_at_long_positions(name: str, tmp_path: Path) -> None:
    peer = random_peer("Llama", rope_parameters={**STRETCHED[name], "rope_theta": 1e4}, **LONG)
    peer.save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs")
    same_numbers(model, peer, length=800)
    save_model(tmp_path / "ours", model)
    assert load_model(tmp_path / "ours").config == model.config
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert (again(tokens()).logits - peer(tokens()).logits).abs().max() < 1e-5


def test_yarn_is_not_ignored(tmp_path: Path) -> None:
    """Its frequencies and its attention factor, each alone, make another model; an older config
    says the same with `rope_scaling` and `type`, and the first context where it says none."""
    peer = random_peer("Llama", rope_parameters={**YARN, "rope_theta": 1e4}, **LONG)
    peer.save_pretrained(tmp_path)
    ids = tokens(800)
    stretched = ours(load_model(tmp_path), ids)
    old = {key: value for key, value in YARN.items() if key != "rope_type"} | {"type": "yarn"}
    edit(tmp_path, rope_parameters=..., rope_scaling=old, rope_theta=1e4)
    assert torch.equal(ours(load_model(tmp_path), ids), stretched)
    edit(tmp_path, rope_scaling={**old, "attention_factor": 1.0})
    assert (ours(load_model(tmp_path), ids) - stretched).abs().max() > 1e-2
    edit(tmp_path, rope_scaling={"type": "yarn", "factor": 4.0})
    assert load_model(tmp_path).config.rope_scaling.original_max_position_embeddings == 1024
    edit(tmp_path, rope_scaling=None)
    assert (ours(load_model(tmp_path), ids) - stretched).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_factor": 0}, "attention_factor is 0.0; it must be above 0"),
        ({"beta_slow": 64}, "beta_slow must be above 0 and at most beta_fast"),
        ({"original_max_position_embeddings": 0}, "original_max_position_embeddings is 0"),
        ({"factor": 0.5}, "factor is 0.5; it must be 1 to 1e6"),
        ({"truncate": 1}, "truncate is 1, expected true or false"),
        ({"rope_theta": 1.0}, "rope_theta is 1.0; with YaRN it must be above 1"),
    ],
)
def test_yarn_of_numbers_that_stretch_nothing(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    random_peer("Llama").save_pretrained(tmp_path)
    edit(tmp_path, rope_parameters={**YARN, "rope_theta": 1e4, **changes})
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


def test_a_stretched_model_that_a_gguf_would_not_hold(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    folder = byte_level(tmp_path / "model")
    random_peer("Llama", rope_parameters={**YARN, "rope_theta": 1e4}, **LONG).save_pretrained(
        folder
    )
    with pytest.raises(ValueError, match="rope_scaling of the type yarn is not written to a .gguf"):
        convert(folder, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()
