"""The widths of a network are listed, with what moves together and the edit that grows each; what is said holds."""

import fnmatch

import pytest
import torch
from test_layers_that_widen import CASES, IDS, Attention, Gated, Tied, off, ready
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import auxin as ax

torch.set_num_threads(1)
KINDS = {name: CASES[name] for name in CASES if name not in ("RNN", "embedding", "excited unit", "pixel shuffle")}
KINDS["tied"] = (lambda: Tied(nn.RMSNorm), "", 0, IDS)


def flops(net, probe):
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        net(probe)
    return counter.get_total_flops() / len(probe)


@pytest.mark.parametrize("case", KINDS)
def test_what_is_said_to_fit_does_and_costs_what_is_said(case):
    build, _, _, probe = KINDS[case]
    net, probe = ready(build, probe)
    widths = ax.sites(net, probe).widths
    assert any(width.fits for width in widths)
    for width in widths:
        for text in width.fits:
            net, _ = ready(build, KINDS[case][3])
            before, spent = net.eval()(probe).detach(), flops(net, probe)
            names = {name: p.shape for name, p in net.state_dict().items()}
            edit = eval(text, {"Widen": ax.Widen})
            change = ax.grow(net, edit, probe=probe)
            assert edit.outputs or (change.preserves and off(net(probe).detach(), before) < 1e-13), text
            assert change.added_parameters == width.parameters, text
            assert flops(net, probe) - spent == pytest.approx(width.flops), text
            grown = {name for name, t in net.state_dict().items() if t.shape != names[name]}
            assert grown == {*width.makes, *width.reads, *width.along}, text


def test_the_table_shows_what_moves_together_with_a_pattern_to_paste():
    net, x = nn.Sequential(nn.Linear(8, 8), Gated(), Gated(), Gated(), nn.Linear(8, 2)), torch.randn(4, 8)
    lines = str(ax.sites(net, x)).partition("\n\n")[2].splitlines()
    assert lines[0].split()[:5] == ["width", "size", "step", "parameters", "FLOPs"]
    rows = [line.split("  ") for line in lines if line.startswith("Widen('*.gate_up', by=2) (3)")]
    assert len(rows) == 1
    told = "made by 1-3.gate_up.weight; read by 1-3.down.weight; with 1-3.gate_up.bias"
    assert rows[0][-1] == told
    stream = [line for line in lines if line.startswith("Widen('0', by=1) ")]
    assert len(stream) == 1 and "residual stream: new entries get zeros" in stream[0]
    assert any(line.startswith("Widen('4', by=1, outputs=True)") for line in lines)
    assert lines[-1].startswith("5 of 5 widths can grow")
    change = ax.grow(net, ax.Widen("*.gate_up", by=2), probe=x)
    assert [net[i].down.in_features for i in (1, 2, 3)] == [13, 13, 13] and change.preserves


class Uneven(nn.Module):
    """Blocks of two widths: a pattern over all of them would widen the others too."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Gated(8, hidden) for hidden in (12, 12, 16)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def test_a_pattern_names_no_more_than_its_row():
    net, x = Uneven(), torch.randn(4, 8)
    text = str(ax.sites(net, x).widths)
    paths = [path for path, _ in net.named_modules()]
    for line in text.splitlines():
        if line.startswith("Widen(") and "*" in line:
            pattern, count = line.split("'")[1], int(line.split("(")[2].split(")")[0])
            assert sum(fnmatch.fnmatchcase(path, pattern) for path in paths) == count
    assert text.count("gate_up', by=2)") == 3


class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 12), nn.Linear(12, 2)

    def forward(self, x):
        return self.b(self.a(x).view(len(x), 3, 4).softmax(1).flatten(1))


def test_why_a_width_cannot_grow_is_said_with_its_place():
    widths = ax.sites(Fixed(), torch.randn(5, 4)).widths
    stuck = [width for width in widths if width.at == "a"]
    assert stuck and all(not width.fits and "test_listed.py:" in width.why_not for width in stuck)
    assert "cannot grow: " in str(widths)


def test_heads_key_value_groups_and_the_size_of_a_head_are_told_apart():
    net, x = nn.Sequential(nn.Linear(8, 16), Attention(), nn.Linear(16, 2)), torch.randn(3, 5, 8)
    found = {width.attributes: width for width in ax.sites(net, x).widths if width.at == "1.qkv"}
    assert {attributes: (w.step, w.fits[0]) for attributes, w in found.items()} == {
        ("1.heads 4 -> 6", "1.groups 2 -> 3"): (16, "Widen('1.qkv', by=16)"),
        ("1.heads 4 -> 6",): (8, "Widen('1.qkv', by=8)"),
        ("1.size 4 -> 6",): (16, "Widen('1.qkv', by=2, unit='head_dim')"),
    }
    assert found["1.size 4 -> 6",].start.startswith("head size: ")
    for unit, after in (("groups", (6, 3, 4)), ("heads", (6, 2, 4)), ("head_dim", (4, 2, 6))):
        net, probe = ready(*[CASES["a group of heads"][i] for i in (0, 3)])
        ax.grow(net, ax.Widen("1.qkv", by=1 if unit == "groups" else 2, unit=unit), probe=probe)
        assert (net[1].heads, net[1].groups, net[1].size) == after


class Fused(nn.Module):
    """Queries, keys and values by one projection, taken apart by an axis of three."""

    def __init__(self, d=8, heads=2):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_the_three_of_a_fused_projection_are_no_heads():
    net, x = nn.Sequential(nn.Linear(6, 8), Fused()).double(), torch.randn(3, 5, 6, dtype=torch.float64)
    before = net(x).detach()
    with pytest.raises(ax.GrowthError, match="2 heads already"):
        ax.grow(net, ax.Widen("1.qkv", to=2, unit="heads"), probe=x)
    ax.grow(net, ax.Widen("1.qkv", to=3, unit="heads"), probe=x)
    assert (net[1].heads, net[1].qkv.out_features) == (3, 36) and off(net(x).detach(), before) < 1e-13
    ax.grow(net, ax.Widen("1.qkv", by=2, unit="head_dim"), probe=x)
    assert (net[1].heads, net[1].qkv.out_features) == (3, 54) and off(net(x).detach(), before) < 1e-13


class Numbered(nn.Module):
    """A block that knows its position, which is as large as its width for one of them."""

    def __init__(self, index, width=4):
        super().__init__()
        self.index, self.width = index, width
        self.up, self.down = nn.Linear(6, width), nn.Linear(width, 6)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def test_the_number_of_a_block_is_not_taken_for_its_width():
    net, x = nn.Sequential(*(Numbered(i) for i in range(6))), torch.randn(3, 6)
    ax.grow(net, ax.Widen("*.up", by=3), probe=x)
    assert [block.index for block in net] == list(range(6)) and {block.width for block in net} == {7}


def test_a_network_that_cannot_be_followed_is_listed_without_widths():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.calls = nn.Linear(4, 4), 0

        def forward(self, x):
            if not torch.is_grad_enabled():
                raise RuntimeError("no")
            return self.a(x)

    found = ax.sites(Odd(), torch.randn(2, 4))
    assert str(found).endswith("no widths: the forward could not be followed: no")


class Attended(nn.Module):
    """A block with torch's own attention, whose heads tie the stream to whole steps of it."""

    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(16), nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x):
        h = self.norm(x)
        return x + self.attention(h, h, h)[0]


def test_a_width_that_can_grow_in_one_way_only_is_told_once():
    net, x = nn.Sequential(nn.Linear(4, 16), Attended(), Attended(), nn.Linear(16, 2)), torch.randn(2, 5, 4)
    streams = [width for width in ax.sites(net, x).widths if width.at == "0"]
    assert [width.fits for width in streams] == [("Widen('0', by=4)",)]


class Aligned(nn.Module):
    """Rows of 16 bytes, as the kernels of grouped products ask for them."""

    bytes = 16

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x):
        hidden = torch.relu(self.up(x))
        if hidden.stride(0) * hidden.element_size() % self.bytes:
            raise ValueError("strides should be multiple of 16 bytes")
        return self.down(hidden)


def test_what_runs_in_coarser_steps_only_is_listed_with_them():
    net, probe = Aligned(), torch.randn(4, 6)
    (width,) = (width for width in ax.sites(net, probe).widths if width.at == "up")
    assert (width.step, width.edit, width.fits) == (4, ax.Widen("up", by=4), ("Widen('up', by=4)",))
    assert ax.grow(net, width.edit, probe=probe).added_parameters == width.parameters == 36
    net.bytes = 1024
    net.up, net.down = nn.Linear(6, 256), nn.Linear(256, 2)
    (width,) = (width for width in ax.sites(net, probe).widths if width.at == "up")
    assert width.edit is None and "would not run on the probe: strides should" in width.why_not
    assert width.step == 1
