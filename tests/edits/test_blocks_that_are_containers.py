"""Blocks that forward takes apart: ``for attention, feedforward in self.layers``; nothing ever calls them."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import auxin as ax
from auxin import GrowthError


def feed(d: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))


class Attention(nn.Module):
    def __init__(self, d: int = 8):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(d), nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d)

    def forward(self, x: Tensor, mask: Tensor | None = None, rope: nn.Module | None = None) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        if rope is not None:
            q, k = rope(q), rope(k)
        return self.out(functional.scaled_dot_product_attention(q, k, v, attn_mask=mask))


class Scale(nn.Module):
    """Shared by all blocks and held by the network, as a rotary embedding is."""

    def __init__(self, d: int = 8):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


def pair() -> nn.ModuleList:
    return nn.ModuleList([Attention(), feed()])


def triple() -> nn.ModuleList:
    return nn.ModuleList([Attention(), nn.Conv1d(8, 8, 3, padding=1), feed()])


def named() -> nn.ModuleDict:
    return nn.ModuleDict({"attention": Attention(), "norm": nn.LayerNorm(8), "ffn": feed()})


class Held(nn.Module):
    """A block with a forward that nothing calls: the network goes by its parts."""

    def __init__(self):
        super().__init__()
        self.attention, self.feed = Attention(), feed()


class Over(nn.Module):
    """A list of blocks between two layers."""

    block: Any = staticmethod(pair)

    def __init__(self, depth: int = 2):
        super().__init__()
        self.stem, self.head = nn.Linear(4, 8), nn.Linear(8, 2)
        self.layers = nn.ModuleList(self.block() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.layers:
            x = self.step(block, x)
        return self.head(x)

    def step(self, block: Any, x: Tensor) -> Tensor:
        attention, feedforward = block
        x = x + attention(x)
        return x + feedforward(x)


class VisionTransformer(Over):
    """As in vit-pytorch: a transformer module with the list inside, and a last norm."""

    class Transformer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.layers = nn.LayerNorm(8), nn.ModuleList([])
            for _ in range(2):
                self.layers.append(nn.ModuleList([Attention(), feed()]))

        def forward(self, x: Tensor) -> Tensor:
            for attention, feedforward in self.layers:
                x = attention(x) + x
                x = feedforward(x) + x
            return self.norm(x)

    def __init__(self):
        super().__init__()
        self.layers = None
        self.transformer = self.Transformer()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.transformer(self.stem(x)))


class Triples(Over):
    block = staticmethod(triple)

    def step(self, block: Any, x: Tensor) -> Tensor:
        attention, convolution, feedforward = block
        x = x + attention(x)
        x = x + convolution(x.mT).mT
        return x + feedforward(x)


class Named(Over):
    """As in rtdl's FT-Transformer: dictionaries with norms between, the first block going without one."""

    block = staticmethod(named)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for index, layer in enumerate(self.layers):
            residual = x if index == 0 else layer["norm"](x)
            x = x + layer["attention"](residual)
            x = x + layer["ffn"](x)
        return self.head(x)


class ByNumber(Over):
    """A stored depth counts the pairs."""

    def __init__(self):
        super().__init__()
        self.depth = 2

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i in range(self.depth):
            x = x + self.layers[i][0](x)
            x = x + self.layers[i][1](x)
        return self.head(x)


class Zipped(Over):
    """As in x-transformers: norms, a branch, and what stands behind it or None."""

    block = staticmethod(lambda: nn.ModuleList([nn.ModuleList([nn.LayerNorm(8), nn.Identity()]), Attention(), None]))

    def step(self, block: Any, x: Tensor) -> Tensor:
        (before, after), branch, _ = block
        return x + after(branch(before(x)))


class Shared(Over):
    """Each pair holds what all of them share."""

    def __init__(self):
        super().__init__()
        self.rope = Scale()
        for block in self.layers:
            block.append(self.rope)

    def step(self, block: Any, x: Tensor) -> Tensor:
        attention, feedforward, rope = block
        x = x + attention(x, rope=rope)
        return x + feedforward(x)


class ByParts(Over):
    block = Held

    def step(self, block: Any, x: Tensor) -> Tensor:
        x = x + block.attention(x)
        return x + block.feed(x)


class Tuples(Over):
    """A Sequential as a pair: it could be called, and is not."""

    block = staticmethod(lambda: nn.Sequential(Attention(), feed()))


X = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
NETWORKS = [Over, VisionTransformer, Triples, Named, ByNumber, Zipped, Shared, ByParts, Tuples]


def place(net: nn.Module) -> str:
    return "transformer.layers" if isinstance(net, VisionTransformer) else "layers"


def trained(kind: type[nn.Module]) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = kind()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    step(net, optimizer, 3)
    return net, optimizer


def step(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        net(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("by", [1, 2])
def test_copies(kind: type[nn.Module], by: int) -> None:
    net, optimizer = trained(kind)
    before = net(X)
    change = ax.grow(net, ax.Duplicate(place(net), by=by), optimizer, probe=X)
    blocks = net.get_submodule(place(net))
    assert isinstance(blocks, nn.ModuleList)
    assert len(blocks) == 2 + by
    assert change.how == "last writers zero"
    torch.testing.assert_close(net(X), before, rtol=0, atol=0)
    ax.verify(net, optimizer)
    born = dict(change.added)
    step(net, optimizer, 4)
    for path, new in born.items():
        source = net.get_submodule(new.source or "")
        pairs = zip(new.module.parameters(), source.parameters(), strict=True)
        assert all(p is q or not torch.equal(p, q) for p, q in pairs), path
        assert any(p.any() for name, p in new.module.named_parameters() if name in new.zeroed)


@pytest.mark.parametrize("kind", NETWORKS)
def test_copies_that_are_kept_as_they_are(kind: type[nn.Module]) -> None:
    net, optimizer = trained(kind)
    change = ax.grow(net, ax.Duplicate(place(net), by=1, output="keep"), optimizer, probe=X)
    assert (change.max_difference or 0) > 1e-4


LISTS = [(Over, pair), (VisionTransformer, pair), (Triples, triple), (ByNumber, pair)]


@pytest.mark.parametrize(
    ("kind", "layer", "index"), [(*each, index) for each in LISTS for index in (0, 1, None)] + [(Named, named, 1)]
)
def test_new_ones(kind: type[nn.Module], layer: Any, index: int | None) -> None:
    net, optimizer = trained(kind)
    before = net(X)
    change = ax.grow(net, ax.Insert(place(net), layer, index=index), optimizer, probe=X)
    assert change.how == "last writers zero"
    torch.testing.assert_close(net(X), before, rtol=0, atol=0)
    step(net, optimizer, 2)


def test_a_new_one_before_what_goes_another_way_at_the_front() -> None:
    net, optimizer = trained(Named)
    with pytest.raises(GrowthError, match="no zeroing of its tensors keeps what the network computes") as raised:
        ax.grow(net, ax.Insert("layers", named, index=0), optimizer, probe=X)
    assert "init='default'" in str(raised.value)
    ax.grow(net, ax.Insert("layers", named, index=0, init="default"), optimizer, probe=X)
    assert len(net.layers) == 3


@pytest.mark.parametrize("kind", [Over, Named])
def test_by_hand(kind: type[nn.Module]) -> None:
    net, optimizer = trained(kind)
    with ax.surgery(net, optimizer, probe=X) as done:
        net.layers.append(kind.block())
    assert done.change is not None
    assert not done.change.notes
    with pytest.raises(GrowthError, match=r"idle: the network's forward never calls it"):
        with ax.surgery(net, optimizer, probe=X):
            net.idle = kind.block()


def test_what_shared_parts_run_is_not_what_a_block_runs() -> None:
    """The network calls what the idle pair shares with it, not the pair."""
    net, optimizer = trained(Shared)
    with pytest.raises(GrowthError, match=r"idle: the network's forward never calls it"):
        with ax.surgery(net, optimizer, probe=X):
            net.idle = nn.ModuleList([Attention(), net.rope])


def post() -> nn.ModuleList:
    return nn.ModuleList([Attention(), nn.LayerNorm(8), feed(), nn.LayerNorm(8)])


class Post(Over):
    """A norm after each sum: no copy keeps what the network computes."""

    block = staticmethod(post)

    def step(self, block: Any, x: Tensor) -> Tensor:
        attention, first, feedforward, second = block
        x = first(x + attention(x))
        return second(x + feedforward(x))


def test_what_cannot_keep_the_function_says_what_would_run() -> None:
    net, optimizer = trained(Post)
    wording = r"the network's forward calls the parts of layers\.1.*output='keep' would run and change the function"
    with pytest.raises(GrowthError, match=wording):
        ax.grow(net, ax.Duplicate("layers", by=1), optimizer, probe=X)
    with pytest.raises(GrowthError, match=r"calls the parts of what stands there.*init='default'"):
        ax.grow(net, ax.Insert("layers", post), optimizer, probe=X)
    ax.grow(net, ax.Duplicate("layers", by=1, output="keep"), optimizer, probe=X)
    ax.grow(net, ax.Insert("layers", post, init="default"), optimizer, probe=X)
    assert len(net.layers) == 4


def test_a_head_of_zeros_hides_nothing() -> None:
    """What the network returns is zero with and without a copy; what arrives at the head is not."""
    net, optimizer = trained(Over)
    with torch.no_grad():
        net.head.weight.zero_()
    change = ax.Duplicate("layers", by=1, output="zero")
    with pytest.raises(GrowthError, match="still learns|no gradient"):
        ax.grow(net, change, optimizer, probe=X)
    with torch.no_grad():
        net.head.weight.normal_()
    ax.grow(net, change, optimizer, probe=X)
    assert len(net.layers) == 3


def test_the_second_copy_needs_no_probe() -> None:
    net, optimizer = trained(Over)
    grower = ax.Grower(net, optimizer, edits=ax.Duplicate("layers", by=1), when=ax.when.every(1), probe=X)
    assert grower.step(1.0)
    net.train()
    assert grower.step(1.0)
    assert len(net.layers) == 4


def test_a_wrong_width_is_told() -> None:
    net, optimizer = trained(Over)
    wide = functools.partial(nn.Linear, 9, 9)
    with pytest.raises(GrowthError, match=r"Insert\(at='layers', index=2\): Linear"):
        ax.grow(net, ax.Insert("layers", wide), optimizer, probe=X)


def test_nothing_is_left_behind() -> None:
    net, optimizer = trained(Post)
    before = {name: p.clone() for name, p in net.state_dict().items()}
    modules = dict(net.named_modules())
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]
    for edit in (ax.Duplicate("layers", by=1), ax.Insert("layers", post)):
        with pytest.raises(GrowthError):
            ax.grow(net, edit, optimizer, probe=X)
    assert dict(net.named_modules()) == modules
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()] == hooks
    assert all(m.training for m in net.modules())
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("kind", NETWORKS)
def test_sites_offer_the_list_and_no_place_inside_a_block(kind: type[nn.Module]) -> None:
    net, optimizer = trained(kind)
    found = {site.at: site.fits for site in ax.sites(net, X)}
    at = place(net)
    assert f"Insert({at!r}, layer)" in found[at]
    assert f"Duplicate({at!r})" in found[at]
    assert not any(fit.startswith(("Duplicate", "Insert")) for fit in found[f"{at}.0"])


def test_sites_still_offer_stages() -> None:
    """A list of lists that forward iterates over: each of them takes one more."""

    class Stages(Over):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for stage in self.layers:
                for block in stage:
                    x = x + block(x)
            return self.head(x)

    net, _ = trained(Stages)
    found = {site.at: site.fits for site in ax.sites(net, X)}
    assert "Insert('layers.0', layer)" in found["layers.0"]
