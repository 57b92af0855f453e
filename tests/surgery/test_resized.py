"""Tensors that any code resizes, reorders, copies and rescales: moments and averages go with their entries."""

import sys
from pathlib import Path

import pytest
import torch
from resizes import PRESERVED, RESIZES, by_hand
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import auxin as ax

sys.path.insert(0, str(Path(__file__).parent.parent / "conformance"))
from companions import SIMPLE

torch.set_num_threads(1)
# By hand: the power of the gradient with which each state goes; None: it goes with the parameter's values.
POWERS = {
    **dict.fromkeys(("exp_avg", "momentum_buffer", "grad_avg", "prev", "exp_inf"), 1),
    **dict.fromkeys(("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "variance", "row_var", "col_var"), 2),
    **dict.fromkeys(("acc_delta", "step_size"), 0),
    "ax": None,
}


def trained(resize, kind=torch.optim.AdamW, **options):
    build, change, spec = RESIZES[resize]
    torch.manual_seed(0)
    net, x = build(), torch.randn(16, 16 if resize in ("per-run", "channels") else 4)
    if isinstance(options.get("lr"), torch.Tensor):
        options["lr"] = options["lr"].clone()
    opt = kind(net.parameters(), **options)
    ema = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True)
    for _ in range(4):
        step(net, opt, x)
        ema.update_parameters(net)
    return net, opt, ema, x, change, spec


def step(net, opt, x):
    opt.zero_grad()
    (net(x) - x.sum(1, keepdim=True)).square().mean().backward()
    opt.step()


def kept(spec, old, new):
    """Entries of a state that continue old ones: along axes that the state has, and is not a mean over."""
    return {a: come for a, come in spec.items() if new.shape[a] == len(come[0]) and old.shape[a] != 1}


def check_state(net, opt, states, spec, kind):
    for name, p in net.named_parameters():
        state, before = opt.state[p], states[name]
        assert state.keys() == before.keys(), name
        for key, value in state.items():
            if not isinstance(value, torch.Tensor) or value.dim() == 0:
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(before[key]))
                continue
            power = 0 if kind is torch.optim.RMSprop and key == "momentum_buffer" else POWERS[key]
            come = spec.get(name, {})
            for axis, one in come.items():
                if value.shape[axis] == 1 and before[key].shape[axis] == 1 and one[2] is not None:  # a mean over it
                    share = torch.tensor(one[2], dtype=torch.float64).square().mean()
                    before[key] = (before[key] * share).to(value.dtype)
            come = kept(come, before[key], value)
            wanted = by_hand(before[key], come, value.new_full((), float("nan")), power)
            there = ~wanted.isnan()
            assert torch.equal(value[there], wanted[there]), (name, key)
            assert not value.isnan().any() and (key not in ("exp_avg", "momentum_buffer") or not value[~there].any())
            assert value.stride() == p.stride() or value.shape != p.shape


@pytest.mark.parametrize("optimizer", SIMPLE)
@pytest.mark.parametrize("resize", RESIZES)
def test_moments_and_averages_follow_their_entries(resize, optimizer):
    kind, options = SIMPLE[optimizer]
    net, opt, ema, x, change, spec = trained(resize, kind, **options)
    opt.zero_grad()
    states = {n: {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in opt.state[p].items()}
              for n, p in net.named_parameters()}  # fmt: skip
    averages = {n: p.detach().clone() for n, p in ema.module.named_parameters()}
    live, averaged = net.eval()(x).detach(), ema.eval()(x).detach()
    net.train(), ema.train()
    with ax.surgery(net, opt, ema, probe=x):
        change(net)
    check_state(net, opt, states, spec, kind)
    mine = dict(net.named_parameters())
    for name, p in ema.module.named_parameters():
        wanted = by_hand(averages[name], spec.get(name, {}), p.new_full((), float("nan")), None)
        wanted = torch.where(wanted.isnan(), mine[name].detach(), wanted)
        assert torch.equal(p, wanted), name
    if resize in PRESERVED:
        assert (net.eval()(x) - live).abs().max() < 1e-6
        assert (ema.eval()(x) - averaged).abs().max() < 1e-6
        net.train()
    for _ in range(2):
        step(net, opt, x)
        ema.update_parameters(net)
    ax.verify(net, opt, ema)


@pytest.mark.parametrize("resize", ["middle", "gru-per-gate", "net2wider", "head", "pruned-new-parameters"])
def test_a_journal_repeats_the_resize_and_a_checkpoint_goes_on(resize, tmp_path):
    def run():
        net, opt, ema, x, change, _ = trained(resize, lr=0.01)
        opt.zero_grad()
        return (
            net,
            opt,
            ema,
            x,
            change,
            ax.Grower(net, opt, ema, edits=lambda model: [], when=ax.when.every(10**9), probe=x),
        )

    net, opt, ema, x, change, grower = run()
    with grower.surgery():
        change(net)
    step(net, opt, x)
    ema.update_parameters(net)
    ax.save(grower, tmp_path)
    twin, topt, tema, _, _, again = run()
    ax.load(tmp_path, again)
    for _ in range(3):
        step(net, opt, x), ema.update_parameters(net)
        step(twin, topt, x), tema.update_parameters(twin)
    for mine, theirs in ((net, twin), (ema, tema)):
        assert all(
            torch.equal(a, b) for a, b in zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True)
        )


@pytest.mark.parametrize("resize", RESIZES)
def test_what_is_raised_puts_everything_back(resize):
    net, opt, ema, x, change, _ = trained(resize, lr=0.01)
    before = [t.clone() for t in (*net.state_dict().values(), *ema.state_dict().values())]
    states = [v.clone() for s in opt.state.values() for v in s.values()]
    opt.zero_grad()
    with pytest.raises(ZeroDivisionError), ax.surgery(net, opt, ema, then=lambda change: 1 / 0):
        change(net)
    after = (*net.state_dict().values(), *ema.state_dict().values())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(
        torch.equal(a, b) for a, b in zip(states, [v for s in opt.state.values() for v in s.values()], strict=True)
    )
    step(net, opt, x)
