"""What tests of the module tree share: ways to alter a module, and a Llama by formulas in fp64 that
is altered alike."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from puna.core.config import ModelConfig
from puna.core.model import Transformer

CONFIG = ModelConfig(32, 2, 4, 2, 48, vocab_size=41, context=24)
PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
LINEARS = [f"model.layers.1.{part}" for part in PARTS] + ["lm_head"]
NORMS = ["model.layers.0.input_layernorm", "model.layers.1.post_attention_layernorm", "model.norm"]
CALLED = ["model.layers.1.self_attn", "model.layers.0.mlp", "model.layers.1", "model", ""]
MODULES = [*LINEARS, *NORMS, "model.embed_tokens", *CALLED]


def build(head="lm"):
    model = Transformer(CONFIG, head)
    model.init_weights(3)
    return model


def some_tokens(rows=3, length=9):
    return torch.randint(41, (rows, length), generator=torch.Generator().manual_seed(0))


class Wrapper(nn.Module):
    """Stands in a module's place, and has neither its class nor its weight."""

    def __init__(self, inner, change):
        super().__init__()
        self.inner, self.change = inner, change

    def forward(self, *args, **kwargs):
        return self.change(self.inner(*args, **kwargs))


class Scaled(nn.Module):
    def forward(self, weight):
        return 1.5 * weight


def put(model, name, module):
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)


def changed(x):
    return 1.5 * x + 0.1


def hooked(model, name):
    model.get_submodule(name).register_forward_hook(lambda module, given, out: changed(out))


def pre_hooked(model, name):
    module = model.get_submodule(name)
    module.register_forward_pre_hook(lambda module, given: (changed(given[0]), *given[1:]))


def wrapped(model, name):
    put(model, name, Wrapper(model.get_submodule(name), changed))


def replaced(model, name):
    module = model.get_submodule(name)
    forward = module.forward
    module.forward = lambda *given, **named: changed(forward(*given, **named))


def parametrized(model, name):
    parametrize.register_parametrization(model.get_submodule(name), "weight", Scaled())


def given_a_bias(model, name):
    module = model.get_submodule(name)
    module.bias = nn.Parameter(torch.linspace(-1, 1, module.out_features))


def norm(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + CONFIG.norm_eps) * weight


def exact(model, tokens, at, way):
    """(hidden, logits) in fp64 by formulas, with the change `way` at the module called `at`."""
    weights = {name: p.detach().double() for name, p in build(model.head).named_parameters()}

    def module(name, compute, x):
        if name == at and way is pre_hooked:
            x = changed(x)
        weight = weights.get(f"{name}.weight")
        if name == at and way is parametrized:
            weight = 1.5 * weight
        y = compute(x) if weight is None else compute(x, weight)
        if name == at and way is given_a_bias:
            y = y + torch.linspace(-1, 1, y.shape[-1], dtype=torch.float64)
        return changed(y) if name == at and way in (hooked, wrapped, replaced) else y

    def rotate(x):  # (B, T, H, D)
        half = x.shape[-1] // 2
        angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * CONFIG.rope_theta ** -(
            torch.arange(half, dtype=torch.float64) / half
        )
        turned = torch.complex(*x.chunk(2, -1)) * torch.polar(
            torch.ones_like(angles), angles
        ).unsqueeze(1)
        return torch.cat((turned.real, turned.imag), -1)

    def attention(prefix, x):
        q, k, v = (
            module(f"{prefix}.{each}_proj", F.linear, x).unflatten(-1, (-1, CONFIG.head_dim))
            for each in "qkv"
        )
        q, k = rotate(q), rotate(k)
        k, v = (each.repeat_interleave(2, 2) for each in (k, v))
        scores = torch.einsum("bthd,bshd->bhts", q, k) * CONFIG.head_dim**-0.5
        after = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        shares = scores.masked_fill(after, -torch.inf).softmax(-1)
        return module(
            f"{prefix}.o_proj", F.linear, torch.einsum("bhts,bshd->bthd", shares, v).flatten(2)
        )

    def feed_forward(prefix, x):
        gate = module(f"{prefix}.gate_proj", F.linear, x)
        inner = F.silu(gate) * module(f"{prefix}.up_proj", F.linear, x)
        return module(f"{prefix}.down_proj", F.linear, inner)

    def block(prefix, x):
        normed = module(f"{prefix}.input_layernorm", norm, x)
        x = x + module(f"{prefix}.self_attn", lambda y: attention(f"{prefix}.self_attn", y), normed)
        normed = module(f"{prefix}.post_attention_layernorm", norm, x)
        return x + module(f"{prefix}.mlp", lambda y: feed_forward(f"{prefix}.mlp", y), normed)

    def decoder(ids):
        x = module("model.embed_tokens", lambda i, w: w[i], ids)
        for layer in range(CONFIG.n_layers):
            prefix = f"model.layers.{layer}"
            x = module(prefix, lambda y, p=prefix: block(p, y), x)
        return module("model.norm", norm, x)

    hidden = module("", lambda ids: module("model", decoder, ids), tokens)
    head = "lm_head" if model.head == "lm" else "score"
    return hidden, module(head, F.linear, hidden)
