"""Blocks that run again with the same weights, as a network written by hand runs them; later weights of their own."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import anew
import auxin as ax


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 16), nn.Linear(16, width)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """Three blocks, run one after the other, or by hand in an order of one's own."""

    def __init__(self, order=None):
        super().__init__()
        self.stem, self.head, self.order = nn.Linear(4, 8), nn.Linear(8, 2), order
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks if self.order is None else [self.blocks[i] for i in self.order]:
            x = block(x)
        return self.head(x)


class Added(Net):
    """Adds what its blocks return."""

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


X, Y = torch.randn(2, 16, 4, generator=torch.Generator().manual_seed(1)).sin(), torch.linspace(-1, 1, 32).view(16, 2)
X = X[0]


def made(build=Net, *args):
    """A network, its optimizer and its average."""
    torch.manual_seed(0)
    model = build(*args)
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, optimizer, torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average)


def train(run, steps):
    model, optimizer, average = run
    for _ in range(steps):
        nn.functional.mse_loss(model(X), Y).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
    return run


def grower_of(run):
    return ax.Grower(*run, edits=lambda model: [], when=ax.when.every(1), probe=X)


def grow(run, *edits):
    return [ax.grow(run[0], edit, *run[1:], probe=X) for edit in edits][-1]


@pytest.mark.parametrize(
    ("edit", "order"),
    [
        (ax.Repeat("blocks"), [0, 1, 2, 0, 1, 2]),
        (ax.Repeat("blocks", blocks=[1, 3]), [0, 1, 2, 1, 2]),
        (ax.Repeat("blocks", blocks=(0, 2), times=3, order="interleave"), [0, 0, 0, 1, 1, 1, 2]),
    ],
)
def test_equals_to_the_bit_a_network_that_repeats_by_hand(edit, order):
    ours, theirs = train(made(), 3), train(made(), 3)
    held = [id(p) for p in ours[0].parameters()]
    change = grow(ours, edit)
    theirs[0].order = theirs[2].module.order = order
    assert edit.sources(3) == order and change.added_parameters == 0
    assert [id(p) for p in ours[0].parameters()] == held == [id(p) for p in ours[1].param_groups[0]["params"]]
    train(ours, 4), train(theirs, 4)
    copied = copy.deepcopy(ours[0])
    assert torch.equal(ours[0](X), theirs[0](X)) and torch.equal(ours[2](X), theirs[2](X))
    assert torch.equal(copied(X), ours[0](X)) and len(list(copied.parameters())) == len(held)
    assert str(change).startswith("blocks.") and "runs blocks." in str(change)


def test_own_weights_are_those_of_a_copy_and_so_is_what_the_optimizer_knows():
    ours, theirs = train(made(), 3), train(made(), 3)
    grow(ours, ax.Repeat("blocks", blocks=(1, 3)))
    kept, state = ours[0].blocks[1].up.weight, copy.deepcopy(ours[1].state[ours[0].blocks[1].up.weight])
    before = ours[0](X)
    change = grow(ours, ax.Untie("blocks"))
    grow(theirs, ax.Duplicate("blocks", order=[0, 1, 2, 1, 2], output="keep"))
    assert torch.equal(ours[0](X), before) and change.preserves and change.added_parameters == 2 * 296
    assert ours[0].state_dict().keys() == theirs[0].state_dict().keys()
    assert all(torch.equal(value, theirs[0].state_dict()[name]) for name, value in ours[0].state_dict().items())
    assert ours[0].blocks[1].up.weight is kept is not ours[0].blocks[3].up.weight
    for block in (ours[0].blocks[1], ours[0].blocks[3]):
        assert all(torch.equal(value, state[key]) for key, value in ours[1].state[block.up.weight].items())
    train(ours, 2)
    assert not torch.equal(ours[0].blocks[1].up.weight, ours[0].blocks[3].up.weight)


def test_resumed_in_a_new_process_to_the_bit(tmp_path):
    run = train(made(), 2)
    grower = grower_of(run)
    for number, edit in enumerate([ax.Repeat("blocks", times=3), ax.Untie("blocks")]):
        grower.grow(edit)
        train(run, 2)
        ax.save(grower, tmp_path / str(number))
        torch.save((run[0](X), run[2](X)), tmp_path / f"{number}.now")
        train(run, 2)
        torch.save((run[0](X), run[2](X)), tmp_path / f"{number}.pt")
    text = (
        "import sys, torch, auxin as ax; sys.path[:0] = sys.argv[1:3]; from test_repeat import *\n"
        "for number in '01':\n"
        "    run = made(); ax.load(f'{sys.argv[3]}/{number}', grower_of(run))\n"
        "    for name in ('now', 'pt'):\n"
        "        for ours, theirs in zip((run[0](X), run[2](X)), torch.load(f'{sys.argv[3]}/{number}.{name}')):\n"
        "            assert torch.equal(ours, theirs), (number, name)\n"
        "        train(run, 2)\n"
        "    print(len({id(block.up.weight) for block in run[0].blocks}))\n"
    )
    here = Path(__file__).parent
    done = anew.run("-c", text, here, here.parent, tmp_path)
    assert done.stdout.split() == ["3", "9"], done.stderr


def test_replayed_in_halves_and_taken_back():
    run = train(made(), 2)
    grower, names = grower_of(run), list(run[0].state_dict())
    grower.grow(ax.Repeat("blocks"))
    half = made()
    ax.replay(half[0], grower.journal, *half[1:])
    assert half[0].blocks[3].up.weight is half[0].blocks[0].up.weight
    grower.undo()
    assert list(run[0].state_dict()) == names
    grower.grow(ax.Repeat("blocks"))
    tied = run[0](X)
    grower.grow(ax.Untie("blocks"))
    ax.replay(half[0], grower.journal, *half[1:])  # the names and shapes are those of before
    assert half[0].blocks[3].up.weight is not half[0].blocks[0].up.weight
    grower.undo()
    assert run[0].blocks[3].up.weight is run[0].blocks[0].up.weight and torch.equal(run[0](X), tied)


def test_a_pass_fades_in_and_is_whole_at_the_end():
    run = train(made(), 2)
    before = run[0](X)
    change = grow(run, ax.Repeat("blocks", fade=3))
    assert torch.equal(run[0](X), before) and change.gates == ("blocks.3", "blocks.4", "blocks.5")
    with pytest.raises(ax.GrowthError, match=r"blocks\.3 is still fading in\. Untie it once it is whole"):
        grow(run, ax.Untie("blocks"))
    train(run, 3)
    written = Net([0, 1, 2, 0, 1, 2])
    written.load_state_dict(
        {n: v for n, v in run[0].state_dict().items() if not n.startswith("blocks.") or n < "blocks.3"}
    )
    assert torch.equal(run[0](X), written(X)) and "auxin_gate" not in "".join(run[0].state_dict())


class ConvBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(3, 3, 3, padding=1), nn.BatchNorm1d(3)

    def forward(self, x):
        return x + torch.tanh(self.norm(self.conv(x)))


def test_each_pass_keeps_statistics_of_its_own():
    torch.manual_seed(0)
    model = nn.Sequential(ConvBlock(), ConvBlock())
    x, optimizer = torch.randn(8, 3, 5), torch.optim.SGD(model.parameters(), lr=0.1)
    ax.grow(model, ax.Repeat(""), optimizer, probe=x)
    seen: list = []
    for _ in range(80):
        seen = [x]
        for block in model:
            seen.append(block(seen[-1]))
    for block, given in zip(model, seen[:-1], strict=True):
        mean = block.conv(given).mean((0, 2))
        assert torch.allclose(block.norm.running_mean, mean, atol=1e-3)
    assert not torch.allclose(model[0].norm.running_mean, model[2].norm.running_mean, atol=1e-3)


def test_lists_with_one_module_at_several_places_are_followed():
    def shared():
        model = Net()
        model.blocks = nn.ModuleList([Block()] * 3)
        return model

    run = train(made(shared), 2)
    grow(run, ax.Repeat("blocks", blocks=(0, 1)))
    grow(run, ax.Remove("blocks.2"))
    train(run, 1)
    assert len(run[0].blocks) == 3 and len(list(run[0].blocks.parameters())) == 6
    before = run[0](X)
    grow(run, ax.Untie("blocks"))
    assert torch.equal(run[0](X), before) and len(list(run[0].blocks.parameters())) == 18
    ax.verify(*run)
    train(run, 1)


def test_what_other_edits_do_where_blocks_share_weights():
    run = train(made(), 2)
    grow(run, ax.Repeat("blocks", blocks=(1, 3)))
    with pytest.raises(ax.GrowthError, match=r"blocks\.4 shares all its weights with blocks\.2.*Untie\('blocks'\)"):
        grow(run, ax.Duplicate("blocks", by=1))
    grow(run, ax.Duplicate("blocks", order=[0, 0, 1, 2, 3, 4]))  # a block that has weights of its own
    assert grow(run, ax.Remove("blocks.4")).added_parameters == 0
    before = run[0](X)
    grow(run, ax.Widen("blocks.3.up", by=4))
    assert torch.allclose(run[0](X), before, atol=1e-6)
    assert [block.up.out_features for block in run[0].blocks] == [16, 16, 16, 20, 20]
    assert run[0].blocks[3].up.weight is run[0].blocks[4].up.weight
    assert "Duplicate('blocks')" not in {fit for site in ax.sites(run[0], X) for fit in site.fits}
    train(run, 2)
    ax.verify(*run)


BAD = {
    "behind the end": (Net, ax.Repeat("blocks", blocks=(2, 5)), r"'blocks' holds 3 blocks; .* 0 <= i < j <= 3"),
    "an empty range": (Net, ax.Repeat("blocks", blocks=(2, 2)), "0 <= i < j <= 3"),
    "a number": (Net, ax.Repeat("blocks", blocks=1), "0 <= i < j <= 3"),
    "widths": (lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh()), ax.Repeat(""), r"(?s)16x8 and 4x8.*widths must fit"),
    "added": (Added, ax.Repeat("blocks", fade=9), r"fade-in was to keep them.*fade=0 would accept that"),
    "a fade that no shape fits": (
        lambda: nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), ax.Repeat("", fade=9), "cannot fade in: .*fade=0 runs",
    ),
    "nothing shared": (Net, ax.Untie("blocks"), r"no two blocks of 'blocks' run the same weights.*Repeat\('blocks'\)"),
    "no list": (Net, ax.Repeat("head"), "'head' is a Linear, not a container"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_refused_by_name_and_nothing_changes(name):
    build, edit, words = BAD[name]
    run = made(build)
    before = [(key, id(value), value.clone()) for key, value in run[0].state_dict(keep_vars=True).items()]
    with pytest.raises(ax.GrowthError, match=words):
        grow(run, edit)
    after = run[0].state_dict(keep_vars=True)
    assert list(after) == [key for key, _, _ in before]
    assert all(id(after[key]) == i and torch.equal(after[key], value) for key, i, value in before)


WORDS = {
    "once": (ax.Repeat, {"times": 1}, "times is how often the blocks run in all, a whole number from 2"),
    "another order": (ax.Repeat, {"order": "last"}, r"order is 'stack' \(ABAB\) or 'interleave' \(AABB\)"),
    "a fade": (ax.Repeat, {"fade": -1}, "fade is a number of optimizer steps"),
    "another state": (ax.Untie, {"state": "half"}, "state is one of 'copy', 'fresh'"),
}


@pytest.mark.parametrize("name", WORDS)
def test_a_word_that_means_nothing_is_refused_where_it_is_written(name):
    edit, words, match = WORDS[name]
    with pytest.raises(ax.GrowthError, match=match):
        edit("blocks", **words)


def llama():
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=41, hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1)
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=2, **sizes)).eval()


def test_blocks_of_a_language_model_keep_their_caches_apart():
    model, ids = llama(), torch.randint(3, 41, (2, 8), generator=torch.Generator().manual_seed(0))
    with pytest.raises(ax.GrowthError, match="save_pretrained refuses.*stock=False; after Untie it is stock again"):
        ax.grow(model, ax.Repeat("model.layers"), probe={"input_ids": ids})
    cache = pytest.importorskip("transformers").StaticCache(config=model.config, max_cache_len=16)
    with pytest.raises(ax.GrowthError, match="the cache in the probe has places for the old blocks alone"):
        given = {"input_ids": ids, "past_key_values": cache}
        ax.grow(model, ax.Repeat("model.layers"), probe=given, stock=False)
    assert len(model.model.layers) == model.config.num_hidden_layers == 2
    ax.grow(model, ax.Repeat("model.layers"), probe={"input_ids": ids}, stock=False)
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3]
    how = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    made = [model.generate(ids, use_cache=use, **how) for use in (True, False)]
    made.append(model.generate(ids, cache_implementation="static", **how))
    assert all(torch.equal(one, made[0]) for one in made)
    ax.grow(model, ax.Untie("model.layers"), probe={"input_ids": ids})  # which checks that it is stock


class Tied(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        if tied:
            self.blocks[1].weight, self.blocks[1].bias = self.blocks[0].weight, self.blocks[0].bias

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def test_a_journal_that_copies_a_tied_block_says_that_it_cannot_be_rebuilt(tmp_path):
    def run(tied):
        model = Tied(tied)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        edit = ax.Duplicate("blocks", by=1)
        return edit, ax.Grower(model, optimizer, edits=edit, when=ax.when.every(10**9), probe=torch.randn(3, 4))

    edit, grower = run(False)
    grower.grow(edit)
    ax.save(grower, tmp_path)
    match = (
        r"growth 0 of the journal .*: the journal copies blocks\.1, which shares all its weights with blocks\.0 here\. "
        r"If they were not shared in that run, .*an earlier version of auxin wrote this.*torch\.save\(model\.state_d"
    )
    _, other = run(True)
    with pytest.raises(ax.GrowthError, match=match) as caught:
        ax.load(tmp_path, other)
    assert "Untie" not in str(caught.value) and len(other.model.blocks) == 2
