"""Further resizes as people write them: what continues what is found by value, named, or refused."""

import copy

import pytest
import torch
from resizes import Pair, put
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import auxin as ax

torch.set_num_threads(1)


class Run:
    """A network that has trained for a while, with AdamW and an average of other values."""

    def __init__(self, net, shape=(16, 4), steps=4, dtype=torch.float32, average=None):
        torch.manual_seed(1)
        self.net, self.x = net.to(dtype), torch.randn(shape).to(dtype)
        self.opt = torch.optim.AdamW(net.parameters(), lr=0.01)
        self.ema = (average or self.averaged)(net)
        for _ in range(steps):
            self.step()
        self.opt.zero_grad()
        self.moments = {
            n: self.opt.state[p]["exp_avg"].clone() for n, p in net.named_parameters() if p in self.opt.state
        }
        self.averages = {n: t.clone() for n, t in self.ema.module.state_dict().items()}
        self.before = self.outputs()

    @staticmethod
    def averaged(net):
        return AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True)

    def step(self):
        self.opt.zero_grad()
        out = self.net(self.x)
        (out.float() - self.x.float().flatten(1).sum(1).view(-1, *[1] * (out.dim() - 1))).square().mean().backward()
        self.opt.step()
        self.ema.update_parameters(self.net)

    def outputs(self):
        modes = [(m, m.training) for root in (self.net, self.ema) for m in root.modules()]
        self.net.eval(), self.ema.eval()
        found = self.net(self.x).detach().clone(), self.ema(self.x).detach().clone()
        for module, mode in modes:
            module.training = mode
        return found

    def surgery(self, change, probe=True):
        with ax.surgery(self.net, self.opt, self.ema, probe=self.x if probe else None) as done:
            change(self.net)
        self.change = str(done.change)
        self.after = self.outputs()
        return self

    def moved(self):
        return [(a - b).abs().max().item() for a, b in zip(self.before, self.after, strict=True)]

    def moment(self, name):
        return self.opt.state[self.net.get_parameter(name)]["exp_avg"]

    def average(self, name):
        return self.ema.module.state_dict()[name]

    def goes_on(self):
        for _ in range(2):
            self.step()
        ax.verify(self.net, self.opt, self.ema)


INSERTED = [0, 1, -1, 2, 3, 4, 5]


def widen(index, **words):
    def change(net):
        put(net.up, "weight", index, 0, fresh=0.2)
        put(net.up, "bias", index, 0)
        for name, fresh in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            put(net.norm, name, index, 0, fresh=fresh)
        put(net.down, "weight", index, 1, **words)

    return change


def test_constants_go_with_the_tensor_beside_them():
    """A norm of ones and a bias of zeros do not tell; the weight of the same width does."""
    net = Pair()
    net.norm.weight.requires_grad_(False)
    net.norm.bias.requires_grad_(False)
    run = Run(net)
    with torch.no_grad():
        run.ema.module.norm.weight.copy_(torch.arange(6.0) + 1)  # an average of its own
    run.before = run.outputs()
    run.surgery(widen(INSERTED))
    assert run.average("norm.weight").tolist() == [1, 2, 1, 3, 4, 5, 6]
    assert max(run.moved()) < 1e-6 and "do not tell" not in run.change
    run.goes_on()


def test_constants_alone_are_taken_in_order_and_named():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x * self.gain.sum()

    run = Run(Scale(), steps=0)

    def change(net):
        net.gain.data = torch.cat([net.gain.data, torch.zeros(2)])

    run.surgery(change)
    assert "the values of gain do not tell which of its entries go on where; they were taken in order" in run.change
    assert run.average("gain").tolist() == [1, 1, 1, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    run = Run(Pair(), dtype=dtype)
    run.surgery(widen(INSERTED))
    keep = [0, 1, 3, 4, 5, 6]
    assert torch.equal(run.moment("up.weight")[keep], run.moments["up.weight"])
    assert torch.equal(run.average("down.weight")[:, keep], run.averages["down.weight"])
    assert run.average("up.weight").dtype == dtype
    run.goes_on()


def test_an_average_in_another_dtype_keeps_it_and_its_own_values():
    run = Run(Pair())
    run.ema.double()
    with torch.no_grad():
        for p in run.ema.module.parameters():
            p.add_(1e-9)  # what float32 could not hold
    averages = {n: t.clone() for n, t in run.ema.module.state_dict().items()}
    with ax.surgery(run.net, run.opt, run.ema):
        widen(INSERTED)(run.net)
    keep = [0, 1, 3, 4, 5, 6]
    assert run.average("up.weight").dtype == torch.float64
    assert torch.equal(run.average("up.weight")[keep], averages["up.weight"])


def test_an_average_that_does_not_train_stays_so():
    def average(net):
        ema = Run.averaged(net).eval()
        return ema.requires_grad_(False)

    run = Run(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Dropout(0.5)), average=average)
    run.surgery(lambda net: net.insert(2, nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))), probe=False)
    assert not any(p.requires_grad for p in run.ema.parameters())
    assert not any(m.training for m in run.ema.modules()) and run.net[2].training
    run.goes_on()


def test_a_fused_projection_is_split_and_each_part_keeps_its_rows():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(4, 12)

        def forward(self, x):
            parts = self.qkv(x).chunk(3, -1) if hasattr(self, "qkv") else (self.q(x), self.k(x), self.v(x))
            return parts[0] * parts[1] + parts[2]

    run = Run(Net())
    old = run.opt.state[run.net.qkv.weight]["step"].clone()

    def change(net):
        for name, w, b in zip("qkv", net.qkv.weight.chunk(3), net.qkv.bias.chunk(3), strict=True):
            part = nn.Linear(4, 4)
            part.weight, part.bias = nn.Parameter(w.detach().clone()), nn.Parameter(b.detach().clone())
            net.add_module(name, part)
        del net.qkv

    run.surgery(change)
    for number, name in enumerate("qkv"):
        rows = slice(4 * number, 4 * number + 4)
        assert torch.equal(run.moment(f"{name}.weight"), run.moments["qkv.weight"][rows])
        assert torch.equal(run.moment(f"{name}.bias"), run.moments["qkv.bias"][rows])
        assert torch.equal(run.average(f"{name}.weight"), run.averages["qkv.weight"][rows])
        assert torch.equal(run.opt.state[run.net.get_parameter(f"{name}.weight")]["step"], old)
    assert max(run.moved()) < 1e-6
    run.goes_on()


def test_a_head_that_moves_into_a_wrapper_keeps_what_is_its():
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    run = Run(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)))

    def change(net):
        new = nn.Linear(5, 2)
        new.load_state_dict(net[2].state_dict())
        net[2] = Wrapper(new)

    run.surgery(change)
    assert torch.equal(run.moment("2.inner.weight"), run.moments["2.weight"])
    assert torch.equal(run.average("2.inner.weight"), run.averages["2.weight"])
    assert max(run.moved()) < 1e-6
    run.goes_on()


class Adapted(nn.Module):
    def __init__(self):
        super().__init__()
        self.base, self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)

    def forward(self, x):
        return self.base(x) + (self.b(self.a(x)) if self.b is not None else 0)


def merge(net):
    with torch.no_grad():
        net.base.weight += net.b.weight @ net.a.weight
    net.a = net.b = None


def test_an_adapter_that_is_merged_fits_the_live_values_only_and_is_refused():
    run = Run(Adapted())
    before = {n: t.clone() for n, t in run.ema.state_dict().items()}
    with pytest.raises(ax.GrowthError, match="AveragedModel: the outputs of its averaged network on the probe would"):
        run.surgery(merge)
    assert all(torch.equal(t, before[n]) for n, t in run.ema.state_dict().items()) and run.net.b is not None
    run.goes_on()


def test_without_a_probe_a_merged_adapter_is_named():
    run = Run(Adapted()).surgery(merge, probe=False)
    assert "base.weight holds other values, which do not come from its old ones: states and averages" in run.change
    assert torch.equal(run.moment("base.weight"), run.moments["base.weight"])


def test_a_layer_that_starts_anew_in_place_keeps_its_state_and_is_named():
    run = Run(Pair()).surgery(lambda net: nn.init.normal_(net.down.weight))
    assert "down.weight holds other values" in run.change
    assert torch.equal(run.average("down.weight"), run.averages["down.weight"])
    run.goes_on()


def test_rows_that_start_anew_in_place_lose_the_moments_of_the_old_ones():
    def change(net):
        with torch.no_grad():
            net.down.weight[1] = torch.randn(6)

    run = Run(Pair()).surgery(change)
    assert not run.moment("down.weight")[1].any()
    assert torch.equal(run.moment("down.weight")[[0, 2]], run.moments["down.weight"][[0, 2]])
    assert torch.equal(run.average("down.weight")[1], run.net.down.weight[1])
    run.goes_on()


class Relu(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 6, bias=False), nn.Linear(6, 3)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def rescale(net):
    with torch.no_grad():
        net.up.weight.mul_(2)
        net.down.weight.div_(2)


def test_a_pair_that_is_rescaled_takes_moments_and_averages_along():
    """theta_new = q theta_old gives g_new = g_old / q, as the network's function is unchanged."""
    run = Run(Relu()).surgery(rescale)
    assert torch.equal(run.moment("up.weight"), run.moments["up.weight"] / 2)
    assert torch.equal(run.moment("down.weight"), run.moments["down.weight"] * 2)
    assert torch.equal(run.average("up.weight"), run.averages["up.weight"] * 2)
    assert max(run.moved()) < 1e-6
    run.goes_on()


def test_without_a_probe_moments_of_a_rescaled_tensor_stay_and_are_named():
    run = Run(Relu()).surgery(rescale, probe=False)
    assert torch.equal(run.moment("up.weight"), run.moments["up.weight"])
    assert torch.equal(run.average("up.weight"), run.averages["up.weight"] * 2)
    assert "moments of up.weight, down.weight stay as they are: no probe shows" in run.change


@pytest.mark.parametrize("count", [2, 3])
def test_a_branch_is_split_and_each_average_has_its_share(count):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.branches = nn.ModuleList([nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))])

        def forward(self, x):
            return x + sum(branch(x) for branch in self.branches)

    run = Run(Net())

    def change(net):
        with torch.no_grad():
            net.branches[0][2].weight.div_(count), net.branches[0][2].bias.div_(count)
        for _ in range(count - 1):
            net.branches.append(copy.deepcopy(net.branches[0]))

    run.surgery(change)
    assert torch.equal(run.moment("branches.0.2.weight"), run.moments["branches.0.2.weight"])
    assert max(run.moved()) < 1e-6
    assert torch.allclose(run.average(f"branches.{count - 1}.2.bias"), run.averages["branches.0.2.bias"] / count)
    run.goes_on()


class Text(nn.Module):
    def __init__(self, words=7, tied=False):
        super().__init__()
        self.emb, self.out = nn.Embedding(words, 4, padding_idx=0), nn.Linear(4, words, bias=False)
        if tied:
            self.out.weight = self.emb.weight

    def forward(self, x):
        tokens = (x * 10).long().abs() % min(5, self.emb.num_embeddings)
        return self.out(self.emb(tokens).mean(1))[:, :4]


@pytest.mark.parametrize("tied", [False, True])
def test_a_vocabulary_is_trimmed_and_extended(tied):
    """The row of zeros for padding is no copy of the new rows of zeros, nor the other way round."""
    keep = [0, 1, 2, 3, 4, 6]
    run = Run(Text(tied=tied))

    def change(net):
        for module in {id(m.weight): m for m in (net.emb, net.out)}.values():
            module.weight.data = torch.cat([module.weight.data[keep], torch.zeros(2, 4)])
        net.emb.num_embeddings = net.out.out_features = 8

    run.surgery(change)
    name = "emb.weight"
    assert torch.equal(run.moment(name)[:6], run.moments[name][keep]) and not run.moment(name)[6:].any()
    assert torch.equal(run.average(name)[:6], run.averages[name][keep])
    assert (run.ema.module.out.weight is run.ema.module.emb.weight) is tied
    assert max(run.moved()) < 1e-6
    run.goes_on()


def test_heads_of_attention_are_pruned():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.mix = 6, nn.Linear(4, 18)
            self.out = nn.Linear(6, 4)

        def forward(self, x):
            q, k, v = (t.view(-1, 3, 4, self.inner // 3 if self.inner == 6 else 2)[..., :2] for t in self._parts(x))
            return self.out((q.softmax(-1) * k + v).transpose(1, 2).flatten(1)[:, : self.inner])

        def _parts(self, x):
            return (t.repeat(1, 12 // self.inner * 2)[:, :24] for t in self.mix(x).chunk(3, -1))

    run = Run(Net())
    keep = [0, 1, 4, 5]
    rows = [6 * part + place for part in range(3) for place in keep]

    def change(net):
        net.mix.weight.data, net.mix.bias.data = net.mix.weight.data[rows], net.mix.bias.data[rows]
        net.out.weight.data = net.out.weight.data[:, keep]
        net.inner = 4

    run.surgery(change, probe=False)
    assert torch.equal(run.moment("mix.weight"), run.moments["mix.weight"][rows])
    assert torch.equal(run.average("out.weight"), run.averages["out.weight"][:, keep])


class Grids(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.each = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.back = nn.ConvTranspose2d(4, 2, 3, padding=1)

    def forward(self, x):
        return self.back(torch.relu(self.each(torch.relu(self.first(x.view(-1, 1, 4, 4)))))).flatten(1)


@pytest.mark.parametrize("last", [False, True])
def test_depthwise_and_transposed_convolutions(last):
    index = [0, -1, 1, 2, 3]
    net = Grids().to(memory_format=torch.channels_last) if last else Grids()
    run = Run(net, shape=(8, 16))

    def change(net):
        for conv in (net.first, net.each):
            put(conv, "weight", index, 0, fresh=0.1)
            put(conv, "bias", index, 0)
        put(net.back, "weight", index, 0)
        net.first.out_channels = net.each.in_channels = net.each.out_channels = net.each.groups = 5
        net.back.in_channels = 5

    run.surgery(change)
    keep = [0, 2, 3, 4]
    for name in ("first.weight", "each.weight", "each.bias", "back.weight"):
        assert torch.equal(run.moment(name)[keep], run.moments[name]), name
        assert torch.equal(run.average(name)[keep], run.averages[name]), name
    assert max(run.moved()) < 1e-6
    run.goes_on()


def test_a_residual_stream_of_another_width():
    """Two axes of one tensor at once, in the middle of both."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inp, self.mix, self.out = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 2)

        def forward(self, x):
            x = self.inp(x)
            return self.out(x + torch.tanh(self.mix(x)))

    index = [0, 1, 2, -1, 3, 4]
    run = Run(Net())

    def change(net):
        for name in ("weight", "bias"):
            put(net.inp, name, index, 0, fresh=0.3)
            put(net.mix, name, index, 0, fresh=0.1)
        put(net.mix, "weight", index, 1)
        put(net.out, "weight", index, 1)

    run.surgery(change)
    keep = [0, 1, 2, 4, 5]
    assert torch.equal(run.moment("mix.weight")[keep][:, keep], run.moments["mix.weight"])
    assert torch.equal(run.average("mix.weight")[keep][:, keep], run.averages["mix.weight"])
    assert max(run.moved()) < 1e-6
    run.goes_on()


def test_hidden_units_of_an_rnn_are_permuted():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.out = nn.RNN(4, 5, batch_first=True), nn.Linear(5, 2)

        def forward(self, x):
            return self.out(self.rnn(x[:, None].repeat(1, 3, 1))[0][:, -1])

    order = [3, 0, 4, 1, 2]
    run = Run(Net())

    def change(net):
        for name in ("weight_ih_l0", "bias_ih_l0", "bias_hh_l0", "weight_hh_l0"):
            put(net.rnn, name, order, 0)
        put(net.rnn, "weight_hh_l0", order, 1)
        put(net.out, "weight", order, 1)

    run.surgery(change)
    assert torch.equal(run.moment("rnn.weight_hh_l0"), run.moments["rnn.weight_hh_l0"][order][:, order])
    assert torch.equal(run.average("rnn.bias_hh_l0"), run.averages["rnn.bias_hh_l0"][order])
    assert max(run.moved()) < 1e-6
    run.goes_on()


def test_net2wider_of_convolutions_with_a_norm_between():
    from resizes import Images

    index, counts = [0, 1, 2, 3, 1, 1], [1, 3, 1, 1, 3, 3]
    run = Run(Images(), shape=(8, 16))

    def change(net):
        put(net.first, "weight", index, 0)
        put(net.first, "bias", index, 0)
        for name in ("weight", "bias", "running_mean", "running_var"):
            put(net.norm, name, index, 0)
        put(net.second, "weight", index, 1, value=[1 / c for c in counts])
        net.first.out_channels = net.norm.num_features = net.second.in_channels = 6

    run.surgery(change)
    share = torch.tensor([1 / c for c in counts], dtype=torch.float64).float()
    assert torch.allclose(run.moment("norm.weight"), run.moments["norm.weight"][index] * share)
    assert torch.equal(run.moment("second.weight"), run.moments["second.weight"][:, index])
    assert torch.equal(run.average("norm.running_var"), run.averages["norm.running_var"][index])
    assert max(run.moved()) < 1e-6
    run.goes_on()


def test_resizes_follow_one_another_and_a_frozen_tensor_has_no_state():
    net = Pair()
    net.down.bias.requires_grad_(False)
    run = Run(net)
    run.surgery(widen([0, 1, 2, 3, 4, 5, -1]))
    run.goes_on()
    run.opt.zero_grad()
    run.before = run.outputs()
    run.surgery(widen([6, 0, 1, 2, 3, 4, 5]))
    assert max(run.moved()) < 1e-6
    run.goes_on()


def test_a_compiled_network_and_a_wrapped_one():
    run = Run(Pair())
    compiled = torch.compile(run.net, backend="eager")
    before = compiled(run.x).detach()
    with ax.surgery(compiled, run.opt, run.ema, probe=run.x):
        widen(INSERTED)(run.net)
    assert torch.allclose(compiled(run.x), before, atol=1e-5)
    assert torch.equal(run.moment("up.bias")[[0, 1, 3, 4, 5, 6]], run.moments["up.bias"])
    run.goes_on()


def test_new_rows_that_no_batch_of_the_probe_reads_are_named():
    run = Run(Text())

    def change(net):
        net.emb.weight.data = torch.cat([net.emb.weight.data, torch.randn(3, 4)])

    run.surgery(change)
    assert "no gradient at the new entries of emb.weight on the probe" in run.change


def test_a_tensor_of_other_dimensions_starts_afresh_and_says_so():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.randn(4))

        def forward(self, x):
            return x * self.gain.sum()

    run = Run(Net())

    def change(net):
        net.gain.data = torch.randn(2, 2)

    run.surgery(change)
    assert "nothing of gain goes on: its optimizer state starts afresh, averages take its values" in run.change
    assert run.net.gain not in run.opt.state
    run.goes_on()


# ---- copies that share nothing


class Classes(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.up(x)))


SPLIT = [0, 1, 2, 2]


@pytest.mark.parametrize("probe", [True, False])
@pytest.mark.parametrize("how", ["data", "parameter", "module"])
def test_a_class_that_is_split_in_two_keeps_whole_moments(how, probe):
    run = Run(Classes())

    def change(net):
        head = net.head
        if how == "module":
            net.head = nn.Linear(6, 4)
            with torch.no_grad():
                net.head.weight.copy_(head.weight[SPLIT]), net.head.bias.copy_(head.bias[SPLIT])
            return
        for name in ("weight", "bias"):
            value = getattr(head, name).detach()[SPLIT].clone()
            if how == "data":
                getattr(head, name).data = value
            else:
                setattr(head, name, nn.Parameter(value))
        head.out_features = 4

    squares = {n: run.opt.state[p]["exp_avg_sq"].clone() for n, p in run.net.named_parameters()}
    run.surgery(change, probe=probe)
    for name in ("head.weight", "head.bias"):
        assert torch.equal(run.moment(name), run.moments[name][SPLIT]), name
        assert torch.equal(run.opt.state[run.net.get_parameter(name)]["exp_avg_sq"], squares[name][SPLIT]), name
        assert torch.equal(run.average(name), run.averages[name][SPLIT]), name
    assert "copied entries of" in run.change and "nothing shares them" in run.change
    assert "up.weight" not in run.change.partition("copied entries of")[2]
    run.goes_on()


def test_units_that_are_copied_and_read_in_full_keep_whole_moments():
    run, index = Run(Classes()), [0, 1, 2, 3, 4, 5, 5]

    def change(net):
        for name in ("weight", "bias"):
            put(net.up, name, index, 0)
        put(net.head, "weight", index, 1)

    run.surgery(change, probe=False)
    for name in ("up.weight", "up.bias"):
        assert torch.equal(run.moment(name), run.moments[name][index]), name
    assert "copied entries of up.weight, head.weight, up.bias have the moments" in run.change


def test_a_tensor_whose_scale_changes_the_function_keeps_its_moments():
    run = Run(Classes())

    def change(net):
        with torch.no_grad():
            net.head.weight.mul_(2)

    run.surgery(change)
    assert torch.equal(run.moment("head.weight"), run.moments["head.weight"])
    assert torch.equal(run.average("head.weight"), 2 * run.averages["head.weight"])
    assert "moments of head.weight stay as they are: no probe shows" in run.change


class Pixels(nn.Module):
    """Two channels of 2 x 2 pixels that a linear layer reads; with ``last`` the channel stands behind its pixels."""

    def __init__(self, last=False):
        super().__init__()
        self.up, self.head, self.last = nn.Linear(4, 2), nn.Linear(8, 3), last

    def forward(self, x):
        pixels = torch.tanh(self.up(x.view(-1, 4, 4)))
        return self.head(pixels.flatten(1) if self.last else pixels.movedim(2, 1).flatten(1))


@pytest.mark.parametrize("probe", [True, False])
@pytest.mark.parametrize("last", [True, False])
def test_copies_of_a_channel_share_what_is_read_of_all_its_pixels(last, probe):
    run, index = Run(Pixels(last), shape=(16, 16)), [0, 1, 1]
    wide = [p * 2 + c for p in range(4) for c in index] if last else [c * 4 + p for c in index for p in range(4)]
    share = torch.tensor([1.0, 0.5, 0.5])

    def change(net):
        for name in ("weight", "bias"):
            put(net.up, name, index, 0)
        counts = share.repeat(4) if last else share.repeat_interleave(4)
        net.head.weight.data = net.head.weight.data[:, wide] * counts
        net.up.out_features, net.head.in_features = 3, 12

    run.surgery(change, probe=probe)
    assert torch.equal(run.moment("up.weight"), run.moments["up.weight"][index] * share[:, None])
    assert torch.equal(run.moment("head.weight"), run.moments["head.weight"][:, wide])
    assert max(run.moved()) < 1e-6 and "nothing shares" not in run.change
    run.goes_on()
