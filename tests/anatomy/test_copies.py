"""What a module is given in a trial, and the trial itself, are copies that share nothing."""

import copy

import pytest
import torch
from torch import nn

from auxin.anatomy.probe import Call, taken
from auxin.anatomy.zero_init import amplification, amplified_by_a_norm, copy_of, last_writers

GIVEN = {
    "plain": torch.randn(4, 3),
    "of another order": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "a part": torch.randn(6, 3)[2:4],
    "expanded": torch.randn(3, 1).expand(3, 4),
    "complex": torch.randn(3, dtype=torch.complex64).conj(),
    "a parameter": nn.Parameter(torch.randn(3)),
}


@pytest.mark.parametrize("name", GIVEN)
def test_what_a_module_is_given_is_a_deep_copy(name: str) -> None:
    x = GIVEN[name]
    expected, ((found,), words) = copy.deepcopy(x), taken(((x,), {}), {})
    assert type(found) is type(expected) and found.stride() == expected.stride()
    assert found.is_conj() == expected.is_conj() and found.requires_grad == expected.requires_grad
    assert torch.equal(found, x) and words == {}
    assert found.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def test_what_is_kept_is_given_as_it_is() -> None:
    x = torch.randn(3)
    assert taken(((x,), {}), {id(x): x})[0][0] is x


def test_a_copy_has_hooks_of_its_own() -> None:
    block, called = nn.Sequential(nn.Linear(2, 2), nn.ReLU()), []
    block[1].register_forward_hook(lambda *_: called.append("old"))
    twin = copy_of(block)
    hooks = [name for name in vars(block[0]) if name.endswith("_hooks")]
    assert hooks and all(vars(twin[0])[name] is not vars(block[0])[name] for name in hooks)
    handle = twin[0].register_forward_hook(lambda *_: called.append("new"))
    block(torch.zeros(1, 2))
    assert called == ["old"]
    twin(torch.zeros(1, 2))
    assert called == ["old", "new", "old"]
    handle.remove()
    assert not twin[0]._forward_hooks


def test_a_dict_that_two_modules_hold_stays_one_dict() -> None:
    block = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    block[0].__dict__["shared"] = block[1].__dict__["shared"] = type(block[0]._forward_hooks)()
    twin = copy_of(block)
    assert twin[0].shared is twin[1].shared is not block[0].shared


class Normed(nn.Module):
    """A norm without a gain after the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.norm = nn.Linear(8, 8), nn.LayerNorm(8, elementwise_affine=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.norm(self.down(x))


def test_amplifications_are_those_of_the_block_and_the_constants_that_are_asked_for() -> None:
    block, other, call = Normed(), Normed(), Call((torch.randn(16, 8),), {}, None)
    constants = last_writers(block, call)
    assert constants
    expected = amplification(block, call, constants)
    assert expected == amplified_by_a_norm(block, call, constants) != {}
    assert amplified_by_a_norm(other, call, constants) == amplification(other, call, constants) != expected
