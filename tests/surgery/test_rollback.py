"""Whatever goes wrong inside a surgery, everything is bit for bit as before, and the user's own error passes on."""

import copy
import random

import numpy as np
import pytest
import torch
from growing import Block, Net, assert_same, batch, ema_of, picture, train
from torch import nn

import auxin as ax
from auxin.ramp import saved

torch.set_num_threads(1)


class Mine(Exception):
    """An error of the user's own code."""


class Settings:
    """A configuration object, as large libraries hang on their networks."""

    def __init__(self):
        self.depth, self.sizes = 2, [1, 2]


def ready():
    torch.manual_seed(0)
    model = Net(dropout=0.1)
    model.running = nn.BatchNorm1d(5)
    model.settings = Settings()
    model.note = [1, 2]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, 3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=50)
    scaler, ema = torch.amp.GradScaler("cpu"), ema_of(model)
    ema.update_parameters(model)
    return model, optimizer, scheduler, ema, scaler


def adds(model):
    model.blocks.append(Block())


def inserts_and_removes(model):
    model.blocks.insert(0, Block())
    del model.blocks[1]


def replaces(model):
    model.head = nn.Linear(8, 1)


def assigns_parameters(model):
    model.head.weight = nn.Parameter(torch.zeros(1, 8))
    del model.head.bias
    model.head.bias = None


def resizes(model):
    model.head.weight.data = torch.zeros(4, 8)
    model.head.bias.data = torch.zeros(4)
    model.head.out_features = 4


def writes_in_place(model):
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(1)


def turns_signs(model):
    """Zeros become negative zeros, which compare equal and are other bits."""
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
            p.neg_()


def freezes(model):
    model.stem.requires_grad_(False)
    model.eval()


def hooks(model):
    model.blocks[0].register_forward_hook(lambda *_: None)
    model.blocks[0].register_forward_pre_hook(lambda *_: None, with_kwargs=True)
    model.stem.weight.register_hook(lambda grad: None)


def attributes(model):
    model.depth = 7
    model.note.append(3)
    model.blocks[0].drop.p = 0.5
    del model.settings


def settings(model):
    model.settings.depth = 3
    model.settings.sizes.append(4)


def gradients(model):
    model(batch()[0]).sum().backward()


def buffers(model):
    model.register_buffer("extra", torch.ones(3))
    model.running.running_mean = torch.ones(5)
    model.running(batch()[0])


def parametrizes(model):
    nn.utils.parametrizations.weight_norm(model.head)


def random_numbers(model):
    torch.randn(10), random.random(), np.random.rand(3)
    nn.init.normal_(model.stem.weight)


CODE = [
    adds,
    inserts_and_removes,
    replaces,
    assigns_parameters,
    resizes,
    writes_in_place,
    turns_signs,
    freezes,
    hooks,
    attributes,
    settings,
    gradients,
    buffers,
    parametrizes,
    random_numbers,
]


@pytest.mark.parametrize("code", CODE, ids=lambda code: code.__name__)
def test_an_error_of_the_users_own_passes_on_and_leaves_everything_as_it_was(code):
    everything = ready()
    before = picture(*everything)
    with pytest.raises(Mine) as raised, ax.surgery(*everything):
        code(everything[0])
        raise Mine("no")
    assert raised.value.args == ("no",) and type(raised.value) is Mine
    assert_same(before, picture(*everything))
    assert train(everything[0], everything[1], 1)[0] > 0


@pytest.mark.parametrize("code", [c for c in CODE if c is not parametrizes], ids=lambda code: code.__name__)
def test_a_refusal_on_leaving_leaves_everything_as_it_was(code):
    """The scheduler's optimizer is not given, so nothing can be followed."""
    model, optimizer, scheduler, ema, scaler = everything = ready()
    before = picture(*everything)
    with pytest.raises(ax.GrowthError, match="OneCycleLR drives a AdamW that was not given"):
        with ax.surgery(model, torch.optim.SGD(model.parameters(), lr=0.1), scheduler, ema, scaler):
            code(model)
    assert_same(before, picture(*everything))


def test_a_parametrization_is_refused_because_no_copy_could_follow_it():
    everything = ready()
    before = picture(*everything)
    with pytest.raises(ax.GrowthError, match="head was a Linear and is a ParametrizedLinear now"):
        with ax.surgery(*everything):
            parametrizes(everything[0])
    assert_same(before, picture(*everything))


def test_a_bias_that_is_taken_away_is_taken_from_the_average_too():
    model, optimizer, *rest, ema, scaler = everything = ready()
    with ax.surgery(*everything):
        model.head.bias = None
    assert model.head.bias is None and ema.module.head.bias is None
    assert torch.isfinite(ema.module(batch()[0])).all()
    train(model, optimizer, 1)
    ema.update_parameters(model)


def test_a_resize_while_the_last_loss_is_still_alive():
    """A loop's variable holds the graph of the last step, and with it what remembers the old shape."""
    model, optimizer, *rest = everything = ready()
    loss = nn.functional.mse_loss(model(batch()[0]), batch()[1])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    with ax.surgery(*everything):
        resizes(model)
    model(batch()[0]).square().mean().backward()
    optimizer.step()
    assert loss.grad_fn is not None and model.head.weight.grad.shape == (4, 8)


def tells_the_optimizer(model, optimizer, scheduler, ema, scaler):
    optimizer.add_param_group({"params": list(model.blocks[-1].parameters())})


def extends_the_group(model, optimizer, scheduler, ema, scaler):
    optimizer.param_groups[0]["params"].extend(model.blocks[-1].parameters())


def extends_the_average(model, optimizer, scheduler, ema, scaler):
    ema.module.blocks.append(copy.deepcopy(model.blocks[-1]))


def forgets_the_state(model, optimizer, scheduler, ema, scaler):
    optimizer.state.clear()
    scheduler.base_lrs[0] = 7.0


@pytest.mark.parametrize(
    "code", [tells_the_optimizer, extends_the_group, extends_the_average, forgets_the_state], ids=lambda f: f.__name__
)
def test_what_the_code_did_to_the_companions_itself_is_taken_back_too(code):
    everything = ready()
    before = picture(*everything)
    with pytest.raises(Mine), ax.surgery(*everything):
        adds(everything[0])
        code(*everything)
        raise Mine
    assert_same(before, picture(*everything))


def test_a_group_that_the_code_extended_itself_is_left_as_it_is():
    everything = model, optimizer, *_ = ready()
    with ax.surgery(*everything):
        adds(model)
        extends_the_group(*everything)
    ax.verify(*everything)
    held = [id(p) for p in optimizer.param_groups[0]["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize("code", [tells_the_optimizer, extends_the_average], ids=lambda f: f.__name__)
def test_a_companion_that_the_code_changed_so_that_it_does_not_fit_is_refused(code):
    everything = ready()
    before = picture(*everything)
    with pytest.raises(ax.GrowthError, match=r"base_lrs has 1 entries for 2 groups|averages another network"):
        with ax.surgery(*everything):
            adds(everything[0])
            code(*everything)
    assert_same(before, picture(*everything))


def test_gradients_that_were_zero_are_zero_again():
    """A loop with set_to_none=False: a backward inside the surgery adds to the same tensors."""
    everything = model, optimizer, *_ = ready()
    train(model, optimizer, 1, clear=False)
    optimizer.zero_grad(set_to_none=False)
    before = picture(*everything)
    with pytest.raises(Mine), ax.surgery(*everything):
        gradients(model)
        raise Mine
    assert_same(before, picture(*everything))


def test_nested_code_that_is_interrupted():
    everything = ready()
    before = picture(*everything)
    with pytest.raises(KeyboardInterrupt), ax.surgery(*everything):
        adds(everything[0])
        writes_in_place(everything[0])
        raise KeyboardInterrupt
    assert_same(before, picture(*everything))


def test_a_follower_that_fails_after_the_others_changed_takes_all_back():
    class Shadow:
        """A companion of the user's own."""

    @ax.follow(Shadow)
    def follow_shadow(shadow, change):
        yield
        raise Mine("late")
        yield

    everything = ready()
    before = picture(*everything)
    with pytest.raises(Mine, match="late"), ax.surgery(*everything, Shadow()):
        adds(everything[0])
    assert_same(before, picture(*everything))
    with pytest.raises(Mine, match="late"):
        ax.grow(everything[0], ax.Duplicate("blocks"), *everything[1:], Shadow(), probe=batch()[0])
    assert_same(before, picture(*everything))


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=torch.tensor(1e-2), amsgrad=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-2),
    "asgd": lambda p: torch.optim.ASGD(p, lr=1e-2),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=1e-2, max_iter=2, history_size=2),
}


def trains(model, optimizer, scheduler, ema, steps=2):
    """A loop of the user's own, inside the block."""
    inputs, targets = batch()

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        return loss

    for _ in range(steps):
        closure()
        optimizer.step(closure)
        scheduler.step()
        if len(list(ema.module.parameters())) == len(list(model.parameters())):
            ema.update_parameters(model)
        optimizer.zero_grad()


def running(kind, fresh):
    torch.manual_seed(0)
    model = Net()
    optimizer, ema = OPTIMIZERS[kind](model.parameters()), ema_of(model)
    everything = model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5), ema
    if not fresh:
        trains(*everything, steps=3)
    return everything


@pytest.mark.parametrize("grows", [False, True])
@pytest.mark.parametrize("fresh", [False, True], ids=["trained", "fresh"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_steps_that_are_taken_inside_are_taken_back(kind, fresh, grows):
    everything, twin = running(kind, fresh), running(kind, fresh)
    before = picture(*everything)
    with pytest.raises(Mine), ax.surgery(*everything):
        if grows:
            adds(everything[0])
        trains(*everything)
        raise Mine
    assert_same(before, picture(*everything))
    for run in (everything, twin):
        torch.manual_seed(1)
        trains(*run)
    for network, other in zip(everything[::3], twin[::3], strict=True):
        assert all(map(torch.equal, network.state_dict().values(), other.state_dict().values()))


def test_states_and_averages_that_are_written_to_inside_come_back():
    everything = model, optimizer, _, ema, scaler = ready()
    scaler.scale(torch.ones(()))  # its scale is made at the first use
    before = picture(*everything)
    with pytest.raises(Mine), ax.surgery(*everything):
        adds(model)
        for state in optimizer.state.values():
            state["exp_avg"].zero_(), state["step"].fill_(7)
        for tensor in (*ema.parameters(), *ema.buffers()):
            tensor.data.fill_(1)
        scaler._scale.fill_(3)
        raise Mine
    assert_same(before, picture(*everything))


def test_a_refusal_on_leaving_takes_steps_back_that_were_taken_inside():
    model, optimizer, scheduler, ema, _ = everything = ready()
    before = picture(*everything)
    with pytest.raises(ax.GrowthError, match="OneCycleLR drives a AdamW that was not given"):
        with ax.surgery(model, torch.optim.SGD(model.parameters(), lr=0.1), scheduler, ema):
            trains(model, optimizer, scheduler, ema)
    assert_same(
        {k: v for k, v in before.items() if "AdamW" not in k},
        {k: v for k, v in picture(*everything).items() if "AdamW" not in k},
    )


def test_a_grower_and_a_fading_block_forget_steps_that_were_taken_inside():
    torch.manual_seed(0)
    model = Net()
    optimizer, ema = torch.optim.AdamW(model.parameters(), lr=1e-2), ema_of(model)
    grower = ax.Grower(model, optimizer, ema, edits=ax.Duplicate("blocks"), when=ax.when.at([99]), probe=batch()[0])
    train(model, optimizer, 2)
    grower.grow(ax.Duplicate("blocks", fade=5, output="keep"))
    train(model, optimizer, 2)
    everything, before = (model, optimizer, ema), picture(model, optimizer, ema)
    counts, ramps = copy.deepcopy(grower.state_dict()), saved(model, [optimizer])
    with pytest.raises(Mine), grower.surgery():
        train(model, optimizer, 2)
        ema.update_parameters(model)
        raise Mine
    assert_same(before, picture(*everything))
    assert grower.state_dict() == counts and saved(model, [optimizer]) == ramps
    train(model, optimizer, 3)
    assert not saved(model, [optimizer])
