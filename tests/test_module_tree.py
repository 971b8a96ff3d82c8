"""Whatever is done to a module of the tree takes effect: fused operations go past plain ones only.

Run: python -m pytest tests/test_module_tree.py -q
"""

from pathlib import Path

import pytest
import torch
from altered_llama import (
    LINEARS,
    MODULES,
    NORMS,
    PARTS,
    build,
    exact,
    given_a_bias,
    hooked,
    parametrized,
    pre_hooked,
    replaced,
    some_tokens,
    wrapped,
)  # fmt: skip
from torch import nn

from puna.core import ops, parallel
from puna.core.checkpoint.folder import load_model, save_model
from puna.core.generation.generate import generate, stream
from puna.core.model import Linear, Transformer
from puna.core.native.engine import engine_for, unfit
from puna.core.native.loader import extension
from puna.core.plain import altered, plain
from puna.trainers.data.packing import LMBatch
from puna.trainers.train import loop
from puna.trainers.train.next_token import OBJECTIVE, next_token_loss
from puna.trainers.train.run import Trained


def every_case():
    for way in (hooked, pre_hooked, wrapped, replaced):
        for name in MODULES:
            takes_ids = name in ("model.embed_tokens", "model", "")
            if not (way is pre_hooked and takes_ids or way is wrapped and name in ("model", "")):
                yield pytest.param(way, name, id=f"{way.__name__} {name or 'Transformer'}")
    for name in LINEARS:
        yield pytest.param(given_a_bias, name, id=f"bias {name}")
    for name in (*LINEARS, *NORMS, "model.embed_tokens"):
        yield pytest.param(parametrized, name, id=f"parametrized {name}")


CASES = list(every_case())


def batch_of(tokens):
    targets = tokens.roll(-1, 1)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    cuts = torch.arange(len(tokens) + 1, dtype=torch.int32) * tokens.shape[1]
    weights = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1))
    weights[0, :3] = 0
    return LMBatch(tokens, targets, weights, positions, cuts)


@pytest.mark.parametrize(("way", "name"), CASES)
def test_what_is_done_to_a_module_takes_effect(way, name):
    """Forward, loss, log-probs and sampling are those of fp64 formulas with the same change."""
    model, tokens = build(), some_tokens()
    way(model, name)
    hidden, logits = exact(model, tokens, name, way)
    _, plain_logits = exact(model, tokens, None, None)
    assert (logits - plain_logits).abs().max() > 1e-3
    found = model(tokens)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(found.double(), hidden, **close)
    torch.testing.assert_close(model.logits(found).double(), logits, **close)
    torch.testing.assert_close(model.logits(found[0, :1]).double(), logits[0, :1], **close)
    batch, logp = batch_of(tokens), logits.log_softmax(-1)
    picked = logp.gather(-1, batch.targets[..., None])[..., 0]
    loss, _ = next_token_loss(model, batch)
    torch.testing.assert_close(loss.double(), -(picked * batch.weights).sum(), **close)
    logprobs, entropy = model.logprobs(found, batch.targets)
    torch.testing.assert_close(logprobs.double(), picked, **close)
    torch.testing.assert_close(entropy.double(), -(logp.exp() * logp).sum(-1), **close)
    drawn = generate(model, [[1, 2, 3]], max_new_tokens=8, eos_id=None, temperature=0.0)
    ids = [1, 2, 3]
    for token, logprob in zip(drawn[0].tokens, drawn[0].logprobs, strict=True):
        _, seen = exact(model, torch.tensor([ids]), name, way)
        truth = seen[0, -1].log_softmax(-1)
        assert truth.max() - truth[token] < 1e-4
        assert abs(truth[token] - logprob) < 1e-3
        ids.append(token)
    streamed = stream(model, [1, 2, 3], max_new_tokens=8, eos_id=None, temperature=0.0)
    assert list(streamed) == drawn[0].tokens


@pytest.mark.parametrize(("way", "name"), CASES)
def test_the_native_engine_names_what_it_does_not_take(way, name):
    if extension() is None:
        pytest.skip("the extension is not built")
    model = build()
    assert unfit(model) is None
    way(model, name)
    why = unfit(model)
    assert why is not None and f"of {name or 'the model'}" in why
    assert engine_for(model) is None
    with ops.use_backend("native"), pytest.raises(ValueError, match="does not take this model: of"):
        engine_for(model)


def test_the_native_engine_takes_no_other_shape():
    """It is handed addresses: a layer cut away or made narrower would be read past its end."""
    if extension() is None:
        pytest.skip("the extension is not built")
    shallow, narrow, other_eps = build(), build(), build()
    del shallow.model.layers[1]
    narrow.model.layers[0].mlp.gate_proj = Linear(32, 40)
    other_eps.model.norm.eps = 0.1
    assert "model.layers.1.self_attn.q_proj.weight is not as its config" in unfit(shallow)
    assert "model.layers.0.mlp.gate_proj.weight is not as its config" in unfit(narrow)
    assert unfit(other_eps) == "model.norm.eps is not as its config says"
    scaled = build()
    scaled.logits = lambda hidden: 0.5 * Transformer.logits(scaled, hidden)
    assert unfit(scaled) == "its logits were replaced"


def test_backward_hooks_and_global_hooks_are_seen():
    model, seen = build(), []
    model.model.layers[0].mlp.up_proj.register_full_backward_hook(lambda *_: seen.append("up"))
    model.lm_head.register_full_backward_pre_hook(lambda *_: seen.append("head"))
    tokens = some_tokens()
    model.cross_entropy(model(tokens), tokens).backward()
    assert seen == ["head", "up"]
    called, model = [], build()
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, given, out: called.append(module)
    )
    try:
        model.logprobs(model(tokens), tokens)
        assert not plain(model.lm_head) and unfit(model) is not None
    finally:
        handle.remove()
    containers = (nn.ModuleList,)
    assert set(called) == {m for m in model.modules() if not isinstance(m, containers)}
    assert plain(model.lm_head)


def test_a_patched_class_is_seen(monkeypatch):
    model, tokens = build(), some_tokens()
    expected = model(tokens)
    forward = Linear.forward
    monkeypatch.setattr(Linear, "forward", lambda self, x: forward(self, x) * 1.5)
    assert altered(model.lm_head) == "its forward was replaced"
    assert (model(tokens) - expected).abs().max() > 1e-3


def test_one_graph_through_a_plain_tree():
    """The questions that are asked of each module break no graph."""
    model, tokens = build(), some_tokens()
    torch._dynamo.reset()
    step = torch.compile(
        lambda t: model.cross_entropy(model(t), t), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(step(tokens), model.cross_entropy(model(tokens), tokens))
    hooked(model, "model.layers.0.mlp.up_proj")
    torch._dynamo.reset()
    torch.testing.assert_close(step(tokens), model.cross_entropy(model(tokens), tokens))


def test_checkpointing_keeps_a_hook_inside_and_a_forward_put_there_by_others():
    model, plain_one, tokens = build(), build(), some_tokens()
    for each in (model, plain_one):
        replaced(each, "model.layers.0")
        hooked(each, "model.layers.1.mlp.gate_proj")
    expected = plain_one(tokens)
    parallel.prepare(model, checkpointing="full")
    assert torch.equal(model(tokens), expected)
    with parallel.gathered(model) as whole:
        assert torch.equal(whole(tokens), expected)
    assert torch.equal(model(tokens), expected)


@pytest.fixture
def group_of_one():
    yield
    parallel.close()


def test_a_sharded_model_is_not_sampled_without_its_hook(group_of_one):
    model = parallel.prepare(build(), compute_dtype=torch.bfloat16, checkpointing="full")
    with parallel.gathered(model) as whole:
        assert unfit(whole) == "its weights are torch.bfloat16 on cpu, not float32 on the CPU"
    tokens = some_tokens()
    before = model(tokens)
    for name in ("model.layers.1.self_attn.v_proj", "model.layers.0", ""):
        handle = model.get_submodule(name).register_forward_hook(lambda m, given, out: 2 * out)
        assert not torch.equal(model(tokens), before)
        message = f"but of {name or 'the model'} it has a hook"
        with pytest.raises(ValueError, match=message), parallel.gathered(model):
            pass
        handle.remove()
    with parallel.gathered(model):
        pass


def test_no_one_multiplies_by_the_heads_weight():
    """A fused operation that is handed the head's weight goes past the head."""
    root = Path(__file__).resolve().parents[1]
    allowed = {root / "core" / "model.py", root / "core" / "native" / "engine.py"}
    users = {
        str(path.relative_to(root))
        for room in ("core", "trainers", "demo", "cli", "benchmarks")
        for path in (root / room).rglob("*.py")
        if path not in allowed and "head_weight" in path.read_text(encoding="utf-8")
    }
    assert not users, f"use the model's cross_entropy, logprobs, logits, device, dtype: {users}"


# Adapters


TARGETS = [part.rpartition(".")[2] for part in PARTS] + ["lm_head"]


@pytest.fixture
def adapted():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS, lora_dropout=0.0)
    return peft.get_peft_model(build(), config)


def trained(model, steps=12):
    """Steps of the trainers' own loop; returns the losses."""
    config = loop.TrainConfig(
        out=Path(), lr=1e-2, warmup_steps=0, weight_decay=0.0, schedule="constant"
    )
    network = Trained(model, loop.make_optimizer(model, config))
    batch = batch_of(some_tokens())
    losses = []
    for _ in range(steps):
        losses.append(loop.backward(model, [batch], OBJECTIVE)["loss"])
        loop.step_optimizer(network, config.lr, config.clip)
    return losses


def test_adapters_train_and_the_merged_model_opens_elsewhere(adapted, tmp_path):
    transformers = pytest.importorskip("transformers")
    start = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    losses = trained(adapted)
    assert losses[-1] < 0.8 * losses[0]
    for name, parameter in adapted.named_parameters():
        assert torch.equal(parameter, start[name]) != ("lora_" in name), name
    tokens = some_tokens()
    logits = adapted.logits(adapted(tokens)).detach()
    drawn = generate(adapted, [[1, 2, 3]], max_new_tokens=6, eos_id=None, temperature=0.0)
    assert (logits - build().logits(build()(tokens))).abs().max() > 0.1
    merged = adapted.merge_and_unload()
    assert type(merged) is Transformer and all(altered(m) is None for m in merged.modules())
    torch.testing.assert_close(merged.logits(merged(tokens)), logits, rtol=1e-4, atol=1e-5)
    again = generate(merged, [[1, 2, 3]], max_new_tokens=6, eos_id=None, temperature=0.0)
    assert again[0].tokens == drawn[0].tokens
    save_model(tmp_path / "merged", merged)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        theirs = peer(tokens).logits
    ours = load_model(tmp_path / "merged")
    torch.testing.assert_close(ours.logits(ours(tokens)), theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged.logits(merged(tokens)), theirs, rtol=1e-5, atol=1e-5)


def test_adapters_that_are_not_merged_are_not_saved(adapted, tmp_path):
    for model in (adapted, adapted.base_model.model):
        with pytest.raises(ValueError, match="layer.weight; merge the adapters first"):
            save_model(tmp_path / "lost", model)
        with pytest.raises(ValueError, match="merge the adapters first"):
            next(parallel.full_parameters(model))
    assert not (tmp_path / "lost").exists()
    with pytest.raises(ValueError, match="merge the adapters first"):
        adapted.base_model.model.init_weights(0)
    model = build()
    parametrized(model, "model.layers.0.mlp.up_proj")
    with pytest.raises(ValueError, match="up_proj.parametrizations.*remove parametrizations"):
        save_model(tmp_path / "lost", model)


def test_a_sharded_model_with_adapters_is_not_sampled_without_them(adapted, group_of_one):
    model = parallel.prepare(adapted.base_model.model, compute_dtype=torch.bfloat16)
    losses = trained(model, 3)
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match="merge the adapters first"), parallel.gathered(model):
        pass
