"""The list of places of a network: what stands there, and that what is said to fit does."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import auxin as ax

torch.set_num_threads(1)


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(self.act(self.up(x)))


class Argmax(nn.Module):
    def forward(self, x):
        return x.argmax(-1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.heads = nn.ModuleDict({"a": nn.Linear(8, 2), "b": nn.Linear(8, 2)})
        self.drop, self.lstm, self.pick = nn.Dropout(0.1), nn.LSTM(8, 8), Argmax()
        self.idle, self.unused, self.sleeping = nn.Linear(3, 3), nn.Linear(8, 8), ax.Dormant(nn.Linear(8, 8))
        self.narrow, self.flat = nn.Linear(8, 5), nn.Flatten(0)

    def forward(self, x):
        x = self.drop(self.stem(x))
        for block in self.blocks:
            x = block(x)
        x = self.sleeping(self.lstm(x)[0])
        self.unused(x)
        self.pick(x)
        out = sum(head(x) for head in self.heads.values())
        return out + self.drop(self.narrow(x)).mean() + self.flat(x).mean()


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture(scope="module")
def found(net):
    return {site.at: site for site in ax.sites(net, torch.randn(6, 4))}


def test_every_module_is_listed_in_the_order_of_the_network(net, found):
    assert list(found) == [path for path, _ in net.named_modules() if path]


def test_what_stands_there(net, found):
    up = found["blocks.1.up"]
    assert (up.shape, up.dtype, up.calls, up.parameters) == ((6, 16), torch.float32, 1, 8 * 16 + 16)
    assert up.flops == 2 * 8 * 16 and up.fits == ("After('blocks.1.up')",) and not up.why_not
    assert found["drop"].calls == 2 and found["idle"].calls == 0
    assert found["blocks.1"].flops == 2 * up.flops and found["lstm"].shape is None


def test_flops_add_up_to_those_of_the_whole(net, found):
    x = torch.randn(6, 4)
    with FlopCounterMode(display=False) as counter:
        net(x)
    tops = ("stem", "blocks.0", "blocks.1", "lstm", "unused", "heads.a", "heads.b", "narrow")
    assert sum(found[at].flops for at in tops) == counter.get_total_flops() / 6


@pytest.mark.parametrize(
    ("at", "why"),
    [
        ("blocks", "not called on this probe"),
        ("idle", "not called on this probe"),
        ("drop", "called with several widths: 5, 8"),
        ("lstm", "returns a tuple"),
        ("pick", "returns a tensor of int64"),
        ("unused", "the network's output does not depend on what it returns"),
        ("flat", "its output has no channels"),
    ],
)
def test_why_a_layer_cannot_stand_there_and_the_edit_says_the_same(net, found, at, why):
    assert found[at].why_not == why and not any(text.startswith("After") for text in found[at].fits)
    with pytest.raises(ax.GrowthError):
        ax.grow(net, ax.After(at), probe=torch.randn(6, 4))


def test_other_edits_that_fit(found):
    assert found["blocks"].fits == ("Duplicate('blocks')", "Insert('blocks', layer)")
    assert found["stem"].fits == ("After('stem')", "Insert('stem', layer)")
    assert found["heads"].fits == ("Insert('heads', layer, key=...)",)
    assert found["sleeping"].fits == ("After('sleeping')", "Wake('sleeping')")


def test_what_is_said_to_fit_does(found):
    for site in found.values():
        for text in site.fits:
            if "layer" not in text:
                torch.manual_seed(0)
                model, x = Net().eval(), torch.randn(6, 4)
                before = model(x)
                edit = eval(text, {"After": ax.After, "Duplicate": ax.Duplicate, "Wake": ax.Wake})
                change = ax.grow(model, edit, probe=x)
                assert isinstance(edit, ax.Wake) or (torch.equal(model(x), before) and change.preserves), text


def test_looking_leaves_no_trace():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.ReLU())
    state = {name: t.clone() for name, t in model.state_dict().items()}
    rng = torch.get_rng_state()
    ax.sites(model, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng) and all(m.training for m in model.modules())
    assert all(p.grad is None and not p._backward_hooks for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_one_forward():
    calls = []

    class Counted(nn.Linear):
        def forward(self, x):
            calls.append(1)
            return super().forward(x)

    ax.sites(nn.Sequential(Counted(4, 4), nn.ReLU()), torch.randn(3, 4))
    assert len(calls) == 1


def test_the_table_has_one_row_for_what_is_alike(net):
    found = ax.sites(net, torch.randn(6, 4))
    lines = str(found).partition("\n\n")[0].splitlines()
    assert lines[0].split() == ["at", "output", "dtype", "calls", "parameters", "FLOPs", "what", "fits"]
    rows = [line for line in lines if line.startswith("blocks.*.up (2)")]
    assert len(rows) == 1 and rows[0].split()[3:] == ["x", "16", "float32", "1", "144", "256", "After"]
    assert any(line.endswith("no After: called with several widths: 5, 8") for line in lines)
    fit = sum(not site.why_not for site in found)
    assert lines[-1] == f"{fit} of {len(found)} modules take a layer behind them (After)"
    page = found._repr_html_().partition("</table>")[0]
    assert page.count("<tr>") == len(lines) - 1 and "<td>blocks.*.up (2)</td>" in page


def test_frozen_networks_and_compiled_ones_are_looked_at_too():
    torch.manual_seed(0)
    frozen = Net().requires_grad_(False)
    assert [s.at for s in ax.sites(frozen, torch.randn(6, 4)) if s.why_not.startswith("the network")] == []
    compiled = torch.compile(Net(), backend="eager")
    compiled(torch.randn(6, 4))
    assert {s.at: s.calls for s in ax.sites(compiled, torch.randn(6, 4))}["blocks.0.up"] == 1


def test_what_it_cannot_look_at_is_said():
    with pytest.raises(ax.GrowthError, match="needs one batch"):
        ax.sites(Net(), None)
    with pytest.raises(ax.GrowthError, match="Net does not run on the probe"):
        ax.sites(Net(), torch.randn(6, 5))


def test_weights_that_were_left_without_values_are_named_and_no_widths_are_listed():
    model = Net()
    model.blocks[1].up = nn.Linear(8, 16, device="meta")
    with pytest.raises(ax.GrowthError, match=r"sites: blocks\.1\.up\.weight, .* are on the meta device"):
        ax.sites(model, torch.randn(6, 4))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_parts_are_named():
    model = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Sequential(nn.Linear(4, 4))))
    assert [s.why_not for s in ax.sites(model, torch.randn(2, 4))] == ["", *["part of a ScriptModule"] * 2]


class Stage(nn.Module):
    """Blocks, and something in front of them that changes the width or not."""

    def __init__(self, width, given):
        super().__init__()
        self.front, self.blocks = nn.Linear(given, width), nn.Sequential(Block(width), Block(width))

    def forward(self, x):
        return self.blocks(self.front(x))


def test_of_lists_within_each_other_the_one_of_blocks_counts():
    staged = nn.Sequential(Stage(4, 4), Stage(8, 4))
    even = nn.Sequential(Stage(4, 4), Stage(4, 4))
    lists = [
        [site.at for site in ax.sites(nn.Sequential(net), torch.randn(3, 4)) if "Duplicate" in " ".join(site.fits)]
        for net in (staged, even)
    ]
    assert lists == [["0.0.blocks", "0.1.blocks"], ["0"]]
