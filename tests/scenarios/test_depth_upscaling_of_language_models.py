"""Two blocks more in five language models: as many run as the configuration says and as the files hold; the cache
agrees; what is saved opens in plain transformers and writes the same words.
"""

import json

import pytest
import torch
from language_models import IDS, KNOWN, adamw, blocks_of, built, cached, logits, ran, steps, tokens
from safetensors.torch import load_file

import auxin as ax

pytest.importorskip("transformers")
torch.set_num_threads(1)
FADES = ("bert",)  # a norm behind the sum: nothing can be zeroed, the block fades in
ORDERS = {"interleave": "interleave", "last": "last", "a list": [0, 0, 1, 1, 2]}


def saved_blocks(folder, at):
    """How many blocks the files hold."""
    names = [name.removeprefix(f"{at}.") for name in load_file(folder / "model.safetensors") if name.startswith(at)]
    return len({name.split(".")[0] for name in names})


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", KNOWN)
def test_two_blocks_more(name, order, tmp_path):
    model, at = built(name), KNOWN[name].at
    before, was, optimizer = logits(model), tokens(model), adamw(model)
    edit = ax.Duplicate(at, by=2, order=ORDERS[order], fade=3)
    change = ax.grow(model, edit, optimizer, probe={"input_ids": IDS}, stock=name not in FADES)
    blocks = blocks_of(name, model)
    assert (len(blocks), model.config.num_hidden_layers, change.max_difference) == (5, 5, 0)
    assert torch.equal(logits(model), before) and torch.equal(tokens(model), was)
    assert bool(change.gates) is (name in FADES)

    losses = steps(model.train(), optimizer, 6)  # the copies have moved, and the gates are gone
    assert max(losses) <= 1.2 * losses[0]
    assert not [n for n in model.state_dict() if "auxin" in n]
    before, was = logits(model.eval()), tokens(model)
    assert ran(blocks, lambda: logits(model)) == list(range(5))
    assert ran(blocks, lambda: cached(model)) == list(range(5)) * IDS.shape[1]
    torch.testing.assert_close(cached(model), before, atol=1e-5, rtol=0)
    assert torch.equal(tokens(model, use_cache=False), was)

    model.save_pretrained(tmp_path)
    counts = {"num_hidden_layers", "n_layer"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert {value for field, value in config.items() if field in counts} == {5}
    assert saved_blocks(tmp_path, at) == 5
    other, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and len(blocks_of(name, other)) == other.config.num_hidden_layers == 5
    torch.testing.assert_close(logits(other), before, atol=1e-6, rtol=0)
    torch.testing.assert_close(cached(other), before, atol=1e-5, rtol=0)
    assert torch.equal(tokens(other), was)
    ax.verify(model, optimizer)
