"""Layers that your own code adds, and code of others: `ax.surgery` follows whatever happens inside of the `with` block.

    python examples/own_surgery.py

The network has its own method that grows it. Called alone, that method would leave the new layer out of the optimizer
and of the average, without an error. Inside `ax.surgery` both keep step, and if the method fails all is put back.
"""

import importlib.util

import torch
from torch import nn

import auxin as ax


class Classifier(nn.Module):
    def __init__(self, features=10, hidden=20, classes=3):
        super().__init__()
        self.hidden = nn.ModuleList([nn.Linear(features, hidden)])
        self.head = nn.Linear(hidden, classes)

    def forward(self, x):
        for layer in self.hidden:
            x = torch.relu(layer(x))
        return self.head(x)

    def add_layer(self, width):
        """Your own surgery: another hidden layer, and a new head behind it."""
        self.hidden.append(nn.Linear(self.head.in_features, width))
        self.head = nn.Linear(width, self.head.out_features)

    def add_class(self):
        """More classes: a wider head that keeps what the old one has learned."""
        old, self.head = self.head, nn.Linear(self.head.in_features, self.head.out_features + 1)
        with torch.no_grad():
            self.head.weight[:-1], self.head.bias[:-1] = old.weight, old.bias


def train(model, opt, ema, steps=30):
    for _ in range(steps):
        x = torch.randn(64, 10)
        loss = nn.functional.cross_entropy(model(x), x[:, :3].argmax(1))
        opt.zero_grad()
        loss.backward()
        opt.step()
        ema.update_parameters(model)
    opt.zero_grad()
    return loss.item()


def own_method():
    model = Classifier()
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99))
    print(f"loss {train(model, opt, ema):.3f}")

    with ax.surgery(model, opt, ema) as done:
        model.add_layer(30)
    print(done.change)
    print(f"loss {train(model, opt, ema):.3f}, {len(ema.module.hidden)} hidden layers in the average too")

    with ax.surgery(model, opt, ema) as done:
        model.add_class()
    print(done.change)
    print(f"loss {train(model, opt, ema):.3f}, average and network both know {ema.module.head.out_features} classes")

    try:
        with ax.surgery(model, opt, ema):
            model.add_layer(30)
            raise RuntimeError("something went wrong in the middle")
    except RuntimeError as error:
        print(f"{error}: {len(model.hidden)} hidden layers as before")
    ax.verify(model, opt, ema)  # would raise, and name every parameter that went astray


def hugging_face():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=100, n_positions=32, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(0, 100, (4, 16))
    model(input_ids=ids, labels=ids).loss.backward()
    opt.step()
    opt.zero_grad()

    with ax.surgery(model, opt) as done:
        model.resize_token_embeddings(110, mean_resizing=False)
    print(done.change)
    tied = model.lm_head.weight is model.transformer.wte.weight
    print(f"{model.config.vocab_size} tokens, embedding and head still one tensor: {tied}")


if __name__ == "__main__":
    torch.manual_seed(0)
    own_method()
    if importlib.util.find_spec("transformers"):
        hugging_face()
