"""Six small networks as people write them, each with the edits that fit it."""

import torch
from torch import nn
from torch.nn import functional as F

from auxin import Dormant

WIDTH = 8


class MlpBlock(nn.Module):
    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.dropout = nn.Dropout(0.1)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(self.dropout(torch.tanh(self.up(self.norm(x)))))


class Mlp(nn.Module):
    """Blocks in a Sequential, behind a plain stem; a layer sleeps behind them."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(5, WIDTH), nn.ReLU())
        self.blocks = nn.Sequential(MlpBlock(), MlpBlock())
        self.extra = Dormant(nn.Linear(WIDTH, WIDTH))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        return self.head(self.extra(self.blocks(self.stem(x))))


class ConvBlock(nn.Module):
    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x):
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Cnn(nn.Module):
    """A residual network with batch norm; the blocks stand in a Sequential."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU())
        self.blocks = nn.Sequential(ConvBlock(), ConvBlock())
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class GptBlock(nn.Module):
    def __init__(self, width: int = WIDTH, heads: int = 2, dropout: float = 0.1):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width), nn.Dropout(dropout)
        )

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm2(x))


class Gpt(nn.Module):
    """Pre-norm, causal, with a head that shares the embedding's weight; the blocks stand in a ModuleList."""

    def __init__(self, sparse: bool = False):
        super().__init__()
        self.tokens = nn.Embedding(11, WIDTH)
        self.places = nn.Embedding(6, WIDTH, sparse=sparse)
        self.blocks = nn.ModuleList([GptBlock(), GptBlock()])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x):
        x = self.tokens(x) + self.places(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Encoder(nn.Module):
    """Post-norm layers of torch, of which no zeroing makes the identity."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(5, WIDTH))
        self.blocks = nn.ModuleList([encoder_layer(), encoder_layer()])
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.1, batch_first=True)


class LstmBlock(nn.Module):
    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        return x + self.out(self.lstm(self.norm(x))[0])


class Lstm(nn.Module):
    """Residual LSTM blocks in a ModuleDict with numeric keys, as torchtitan keeps its layers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(5, WIDTH), nn.ReLU())
        self.blocks = nn.ModuleDict({"0": LstmBlock(), "1": LstmBlock()})
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks.values():
            x = block(x)
        return self.head(x[:, -1])


class TcnBlock(nn.Module):
    def __init__(self, width: int = WIDTH, dilation: int = 2):
        super().__init__()
        self.pad = 2 * dilation
        self.conv1 = nn.Conv1d(width, width, 3, dilation=dilation)
        self.conv2 = nn.Conv1d(width, width, 3, dilation=dilation)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        y = self.dropout(F.leaky_relu(self.conv1(F.pad(x, (self.pad, 0)))))
        return x + self.conv2(F.pad(y, (self.pad, 0)))


class Tcn(nn.Module):
    """Causal dilated convolutions in a ModuleList, and steps with names in a ModuleDict and a Sequential."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(3, WIDTH, 1), nn.ReLU())
        self.blocks = nn.ModuleList([TcnBlock(dilation=1), TcnBlock(dilation=2)])
        self.named = nn.ModuleDict({"first": TcnBlock(dilation=1), "last": TcnBlock(dilation=1)})
        self.head = nn.Conv1d(WIDTH, 1, 1)

    def forward(self, x):
        x = self.stem(x)
        for block in (*self.blocks, *self.named.values()):
            x = block(x)
        return self.head(x)[..., -1]


FAMILIES = {"mlp": Mlp, "cnn": Cnn, "gpt": Gpt, "encoder": Encoder, "lstm": Lstm, "tcn": Tcn}


def build(family: str, dtype: torch.dtype = torch.float32, **arguments) -> nn.Module:
    """The network with weights, biases, gains and statistics that hide nothing."""
    generator = torch.Generator().manual_seed(7)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = FAMILIES[family](**arguments)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.add_(0.1 * torch.randn(b.shape, generator=generator))
            elif name.endswith("running_var"):
                b.mul_(1 + 0.3 * torch.rand(b.shape, generator=generator))
    return model.to(dtype)


def batch(family: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Inputs that fit it."""
    generator = torch.Generator().manual_seed(5)
    if family == "gpt":
        return torch.randint(0, 11, (3, 6), generator=generator)
    shape = {"mlp": (6, 5), "cnn": (4, 2, 5, 5), "encoder": (3, 4, 5), "lstm": (3, 4, 5), "tcn": (3, 3, 9)}[family]
    return torch.randn(shape, generator=generator).to(dtype)
