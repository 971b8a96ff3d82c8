"""Small models with a byte-level tokenizer.json and a chat template of their own, for the tests."""

import json
from pathlib import Path

import pytest
import torch

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nbe kind<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level(folder: Path, template: str | None = CHATML, **config) -> Path:
    """A folder with a tokenizer.json of 280 pieces, and no model yet."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator(["hello there general kenobi 7 times tree"] * 20, trainer)
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>", "chat_template": template, **config}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return folder


def with_model(folder: Path, vocab_size: int, **config) -> Path:
    """A random Llama of transformers in the folder."""
    torch.manual_seed(0)
    settings = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, vocab_size=vocab_size, max_position_embeddings=256,
        initializer_range=0.3, bos_token_id=1, eos_token_id=2, **config,
    )  # fmt: skip
    transformers.LlamaForCausalLM(settings).save_pretrained(folder)
    return folder
