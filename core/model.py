"""The Llama 2 transformer, with Hugging Face's parameter names.

B batch, T tokens, C model width, F FFN width, H query heads, K key/value heads, D head size,
V vocabulary. Forward returns hidden states (B, T, C); the head is applied by whoever needs
it, so that (N, V) logits exist only where they must. Nothing here knows of devices,
processes or precision: those are applied from outside.
Source: Llama 2 paper, section 2.2; Meta's reference code for the order of operations.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from puna.core import head as heads
from puna.core import ops
from puna.core.config import ModelConfig
from puna.core.generation.kv_cache import KVCache
from puna.core.parameters import check_parameters, initial_weights
from puna.core.plain import altered, plain, transparent
from puna.core.shared import Shared, gathered, of_wanted, spread


class Rotary(NamedTuple):
    """The angles of each token: (B, T, D/2) fp32, or the tables (context, D/2) for 0..T-1."""

    cos: Tensor
    sin: Tensor


@transparent
class Linear(nn.Linear):
    """A projection; without a bias, as Llama 2 has them, but where it is asked for."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False):
        super().__init__(inputs, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y = ops.linear(x, self.weight)
        return y if self.bias is None else y + self.bias


@transparent
class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, eps=self.eps)


@transparent
class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.q_proj = Linear(config.dim, config.q_dim, "q_proj" in config.biased)
        self.k_proj = Linear(config.dim, config.kv_dim, "k_proj" in config.biased)
        self.v_proj = Linear(config.dim, config.kv_dim, "v_proj" in config.biased)
        self.o_proj = Linear(config.q_dim, config.dim, "o_proj" in config.biased)

    def forward(
        self,
        x: Tensor,
        rotary: Rotary,
        cu_seqlens: Tensor | None,
        cache: KVCache | None,
        shared: Shared | None,
        wanted: Tensor | None,
    ) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (each.view(batch, tokens, -1, self.head_dim) for each in self._projected(x))
        q, k = ops.rope(q, k, rotary.cos, rotary.sin)
        if cache is not None and tokens == 1:
            k_cache, v_cache = cache.append(self.layer, k, v)
            out = ops.decode_attention(q, k_cache, v_cache, cache.seen)
        elif shared is not None:
            q, k, v = (spread(each, shared) for each in (q, k, v))
            out = gathered(ops.attention(q, k, v, cu_seqlens=cu_seqlens), shared)
        else:
            if cache is not None:
                cache.fill(self.layer, k, v)
            out = ops.attention(q, k, v, cu_seqlens=cu_seqlens)
        return self.o_proj(of_wanted(out.reshape(batch, tokens, -1), wanted))

    def _projected(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, T, H D) and twice (B, T, K D) of x (B, T, C)."""
        projections = self.q_proj, self.k_proj, self.v_proj
        if plain(*projections):
            return ops.linears(x, *(each.weight for each in projections))
        return tuple(each(x) for each in projections)


@transparent
class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = Linear(config.dim, config.ffn_dim)
        self.up_proj = Linear(config.dim, config.ffn_dim)
        self.down_proj = Linear(config.ffn_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        if plain(gate, up, down):
            return ops.feed_forward(x, gate.weight, up.weight, down.weight)
        return down(ops.swiglu(gate(x), up(x)))


@transparent
class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = FeedForward(config)
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)

    def forward(
        self,
        x: Tensor,
        rotary: Rotary,
        cu_seqlens: Tensor | None = None,
        cache: KVCache | None = None,
        shared: Shared | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        normed = self.input_layernorm(x)
        attended = self.self_attn(normed, rotary, cu_seqlens, cache, shared, wanted)
        normed, x = self._normed_sum(attended, of_wanted(x, wanted))
        return x + self.mlp(normed)

    def _normed_sum(self, attended: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        norm = self.post_attention_layernorm
        if plain(norm):  # read once: a GPU's memory is what such operations wait for
            return ops.add_rms_norm(attended, x, norm.weight, eps=norm.eps)
        x = x + attended
        return norm(x), x


@transparent
class Decoder(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)

    def forward(
        self,
        tokens: Tensor,
        rotary: Rotary,
        cu_seqlens: Tensor | None,
        cache: KVCache | None,
        shared: Shared | None,
        wanted: Tensor | None,
    ) -> Tensor:
        x = self.embed_tokens(tokens)
        # Of other tokens nobody reads more of the last layer than their keys and values.
        *blocks, last = self.layers
        for block in blocks:
            x = block(x, rotary, cu_seqlens, cache, shared)
        return self.norm(last(x, rotary, cu_seqlens, cache, shared, wanted))


@transparent
class Transformer(nn.Module):
    """A Llama with a language-model head (V, C) or a score head (1, C)."""

    def __init__(self, config: ModelConfig, head: str = "lm"):
        super().__init__()
        if head not in ("lm", "score"):
            raise ValueError(f"head is {head!r}, expected 'lm' or 'score'")
        self.config = config
        self.head = head
        self.model = Decoder(config)
        if head == "lm":
            self.lm_head = Linear(config.dim, config.vocab_size)
        else:
            self.score = Linear(config.dim, 1)
        self._tables: tuple[Tensor, Tensor] | None = None

    @property
    def head_module(self) -> Linear:
        """C -> V or C -> 1; or what someone has put in its place."""
        return self.lm_head if self.head == "lm" else self.score

    @property
    def head_weight(self) -> Tensor:
        """(V, C) or (1, C). Raises ValueError where it does not say all that the head does."""
        why = altered(self.head_module)
        if why:
            raise ValueError(
                f"the head's weight alone is not what the head does: {why}; use the model's "
                "cross_entropy, logprobs or logits"
            )
        return self.head_module.weight

    @property
    def device(self) -> torch.device:
        """Of the embedding, the first of the parameters."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: KVCache | None = None,
        shared: Shared | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, T, C) after the final norm, for tokens (B, T) int64.

        `positions` (B, T) restart with each packed sequence; None counts 0..T-1. `cu_seqlens`
        (S+1,) int32 cuts the flattened tokens into sequences. With a `cache`, T > 1 fills it
        from slot 0 and T == 1 appends at each row's length; the caller moves `lengths` on. Where
        sequences share tokens (`shared`, no cache then) `cu_seqlens` cuts the rows of attention.
        Of tokens `wanted` (W,) of the flattened B*T alone: (1, W, C), without most of the last
        layer's work on others. ValueError where a sequence is longer than the model's context.
        """
        given = self.rotary(tokens, positions), cu_seqlens, cache, shared
        if tokens.shape[1] == 1:  # a step of decoding, multiplied as one
            return of_wanted(self.model(tokens, *given, None), wanted)
        if wanted is None or len(wanted) != 1:
            return self.model(tokens, *given, wanted)
        # One alone would be multiplied as such a step, to other bits. (FSDP2 warns of views.)
        return self.model(tokens, *given, wanted.repeat(2))[:, :1].clone()

    def logits(self, hidden: Tensor) -> Tensor:
        """The head applied to hidden (..., C): (..., V) or (..., 1), fp32."""
        head = self.head_module
        if not plain(head):
            return head(hidden).float()
        weight = head.weight
        if hidden.shape[:-1].numel() == 1 and weight.device.type == "cpu":
            return heads.one_row(hidden, weight).float()
        return ops.linear(hidden, weight).float()

    def cross_entropy(self, hidden: Tensor, targets: Tensor, **options: Any) -> Tensor:
        """`ops.linear_cross_entropy` of hidden (..., C) and targets (...,) under the head.

        The options and errors are the same; no logits are held where the head is a plain one.
        """
        head = self.head_module
        if plain(head):
            return ops.linear_cross_entropy(hidden, head.weight, targets, **options)
        return heads.cross_entropy(head, hidden, targets, **options)

    def logprobs(
        self, hidden: Tensor, targets: Tensor, *, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """`ops.linear_logprobs` of hidden (..., C) and targets (...,) under the head: log-probs
        and entropy, both (...,). No logits are held where the head is a plain one."""
        head = self.head_module
        if plain(head):
            return ops.linear_logprobs(hidden, head.weight, targets, temperature=temperature)
        return heads.logprobs(head, hidden, targets, temperature=temperature)

    def rotary(self, tokens: Tensor, positions: Tensor | None) -> Rotary:
        """The angles, from tables made on first use; positions are checked against the context."""
        longest = tokens.shape[1] if positions is None else 0
        if positions is not None and positions.device.type == "cpu" and positions.numel():
            longest = int(positions.max()) + 1  # on a GPU this would wait for the device
        if longest > self.config.context:
            raise ValueError(
                f"a sequence of {longest} tokens exceeds the model's context of "
                f"{self.config.context}; shorten it"
            )
        cos, sin = self.rope_tables(tokens.device)
        # Taken from the tables once, not once a layer.
        return Rotary(cos, sin) if positions is None else Rotary(cos[positions], sin[positions])

    def rope_tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin (context, D/2) fp32 on `device`, times YaRN's factor; made on first use."""
        tables = self._tables  # looked at once: another thread may put others there
        if tables is None or tables[0].device != device:
            c, divisors = self.config, self.config.rope_divisors()
            factor = 1.0 if c.rope_scaling is None else c.rope_scaling.attention_factor
            # Made for good: a table from inside `generate` could not be trained through later.
            with torch.inference_mode(False):
                cos, sin = ops.rope_tables(
                    c.context, c.head_dim, theta=c.rope_theta, divisors=divisors, device=device
                )
                tables = self._tables = cos * factor, sin * factor
        return tables

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Initialise every parameter, the same on any device; errors as `check_parameters`."""
        check_parameters(self, self.config, self.head)
        parameters = dict(self.named_parameters())
        for name, tensor in initial_weights(self.config, self.head, seed):
            parameters[name].copy_(tensor)
