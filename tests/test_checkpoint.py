"""Model folders: transformers computes the same with them, damage is named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from puna.core.checkpoint.folder import load_model, save_model, tokenizer_path
from puna.core.config import ModelConfig
from puna.core.generation.generate import generate
from puna.core.model import Transformer
from puna.core.text.tokenizer import train_tokenizer

transformers = pytest.importorskip("transformers")


MHA = ModelConfig(64, 2, 4, 4, 96, 320, context=128, rope_theta=5e4)
GQA = ModelConfig(64, 2, 8, 2, 96, 320, context=128, norm_eps=1e-6)
TEXTS = ["[INST] hello there [/INST] general answer", "<<SYS>> be kind <</SYS>> 7 times"] * 20


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(TEXTS, path, vocab_size=320)
    return path


def random_model(config: ModelConfig, head: str = "lm", seed: int = 0) -> Transformer:
    model = Transformer(config, head)
    model.init_weights(seed)
    with torch.no_grad():  # norms that differ from one another
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
    return model


def theirs_config(config: ModelConfig, **options) -> "transformers.LlamaConfig":
    return transformers.LlamaConfig(
        hidden_size=config.dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        intermediate_size=config.ffn_dim,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.context,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        initializer_range=0.2,
        **options,
    )


def assert_same(one: Transformer, other: Transformer) -> None:
    assert one.config == other.config and one.head == other.head
    theirs = dict(other.named_parameters())
    assert len(theirs) == len(list(one.parameters()))
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, theirs[name]), name


@torch.no_grad()
def assert_computes_the_same(ours: Transformer, theirs: torch.nn.Module) -> None:
    """Logits within 1e-4 and the same 64 greedy tokens, in fp32."""
    theirs.eval()
    tokens = torch.randint(3, 320, (3, 40), generator=torch.Generator().manual_seed(5))
    difference = ours.logits(ours(tokens)) - theirs(tokens).logits
    assert difference.abs().max() < 1e-4
    theirs.generation_config.eos_token_id = None
    for prompt in tokens[:2, :7]:
        expected = theirs.generate(
            prompt[None],
            attention_mask=torch.ones(1, 7, dtype=torch.int64),
            max_new_tokens=64,
            do_sample=False,
        )
        found = generate(ours, [prompt.tolist()], max_new_tokens=64, eos_id=None, temperature=0.0)
        assert found[0].tokens == expected[0, 7:].tolist()


# --- with transformers, both ways


@pytest.mark.parametrize("config", [MHA, GQA], ids=["mha", "gqa"])
def test_transformers_opens_ours(config: ModelConfig, tokenizer: Path, tmp_path: Path) -> None:
    model = random_model(config)
    save_model(tmp_path / "one", model, tokenizer)
    save_model(tmp_path / "shards", model, tokenizer, shard_bytes=100_000)
    assert len(list((tmp_path / "shards").glob("model-0000?-of-0000?.safetensors"))) > 1
    for folder in ("one", "shards"):
        theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / folder, dtype=torch.float32, output_loading_info=True
        )
        assert not any(report.values())
        assert_computes_the_same(model, theirs)
        assert_same(model, load_model(tmp_path / folder))


@pytest.mark.parametrize("config", [MHA, GQA], ids=["mha", "gqa"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("shard", ["5GB", "50KB"])
def test_ours_opens_transformers(
    config: ModelConfig, tied: bool, shard: str, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    theirs = transformers.LlamaForCausalLM(theirs_config(config, tie_word_embeddings=tied))
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    model = load_model(tmp_path)
    assert model.config == config
    assert_computes_the_same(model, theirs)
    if tied:
        assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()


def test_old_config_and_stored_rope_tables(tmp_path: Path) -> None:
    """As transformers 4 wrote them: rope_theta at the top, inv_freq among the weights."""
    model = random_model(MHA)
    save_model(tmp_path, model)
    edit_config(tmp_path, rope_parameters=None, rope_scaling=None, pretraining_tp=1)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same(model, load_model(tmp_path))


@torch.no_grad()
def test_scores_in_transformers(tokenizer: Path, tmp_path: Path) -> None:
    """A right-padded batch is read at each row's last real token, which may be EOS."""
    model = random_model(GQA, head="score")
    save_model(tmp_path / "ours", model, tokenizer)
    auto = transformers.AutoModelForSequenceClassification
    theirs = auto.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    assert type(theirs).__name__ == "LlamaForSequenceClassification"
    rows = [[1, 7, 8, 9, 2], [1, 300, 12], [1, 5, 6, 7, 8, 9, 10, 2]]
    lone = torch.stack([model.logits(model(torch.tensor([row])))[0, -1, 0] for row in rows])
    pad = theirs.config.pad_token_id
    tokens = torch.tensor([row + [pad] * (8 - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (8 - len(row)) for row in rows])
    scores = theirs(tokens, attention_mask=mask).logits[:, 0]
    torch.testing.assert_close(scores, lone, atol=1e-5, rtol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same(model, load_model(tmp_path / "theirs"))


# --- heads, types, randomness


def test_a_fresh_score_head_only_when_asked(tmp_path: Path) -> None:
    model = random_model(MHA)
    save_model(tmp_path / "lm", model)
    with pytest.raises(ValueError, match="lm head and no score head; .* `puna reward`"):
        load_model(tmp_path / "lm", head="score")
    state = torch.get_rng_state()
    scorer = load_model(tmp_path / "lm", head="score", fresh_head=True, seed=4)
    assert torch.equal(state, torch.get_rng_state())
    assert scorer.score.weight.shape == (1, MHA.dim)
    assert torch.equal(scorer.model.norm.weight, model.model.norm.weight)
    again = load_model(tmp_path / "lm", head="score", fresh_head=True, seed=4)
    assert_same(scorer, again)
    drawn = torch.cat(
        [
            load_model(tmp_path / "lm", head="score", fresh_head=True, seed=seed).score.weight
            for seed in range(30)
        ]
    )
    assert drawn.std().item() == pytest.approx((MHA.dim + 1) ** -0.5, rel=0.1)


def test_heads_are_not_exchanged(tmp_path: Path) -> None:
    save_model(tmp_path / "score", random_model(MHA, head="score"))
    assert load_model(tmp_path / "score").head == "score"
    with pytest.raises(ValueError, match="holds a score head and no lm head"):
        load_model(tmp_path / "score", head="lm")
    with pytest.raises(ValueError, match="fresh_head is for a score head"):
        load_model(tmp_path / "score", head="lm", fresh_head=True)


def test_types(tmp_path: Path) -> None:
    model = random_model(MHA).to(torch.bfloat16)
    save_model(tmp_path, model)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert_same(model, load_model(tmp_path, dtype=torch.bfloat16))
    assert load_model(tmp_path).lm_head.weight.dtype == torch.float32


def test_loaded_weights_are_ours_alone(tmp_path: Path) -> None:
    """Neither shared with the file nor lost with it, and ready to be trained."""
    model = random_model(MHA)
    save_model(tmp_path / "model", model)
    loaded = load_model(tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    with torch.no_grad():
        loaded.lm_head.weight.zero_()
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    os.truncate(tmp_path / "model" / "model.safetensors", 0)
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert all(p.requires_grad and p.is_leaf for p in loaded.parameters())


def test_loading_holds_about_one_model(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = Transformer(ModelConfig(512, 4, 8, 8, 1408, 8192, context=64))
    model.to_empty(device="cpu")
    size = sum(p.nbytes for p in model.parameters())
    save_model(tmp_path, model, shard_bytes=size // 3)
    script = (
        "import resource, sys, torch; from puna.core.checkpoint.folder import load_model\n"
        "rss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = rss(); model = load_model(sys.argv[1]); print(rss() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 1.3 * size


# --- damage


def edit_config(folder: Path, **changes) -> None:
    document = json.loads((folder / "config.json").read_text())
    document.update(changes)
    document = {key: value for key, value in document.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(document))


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def cut(folder: Path, size: int) -> None:
    os.truncate(folder / "model.safetensors", size)


HARM = {
    "missing": (
        lambda f: edit_tensors(f, lambda t: t.pop("model.norm.weight")),
        "missing tensors: model.norm.weight; fetch the checkpoint again",
    ),
    "extra": (
        lambda f: edit_tensors(f, lambda t: t.update(bias=torch.zeros(2))),
        "tensors that this Llama has not: bias; fetch",
    ),
    "mis-shaped": (
        lambda f: edit_tensors(f, lambda t: t.update({"lm_head.weight": torch.zeros(4, 64)})),
        r"lm_head.weight has shape \(4, 64\) where the config says \(320, 64\)",
    ),
    "quantised": (
        lambda f: edit_tensors(
            f, lambda t: t.update({"lm_head.weight": torch.zeros(320, 64, dtype=torch.int8)})
        ),
        "lm_head.weight is stored as I8; Puna reads floats only",
    ),
    "truncated": (lambda f: cut(f, 50_000), "model.safetensors is damaged or cut short"),
    "truncated in the header": (lambda f: cut(f, 30), "is damaged or cut short"),
    "empty": (lambda f: cut(f, 0), "is damaged or cut short"),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        "holds no model.safetensors; fetch or save the model again",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: no such file; give"),
    "broken config": (
        lambda f: (f / "config.json").write_text('{"hidden_size": 6'),
        "config.json: not JSON .* at column 18.; fetch or save it again",
    ),
    "config without a size": (
        lambda f: edit_config(f, hidden_size=None),
        "hidden_size is missing, expected a whole number",
    ),
    "impossible config": (
        lambda f: edit_config(f, num_attention_heads=5),
        "config.json: n_heads 5 must be a multiple of n_kv_heads 4",
    ),
    "another architecture": (
        lambda f: edit_config(f, model_type="gemma", architectures=["GemmaForCausalLM"]),
        "the architecture is GemmaForCausalLM",
    ),
    "rope_scaling": (
        lambda f: edit_config(f, rope_scaling={"type": "dynamic", "factor": 2.0}),
        "rope_scaling of the type dynamic turns earlier tokens anew",
    ),
    "new rope_scaling": (
        lambda f: edit_config(f, rope_parameters={"rope_type": "longrope", "rope_theta": 1e4}),
        "rope_scaling = .*longrope.* is not what a Llama 2 computes",
    ),
    "half a rope_scaling": (
        lambda f: edit_config(f, rope_scaling={"rope_type": "llama3", "factor": 8.0}),
        "low_freq_factor is missing, expected a finite number",
    ),
    "attention_bias": (
        lambda f: edit_config(f, attention_bias=True),
        "missing tensors: model.layers.0.self_attn.q_proj.bias",
    ),
    "mlp_bias": (lambda f: edit_config(f, mlp_bias=True), "mlp_bias = true"),
    "activation": (lambda f: edit_config(f, hidden_act="gelu"), 'hidden_act = "gelu"'),
    "head_dim": (
        lambda f: edit_config(f, head_dim=32),
        r"q_proj.weight has shape \(64, 64\) where the config says \(128, 64\)",
    ),
    "no head_dim": (lambda f: edit_config(f, head_dim=0), "head_size is 0; it must be 1"),
}


@pytest.mark.parametrize("harm", HARM)
def test_harmed_folder(harm: str, tmp_path: Path) -> None:
    save_model(tmp_path / "model", random_model(MHA))
    do, message = HARM[harm]
    do(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "model")


def index_elsewhere(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"]["lm_head.weight"] = "../model.safetensors"
    index.write_text(json.dumps(document))


def forget_in_index(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    del document["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: next(f.glob("model-00002-*")).unlink(), "model-00002.* is missing; fetch"),
        (index_elsewhere, "points outside its folder"),
        (forget_in_index, "holds model.norm.weight, which its index does not name"),
    ],
)
def test_harmed_shards(harm, message: str, tmp_path: Path) -> None:
    save_model(tmp_path, random_model(MHA), shard_bytes=100_000)
    harm(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


def test_another_vocabulary(tokenizer: Path, tmp_path: Path) -> None:
    config = ModelConfig(64, 1, 4, 4, 96, 256, context=64)
    with pytest.raises(ValueError, match="320 pieces where the model's vocabulary is 256; use"):
        save_model(tmp_path / "model", random_model(config), tokenizer)
    assert not list(tmp_path.iterdir())
    save_model(tmp_path / "model", random_model(config))
    with pytest.raises(ValueError, match="has no tokenizer.model; name"):
        tokenizer_path(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    with pytest.raises(ValueError, match="320 pieces where the model's vocabulary is 256; use"):
        load_model(tmp_path / "model")
