"""A small BERT-like encoder (post-norm, with an attention mask by keyword) and a run of it, for every test here."""

import functools
import sys

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import auxin as ax

WIDTH = 8
FADE = 6


class Layer(nn.Module):
    """norm(x + attention(x)), then norm(x + mlp(x)); returns a tuple, as BERT's layers do."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.drop = nn.Dropout(0.1)

    def forward(self, hidden, mask=None):
        mixed, weights = self.attention(hidden, hidden, hidden, key_padding_mask=mask)
        hidden = self.norm1(hidden + self.drop(mixed))
        return self.norm2(hidden + self.drop(self.down(nn.functional.gelu(self.up(hidden))))), weights


class Bert(nn.Module):
    def __init__(self, depth=2):
        super().__init__()
        self.embed, self.places = nn.Embedding(11, WIDTH), nn.Embedding(5, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(depth))
        self.head = nn.Linear(WIDTH, 11)

    def forward(self, tokens, mask=None):
        hidden = self.norm(self.embed(tokens) + self.places.weight[: tokens.shape[1]])
        for layer in self.layers:
            hidden = layer(hidden, mask=mask)[0]
        return self.head(hidden)


class Run:
    """Network, optimizer, schedule, average, grower; data from the global generator."""

    def __init__(self, rewarm=0, use_buffers=False, keep=False, **fields):
        torch.manual_seed(0)
        self.model = Bert()
        with torch.no_grad():
            for p in self.model.parameters():
                p.add_(0.05 * torch.randn(p.shape))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, weight_decay=0.1)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 100)
        average = functools.partial(AveragedModel, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)
        self.average = average(self.model)
        self.probe = torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(1))
        self.edit = ax.Duplicate("layers", by=1, **({"fade": FADE} | fields))
        self.grower = ax.Grower(
            self.model,
            self.optimizer,
            self.schedule,
            self.average,
            edits=self.edit,
            when=ax.when.every(10**6),
            probe=self.probe,
            rewarm=rewarm,
            keep=keep,
        )

    def train(self, steps):
        losses = []
        for _ in range(steps):
            tokens = torch.randint(0, 11, (4, 5))
            loss = nn.functional.cross_entropy(self.model(tokens).transpose(1, 2), tokens.roll(1, 1))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            self.average.update_parameters(self.model)
            losses.append(loss.item().hex())
        return losses

    def outputs(self, model=None):
        model = model or self.model
        modes = model.training
        model.eval()
        with torch.no_grad():
            out = model(self.probe)
        model.train(modes)
        return out


if __name__ == "__main__":  # python bert.py FOLDER REWARM STEPS: resume and print the losses
    import bert  # classes under the name that they have in the tests

    torch.set_num_threads(1)
    run = bert.Run(rewarm=int(sys.argv[2]))
    ax.load(sys.argv[1], run.grower)
    print(*run.train(int(sys.argv[3])))
