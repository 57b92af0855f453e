"""`auxin doctor` on twenty real architectures and five networks as people write them: what it says of each is so."""

import copy
import functools
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from architectures import QUICK
from models import build
from torch import Tensor, nn

import auxin as ax
from auxin.anatomy.hugging_face.stock import is_stock
from auxin.anatomy.probe import tensors_in
from auxin.doctor import Examination, Finding, examine

pytest.importorskip("transformers")


class Residual(nn.Module):
    """A convolution beside its input, with a bottleneck of squeeze-and-excitation."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.squeeze, self.excite = nn.Linear(channels, 2), nn.Linear(2, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        scale = torch.sigmoid(self.excite(torch.relu(self.squeeze(y.mean((2, 3))))))
        return torch.relu(x + y * scale[:, :, None, None])


class Pictures(nn.Module):
    """A small residual network for pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(Residual(8), Residual(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class UNet(nn.Module):
    """Down, up, and the fine picture beside the coarse one."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 12, 3, stride=2, padding=1)
        self.up, self.out = nn.ConvTranspose2d(12, 6, 2, stride=2), nn.Conv2d(12, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        fine = torch.relu(self.down1(x))
        return self.out(torch.cat([fine, torch.relu(self.up(torch.relu(self.down2(fine))))], 1))


class Words(nn.Module):
    """An LSTM of two layers over embeddings, and a share of the head's width that a constant holds fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.lstm = nn.LSTM(8, 12, num_layers=2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.table(ids))[0][:, -1].reshape(-1, 3, 4).sum(1))


class Forecaster(nn.Module):
    """Dilated convolutions that look back only."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Conv1d(2, 8, 1)
        self.layers = nn.ModuleList(nn.Conv1d(8, 8, 2, dilation=2**i) for i in range(3))
        self.norms = nn.ModuleList(nn.GroupNorm(2, 8) for _ in range(3))
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + torch.relu(norm(layer(nn.functional.pad(x, (layer.dilation[0], 0)))))
        return self.out(x[..., -1])


class Siamese(nn.Module):
    """One encoder for both of a pair, which an attention over the batch joins."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.LayerNorm(10), nn.Linear(10, 8))
        self.both = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Bilinear(8, 8, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = self.encoder(a)[None], self.encoder(b)[None]
        return self.out(a[0], self.both(a, b, b)[0][0])


OWN = {
    "pictures": (Pictures, lambda: (torch.randn(4, 3, 8, 8),)),
    "unet": (UNet, lambda: (torch.randn(2, 1, 8, 8),)),
    "words": (Words, lambda: (torch.randint(20, (4, 6)),)),
    "forecaster": (Forecaster, lambda: (torch.randn(4, 2, 9),)),
    "siamese": (Siamese, lambda: (torch.randn(4, 6), torch.randn(4, 6))),
}


def own(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    torch.manual_seed(0)
    kind, batch = OWN[name]
    return kind().eval(), batch(), {}


def outputs(model: nn.Module, probe: Any) -> list[Tensor]:
    torch.manual_seed(1)
    with torch.no_grad():
        out = model(**probe) if isinstance(probe, dict) else model(*probe)
    return [one for one in tensors_in(out) if one.is_floating_point()]


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, probe: Any) -> None:
    model.train()
    for _ in range(2):
        out = model(**probe) if isinstance(probe, dict) else model(*probe)
        loss = sum(one.pow(2).mean() for one in tensors_in(out) if one.is_floating_point() and one.requires_grad)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def check_that_it_works(told: Finding, model: nn.Module, probe: Any) -> None:
    """It grows, keeps the function where that is promised, and its new parameters train."""
    net = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    before, size = outputs(net, probe), sum(p.numel() for p in net.parameters())
    change = ax.grow(net, told.edit, optimizer, probe=probe, stock=told.stock)
    new = sum(p.numel() for p in net.parameters()) - size
    assert f"+{new:,} parameters" in told.words
    if "function unchanged" in told.words:
        for old, now in zip(before, outputs(net, probe), strict=True):
            torch.testing.assert_close(now, old, rtol=1e-4, atol=1e-4 * max(1.0, float(old.abs().max())))
    added = {n for path, _ in change.added for n, _ in net.named_parameters() if n.startswith(f"{path}.")}
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    trained(net, optimizer, probe)
    now = dict(net.named_parameters())
    assert any(not torch.equal(now[name], old) for name, old in start.items() if not added or name in added)
    assert {id(p) for p in net.parameters()} == {id(p) for one in optimizer.param_groups for p in one["params"]}


def check_that_it_does_not(told: Finding, model: nn.Module, probe: Any) -> None:
    """It is refused, and so is what is said of a width, by each size that one could ask for."""
    net = copy.deepcopy(model)
    at = told.subject.removeprefix("width of ").strip("'")
    edits = [told.edit] if told.edit is not None else [ax.Widen(at, by=by) for by in (1, 2, 4, 8, 16, 32)]
    for edit, held in ((edit, held) for edit in edits for held in (True, False)):
        with pytest.raises(ax.GrowthError):
            ax.grow(net, edit, torch.optim.AdamW(net.parameters()), probe=probe, stock=held, dry_run=True)


def findings(found: Examination) -> Iterator[tuple[Finding, bool]]:
    yield from ((one, one.works) for one in (*found.edits, *found.widths))


def check(make: Any) -> Examination:
    model, args, kwargs = make()
    probe = kwargs or args
    for gain in (p for p in model.parameters() if p.dim() == 1 and p.unique().numel() == 1):
        gain.data *= 1 + 0.1 * torch.rand_like(gain)  # as in training: what holds only until then does not work
    started, used = time.perf_counter(), time.process_time()
    found = examine(model, torch.optim.AdamW(model.parameters()), probe=probe)
    print(f"\n{time.perf_counter() - started:.1f} s ({time.process_time() - used:.1f} s of a processor) for {found}")
    assert all(one.works for one in found.companions)
    assert len({one.subject for one in found.edits}) == len(found.edits)
    for told, works in findings(found):
        (check_that_it_works if works else check_that_it_does_not)(told, model, probe)
    return found


@pytest.mark.long
@pytest.mark.parametrize("name", QUICK)
def test_what_it_says_of_real_architectures_is_so(name: str) -> None:
    found = check(functools.partial(build, name))
    assert found.works


@pytest.mark.long
@pytest.mark.parametrize("name", OWN)
def test_what_it_says_of_networks_as_people_write_them_is_so(name: str) -> None:
    assert check(functools.partial(own, name)).works


def test_what_is_in_the_way_of_a_plain_file_is_told_and_passed() -> None:
    model, _, kwargs = build("openai-gpt")
    found = examine(model, torch.optim.AdamW(model.parameters()), probe=kwargs)
    told = next(one for one in found.edits if one.subject == "Duplicate('transformer.h', by=1)")
    assert is_stock(model) and told.works and not told.stock and told.words.startswith("with stock=False, +")
    assert str(found).endswith("rewarm=50, probe=batch, stock=False)")
    check_that_it_works(told, model, kwargs)
