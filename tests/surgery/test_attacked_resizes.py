"""Resizes on which values mislead: numbers that meet by chance, tensors that change places, copies that share none."""

import copy

import pytest
import torch
from test_told_by_values import Pair, Run, put, widen
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import auxin as ax
from auxin.anatomy.matching import Maps, match

torch.set_num_threads(1)


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 256), nn.Linear(256, 3)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


class Two(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        if tied:
            self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def test_new_numbers_of_16_bits_that_equal_old_ones_are_new():
    run = Run(Wide(), dtype=torch.bfloat16)

    def change(net):
        wider = nn.Linear(4, 384).bfloat16()
        with torch.no_grad():
            wider.weight[:256], wider.bias[:256] = net.up.weight, net.up.bias
        net.up.weight.data, net.up.bias.data = wider.weight.data, wider.bias.data
        net.down.weight.data = torch.cat([net.down.weight.data, torch.zeros(3, 128).bfloat16()], 1)
        net.up.out_features = net.down.in_features = 384

    run.surgery(change)
    assert torch.equal(run.moment("up.bias")[:256], run.moments["up.bias"])
    assert not run.moment("up.bias")[256:].any()
    assert torch.equal(run.average("up.bias")[256:], run.net.up.bias[256:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_numbers_of_16_bits_come_from_nowhere(dtype):
    old, other = torch.randn(512).to(dtype), torch.randn(512).to(dtype)
    assert match(old, other, Maps()) is None and match(old, torch.randn(600).to(dtype), Maps()) is None
    keep = torch.tensor([5, 6, 7, 200, 201])
    assert match(torch.arange(256).to(dtype), torch.arange(256).to(dtype)[keep], Maps()).axes[0].index.equal(keep)


def test_one_number_found_again_by_chance_is_no_resize():
    old, other = torch.randn(100), torch.randn(100)
    other[17] = old[40]
    assert match(old, other, Maps()) is None


def test_no_number_is_divided_by_one_that_is_none():
    run = Run(Pair())
    with torch.no_grad():
        run.net.down.weight[1, 2] = float("nan")

    def change(net):
        net.down.weight.data = torch.nan_to_num(net.down.weight.data) * 1.5

    assert "down.weight holds other values" in run.surgery(change, probe=False).change


def test_each_channel_that_is_rescaled_takes_its_own_share():
    """theta_new = q theta_old gives g_new = g_old / q, entry by entry."""

    class Relu(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(4, 6, bias=False), nn.Linear(6, 3)

        def forward(self, x):
            return self.down(torch.relu(self.up(x)))

    run, scale = Run(Relu()), torch.tensor([2.0, 1, 1, 4, 1, 1])

    def change(net):
        with torch.no_grad():
            net.up.weight.mul_(scale[:, None]), net.down.weight.div_(scale)

    run.surgery(change)
    assert torch.allclose(run.moment("up.weight"), run.moments["up.weight"] / scale[:, None])
    assert torch.allclose(run.moment("down.weight"), run.moments["down.weight"] * scale)
    assert torch.allclose(run.average("up.weight"), run.averages["up.weight"] * scale[:, None])
    assert max(run.moved()) < 1e-6
    run.goes_on()


def test_averages_of_tensors_that_change_places_go_with_them():
    run = Run(Two())

    def change(net):
        net.a.weight, net.b.weight = net.b.weight, net.a.weight

    run.surgery(change)
    for new, old in (("a.weight", "b.weight"), ("b.weight", "a.weight")):
        assert torch.equal(run.average(new), run.averages[old]) and torch.equal(run.moment(new), run.moments[old])
    run.goes_on()


def test_what_is_tied_inside_is_tied_in_the_average():
    def change(net):
        net.b.weight = net.a.weight

    run = Run(Two()).surgery(change)
    assert run.ema.module.b.weight is run.ema.module.a.weight
    assert torch.equal(run.average("a.weight"), run.averages["a.weight"])
    run.goes_on()


@pytest.mark.parametrize("probe", [False, True])
def test_what_is_untied_inside_keeps_its_average(probe):
    def change(net):
        net.b.weight = nn.Parameter(net.a.weight.detach().clone())

    run = Run(Two(tied=True)).surgery(change, probe=probe)
    assert torch.equal(run.average("b.weight"), run.averages["a.weight"])
    assert run.ema.module.b.weight is not run.ema.module.a.weight and max(run.moved()) < 1e-6
    run.goes_on()


def test_a_copied_block_takes_the_averaged_statistics_of_its_source():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x):
            return x + self.norm(self.mix(x))

    run = Run(nn.Sequential(nn.Linear(4, 4), Block(), nn.Linear(4, 3)))
    run.surgery(lambda net: net.insert(2, copy.deepcopy(net[1])))
    for name in ("mix.weight", "norm.weight", "norm.running_mean", "norm.running_var"):
        assert torch.equal(run.average(f"2.{name}"), run.averages[f"1.{name}"]), name
    assert run.net[2].mix.weight not in run.opt.state
    run.goes_on()


def test_an_average_that_does_not_take_the_probe_follows_unproved():
    run = Run(Pair())
    run.ema.double()
    averages = {n: t.clone() for n, t in run.ema.module.state_dict().items()}
    with ax.surgery(run.net, run.opt, run.ema, probe=run.x):
        widen([0, 1, -1, 2, 3, 4, 5])(run.net)
    assert torch.equal(run.average("down.weight")[:, [0, 1, 3, 4, 5, 6]], averages["down.weight"])


def test_a_word_that_begins_as_a_copy_takes_nothing_from_its_original():
    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.out = nn.Embedding(7, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.out(self.emb((x * 10).long().abs() % 5).mean(1))

    run = Run(Text())

    def change(net):
        net.emb.weight.data = torch.cat([net.emb.weight.data, net.emb.weight.data[2:3]])

    run.surgery(change)
    assert torch.equal(run.moment("emb.weight")[:7], run.moments["emb.weight"])
    assert torch.equal(run.average("emb.weight")[7], run.averages["emb.weight"][2])
    run.goes_on()


class Counted(TorchDispatchMode):
    """How many numbers go through operations, and how many at most through one that sorts."""

    def __init__(self):
        super().__init__()
        self.numbers = self.sorted = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(out.alias_info is not None and not out.alias_info.is_write for out in func._schema.returns):
            return func(*args, **(kwargs or {}))  # a view, which looks at no number
        size = sum(t.numel() for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor))
        self.numbers += size
        if any(word in func.name() for word in ("sort", "unique", "topk")):
            self.sorted = max(self.sorted, size)
        return func(*args, **(kwargs or {}))


def test_a_block_beside_many_like_it_is_compared_with_all_of_them_in_a_few_passes():
    passes = []
    for count in (8, 16):
        net = nn.ModuleList([nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128)) for _ in range(count)])
        opt = torch.optim.SGD(net.parameters(), lr=0.1)
        with Counted() as counted, ax.surgery(net, opt):
            net.append(nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128)))
        passes.append(counted.numbers / sum(p.numel() for p in net.parameters()))
    assert passes[1] < 1.2 * passes[0] < 100


OTHERS = [((0, 64), (0, 64)), ((0, 64), (100, 64)), ((0, 64), (100, 65)), ((0, 1), (0, 1))]  # (more rows, columns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("old", "new"), OTHERS)
def test_what_has_nothing_in_common_is_compared_in_passes_over_it(old, new, dtype):
    counts = []
    for rows in (2_000, 8_000):
        a, b = (torch.randn(rows + more, c).to(dtype) for more, c in (old, new))
        with Counted() as counted:
            assert match(a, b, Maps()) is None
        counts.append(counted.numbers)
        assert counted.sorted < 2**17 or dtype is torch.bfloat16  # of 16 bits few numbers are unique
    assert counts[1] < 4.2 * counts[0]


@pytest.mark.parametrize("zeros", [False, True])
def test_large_tensors_that_have_changed_along_both_axes_are_found_again(zeros):
    old = torch.randn(3_000, 128, dtype=torch.float64) * (torch.rand(3_000, 128) < 0.1 if zeros else 1)
    rows, columns = torch.randperm(3_000)[:2_900], torch.randperm(128)[:120]
    found = match(old, old[rows][:, columns], Maps())
    assert found.sure and found.axes[0].index.equal(rows) and found.axes[1].index.equal(columns)


@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 4)])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.int16, torch.bool, torch.float8_e4m3fn, torch.uint16])
def test_any_dtype_is_compared_or_left_alone(dtype, shape):
    old = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
    found = match(old, torch.cat([old[2:], torch.full((3, *shape[1:]), 99).to(dtype)]), Maps())
    if dtype in (torch.complex64, torch.int16):
        assert found.axes[0].index.tolist() == [2, 3, 4, 5, -1, -1, -1]
    assert dtype not in (torch.float8_e4m3fn, torch.uint16) or found is None


def test_complex_tensors_follow_and_conjugates_are_other_values():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.shift = (nn.Parameter(torch.randn(*n, dtype=torch.complex64)) for n in ((5, 4), (5,)))

        def forward(self, x):
            return (x.to(torch.complex64) @ self.mix.T + self.shift).abs().sum(1)

    net = Net()
    opt = torch.optim.Adam(net.parameters())
    net(torch.randn(8, 4)).sum().backward()
    opt.step(), opt.zero_grad()
    index = [0, 1, -1, 2, 3, 4]
    states = {n: opt.state[p]["exp_avg"].clone() for n, p in net.named_parameters()}
    with ax.surgery(net, opt):
        put(net, "mix", index, 0), put(net, "shift", index, 0)
    for name, p in net.named_parameters():
        assert torch.equal(opt.state[p]["exp_avg"][[0, 1, 3, 4, 5]], states[name]), name
    with ax.surgery(net, opt) as done:
        net.mix.data = net.mix.data.conj()
    assert "mix holds other values" in str(done.change)


def test_a_network_without_values_is_resized():
    net = Pair().to("meta")
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    with ax.surgery(net, opt):
        net.down.weight.data, net.down.bias.data = torch.empty(5, 6, device="meta"), torch.empty(5, device="meta")
    ax.verify(net, opt)


@pytest.mark.parametrize("told", [True, False])
def test_of_two_equal_units_the_tensors_beside_them_tell_which_has_left(told):
    run = Run(Pair())
    with torch.no_grad():
        run.net.up.weight[2], run.net.up.bias[2] = run.net.up.weight[1], run.net.up.bias[1]
    keep = [0, 2, 3, 4, 5]

    def change(net):
        for name in ("weight", "bias"):
            put(net.up, name, keep, 0)
        if told:
            for name in ("weight", "bias", "running_mean", "running_var"):
                put(net.norm, name, keep, 0)
            put(net.down, "weight", keep, 1)

    run.net.eval()
    with ax.surgery(run.net, run.opt, run.ema) as done:
        change(run.net)
    notes = "the values of up.weight do not tell which of its entries go on where" in str(done.change)
    assert notes is not told
    if told:
        for name in ("up.weight", "up.bias", "norm.weight"):
            assert torch.equal(run.moment(name), run.moments[name][keep]), name
            assert torch.equal(run.average(name), run.averages[name][keep]), name
