"""Models in the formats of others: the same numbers as transformers', peft's and llama2.c's."""

import json
import math
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import puna
from puna.core.checkpoint import gguf_file, gguf_write
from puna.core.checkpoint.convert import convert
from puna.core.checkpoint.folder import load_model, open_source, save_model, tokenizer_path
from puna.core.checkpoint.source import interleaved, meta_name, rope_heads
from puna.core.config import ModelConfig
from puna.core.model import Transformer
from puna.core.rope_scaling import RopeScaling
from puna.core.text.tokenizer import Tokenizer, train_tokenizer

transformers = pytest.importorskip("transformers")

CONFIG = ModelConfig(64, 2, 4, 2, 96, 330, context=128)
TEXTS = ["[INST] hello there [/INST] general answer", "<<SYS>> be kind <</SYS>> 7 times"] * 20
LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 32)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(TEXTS, path, vocab_size=330)
    return path


def random_model(config: ModelConfig = CONFIG, head: str = "lm") -> Transformer:
    model = Transformer(config, head)
    model.init_weights(1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.mul_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return model


def tokens(vocab_size: int = 330) -> torch.Tensor:
    return torch.randint(3, vocab_size, (2, 100), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def furthest(one: Transformer, other: torch.nn.Module) -> float:
    """Largest difference of two models' logits; `other` is ours or transformers'."""
    ids = tokens()
    if isinstance(other, Transformer):
        theirs = other.logits(other(ids))
    else:
        theirs = other.eval()(ids).logits
    return float((one.logits(one(ids)) - theirs).abs().max())


# -- RoPE ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", [RopeScaling("linear", 4.0), LLAMA3])
def test_a_stretched_context_is_transformers(scaling: RopeScaling, tmp_path: Path) -> None:
    model = random_model(replace(CONFIG, rope_scaling=scaling))
    save_model(tmp_path / "model", model)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert furthest(model, theirs) < 1e-4
    assert furthest(model, random_model()) > 1e-2  # it is not ignored
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_model(tmp_path / "theirs")
    assert again.config.rope_scaling == scaling
    assert furthest(again, theirs) < 1e-4
    prompt = [1, 5, 9, 200]
    ids = torch.tensor([prompt])
    theirs.generation_config.eos_token_id = None
    expected = theirs.generate(ids, max_new_tokens=60, do_sample=False, pad_token_id=0)
    from puna.core.generation.generate import generate

    ours = generate(again, [prompt], max_new_tokens=60, eos_id=None, temperature=0.0)
    assert ours[0].tokens == expected[0, 4:].tolist()


# -- GGUF ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_gguf_there_and_back(dtype: torch.dtype | None, tokenizer: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    model = random_model()
    save_model(tmp_path / "model", model, tokenizer)
    file = convert(tmp_path / "model", tmp_path / "model.gguf", dtype=dtype)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert len(kinds) == len(list(model.parameters()))
    wide = {None: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    assert kinds["output_norm.weight"] == "F32" and kinds["blk.1.ffn_up.weight"] == wide
    back = load_model(file)
    for (name, one), other in zip(model.named_parameters(), back.parameters(), strict=True):
        rounded = one if dtype is None or one.dim() == 1 else one.to(dtype).float()
        assert torch.equal(rounded, other), name
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.float32
    )
    assert furthest(back, theirs) < 1e-4


@pytest.mark.parametrize("first", ["rope.scaling.original_context_length", "not.said"])
@pytest.mark.parametrize(
    "scaling",
    [RopeScaling("linear", 4.0), LLAMA3, RopeScaling("llama3", 32.0)],
    ids=lambda scaling: f"{scaling.rope_type}-{scaling.factor:g}",
)
def test_a_stretched_context_goes_through_gguf(
    scaling: RopeScaling, first: str, tokenizer: Path, tmp_path: Path, monkeypatch
) -> None:
    """Released files do not say where it began, which is at 8,192 tokens."""
    pytest.importorskip("gguf")
    monkeypatch.setattr(gguf_write, "FIRST_CONTEXT", first)
    save_model(tmp_path / "model", random_model(replace(CONFIG, rope_scaling=scaling)), tokenizer)
    file = convert(tmp_path / "model", tmp_path / "m.gguf")
    if first == "not.said" and scaling == LLAMA3:
        with pytest.raises(ValueError, match="in a way that Puna does not know"):
            open_source(file)
    else:
        assert open_source(file).config.rope_scaling == scaling


def test_gguf_keeps_the_tokenizer_and_the_chat(tokenizer: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    save_model(tmp_path / "model", random_model(), tokenizer)
    file = convert(tmp_path / "model", tmp_path / "m.gguf", to="gguf")
    convert(file, tmp_path / "folder")
    one, other = Tokenizer(tokenizer), Tokenizer(tokenizer_path(file))
    third = Tokenizer(tokenizer_path(tmp_path / "folder"))
    assert third.path.name == "tokenizer.json"
    for text in (" hello  there", "7 times\n\nx", "Straße 中文 🙂", "</s> <s>"):
        assert one.encode(text) == other.encode(text) == third.encode(text)
        assert one.decode(one.encode(text)) == other.decode(one.encode(text))
    dialogue = [{"role": r, "content": c} for r, c in (("system", "be"), ("user", "hello"))]
    said = [*dialogue, {"role": "assistant", "content": "answer"}]
    from puna.core.text.chat import encode_dialogue, encode_prompt

    for each in (other, third):
        assert encode_prompt(each, dialogue) == encode_prompt(one, dialogue)
        assert encode_dialogue(each, said) == encode_dialogue(one, said)
    for path in (file, tmp_path / "folder"):
        assert furthest(load_model(tmp_path / "model"), load_model(path)) == 0


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q6_K"])
def test_quantised_gguf_is_what_transformers_reads(
    kind: str, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf = pytest.importorskip("gguf")
    config = ModelConfig(256, 1, 4, 2, 256, 330, context=128)
    model = random_model(config)
    number = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for name, value in (
        ("context_length", 128), ("embedding_length", 256), ("block_count", 1),
        ("feed_forward_length", 256), ("attention.head_count", 4), ("attention.head_count_kv", 2),
    ):  # fmt: skip
        writer.add_uint32(f"llama.{name}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    rng = np.random.default_rng(0)
    expected = {}
    for name, parameter in model.named_parameters():
        theirs = names.get_name(name, try_suffixes=(".weight",))
        if parameter.dim() == 1:
            writer.add_tensor(theirs, parameter.detach().numpy())
            continue
        rows = _blocks(kind, parameter.detach().numpy(), rng)
        writer.add_tensor(theirs, rows, raw_dtype=number)
        expected[name] = torch.from_numpy(gguf.dequantize(rows, number).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = open_source(tmp_path / "m.gguf")
    read = dict(source.tensors())
    for name, tensor in expected.items():
        heads = rope_heads(name, config)
        assert torch.equal(interleaved(read[name], heads) if heads else read[name], tensor), name
    monkeypatch.setattr(gguf_file, "PIECE", 256 * 70)  # a head has 64 rows
    pieces: dict[str, list[torch.Tensor]] = {name: [] for name in read}
    for name, first, rows in source.pieces():
        assert first == sum(map(len, pieces[name])) and rows.numel() <= 256 * 70
        pieces[name].append(rows)
    assert all(torch.equal(torch.cat(pieces[name]), read[name]) for name in read)


def _blocks(kind: str, numbers: np.ndarray, rng) -> np.ndarray:
    """Quantised rows; random blocks of K-quants, which the package only reads."""
    import gguf

    number = gguf.GGMLQuantizationType[kind]
    if not kind.endswith("_K"):
        return gguf.quantize(numbers, number)
    block, size = gguf.GGML_QUANT_SIZES[number]
    count = numbers.size // block
    made = rng.integers(0, 256, (count, size), dtype=np.uint8)
    at = slice(0, 4) if kind == "Q4_K" else slice(208, 210)
    scales = np.full((count, (at.stop - at.start) // 2), 0.01, np.float16)
    made[:, at] = scales.view(np.uint8)
    return made.reshape(numbers.shape[0], -1)


def _head(values: bytes = b"", count: int = 0, tensors: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, count) + values


HOSTILE = {
    "empty": (b"", "it ends too early"),
    "no GGUF": (b"GGUX" + b"\0" * 60, "does not begin with GGUF"),
    "version": (_head(version=9), "its version is 9"),
    "settings": (_head(count=2**63), "ends too early"),
    "tensors": (_head(tensors=2**40), "ends too early"),
    "text": (_head(struct.pack("<Q", 2**62), 1) + b"\0" * 64, "ends too early"),
    "array": (
        _head(struct.pack("<Q1sIIQ", 1, b"a", 9, 8, 2**60), 1) + b"\0" * 64, "ends too early",
    ),
    "numbers": (
        _head(struct.pack("<Q1sIIQ", 1, b"a", 9, 4, 2**60), 1) + b"\0" * 64, "ends too early",
    ),
    "deep": (
        _head(struct.pack("<Q1sI", 1, b"a", 9) + struct.pack("<IQ", 9, 1) * 99, 1),
        "unknown type 9",
    ),
    "no settings": (_head() + b"\0" * 64, "general.architecture is missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_damaged_gguf_is_one_sentence(name: str, tmp_path: Path) -> None:
    data, message = HOSTILE[name]
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=message) as raised:
        puna.load(tmp_path / "m.gguf", device="cpu")
    assert "m.gguf" in str(raised.value) and "\n" not in str(raised.value)


def test_a_gguf_cut_short_is_said_before_it_is_read(tokenizer: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    save_model(tmp_path / "model", random_model(), tokenizer)
    file = convert(tmp_path / "model", tmp_path / "m.gguf")
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(ValueError, match="is cut short"):
        open_source(file)
    save_model(tmp_path / "judge", random_model(head="score"), tokenizer)
    with pytest.raises(ValueError, match="this is a reward model"):
        convert(tmp_path / "judge", tmp_path / "judge.gguf")
    assert not (tmp_path / "judge.gguf").exists()


# -- llama2.c -----------------------------------------------------------------------------------


def llama2c(model: Transformer, path: Path, version: int, tied: bool, group: int = 32) -> Path:
    """As llama2.c's export.py writes it."""
    config = model.config
    weights = {}
    for name, parameter in model.named_parameters():
        heads = rope_heads(name, config)
        tensor = parameter.detach()
        weights[meta_name(name)] = interleaved(tensor, heads) if heads else tensor
    layers = range(config.n_layers)
    norms = [weights[f"layers.{i}.attention_norm.weight"] for i in layers]
    norms += [weights[f"layers.{i}.ffn_norm.weight"] for i in layers] + [weights["norm.weight"]]
    matrices = [weights["tok_embeddings.weight"]]
    for kind in ("attention.wq", "attention.wk", "attention.wv", "attention.wo",
                 "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"):  # fmt: skip
        matrices += [weights[f"layers.{i}.{kind}.weight"] for i in layers]
    matrices += [] if tied else [weights["output.weight"]]
    header = struct.pack(
        "<Iiiiiiiii", 0x616B3432, version, config.dim, config.ffn_dim, config.n_layers,
        config.n_heads, config.n_kv_heads, config.vocab_size, config.context,
    ) + struct.pack("<B", tied)  # fmt: skip
    header += struct.pack("<i", group) if version == 2 else b""
    data = header.ljust(256, b"\0") + b"".join(n.numpy().tobytes() for n in norms)
    for each in matrices:
        if version == 1:
            data += each.numpy().tobytes()
            continue
        rows = each.reshape(-1, group)
        scales = rows.abs().amax(1) / 127.0
        data += (rows / scales[:, None]).round().to(torch.int8).numpy().tobytes()
        data += scales.numpy().tobytes()
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("version", [1, 2])
def test_llama2c_of_all_versions(version: int, tied: bool, tmp_path: Path) -> None:
    model = random_model()
    if tied:
        with torch.no_grad():
            model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    file = llama2c(model, tmp_path / "m.bin", version, tied)
    read = load_model(file)
    assert read.config == model.config
    for (name, one), other in zip(model.named_parameters(), read.parameters(), strict=True):
        if version == 1 or one.dim() == 1:
            assert torch.equal(one, other), name
        else:
            assert (one - other).abs().max() <= one.abs().max() / 250, name
    file.write_bytes(file.read_bytes() + b"\0\0\0\0")
    with pytest.raises(ValueError, match="its header asks for"):
        load_model(file)


def test_a_llama2c_header_is_not_believed(tmp_path: Path) -> None:
    for version, layers in ((1, 2**31 - 1), (2, 2**31 - 1), (3, 1)):
        header = struct.pack(
            "<Iii7iBi", 0x616B3432, version, 64, 96, layers, 4, 2, 330, 128, 0, 0, 7
        )
        (tmp_path / "m.bin").write_bytes(header[: 4 + 4 + 28 + 1 + 4].ljust(300, b"\0"))
        with pytest.raises(ValueError, match="m.bin"):
            load_model(tmp_path / "m.bin")


# -- LoRA ---------------------------------------------------------------------------------------


@pytest.fixture
def adapted(tokenizer: Path, tmp_path: Path) -> Path:
    """A base model and an adapter beside it, made by peft with random factors."""
    peft = pytest.importorskip("peft")
    save_model(tmp_path / "base", random_model(), tokenizer)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=["q_proj", "v_proj", "down_proj", "lm_head"],
        rank_pattern={"down_proj": 7}, task_type="CAUSAL_LM",
    )  # fmt: skip
    made = peft.get_peft_model(base, settings)
    torch.manual_seed(0)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    made.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_is_merged_as_it_is_read(adapted: Path) -> None:
    read = load_model(adapted)
    base = load_model(adapted.parent / "base")
    factors = load_file(adapted / "adapter_model.safetensors")
    weights, changed = dict(base.named_parameters()), 0
    for name, parameter in read.named_parameters():
        expected = weights[name].detach().double()
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in factors:
            a, b = (factors[f"{stem}.lora_{x}.weight"].double() for x in "AB")
            expected = expected + 12 / a.shape[0] * b @ a
            changed += 1
        assert (parameter.double() - expected).abs().max() < 1e-6, name
    assert changed == 7
    peft = pytest.importorskip("peft")
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(adapted)
    assert furthest(read, theirs) < 1e-4
    llama = puna.load(adapted, device="cpu")
    assert llama.generate("hello", max_new_tokens=5) is not None
    assert tokenizer_path(adapted).parent == adapted.parent / "base"


def test_rank_stabilised_adapters_and_other_kinds(adapted: Path) -> None:
    settings = json.loads((adapted / "adapter_config.json").read_text())

    def said(**changes: object) -> None:
        (adapted / "adapter_config.json").write_text(json.dumps(settings | changes))

    plain = dict(load_model(adapted).named_parameters())
    base = dict(load_model(adapted.parent / "base").named_parameters())
    said(use_rslora=True)
    name = "model.layers.0.self_attn.q_proj.weight"
    rooted = dict(load_model(adapted).named_parameters())[name]
    ratio = (rooted - base[name]).norm() / (plain[name] - base[name]).norm()
    assert math.isclose(ratio, 2.0, rel_tol=1e-4)  # r / sqrt(r), r = 4
    for changes, message in (
        ({"peft_type": "IA3"}, "of the kind IA3; Puna merges LORA"),
        ({"use_dora": True}, "use_dora = true is not merged here"),
        ({"bias": "all"}, "it has biases"),
        ({"base_model_name_or_path": "someone/model"}, "not on this machine; fetch that and write"),
        ({"lora_alpha": "x"}, "lora_alpha is .x., expected a finite number"),
    ):
        said(**changes)
        with pytest.raises(ValueError, match=message):
            load_model(adapted)
    said()
    file = adapted / "adapter_model.safetensors"
    factors = load_file(file)
    save_file(factors | {"base_model.model.model.x.lora_A.weight": torch.ones(4, 8)}, file)
    with pytest.raises(ValueError, match="does not fit its base model"):
        load_model(adapted)
