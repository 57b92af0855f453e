"""``carried`` against a slow twin with plain loops; maps that do not fit are refused."""

import itertools
import random

import pytest
import torch

import auxin as ax
from auxin.axes import Axis, Part, born, carried, shape_after

torch.set_num_threads(1)


def slow(old, axes, fresh, power=None):
    """Entry by entry. ``power``: of the gradient scale; None: the value scale."""
    result = fresh.clone()
    for place in itertools.product(*(range(size) for size in fresh.shape)):
        come = [int(axis.index[i]) for axis, i in zip(axes, place, strict=True)]
        if min(come, default=0) < 0:
            continue
        value = old[tuple(come)]
        for axis, i in zip(axes, place, strict=True):
            scale = axis.value if power is None else axis.gradient
            if scale is not None and power != 0:
                value = (value * scale[i] ** (1 if power is None else power)).to(old.dtype)
        result[place] = value
    return result


def random_axis(rng, size):
    new = rng.randint(1, 7)
    scales = [None, [rng.choice([0.5, 1.0, 0.25, 3.0]) for _ in range(new)]]
    return Axis.of([rng.randrange(-1, size) for _ in range(new)], size, rng.choice(scales), rng.choice(scales))


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_random_maps_equal_the_slow_twin(seed, dtype):
    rng = random.Random(seed)
    shape = [rng.randint(1, 5) for _ in range(rng.randint(0, 4))]
    axes = tuple(random_axis(rng, size) for size in shape)
    old, fresh = torch.randn(shape).to(dtype), torch.randn(shape_after(axes)).to(dtype)
    for kind, power in (("value", None), ("plain", 0), ("gradient", 1), ("square", 2)):
        assert torch.equal(carried(old, axes, fresh, kind), slow(old, axes, fresh, power))
    again = tuple(Axis.from_json(axis.to_json()) for axis in axes)
    assert torch.equal(carried(old, again, fresh), carried(old, axes, fresh))
    assert list(map(str, again)) == list(map(str, axes))


def test_memory_order_dtype_and_device_are_those_of_the_fresh_tensor():
    old = torch.randn(2, 3, 4, 4)
    fresh = torch.zeros(3, 3, 4, 4, dtype=torch.float64).to(memory_format=torch.channels_last)
    axes = (Axis.inserted(2, 1, 1), *map(Axis.same, (3, 4, 4)))
    new = carried(old, axes, fresh)
    assert new.is_contiguous(memory_format=torch.channels_last) and new.dtype == torch.float64
    assert torch.equal(new[[0, 2]], old.double()) and not new[1].any()
    assert not carried(old, axes, fresh.requires_grad_()).requires_grad


def test_copies_share_values_or_gradients():
    axis = Axis.of([0, 1, 2, 1, 1], size=3)
    assert axis.copied(outgoing=True).value.tolist() == pytest.approx([1, 1 / 3, 1, 1 / 3, 1 / 3])
    assert axis.copied(outgoing=False).gradient.tolist() == pytest.approx([1, 1 / 3, 1, 1 / 3, 1 / 3])
    assert Axis.of([2, -1, -1, 0], 3).counts.tolist() == [1, 1, 1, 1]


def test_an_axis_says_what_it_does():
    assert str(Axis.inserted(6, 3, 1)) == "0-2, 1 new, 3-5"
    assert str(Axis.of([0, 1, 0, 1], 2).copied(outgoing=False)) == "0-1, 0-1; gradients x 0.5"
    assert Axis.same(4).is_same and not Axis.leading(4, 3).is_same and not Axis.of([1, 0], 2).is_same


def test_a_part_keeps_to_its_entries_through_further_changes():
    part = Part("weight", tuple(axis.born for axis in (Axis.leading(2, 3), Axis.same(4))))
    assert part.mask.sum() == 4 and part.mask[2].all()
    moved = part.after((Axis.of([2, -1, 0], 3), Axis.inserted(4, 0, 1)))
    assert moved.mask[0].all() and not moved.mask[1:].any()
    again = Part.from_json("weight", moved.to_json(), moved.mask.shape)
    assert torch.equal(again.mask, moved.mask)
    assert born((Axis.leading(2, 3), Axis.leading(1, 2))).sum() == 4


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Axis.of([0, 3], 3), "index holds 3, and the old positions are 0 to 2"),
        (lambda: Axis.of([0, -2], 3), "index holds -2"),
        (lambda: Axis.of([[0, 1]], 3), "pass one old position for each new one"),
        (lambda: Axis.of([0, 1], 3, value=[1.0]), "value has shape"),
        (lambda: Axis.from_json({"size": 2, "runs": [["a", 1]]}), "this is not an axis"),
        (lambda: Axis.from_json({"runs": []}), "this is not an axis"),
        (lambda: Axis.from_json({"size": 2, "runs": [[0, 3]]}), "index holds 2"),
        (lambda: carried(torch.ones(2), (Axis.same(3),), torch.ones(3)), "the map of axis 0 leads from 3 to 3"),
        (lambda: carried(torch.ones(2), (Axis.leading(2, 4),), torch.ones(3)), "leads from 2 to 4 entries"),
        (lambda: carried(torch.ones(2, 2), (Axis.same(2),), torch.ones(2, 2)), "give one Axis for each dimension"),
    ],
)
def test_maps_that_do_not_fit_are_refused(make, words):
    with pytest.raises(ax.GrowthError, match=words):
        make()
