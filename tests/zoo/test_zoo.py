"""Duplicate by one on the block lists of real architectures; the rest of the zoo runs with `make zoo`."""

import copy
import functools

import pytest
import torch
from architectures import NAMES, NOT_STOCK, QUICK, REFUSED
from block_lists import block_lists
from judged import judged
from minilm import NEEDS, figures, packaged
from models import build, has_timm
from trials import duplicate, fingerprint, ungrown

import auxin as ax

pytest.importorskip("transformers")


@pytest.mark.parametrize("name", QUICK)
def test_one_block_more(name):
    make = functools.partial(build, name)
    lists = block_lists(*make())
    assert lists or name == "albert"  # its blocks are one, called again and again
    for blocks in lists:
        assert judged(name, duplicate(make, blocks, ungrown(make))) == ""


@pytest.mark.skipif(not has_timm(), reason="timm is not installed; `make zoo` brings it")
@pytest.mark.parametrize("inner", [False, True])
def test_one_block_more_of_timm(inner):
    make = functools.partial(build, "convnext_atto")
    for blocks in block_lists(*make(), inner=inner):
        assert judged("convnext_atto", duplicate(make, blocks), inner) == ""


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5", "swin", "yolos"])
def test_every_refusal_leaves_all_as_it_was(name, monkeypatch):
    """Also one at the very end, when everything has been changed already."""
    model, args, kwargs = build(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def refuse(*_):
        raise ax.GrowthError("planted")

    monkeypatch.setattr("auxin.engine.check_stock", refuse)
    for blocks in block_lists(model, args, kwargs):
        was = fingerprint(model, optimizer)
        with pytest.raises(ax.GrowthError):
            ax.grow(model, ax.Duplicate(blocks.at, order=blocks.order), optimizer, probe=kwargs or args)
        assert fingerprint(model, optimizer) == was


def test_the_fingerprint_sees_every_kind_of_change():
    model, _, _ = build("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    seen = {fingerprint(model, optimizer)}
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-6
    seen.add(fingerprint(model, optimizer))
    model.config.num_hidden_layers += 1
    seen.add(fingerprint(model, optimizer))
    model.model.layers[1].self_attn.layer_idx = 0
    seen.add(fingerprint(model, optimizer))
    model.model.layers.append(copy.deepcopy(model.model.layers[0]))
    seen.add(fingerprint(model, optimizer))
    optimizer.param_groups[0]["params"].reverse()
    seen.add(fingerprint(model, optimizer))
    assert len(seen) == 6


def test_what_is_expected_is_about_the_zoo():
    every = {name for names in NAMES.values() for name in names}
    assert len(every) == sum(map(len, NAMES.values())) and {*QUICK, *NOT_STOCK, *(name for name, _ in REFUSED)} <= every


@pytest.mark.skipif(packaged() is None, reason=NEEDS)
@pytest.mark.timeout(600)
def test_a_pretrained_encoder_grows_through_the_gate(tmp_path):
    """Six layers after nine: the same embeddings, trained with the gates opening, folded, opened by its own library."""
    found = figures(tmp_path)
    print(f"\n{found}")
    assert (found.layers, found.difference) == (9, 0.0)
    assert found.moved and found.loss_after < 0.99 * found.loss_before
    assert found.gates_left == 0 and found.stock <= 1e-6
