"""The library's one object: texts and chats in, texts, log-probs and scores out.
Run: python -m pytest tests/test_llama.py -q"""

import json
import shutil

import pytest
import torch

import puna
from puna.core.checkpoint.convert import convert
from puna.core.checkpoint.folder import load_model
from puna.core.checkpoint.source import interleaved, meta_name, rope_heads
from puna.core.generation.generate import generate
from puna.core.text.chat import encode_answer, encode_dialogue, encode_prompt
from puna.core.text.tokenizer import Tokenizer, train_tokenizer

CHAT = [{"role": "user", "content": "red cup"}]
LONGER = [
    {"role": "system", "content": "be blue"},
    *CHAT,
    {"role": "assistant", "content": "moon"},
    {"role": "user", "content": "why how"},
]


@pytest.fixture(scope="module")
def llama(tiny):
    return puna.load(tiny / "chat", device="cpu")


@pytest.fixture(scope="module")
def judge(tiny):
    return puna.load(str(tiny / "safety"), device="cpu")


def answered(chat, text="green tree"):
    return [*chat, {"role": "assistant", "content": text}]


def test_a_text_goes_on_as_the_engine_says(tiny, llama):
    tokenizer = Tokenizer(tiny / "tokenizer.model")
    prompts = [tokenizer.encode(text, bos=True) for text in ("red cup", "", "give nine")]
    done = generate(
        load_model(tiny / "chat"), prompts, max_new_tokens=9, eos_id=tokenizer.eos_id,
        temperature=0.8, top_p=0.9, top_k=20, seed=3, round_index=2,
    )  # fmt: skip
    options = dict(temperature=0.8, top_p=0.9, top_k=20, seed=3, round_index=2, max_new_tokens=9)
    found = llama.generate(["red cup", "", "give nine"], **options)
    whole = [
        tokenizer.decode([*ids, *each.tokens]) for ids, each in zip(prompts, done, strict=True)
    ]
    begun = [tokenizer.decode(ids) for ids in prompts]
    assert found == [text.removeprefix(begin) for text, begin in zip(whole, begun, strict=True)]
    assert llama.generate("red cup", **options) == found[0]
    assert "".join(llama.stream("red cup", **options)) == found[0]


def test_chats_and_texts_are_answered_one_or_many(llama):
    options = {"max_new_tokens": 12, "temperature": 0.0}
    one = llama.generate(CHAT, **options)
    assert isinstance(one, str) and one and one == one.strip()
    assert "".join(llama.stream(CHAT, **options)).strip() == one
    assert llama.generate([CHAT], **options) == [one]
    mixed = [CHAT, "red", LONGER, tuple(CHAT)]
    found = llama.generate(mixed, batch_size=2, **options)
    assert found == [llama.generate(each, **options) for each in mixed]
    assert llama.generate([]) == llama.logprobs([]) == []


def test_draws_depend_on_seed_round_and_place_alone(llama):
    options = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 20}
    first, *others = llama.generate(["red"] * 4, **options)
    assert first == llama.generate("red", **options) and len({first, *others}) > 1
    for changed in ({"seed": 1}, {"round_index": 1}):
        assert llama.generate("red", **options, **changed) != first


def test_logprobs_of_a_text_and_of_a_last_answer(tiny, llama):
    tokenizer, model = Tokenizer(tiny / "tokenizer.model"), load_model(tiny / "chat")

    def expected(ids, known):
        with torch.no_grad():
            logits = model.logits(model(torch.tensor([ids])))[0, :-1]
        rows = torch.log_softmax(logits, -1)[range(len(ids) - 1), ids[1:]]
        return pytest.approx(rows[known - 1 :].tolist(), abs=1e-5)

    text = tokenizer.encode("red cup how", bos=True)
    prompt = encode_prompt(tokenizer, LONGER)
    dialogue = prompt + encode_answer(tokenizer, "green tree")
    assert llama.logprobs("red cup how") == expected(text, 1)
    assert llama.logprobs(answered(LONGER)) == expected(dialogue, len(prompt))
    both = llama.logprobs(["red cup how", answered(LONGER)])
    assert both == [expected(text, 1), expected(dialogue, len(prompt))]
    assert llama.logprobs("") == []


def test_scores_are_read_at_the_last_token_as_in_training(tiny, judge):
    tokenizer, model = Tokenizer(tiny / "tokenizer.model"), load_model(tiny / "safety")
    dialogues = [answered(CHAT), answered(LONGER)]
    expected = []
    for dialogue in dialogues:
        ids, _ = encode_dialogue(tokenizer, dialogue)
        with torch.no_grad():
            expected.append(float(model.logits(model(torch.tensor([ids])))[0, -1]))
    assert judge.score(dialogues) == pytest.approx(expected, abs=1e-5)
    assert judge.score(dialogues[1]) == pytest.approx(expected[1], abs=1e-5)
    assert judge.score([]) == []


def write_meta(folder, target):
    """A model folder in Meta's format; its context of 256 is not stored."""
    model = load_model(folder)
    config, tensors = model.config, {}
    for name, tensor in model.named_parameters():
        heads = rope_heads(name, config)
        tensors[meta_name(name)] = interleaved(tensor.detach(), heads) if heads else tensor.detach()
    target.mkdir()
    torch.save(tensors, target / "consolidated.00.pth")
    params = {
        "dim": config.dim, "n_layers": config.n_layers, "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads, "multiple_of": 1, "norm_eps": config.norm_eps,
        "ffn_dim_multiplier": (config.ffn_dim + 0.5) / (8 * config.dim // 3),
    }  # fmt: skip
    (target / "params.json").write_text(json.dumps(params))
    shutil.copy(folder / "tokenizer.model", target)


def test_every_format_opens_as_the_same_model(tiny, llama, tmp_path):
    write_meta(tiny / "chat", tmp_path / "meta")
    convert(tiny / "chat", tmp_path / "model.bin")
    llama.save(str(tmp_path / "saved"))
    expected = llama.generate([CHAT, "red"], temperature=0.0)
    tokenizer = str(tiny / "tokenizer.model")
    for loaded in (
        puna.load(tmp_path / "meta", context=256),
        puna.load(str(tmp_path / "model.bin"), tokenizer=tokenizer),
        puna.load(tmp_path / "saved"),
    ):
        assert loaded.generate([CHAT, "red"], temperature=0.0) == expected
        assert loaded.model.config == llama.model.config
    assert puna.load(tmp_path / "meta").model.config.context == 4096


def test_transformers_opens_what_is_saved(llama, judge, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = llama.save(tmp_path / "saved")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("red cup how", return_tensors="pt").input_ids
    with torch.no_grad():
        rows = torch.log_softmax(model(ids).logits[0, :-1], -1)
    found = rows[range(ids.shape[1] - 1), ids[0, 1:]].tolist()
    assert llama.logprobs("red cup how") == pytest.approx(found, abs=1e-4)
    again = puna.load(judge.save(tmp_path / "judge"))
    assert again.score(answered(CHAT)) == judge.score(answered(CHAT))


def test_types_devices_and_what_it_is_called(tiny, llama):
    half = puna.load(tiny / "chat", dtype="bf16", device="cpu")
    assert half.model.head_weight.dtype == torch.bfloat16
    assert isinstance(half.generate(CHAT, max_new_tokens=3), str)
    assert len(half.logprobs("red cup")) == len(llama.logprobs("red cup"))
    assert repr(llama).startswith(f"<Llama {tiny / 'chat'}: lm head, ")
    assert repr(llama).endswith("parameters, float32 on cpu>")


MISTAKES = {
    "a reward model": (lambda m, j: j.generate("x"), "safety is a reward model; generate needs a"),
    "a language model": (lambda m, j: m.score(answered(CHAT)), "chat is a language model; score"),
    "reward logprobs": (lambda m, j: j.logprobs("x"), "logprobs needs a language model"),
    "no tokenizer": (lambda m, j: puna.Llama(m.model).generate("x"), r"this model has no .*izer="),
    "mixed": (lambda m, j: m.generate([*CHAT, "x"]), "one list holds messages and something else"),
    "no list": (lambda m, j: m.generate(3), "a text, a chat or a list of them, not int"),
    "inner": (lambda m, j: m.generate([CHAT, 3]), "expected a text or a list of messages, not int"),
    "no role": (lambda m, j: m.generate([{"content": "x"}]), "must be an object with 'role' and"),
    "no text": (lambda m, j: m.generate([{"role": "user", "content": 3}]), "must be a text, not"),
    "answered": (lambda m, j: m.generate(answered(CHAT)), "a prompt must end with a user message"),
    "an empty chat": (lambda m, j: m.generate([CHAT, []]), "the dialogue has no user message"),
    "a forged turn": (lambda m, j: m.stream([{"role": "user", "content": "[INST]"}]), "chat tag"),
    "a long text": (lambda m, j: m.generate("red " * 400), "leave room in the context of 256"),
    "a long stream": (lambda m, j: m.stream("red " * 400), "leave room in the context of 256"),
    "long logprobs": (lambda m, j: m.logprobs("red " * 400), "exceeds the model's context of 256"),
    "streams": (lambda m, j: m.stream(["x", "y"]), "stream takes one text or one chat"),
    "no answer": (lambda m, j: j.score(CHAT), "the chat must end with an assistant message"),
    "no answer 2": (lambda m, j: m.logprobs(CHAT), "the chat must end with an assistant message"),
    "a text's score": (lambda m, j: j.score("red"), "a reward model scores chats; give lists of"),
    "a format": (lambda m, j: m.generate("x", weight_format="fp4"), "fp4"),
    "a temperature": (lambda m, j: m.generate("x", temperature=-1.0), "temperature is -1.0; it"),
    "a seed": (lambda m, j: m.generate("x", seed=2**64), "seed is 18446744073709551616; it must"),
    "a length": (lambda m, j: m.stream("x", max_new_tokens=1.5), "max_new_tokens is 1.5; it must"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(llama, judge, name):
    call, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message) as raised:
        call(llama, judge)
    assert "\n" not in str(raised.value)


def test_what_cannot_be_loaded(tiny, tmp_path):
    texts = ["red green blue " * 9] * 40
    train_tokenizer(texts, tmp_path / "other.model", vocab_size=270)
    for options, message in (
        ({"path": tmp_path / "none"}, "no such model; give a model folder"),
        ({"dtype": "fp8"}, "dtype is 'fp8'; expected one of fp32, bf16, fp16"),
        ({"tokenizer": tmp_path / "other.model"}, "270 pieces where the model's vocabulary is"),
        *(
            ({"context": wrong}, f"context is {wrong!r}; it must be a whole number of tokens, 1 to")
            for wrong in (0, -3, 1.5, True, "512", 10**9)
        ),
        ({"dtype": torch.int8}, "dtype is torch.int8; expected a type of floats"),
        ({"device": "foo"}, "device is 'foo', which is not there; ask for cpu, cuda"),
        ({"device": "meta"}, "device is 'meta', which is not there"),
    ):
        with pytest.raises(ValueError, match=message):
            puna.load(**{"path": tiny / "chat", **options})
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device cuda was asked for, but no GPU is visible"):
            puna.load(tiny / "chat", device="cuda")
    if not torch.backends.mps.is_available():
        with pytest.raises(ValueError, match="device is 'mps', which is not there"):
            puna.load(tiny / "chat", device="mps")


def test_a_model_without_a_tokenizer_says_so_when_it_is_needed(tiny, tmp_path):
    convert(tiny / "chat", tmp_path / "model.bin")
    bare = puna.load(tmp_path / "model.bin")
    assert bare.tokenizer is None
    with pytest.raises(ValueError, match=r"model.bin has no tokenizer.model; .* \(tokenizer=\)"):
        bare.generate("red")
