"""Zeroed last writers leave the function alone to the bit: three dtypes, eval mode, and train mode without dropout."""

import copy

import families
import pytest
import torch
from companions import make_optimizers
from rows import rows
from torch import nn

from auxin import grow

ZEROED = ("interleave", "double", "stack", "middle", "list", "fresh", "insert", "insert-front", "insert-end")
FAMILIES = [name for name in families.FAMILIES if name != "encoder"]


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def outputs(model: nn.Module, batch: torch.Tensor, train: bool) -> torch.Tensor:
    """Of a copy: in train mode batch norm would write its running statistics."""
    with torch.no_grad():
        return copy.deepcopy(model).train(train)(batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("family", FAMILIES)
def test_zeroed_writers(family: str, dtype: torch.dtype) -> None:
    batch, figures = families.batch(family, dtype), {}
    for name in ZEROED:
        model = without_dropout(families.build(family, dtype))
        old = [outputs(model, batch, train) for train in (False, True)]
        change = grow(model, rows(family)[name], *make_optimizers(model, "AdamW-loop", "one"), probe=batch)
        assert change.how == "last writers zero"
        new = [outputs(model, batch, train) for train in (False, True)]
        assert all(p.dtype == dtype for p in model.parameters())
        figures[name] = [float((a - b).abs().max()) for a, b in zip(old, new, strict=True)]
    print(f"{family} {dtype}: max |difference| in eval, train mode: {figures}")
    assert all(figure == [0.0, 0.0] for figure in figures.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_zeroed_learns_first_and_the_rest_one_step_later(family: str) -> None:
    batch = families.batch(family)
    model = without_dropout(families.build(family)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    change = grow(model, rows(family)["interleave"], optimizer, probe=batch)
    (path, new), *_ = change.added
    reached = []
    for _ in range(2):
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        reached.append({n for n, p in new.module.named_parameters() if p.grad is not None and p.grad.any()})
        optimizer.step()
    assert reached[0] == set(new.zeroed) and set(change.writers) == {f"{path}.{n}" for n in new.zeroed}
    assert reached[1] == {n for n, _ in new.module.named_parameters()}
