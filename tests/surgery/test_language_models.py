"""Real language models of random weights: more tokens, adapters; moments, ties and averages follow."""

import sys
import textwrap

import pytest
import torch
from growing import assert_same, bits, ema_of, picture

import anew
import auxin as ax

transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)
OLD, NEW = 20, 27


def llama():
    config = transformers.LlamaConfig(
        vocab_size=OLD, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=OLD, n_embd=8, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=1,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


MODES = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


def tokens(vocabulary=OLD, seed=0):
    return torch.randint(0, vocabulary, (2, 6), generator=torch.Generator().manual_seed(seed))


def steps(model, optimizer, count=3, vocabulary=OLD):
    losses = []
    for seed in range(count):
        optimizer.zero_grad()
        ids = tokens(vocabulary, seed)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    optimizer.zero_grad()
    return losses


def ready(build, **mode):
    torch.manual_seed(0)
    model = build().train()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, **mode)
    steps(model, optimizer)
    ema = ema_of(model, 0.9)
    ema.update_parameters(model)
    return model, optimizer, ema


def resized(build, mode):
    """Grow the vocabulary; everything that must hold, then five steps with the new tokens."""
    model, optimizer, ema = ready(build, **MODES[mode])
    tied = build is gpt2
    names = ["input", "output"]
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    old = {n: {k: v.clone() for k, v in optimizer.state[m.weight].items()} for n, m in zip(names, ends, strict=True)}
    weights = {n: m.weight.detach().clone() for n, m in zip(names, ends, strict=True)}
    averages = [
        m.weight.detach().clone() for m in (ema.module.get_input_embeddings(), ema.module.get_output_embeddings())
    ]
    others = {p: [bits(v) for v in s.values()] for p, s in optimizer.state.items() if p.shape != (OLD, 8)}
    with ax.surgery(model, optimizer, ema, probe={"input_ids": tokens()}):
        model.resize_token_embeddings(NEW)

    ends = model.get_input_embeddings(), model.get_output_embeddings()
    assert (ends[0].weight is ends[1].weight) is tied
    assert (ema.module.get_input_embeddings().weight is ema.module.get_output_embeddings().weight) is tied
    for name, module in zip(names, ends, strict=True):
        state = optimizer.state[module.weight]
        assert bits(module.weight[:OLD]) == bits(weights[name]) and module.weight.shape == (NEW, 8)
        for key in ("exp_avg", "exp_avg_sq"):
            assert bits(state[key][:OLD]) == bits(old[name][key]) and state[key].shape == (NEW, 8)
        assert not state["exp_avg"][OLD:].any() and not state["exp_avg_sq"][OLD:].any()
        assert bits(state["step"]) == bits(old[name]["step"])
    assert {p: [bits(v) for v in optimizer.state[p].values()] for p in others} == others
    twins = ema.module.get_input_embeddings(), ema.module.get_output_embeddings()
    assert all(bits(twin.weight[:OLD]) == bits(average) for twin, average in zip(twins, averages, strict=True))
    held = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert len(set(held)) == len(held) and set(held) == {id(p) for p in model.parameters()}
    assert model.config.vocab_size == NEW == ema.module.config.vocab_size
    start = ends[0].weight[OLD:].detach().clone()
    losses = steps(model, optimizer, 5, NEW)
    ema.update_parameters(model)
    assert all(loss == loss for loss in losses) and not torch.equal(ends[0].weight[OLD:], start)
    ax.verify(model, optimizer, ema)


@pytest.mark.parametrize("mode", ["for-loop", "foreach"])
@pytest.mark.parametrize("build", [llama, gpt2])
def test_more_tokens(build, mode):
    resized(build, mode)


def test_more_tokens_under_the_fused_optimizer():
    """In a process of its own: with a state of the old shape the fused kernel corrupts the memory."""
    code = f"""
        import sys
        sys.path[:0] = {[p for p in sys.path if p]!r}
        import test_language_models as this
        for build in (this.llama, this.gpt2):
            this.resized(build, "fused")
        print("whole")
    """
    done = anew.run("-c", textwrap.dedent(code))
    assert done.returncode == 0 and done.stdout.endswith("whole\n"), done.stderr[-3000:]


@pytest.mark.parametrize("build", [llama, gpt2])
def test_by_hand_more_tokens_break_the_next_step(build):
    model, optimizer, _ = ready(build, foreach=False)
    model.resize_token_embeddings(NEW)
    with pytest.raises(RuntimeError, match="size of tensor"):
        steps(model, optimizer, 1, NEW)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_fewer_tokens(build):
    model, optimizer, ema = ready(build)
    before = optimizer.state[model.get_input_embeddings().weight]["exp_avg"].clone()
    with ax.surgery(model, optimizer, ema):
        model.resize_token_embeddings(15)
    assert bits(optimizer.state[model.get_input_embeddings().weight]["exp_avg"]) == bits(before[:15])
    steps(model, optimizer, 2, 15)
    ema.update_parameters(model)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_a_resize_is_rolled_back_with_its_configuration(build):
    everything = ready(build)
    before = picture(*everything)
    with pytest.raises(ZeroDivisionError), ax.surgery(*everything):
        everything[0].resize_token_embeddings(NEW)
        _ = 1 / 0
    assert_same(before, picture(*everything))
    steps(everything[0], everything[1], 1)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_a_resize_is_saved_and_goes_on(build, tmp_path):
    def run():
        model, optimizer, ema = ready(build)
        return model, optimizer, ema, ax.Grower(model, optimizer, ema, edits=lambda model: [], when=ax.when.every(10))

    model, optimizer, ema, grower = run()
    with ax.surgery(model, optimizer, ema) as done:
        model.resize_token_embeddings(NEW)
    grower.record(done.change)
    steps(model, optimizer, 2, NEW)
    ax.save(grower, tmp_path)
    other = run()
    ax.load(tmp_path, other[3])
    assert other[0].config.vocab_size == NEW
    assert (other[0].get_input_embeddings().weight is other[0].get_output_embeddings().weight) is (build is gpt2)
    assert [x.hex() for x in steps(model, optimizer, 3, NEW)] == [x.hex() for x in steps(other[0], other[1], 3, NEW)]


def adapted(build):
    return "c_attn" if build is gpt2 else "q_proj"


@pytest.mark.parametrize("build", [llama, gpt2])
def test_injected_adapters_join_and_the_frozen_network_stays(build):
    peft = pytest.importorskip("peft")
    model, optimizer, ema = ready(build)
    config = peft.LoraConfig(r=2, target_modules=[adapted(build)], fan_in_fan_out=build is gpt2)
    old = {id(p): bits(p) for p in model.parameters()}
    with ax.surgery(model, optimizer, ema, group=0, probe={"input_ids": tokens()}) as done:
        peft.inject_adapter_in_model(config, model)
    new = {n: p for n, p in model.named_parameters() if "lora_" in n}
    assert len(new) == 4 and done.change.added_parameters == sum(p.numel() for p in new.values())
    held = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert all(id(p) in held for p in new.values())
    assert [n for n, _ in ema.module.named_parameters()] == [n for n, _ in model.named_parameters()]
    steps(model, optimizer, 3)
    assert all(p.any() for p in new.values())
    frozen = [p for n, p in model.named_parameters() if id(p) in old and not p.requires_grad]
    assert frozen and all(bits(p) == old[id(p)] for p in frozen)
    ema.update_parameters(model)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_a_model_wrapped_by_get_peft_model_inside_the_block(build):
    peft = pytest.importorskip("peft")
    model, optimizer, _ = ready(build)
    config = peft.LoraConfig(r=2, target_modules=[adapted(build)], fan_in_fan_out=build is gpt2)
    with ax.surgery(model, optimizer, group=0):
        wrapped = peft.get_peft_model(model, config)
    new = [p for n, p in wrapped.named_parameters() if "lora_" in n]
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert new and all(id(p) in held for p in new)
    start = [bits(p) for p in new]
    steps(wrapped, optimizer, 3)
    assert all(bits(p) != s for p, s in zip(new, start, strict=True))
