import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Muon

from auxin.checkpoint.directory import read, write
from auxin.errors import GrowthError
from auxin.follow.optimizer_state import check_optimizer, optimizer_state, restore_optimizer
from auxin.typed import dumps, loads


class Net(nn.Module):
    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 8, sparse=sparse)
        self.conv = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.norm = nn.LayerNorm(8)

    def forward(self, index: Tensor, image: Tensor) -> Tensor:
        x = self.embedding(index)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.norm(x).square().mean() + self.conv(image).square().mean()


def small_net(sparse: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return Net(sparse)


def names_of(model: nn.Module) -> dict[int, str]:
    return {id(p): name for name, p in model.named_parameters()}


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        index = torch.randint(0, 7, (4,), generator=generator)
        image = torch.randn(2, 2, 5, 5, generator=generator).to(memory_format=torch.channels_last)

        def closure(index: Tensor = index, image: Tensor = image) -> Tensor:
            optimizer.zero_grad()
            loss = model(index, image)
            loss.backward()
            return loss

        optimizer.step(closure)


def through_files(optimizer: Any, model: nn.Module, path: Path) -> tuple[dict[str, Tensor], Any]:
    tensors, data = optimizer_state(optimizer, names_of(model))
    write(path, {"optimizer.json": dumps(data).encode(), "optimizer.safetensors": tensors})
    files = read(path)
    return files.tensors("optimizer.safetensors"), loads(files.bytes("optimizer.json"))


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist())


def everything(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Weights, state and hyperparameters, by name, to the bit."""
    called = names_of(model)

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return (value.dtype, tuple(value.shape), bits(value))
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else value

    assert all(p.isfinite().all() for p in model.parameters())
    state = {called.get(id(p), "foreign"): plain(value) for p, value in optimizer.state.items()}
    groups = [
        {**{k: plain(v) for k, v in g.items() if k != "params"}, "order": [called.get(id(p)) for p in g["params"]]}
        for g in optimizer.param_groups
    ]
    return {"weights": {n: bits(p) for n, p in model.named_parameters()}, "state": state, "groups": groups}


Build = Callable[[nn.Module, bool], Any]


def turned(params: Any, turn: bool) -> list[Any]:
    return list(params)[::-1] if turn else list(params)


def plain_build(kind: Any, **options: Any) -> Build:
    def build(model: nn.Module, turn: bool) -> Any:
        # Muon takes matrices only, LBFGS no gradients in another memory order.
        fits = {Muon: (2,), torch.optim.LBFGS: (1, 2)}.get(kind, (1, 2, 4))
        params = [p for p in model.parameters() if p.ndim in fits]
        return kind(turned(params, turn), **options)

    return build


def layered(model: nn.Module, turn: bool) -> Any:
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": turned(rest, turn), "lr": 0.1}, {"params": turned(decay, turn), "weight_decay": 0.3}]
    return AdamW(groups, lr=0.01, betas=(0.8, 0.95))


def named(model: nn.Module, turn: bool) -> Any:
    return SGD(turned(model.named_parameters(), turn), lr=0.1, momentum=0.9)


def with_foreign(model: nn.Module, turn: bool) -> Any:
    torch.manual_seed(1)
    model.__dict__["others"] = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 3))]
    for p in model.__dict__["others"]:
        p.grad = torch.ones_like(p)
    own = turned(model.parameters(), turn)
    return Adam([{"params": [model.others[0], *own]}, {"params": [model.others[1]], "lr": 0.5}], lr=0.01)


def cases() -> Iterator[Any]:
    for name in sorted(dir(torch.optim)):
        kind = getattr(torch.optim, name)
        if not isinstance(kind, type) or not issubclass(kind, torch.optim.Optimizer) or name == "Optimizer":
            continue
        options = {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}
        options |= {"lr": 0.1} if name in ("SGD", "LBFGS") else {}
        options |= {"max_iter": 5} if name == "LBFGS" else {}
        taken = inspect.signature(kind).parameters
        yield pytest.param(plain_build(kind, **options, **({"foreach": False} if "foreach" in taken else {})), id=name)
        for mode in ("foreach", "fused"):
            if mode in taken and (mode != "fused" or name in ("SGD", "Adam", "AdamW", "Adagrad")):
                yield pytest.param(plain_build(kind, **options, **{mode: True}), id=f"{name}-{mode}")
    more: dict[str, Build] = {
        "Adam-amsgrad": plain_build(Adam, amsgrad=True),
        "Adam-tensor-lr": plain_build(Adam, lr=torch.tensor(0.01)),
        "Adam-tensor-betas": plain_build(Adam, betas=(torch.tensor(0.8), torch.tensor(0.9)), lr=torch.tensor(0.01)),
        "AdamW-fused-tensor-lr": plain_build(AdamW, lr=torch.tensor(0.01), fused=True),
        "SGD-tensor-lr": plain_build(SGD, lr=torch.tensor(0.1)),
        "SGD-nesterov": plain_build(SGD, lr=0.1, momentum=0.9, nesterov=True, maximize=True),
        "RMSprop-centered": plain_build(torch.optim.RMSprop, centered=True),
        "LBFGS-wolfe": plain_build(torch.optim.LBFGS, line_search_fn="strong_wolfe", history_size=3, max_iter=4),
        "LBFGS-tensor-lr": plain_build(torch.optim.LBFGS, lr=torch.tensor(0.5), max_iter=3),
        "layered-groups": layered,
        "named-parameters": named,
        "foreign-parameters": with_foreign,
    }
    yield from (pytest.param(build, id=name) for name, build in more.items())


@pytest.mark.parametrize("build", list(cases()))
def test_a_run_goes_on_to_the_bit(tmp_path: Path, build: Build, request: Any) -> None:
    sparse = "SparseAdam" in request.node.callspec.id
    model = small_net(sparse)
    if sparse:
        model = nn.ModuleDict({"embedding": model.embedding})
        model.forward = lambda index, image: model.embedding(index).square().mean()  # type: ignore[method-assign]
    optimizer = build(model, False)
    train(model, optimizer, range(5))
    tensors, data = through_files(optimizer, model, tmp_path)
    saved = {name: p.detach().clone() for name, p in model.named_parameters()}
    others = [p.detach().clone() for p in model.__dict__.get("others", [])]
    before = everything(model, optimizer)

    fresh = small_net(sparse)
    if sparse:
        fresh = nn.ModuleDict({"embedding": fresh.embedding})
        fresh.forward = lambda index, image: fresh.embedding(index).square().mean()  # type: ignore[method-assign]
    restored = build(fresh, True)
    with torch.no_grad():
        for name, p in fresh.named_parameters():
            p.copy_(saved[name])
        for p, value in zip(fresh.__dict__.get("others", []), others, strict=True):
            p.copy_(value)
    groups = list(restored.param_groups)
    lists = [group["params"] for group in groups]
    for group in groups:  # whatever else the fresh object was built with does not survive
        group["lr"] = group["lr"].fill_(123.0) if isinstance(group["lr"], Tensor) else 123.0
        group |= {"weight_decay": 0.7} if "weight_decay" in group else {}
    lrs = [group["lr"] for group in groups]
    restore_optimizer(restored, tensors, data, names_of(fresh))
    assert everything(fresh, restored) == before
    assert all(a is b for a, b in zip(groups, restored.param_groups, strict=True))
    assert all(a is g["params"] for a, g in zip(lists, groups, strict=True))
    assert all(a is g["lr"] for a, g in zip(lrs, groups, strict=True) if isinstance(a, Tensor))
    train(model, optimizer, range(5, 10))
    for p in fresh.__dict__.get("others", []):
        p.grad = torch.ones_like(p)
    train(fresh, restored, range(5, 10))
    assert everything(fresh, restored) == everything(model, optimizer)


def trained(build: Build = layered) -> tuple[nn.Module, Any]:
    model = small_net()
    optimizer = build(model, False)
    train(model, optimizer, range(3))
    return model, optimizer


def test_without_the_new_order_lbfgs_would_go_astray() -> None:
    """The order matters: its history is one flat vector. So the test above does test the order."""
    build = plain_build(torch.optim.LBFGS)
    model, optimizer = trained(build)
    tensors, data = optimizer_state(optimizer, names_of(model))
    other = build(model, True)
    restore_optimizer(other, tensors, data, names_of(model))
    assert other._params is other.param_groups[0]["params"]
    assert [id(p) for p in other._params] == [id(p) for p in optimizer._params]


def test_state_survives_in_the_memory_order_of_the_parameter() -> None:
    model, optimizer = trained(plain_build(Adam, fused=True))
    tensors, data = optimizer_state(optimizer, names_of(model))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    restore_optimizer(optimizer, tensors, data, names_of(model))
    for p in model.parameters():
        assert optimizer.state[p]["exp_avg"].stride() == p.stride()


def test_execution_stays_the_choice_of_the_fresh_optimizer() -> None:
    model, optimizer = trained(plain_build(AdamW, foreach=True))
    tensors, data = optimizer_state(optimizer, names_of(model))
    fused = plain_build(AdamW, fused=True)(model, False)
    restore_optimizer(fused, tensors, data, names_of(model))
    assert fused.param_groups[0]["fused"] and not fused.param_groups[0]["foreach"]
    train(model, fused, range(3, 5))


@pytest.mark.parametrize("build", [layered, plain_build(torch.optim.LBFGS, lr=0.1), plain_build(torch.optim.Adafactor)])
def test_nothing_is_shared_with_what_was_saved(build: Build) -> None:
    model, optimizer = trained(build)
    tensors, data = optimizer_state(optimizer, names_of(model))
    kept = {name: bits(tensor) for name, tensor in tensors.items()}
    text = dumps(data)
    twin = small_net()
    other = build(twin, True)
    restore_optimizer(other, tensors, data, names_of(twin))
    train(twin, other, range(3))
    assert {name: bits(tensor) for name, tensor in tensors.items()} == kept
    assert dumps(data) == text


def test_what_the_checkpoint_does_not_hold_is_gone() -> None:
    model = small_net()
    tensors, data = optimizer_state(layered(model, False), names_of(model))
    model, optimizer = trained()
    restore_optimizer(optimizer, tensors, data, names_of(model))
    assert not optimizer.state


def test_state_of_a_parameter_that_left_its_group_is_not_saved() -> None:
    model, optimizer = trained()
    left = optimizer.param_groups[0]["params"].pop()
    tensors, _ = optimizer_state(optimizer, names_of(model))
    assert left in optimizer.state
    assert not any(name.startswith(names_of(model)[id(left)] + "::") for name in tensors)


def test_hyperparameters_that_are_functions_stay() -> None:
    model, optimizer = trained()
    optimizer.param_groups[0]["rule"] = len
    tensors, data = optimizer_state(optimizer, names_of(model))
    assert "rule" not in data["groups"][0]["options"]
    optimizer.param_groups[0]["rule"] = max
    restore_optimizer(optimizer, tensors, data, names_of(model))
    assert optimizer.param_groups[0]["rule"] is max


def wider(model: nn.Module) -> None:
    model.norm = nn.LayerNorm(9)


def longer(model: nn.Module) -> None:
    model.blocks.append(nn.Linear(8, 8))


def shorter(model: nn.Module) -> None:
    del model.blocks[2]


@pytest.mark.parametrize(
    ("edit", "texts"),
    [
        (wider, ["norm.weight is (9,), in the checkpoint (8,)", "norm.bias is (9,)"]),
        (longer, ["group 0 has blocks.3.bias, the checkpoint's has not", "group 1 has blocks.3.weight"]),
        (shorter, ["group 0 has no blocks.2.bias here", "there is state for blocks.2.bias"]),
    ],
)
def test_every_difference_is_named_and_nothing_touched(edit: Callable[[nn.Module], None], texts: list[str]) -> None:
    model, optimizer = trained()
    tensors, data = optimizer_state(optimizer, names_of(model))
    other = small_net()
    edit(other)
    fresh = layered(other, True)
    before = everything(other, fresh)
    with pytest.raises(GrowthError, match="does not fit this AdamW") as info:
        restore_optimizer(fresh, tensors, data, names_of(other))
    assert all(text in str(info.value) for text in texts), info.value
    assert everything(other, fresh) == before


def test_another_kind_or_number_of_groups() -> None:
    model, optimizer = trained()
    tensors, data = optimizer_state(optimizer, names_of(model))
    with pytest.raises(GrowthError, match="does not fit this SGD:\n  it was saved from AdamW"):
        check_optimizer(SGD(model.parameters()), tensors, data, names_of(model))
    with pytest.raises(GrowthError, match="it has 2 parameter groups, here are 1"):
        check_optimizer(AdamW(model.parameters()), tensors, data, names_of(model))


def test_a_state_of_another_shape_never_reaches_a_fused_kernel() -> None:
    model, optimizer = trained(plain_build(AdamW, fused=True))
    tensors, data = optimizer_state(optimizer, names_of(model))
    tensors["norm.weight::exp_avg"] = torch.zeros(3)
    del tensors["norm.bias::exp_avg_sq"]
    with pytest.raises(GrowthError) as info:
        restore_optimizer(optimizer, tensors, data, names_of(model))
    assert r"the state exp_avg of norm.weight has another shape: (3,) for (8,)" in str(info.value)
    assert "the tensor norm.bias::exp_avg_sq is missing" in str(info.value)


@pytest.mark.parametrize("key", ["type", "groups", "state", "other"])
@pytest.mark.parametrize("junk", [None, 3, [1], {"a": 1}, [[{}]], [{"params": 3}], "text"])
def test_data_that_is_nothing_of_ours(key: str, junk: Any) -> None:
    model, optimizer = trained()
    tensors, data = optimizer_state(optimizer, names_of(model))
    before = everything(model, optimizer)
    with pytest.raises(GrowthError):
        restore_optimizer(optimizer, tensors, {**data, key: junk}, names_of(model))
    with pytest.raises(GrowthError):
        restore_optimizer(optimizer, tensors, {k: v for k, v in data.items() if k != key}, names_of(model))
    assert everything(model, optimizer) == before


def test_names() -> None:
    model = small_net()
    with pytest.raises(GrowthError, match="Two parameters have one name: same"):
        optimizer_state(layered(model, False), {id(p): "same" for p in model.parameters()})
    named_foreign = {id(p): f"foreign.{i}.0" for i, p in enumerate(model.parameters())}
    optimizer = with_foreign(model, False)
    _, data = optimizer_state(optimizer, named_foreign)
    assert data["groups"][0]["params"][:2] == ["_foreign.0.0", "foreign.0.0"]
    assert data["groups"][1]["params"] == ["_foreign.1.0"]


def test_state_that_is_not_a_parameters(tmp_path: Path) -> None:
    model, optimizer = trained()
    optimizer.state["shared"] = {"step": 3, "preconditioners": [torch.eye(2), None]}
    before = everything(model, optimizer)
    tensors, data = through_files(optimizer, model, tmp_path)
    del optimizer.state["shared"]
    restore_optimizer(optimizer, tensors, data, names_of(model))
    assert everything(model, optimizer) == before
    assert torch.equal(optimizer.state["shared"]["preconditioners"][0], torch.eye(2))
