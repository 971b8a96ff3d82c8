"""A model as a GGUF file, for llama.cpp and all that is built on it; not quantised."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna.core.checkpoint.folder import check_vocabulary
from puna.core.checkpoint.gguf_file import FIRST_CONTEXT, FREQUENCIES, gguf_name, stored_heads
from puna.core.checkpoint.source import Source, as_type, interleaved
from puna.core.config import ModelConfig
from puna.core.text.beside import CHAT_TEMPLATE
from puna.core.text.gguf_tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER
from puna.core.text.opened import document_of
from puna.core.text.tokenizer import Tokenizer
from puna.core.text.vocabulary import CUTS

FILE_TYPES = {torch.float32: "ALL_F32", torch.float16: "MOSTLY_F16", torch.bfloat16: "MOSTLY_BF16"}


def write(
    path: Path,
    source: Source,
    tokenizer: str | os.PathLike[str] | None,
    dtype: torch.dtype | None,
) -> None:
    """Write `source` with its tokenizer; one tensor is in memory at a time. `dtype` is that of the
    matrices (None: the stored one); norms are fp32.

    Raises ValueError for a reward model, where the `gguf` package is not installed, without a
    tokenizer and for one that llama.cpp has no name for.
    """
    gguf = _package()
    if source.head != "lm":
        raise ValueError("a GGUF file holds language models; this is a reward model")
    if tokenizer is None:
        raise ValueError("a GGUF file holds its tokenizer and the source has none; name it")
    dtype = dtype or source.dtype
    if dtype not in FILE_TYPES:
        dtype = torch.float32
    _refuse_scaling(source.config)
    known = check_vocabulary(tokenizer, source.config.vocab_size)
    writer = gguf.GGUFWriter(path, "qwen2" if source.config.qkv_bias else "llama")
    try:
        writer.add_file_type(getattr(gguf.LlamaFileType, FILE_TYPES[dtype]))
        write_settings(writer, source.config)
        _vocabulary(writer, known)
        scaling = source.config.rope_scaling
        first: list[tuple[str, Tensor]] = []
        if scaling is not None and scaling.rope_type == "llama3":
            divisors = scaling.divisors(source.config.head_dim, source.config.rope_theta)
            first.append((FREQUENCIES, divisors.float()))
        for name, tensor in first:
            writer.add_tensor_info(name, tensor.shape, _numbers(tensor).dtype, tensor.nbytes)
        for name, tensor in source.tensors():
            kind = dtype if tensor.dim() > 1 else torch.float32
            as_type(name, tensor, kind)  # what does not fit is said before anything is written
            raw = gguf.GGMLQuantizationType.BF16 if kind == torch.bfloat16 else None
            stand_in = _numbers(torch.empty(0, dtype=kind))
            shape = _stored_shape(tensor, kind)
            size = tensor.numel() * kind.itemsize
            writer.add_tensor_info(gguf_name(name), shape, stand_in.dtype, size, raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, tensor in first:
            writer.write_tensor_data(_numbers(tensor))
        for name, tensor in source.tensors():
            heads = stored_heads(name, source.config)
            tensor = interleaved(tensor, heads) if heads else tensor
            kind = dtype if tensor.dim() > 1 else torch.float32
            writer.write_tensor_data(_numbers(as_type(name, tensor, kind)))
    finally:
        writer.close()


def _refuse_scaling(config: ModelConfig) -> None:
    """ValueError for a stretched context that llama.cpp would not compute from the file."""
    scaling = config.rope_scaling
    if scaling is None or scaling.rope_type == "linear":
        return
    if scaling.rope_type == "yarn" or config.qkv_bias:
        raise ValueError(
            f"rope_scaling of the type {scaling.rope_type} is not written to a .gguf of this "
            "model; write a model folder"
        )


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise ValueError(
            "a GGUF file is written with the `gguf` package; install it (pip install 'puna[gguf]')"
        ) from None
    return gguf


def _numbers(tensor: Tensor) -> Any:
    """As NumPy has them; bf16, which it has not, as bytes."""
    tensor = tensor.contiguous().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint8).numpy()
    return tensor.numpy()


def _stored_shape(tensor: Tensor, kind: torch.dtype) -> list[int]:
    """The shape as the writer wants it: of bytes where it gets bytes."""
    *rows, width = tensor.shape
    return [*rows, width * 2 if kind == torch.bfloat16 else width]


def write_settings(writer: Any, config: ModelConfig) -> None:
    """The model's shape, into the header of gguf's `GGUFWriter`."""
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_rope_dimension_count(config.head_dim)
    if config.head_size is not None:
        writer.add_key_length(config.head_size)
        writer.add_value_length(config.head_size)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    scaling = config.rope_scaling
    if scaling is not None and scaling.rope_type == "llama3":
        writer.add_uint32(
            f"{writer.arch}.{FIRST_CONTEXT}", scaling.original_max_position_embeddings
        )
    if scaling is not None and scaling.rope_type == "linear":
        writer.add_string(f"{writer.arch}.rope.scaling.type", "linear")
        writer.add_rope_scaling_factor(scaling.factor)


def _vocabulary(writer: Any, tokenizer: Tokenizer) -> None:
    """The tokenizer as llama.cpp has it; ids that the model is padded with get names."""
    pad = range(tokenizer.pieces, tokenizer.vocab_size)
    pieces = [_name(tokenizer, token) for token in range(tokenizer.pieces)]
    pieces += [f"[PAD{token}]" for token in pad]
    document = None if tokenizer.is_sentencepiece else document_of(tokenizer.path)
    types = [_type(tokenizer, token, document) for token in range(tokenizer.pieces)]
    types += [UNUSED for _ in pad]
    merges = [] if document is None else _merges(document)
    spaced = document is None or bool(document["model"].get("byte_fallback"))
    if spaced:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        scores = [tokenizer.piece_score(token) for token in range(tokenizer.pieces)]
        if document is not None:
            ranks = {left + right: -float(n) for n, (left, right) in reversed([*enumerate(merges)])}
            scores = [ranks.get(piece, -1e9) for piece in pieces[: tokenizer.pieces]]
        writer.add_token_scores([*scores, *[-1e9 for _ in pad]])
        writer.add_add_space_prefix(True)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_cut(document or {}))
        writer.add_token_merges([f"{left} {right}" for left, right in merges])
    writer.add_token_list(pieces)
    writer.add_token_types(types)
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    if len(tokenizer.eos_ids) > 1:
        writer.add_eot_token_id(tokenizer.eos_ids[1])
    writer.add_add_bos_token(tokenizer.encode_start("a")[:1] == [tokenizer.bos_id])
    writer.add_chat_template(tokenizer.chat_template or CHAT_TEMPLATE)


def _name(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.piece(token) or f"[UNUSED{token}]"


def _type(tokenizer: Tokenizer, token: int, document: dict[str, Any] | None) -> int:
    piece = tokenizer.piece(token)
    if not piece:
        return UNUSED
    if document is not None and piece == document["model"].get("unk_token"):
        return UNKNOWN
    if piece in tokenizer.controls:
        return CONTROL
    if tokenizer.is_byte(token):
        return BYTE
    if document is None:
        return NORMAL if tokenizer.is_text(token) else UNKNOWN
    added = document.get("added_tokens") or []
    return USER if any(each.get("id") == token for each in added) else NORMAL


def _merges(document: dict[str, Any]) -> list[tuple[str, str]]:
    """The pairs to join; newer files write them as lists."""
    found = []
    for merge in document["model"].get("merges") or []:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        found.append((left, right))
    if not found:
        raise ValueError("the tokenizer.json holds no byte pairs; llama.cpp has no such tokenizer")
    return found


def _cut(document: dict[str, Any]) -> str:
    """llama.cpp's name of how a text is cut before anything is joined."""
    stage = document.get("pre_tokenizer")
    for name, known in CUTS.items():
        if _plain(stage) == _plain(known):
            return name
    raise ValueError(
        f"the tokenizer.json cuts texts in a way that is none of {', '.join(CUTS)}; llama.cpp's "
        "own converter may know it"
    )


def _plain(stage: Any) -> Any:
    """A step without what does not change the ids."""
    if isinstance(stage, dict):
        return {key: _plain(value) for key, value in stage.items() if key != "trim_offsets"}
    return [_plain(each) for each in stage] if isinstance(stage, list) else stage
