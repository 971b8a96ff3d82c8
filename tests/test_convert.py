"""Meta's shards, llama2.c's files and model folders hold the same model."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from torch import Tensor

from puna.cli.convert import ConvertConfig, run
from puna.core.checkpoint.any_format import open_any
from puna.core.checkpoint.convert import convert
from puna.core.checkpoint.folder import load_model, save_model
from puna.core.config import ModelConfig, ffn_width
from puna.core.model import Transformer

SHARED = Path(
    os.environ.get("PUNA_SHARED", Path(__file__).resolve().parents[1] / ".." / "shared" / "data")
)
STORIES = SHARED / "stories260K" / "stories260K.bin"
MULTIPLE_OF = 16
CONFIG = ModelConfig(32, 2, 4, 4, ffn_width(32, MULTIPLE_OF), 64, context=32)
GQA = ModelConfig(64, 2, 8, 4, ffn_width(64, MULTIPLE_OF, 1.3), 64, context=32)


def random_model(config: ModelConfig, seed: int = 0) -> Transformer:
    model = Transformer(config)
    model.init_weights(seed)
    with torch.no_grad():  # norms that differ from one another
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
    return model


def assert_same(one: Transformer, other: Transformer) -> None:
    assert one.config == other.config and one.head == other.head
    theirs = dict(other.named_parameters())
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, theirs[name]), name


# --- an independent model with Meta's layout: adjacent pairs as complex numbers


def meta_forward(weights: dict[str, Tensor], config: ModelConfig, tokens: Tensor) -> Tensor:
    """Logits (T, V) of Meta's arithmetic for one sequence, in fp64."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    x = w["tok_embeddings.weight"][tokens]
    length, D = len(tokens), config.head_dim
    frequencies = config.rope_theta ** (-torch.arange(0, D, 2).double() / D)
    angles = torch.outer(torch.arange(length).double(), frequencies)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]
    mask = torch.full((length, length), float("-inf"), dtype=torch.float64).triu(1)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.norm_eps) * weight

    def rotate(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(length, -1, D // 2, 2))
        return torch.view_as_real(pairs * turn).reshape(length, -1, D)

    for layer in range(config.n_layers):
        at = f"layers.{layer}."
        h = norm(x, w[f"{at}attention_norm.weight"])
        q, k, v = (
            (h @ w[f"{at}attention.{part}.weight"].T).view(length, -1, D)
            for part in ("wq", "wk", "wv")
        )
        groups = config.n_heads // config.n_kv_heads
        k, v = rotate(k).repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = torch.einsum("thd,shd->hts", rotate(q), k) / D**0.5 + mask
        out = torch.einsum("hts,shd->thd", scores.softmax(-1), v).reshape(length, -1)
        x = x + out @ w[f"{at}attention.wo.weight"].T
        h = norm(x, w[f"{at}ffn_norm.weight"])
        gate = torch.nn.functional.silu(h @ w[f"{at}feed_forward.w1.weight"].T)
        up = h @ w[f"{at}feed_forward.w3.weight"].T
        x = x + (gate * up) @ w[f"{at}feed_forward.w2.weight"].T
    return norm(x, w["norm.weight"]) @ w["output.weight"].T


def meta_weights(config: ModelConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    C, F, KD = config.dim, config.ffn_dim, config.n_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (config.vocab_size, C)}
    for layer in range(config.n_layers):
        parts = {
            "attention.wq": (C, C),
            "attention.wk": (KD, C),
            "attention.wv": (KD, C),
            "attention.wo": (C, C),
            "feed_forward.w1": (F, C),
            "feed_forward.w2": (C, F),
            "feed_forward.w3": (F, C),
            "attention_norm": (C,),
            "ffn_norm": (C,),
        }
        shapes.update({f"layers.{layer}.{name}.weight": shape for name, shape in parts.items()})
    shapes |= {"norm.weight": (C,), "output.weight": (config.vocab_size, C)}
    weights = {
        name: torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        for name, shape in shapes.items()
    }
    return {name: t + 1 if t.dim() == 1 else t for name, t in weights.items()}


def save_meta(folder: Path, weights: dict[str, Tensor], config: ModelConfig, ranks: int) -> Path:
    """Meta's folder: each rank's share in a file of its own."""
    folder.mkdir(parents=True)
    columns = ("tok_embeddings.weight", "wo.weight", "w2.weight")
    for rank in range(ranks):
        share = {"rope.freqs": torch.zeros(config.head_dim // 2)}
        for name, tensor in weights.items():
            if tensor.dim() == 2:
                tensor = tensor.chunk(ranks, 1 if name.endswith(columns) else 0)[rank]
            share[name] = tensor.clone()
        torch.save(share, folder / f"consolidated.{rank:02d}.pth")
    params = {"dim": config.dim, "n_layers": config.n_layers, "n_heads": config.n_heads}
    params |= {"multiple_of": MULTIPLE_OF, "norm_eps": 1e-5, "vocab_size": -1}
    if config.n_kv_heads != config.n_heads:
        params |= {"n_kv_heads": config.n_kv_heads, "ffn_dim_multiplier": 1.3}
    (folder / "params.json").write_text(json.dumps(params))
    return folder


@pytest.mark.parametrize("config", [CONFIG, GQA], ids=["mha", "gqa"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_meta_shards_compute_metas_logits(config: ModelConfig, ranks: int, tmp_path: Path) -> None:
    weights = meta_weights(config)
    folder = save_meta(tmp_path / "meta", weights, config, ranks)
    model = load_model(convert(folder, tmp_path / "puna", context=config.context))
    assert model.config == config
    tokens = torch.randint(0, config.vocab_size, (17,), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ours = model.logits(model(tokens[None]))[0]
    torch.testing.assert_close(
        ours.double(), meta_forward(weights, config, tokens), atol=1e-4, rtol=0
    )


def test_meta_keeps_its_type_unless_told(tmp_path: Path) -> None:
    weights = {name: t.half() for name, t in meta_weights(CONFIG).items()}
    folder = save_meta(tmp_path / "meta", weights, CONFIG, 2)
    kept = json.loads((convert(folder, tmp_path / "kept") / "config.json").read_text())
    assert (kept["torch_dtype"], kept["max_position_embeddings"]) == ("float16", 4096)
    asked = convert(folder, tmp_path / "asked", dtype=torch.bfloat16)
    assert json.loads((asked / "config.json").read_text())["torch_dtype"] == "bfloat16"


def lose_a_share(folder: Path) -> None:
    (folder / "consolidated.01.pth").unlink()


def lose_the_first_share(folder: Path) -> None:
    (folder / "consolidated.00.pth").unlink()


def truncate_a_share(folder: Path) -> None:
    os.truncate(folder / "consolidated.01.pth", 3000)


def put_code_in_a_share(folder: Path) -> None:
    torch.save({"norm.weight": os.path.join}, folder / "consolidated.01.pth")


def lose_a_tensor(folder: Path) -> None:
    share = torch.load(folder / "consolidated.01.pth", weights_only=True)
    del share["output.weight"]
    torch.save(share, folder / "consolidated.01.pth")


def lose_a_parameter(folder: Path) -> None:
    (folder / "params.json").write_text('{"dim": 32, "n_layers": 2}')


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lose_a_share, "1 consolidated file with 16 of 32 columns; fetch the missing files"),
        (lose_the_first_share, "without a gap, found consolidated.01.pth; fetch"),
        (truncate_a_share, "consolidated.01.pth is damaged or cut short; fetch it again"),
        (put_code_in_a_share, "more than tensors and is not opened"),
        (lose_a_tensor, "missing tensors: output.weight; fetch"),
        (lose_a_parameter, "n_heads is missing, expected a whole number"),
    ],
)
def test_harmed_meta_folder(harm, message: str, tmp_path: Path) -> None:
    folder = save_meta(tmp_path / "meta", meta_weights(CONFIG), CONFIG, 2)
    harm(folder)
    with pytest.raises(ValueError, match=message):
        convert(folder, tmp_path / "puna")
    assert os.listdir(tmp_path) == ["meta"]


# --- llama2.c


@pytest.mark.parametrize("config", [CONFIG, GQA], ids=["mha", "gqa"])
@pytest.mark.parametrize("tied", [False, True])
def test_bin_and_back(config: ModelConfig, tied: bool, tmp_path: Path) -> None:
    model = random_model(config)
    if tied:
        model.lm_head.weight.data.copy_(model.model.embed_tokens.weight)
    save_model(tmp_path / "folder", model)
    file = convert(tmp_path / "folder", tmp_path / "model.bin")
    vocab_size = struct.unpack("<7i", file.read_bytes()[:28])[5]
    assert vocab_size == (config.vocab_size if tied else -config.vocab_size)
    assert_same(model, load_model(file))
    assert_same(model, load_model(convert(file, tmp_path / "again")))


def test_bin_has_adjacent_pairs(tmp_path: Path) -> None:
    """wq's rows as Meta orders them: ours 0 and D/2 become 0 and 1."""
    model = random_model(CONFIG)
    save_model(tmp_path / "folder", model)
    file = convert(tmp_path / "folder", tmp_path / "model.bin")
    C, L, V, D = CONFIG.dim, CONFIG.n_layers, CONFIG.vocab_size, CONFIG.head_dim
    floats = torch.frombuffer(bytearray(file.read_bytes()[28:]), dtype=torch.float32)
    wq = floats[V * C + L * C :][: C * C].view(C, C)
    ours = model.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(wq[0], ours[0]) and torch.equal(wq[1], ours[D // 2])
    assert torch.equal(wq[D + 2], ours[D + 1]) and torch.equal(wq[D + 3], ours[D + D // 2 + 1])


@pytest.mark.shared
@pytest.mark.skipif(not STORIES.exists(), reason=f"no real inputs at {SHARED}")
def test_real_bin_round_trip_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = convert(STORIES, tmp_path / "folder")
    file = convert(folder, tmp_path / "model.bin")
    theirs, ours = STORIES.read_bytes(), file.read_bytes()
    tables = 4 * 2 * 512 * 4  # two unread tables of cosines: they depend on the C library
    assert len(ours) == len(theirs) and ours[:-tables] == theirs[:-tables]
    one, other = (
        torch.frombuffer(bytearray(data[-tables:]), dtype=torch.float32) for data in (ours, theirs)
    )
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is 0 bytes long; give a whole .bin in llama2.c's legacy format"),
        (struct.pack("<7i", 32, 48, 2, 4, 4, 64, 32) + b"\0" * 99, "its header asks for"),
        (b"ak42" + b"\1\0\0\0" + b"\0" * 300, "legacy format"),
        (struct.pack("<7i", 30, 48, 2, 4, 4, 64, 32), "must be a multiple of n_heads"),
    ],
)
def test_bad_bin(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.bin").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "bad.bin")


def test_bin_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    config = ModelConfig(32, 1, 4, 4, 48, 64, context=32, rope_theta=5e5)
    save_model(tmp_path / "theta", random_model(config))
    with pytest.raises(ValueError, match="cannot hold rope_theta 500000"):
        convert(tmp_path / "theta", tmp_path / "model.bin")
    scorer = Transformer(CONFIG, head="score")
    scorer.init_weights()
    save_model(tmp_path / "score", scorer)
    with pytest.raises(ValueError, match="has a score head"):
        convert(tmp_path / "score", tmp_path / "model.bin")
    assert sorted(os.listdir(tmp_path)) == ["score", "theta"]


def test_a_bin_that_is_cut_while_it_is_open_is_named(tmp_path: Path) -> None:
    save_model(tmp_path / "model", random_model(CONFIG))
    file = convert(tmp_path / "model", tmp_path / "m.bin")
    source = open_any(file)
    os.truncate(file, 3001)
    with pytest.raises(ValueError, match="m.bin is cut short; fetch it again"):
        list(source.tensors())


# --- the choice by path, and the verb


def test_refuses_to_overwrite(tmp_path: Path) -> None:
    save_model(tmp_path / "model", random_model(CONFIG))
    with pytest.raises(ValueError, match="one.safetensors is called as one file of weights"):
        convert(tmp_path / "model", tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match="exists; choose another target"):
        convert(tmp_path / "model", tmp_path / "model")


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such model; give a model folder"):
        convert(tmp_path / "absent", tmp_path / "out")
    folder = save_meta(tmp_path / "meta", meta_weights(CONFIG), CONFIG, 1)
    with pytest.raises(ValueError, match="give its folder"):
        convert(folder / "consolidated.00.pth", tmp_path / "out")
    with pytest.raises(ValueError, match="convert it first with `puna convert`"):
        load_model(folder)


def test_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = random_model(CONFIG)
    save_model(tmp_path / "model", model)
    target = run(ConvertConfig(tmp_path / "model", tmp_path / "half", dtype="bf16"))
    assert json.loads((target / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert str(target) in capsys.readouterr().out
