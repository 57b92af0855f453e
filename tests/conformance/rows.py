"""The rows of the table: every edit that fits a family, by name. A new edit is one new line here."""

import functools
from dataclasses import replace
from functools import partial

import families as f
import torch
from torch import nn

from auxin import After, Duplicate, Insert, Repeat, Untie, Wake, Widen
from auxin.edits.remove import Remove
from auxin.edits.replace import Replace

BLOCKS = {
    "mlp": f.MlpBlock,
    "cnn": f.ConvBlock,
    "gpt": partial(f.GptBlock, heads=2),
    "encoder": f.encoder_layer,
    "lstm": f.LstmBlock,
    "tcn": partial(f.TcnBlock, dilation=2),
}
STEMS = {
    "mlp": partial(nn.Linear, f.WIDTH, f.WIDTH),
    "cnn": partial(nn.Conv2d, f.WIDTH, f.WIDTH, 3, padding=1),
    "encoder": partial(nn.Linear, f.WIDTH, f.WIDTH),
    "lstm": partial(nn.Linear, f.WIDTH, f.WIDTH),
    "tcn": partial(nn.Conv1d, f.WIDTH, f.WIDTH, 3, padding=1),
}
INNER = {  # a module inside a block, behind which a layer is a child of it
    "mlp": "blocks.1.up",
    "cnn": "blocks.1.conv2",
    "gpt": "blocks.1.out",
    "encoder": "blocks.1.linear1",
    "lstm": "blocks.1.norm",
    "tcn": "blocks.1.conv1",
}
WIDER = {  # a module inside every block, whose output gets wider
    "mlp": ("blocks.*.up", 5),
    "cnn": ("blocks.*.conv1", 3),
    "gpt": ("blocks.*.mlp.0", 4),
    "encoder": ("blocks.*.linear1", 4),
    "lstm": ("blocks.*.lstm", 2),
    "tcn": ("blocks.*.conv1", 3),
}

KEPT = {
    "interleave": Duplicate("blocks", by=1),
    "double": Duplicate("blocks"),
    "stack": Duplicate("blocks", order="stack"),
    "middle": Duplicate("blocks", by=1, order="middle"),
    "last": Duplicate("blocks", by=1, order="last", state="copy"),
    "list": Duplicate("blocks", order=[0, 0, 1, 1, 1], state="copy"),
    "fresh": Duplicate("blocks", by=1, content="fresh"),
}
CHANGED = {
    "keep": Duplicate("blocks", by=1, output="keep"),
    "keep-stack": Duplicate("blocks", order="stack", output="keep", state="copy"),
    "keep-fresh": Duplicate("blocks", order="last", content="fresh", output="keep"),
}


def by_hand_block(model: nn.Module) -> None:
    """What people write: a ready block into the container."""
    block = BLOCKS[next(name for name, kind in f.FAMILIES.items() if type(model) is kind)]()
    if isinstance(model.blocks, nn.ModuleDict):
        model.blocks["2"] = block
    else:
        model.blocks.insert(1, block)


def by_hand_head(model: nn.Module) -> None:
    """Another head."""
    model.head = nn.Linear(f.WIDTH, 5)


def by_hand_resize(model: nn.Module) -> None:
    """More rows for an embedding, the old ones first."""
    old = model.places
    model.places = nn.Embedding(9, f.WIDTH, sparse=old.sparse)
    with torch.no_grad():
        model.places.weight[:6] = old.weight


class Adapter(nn.Module):
    """A narrow detour around an old layer."""

    def __init__(self, inner: nn.Linear):
        super().__init__()
        self.inner = inner
        self.down = nn.Linear(inner.in_features, 2, bias=False)
        self.up = nn.Linear(2, inner.out_features, bias=False)

    def forward(self, x):
        return self.inner(x) + self.up(self.down(x))


def by_hand_adapter(model: nn.Module) -> None:
    """An adapter in every block."""
    for block in model.blocks:
        block.down = Adapter(block.down)


@functools.cache
def rows(family: str) -> dict:
    """Name -> edit, or a function that changes the network by hand."""
    block = BLOCKS[family]
    found: dict = dict(KEPT)
    found |= CHANGED
    found["insert"] = Insert("blocks", block, index=1)
    found["insert-end"] = Insert("blocks", block)
    found["insert-front"] = Insert("blocks", block, index=-2)
    found["insert-default"] = Insert("blocks", block, index=1, init="default")
    found["insert-kaiming"] = Insert("blocks", block, index=0, init="kaiming")
    if family in STEMS:
        found["identity"] = Insert("stem", STEMS[family], init="identity")
        found["stem-default"] = Insert("stem", STEMS[family], init="default")
    if family in STEMS and family != "encoder":
        found["stem-preserve"] = Insert("stem", STEMS[family])
    if family == "tcn":
        found["named"] = Insert("named", block, key="middle", before="last")
    found["after"] = After("head")
    found["after-block"] = After("blocks.0", block)
    found["after-inside"] = After(INNER[family])
    found["replace"] = Replace("blocks.1", block)
    found["widen"] = Widen(WIDER[family][0], by=WIDER[family][1])
    found["remove"] = Remove("blocks.0")
    found["repeat"] = Repeat("blocks")
    if family in ("mlp", "encoder"):
        found["fading-repeat"] = Repeat("blocks", blocks=(0, 1), times=3, order="interleave", fade=15)
    found["untie"] = Untie("blocks")  # of a network whose blocks were let run again
    found["by-hand-block"] = by_hand_block
    if family in ("mlp", "cnn", "encoder", "lstm"):
        found["by-hand-head"] = by_hand_head
    if family == "mlp":
        found["wake"] = Wake("extra")
        found["by-hand-adapter"] = by_hand_adapter
    if family == "gpt":
        found["by-hand-resize"] = by_hand_resize
    if family == "encoder":  # post-norm: what keeps the function fades in, within the shortest schedule
        found = {name: replace(edit, fade=15) if hasattr(edit, "fade") else edit for name, edit in found.items()}
    return found


REFUSED = {
    "zero": Duplicate("blocks", by=1, fade=0),
    "insert": Insert("blocks", f.encoder_layer, fade=0),
}
