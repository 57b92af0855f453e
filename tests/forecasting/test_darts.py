"""Models of Darts as they are: grown while they train and between two fits, saved and loaded again.

Run by `make forecasting`, which installs the library into an environment of its own.
"""

import numpy as np
import pytest
import torch
from libraries import AHEAD, PAST, QUIET, given, grow_while_fitting, hush, values

import auxin as ax

darts = pytest.importorskip("darts")
models = pytest.importorskip("darts.models")
hush()
torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")
BEATS = dict(num_stacks=2, num_blocks=2, layer_widths=16, num_layers=2)
HEADS = dict(d_model=8, nhead=2, num_encoder_layers=2, num_decoder_layers=2, dim_feedforward=16, dropout=0.0)
DENSE = dict(num_encoder_layers=2, num_decoder_layers=2, hidden_size=8, decoder_output_dim=4, temporal_decoder_hidden=8)

ZERO, FADES = "last writers zero", "fade-in"
MODELS = {
    "NBEATSModel, a stack": (BEATS, ax.Duplicate("stacks", order=[0, 0, 1]), ZERO),
    "NBEATSModel, a stack at the end": (BEATS, ax.Duplicate("stacks", by=1), ZERO),
    "NBEATSModel, in a stack": (BEATS, ax.Duplicate("stacks.0.blocks", by=1), ZERO),
    "NBEATSModel, in a stack of one": (BEATS | {"num_blocks": 1}, ax.Duplicate("stacks.1.blocks", by=1), ZERO),
    "NBEATSModel, interpretable": (
        BEATS | {"generic_architecture": False, "num_stacks": 2}, ax.Duplicate("stacks", order=[0, 0, 1]), ZERO,
    ),
    "NBEATSModel, interpretable, in a stack": (
        BEATS | {"generic_architecture": False}, ax.Duplicate("stacks.0.blocks", by=1),
        r"stacks\.0\.blocks\.1 shares all its weights with stacks\.0\.blocks\.0.*Untie",
    ),
    "NHiTSModel, a stack": (BEATS | {"dropout": 0.0}, ax.Duplicate("stacks", order=[0, 0, 1]), ZERO),
    "NHiTSModel, in a stack": (BEATS | {"dropout": 0.0}, ax.Duplicate("stacks.0.blocks", by=1), ZERO),
    "TCNModel": (
        dict(num_filters=4, num_layers=4, kernel_size=3, dropout=0.0),
        ax.Duplicate("res_blocks", order=[0, 1, 1, 2, 3], fade=3),
        r"res_blocks\.2: the grown network does not run on the probe",
    ),
    "TransformerModel, encoder": (HEADS, ax.Duplicate("transformer.encoder.layers", by=1, fade=3), FADES),
    "TransformerModel, decoder": (HEADS, ax.Duplicate("transformer.decoder.layers", by=1, fade=3), FADES),
    "TiDEModel, encoder": (DENSE, ax.Duplicate("encoders", by=1, fade=3), FADES),
    "TSMixerModel": (
        dict(hidden_size=8, ff_size=8, num_blocks=2), ax.Duplicate("conditional_mixer", by=1, fade=3), FADES,
    ),
    "NLinearModel": ({}, ax.Duplicate("layer"), "is a Linear, not a container"),
}  # fmt: skip


def series():
    return darts.TimeSeries.from_values(values(80))


def made(name, **options):
    options = {k: v for k, v in options.items()}
    cls = getattr(models, name.split(",")[0])
    trainer = QUIET | options.pop("trainer", {})
    shape = dict(input_chunk_length=PAST, output_chunk_length=AHEAD, batch_size=16, n_epochs=2, random_state=0)
    return cls(**shape, pl_trainer_kwargs=trainer, **options)


def forecast(model):
    return model.predict(AHEAD, series=series(), verbose=False).values()


@pytest.mark.parametrize("name", MODELS)
def test_grown_while_it_is_fitted_or_refused_by_name(name):
    options, edit, outcome = MODELS[name]
    growing = grow_while_fitting(edit)
    model = made(name, trainer={"callbacks": [growing]}, **options)
    if outcome not in (ZERO, FADES):
        with pytest.raises(ax.GrowthError, match=outcome):
            model.fit(series(), verbose=False)
        return
    model.fit(series(), verbose=False)
    assert growing.change.how == outcome and growing.change.max_difference == 0
    idle = [n for n in growing.unmoved if not any(n in note for note in growing.change.notes)]
    assert not idle, idle
    assert not [n for n in model.model.state_dict() if "auxin" in n]
    assert np.isfinite(forecast(model)).all()


# what the library builds it from, where one stack is doubled
SAID = {
    "NBEATSModel": lambda p: {"num_stacks": 3, "layer_widths": [16] * 3},
    "NHiTSModel": lambda p: {
        "num_stacks": 3,
        "layer_widths": [16] * 3,
        "pooling_kernel_sizes": (p["pooling_kernel_sizes"][0], *p["pooling_kernel_sizes"]),
        "n_freq_downsample": (p["n_freq_downsample"][0], *p["n_freq_downsample"]),
    },
}


@pytest.mark.parametrize("name", SAID)
def test_grown_between_two_fits_and_loaded_again(name, tmp_path):
    model = made(name, **BEATS)
    model.fit(series(), verbose=False)
    net = model.model
    before, probe = given(net, lambda: forecast(model))
    ax.grow(net, ax.Duplicate("stacks", order=[0, 0, 1]), probe=(probe[0],))
    assert np.array_equal(forecast(model), before)
    start = {n: p.detach().clone() for n, p in net.stacks[1].named_parameters()}
    model.fit(series(), epochs=2, verbose=False)
    assert model.model is net and len(net.stacks) == 3
    assert not [n for n, p in net.stacks[1].named_parameters() if torch.equal(p, start[n])]
    after = forecast(model)

    model.save(str(tmp_path / "as it is.pt"))
    with pytest.raises(RuntimeError, match="Unexpected key"):  # said, not silently another network
        type(model).load(str(tmp_path / "as it is.pt"))
    net.hparams.update(SAID[name](net.hparams))
    model.save(str(tmp_path / "said.pt"))
    loaded = type(model).load(str(tmp_path / "said.pt"))
    assert len(loaded.model.stacks) == 3 and np.array_equal(forecast(loaded), after)


# model: options, what gets wider and by how many, what the library builds it from then (None: nothing can say it)
WIDER = {
    "NHiTSModel": (
        BEATS, [(f"stacks.*.blocks.*.layers.{i}", 8) for i in (0, 3)], {"layer_widths": [24, 24]},
    ),
    "TransformerModel": (
        HEADS, [(f"transformer.{part}.layers.*.linear1", 8) for part in ("encoder", "decoder")],
        {"dim_feedforward": 24},
    ),
    "BlockRNNModel": (dict(model="LSTM", hidden_dim=8), [("rnn", 8)], {"hidden_dim": 16}),
    "TCNModel": (dict(num_filters=4, num_layers=3, kernel_size=3, dropout=0.0), [("res_blocks.1.conv1", 4)], None),
    "TiDEModel": (DENSE | {"dropout": 0.0}, [("temporal_decoder.dense.0", 8)], {"temporal_decoder_hidden": 16}),
    "TFTModel": (
        dict(hidden_size=8, add_relative_index=True, dropout=0.0, likelihood=None, loss_fn=torch.nn.MSELoss()),
        [("feed_forward_block.fc1", 4)], None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WIDER)
def test_widened_between_two_fits_and_loaded_again(name, tmp_path):
    """By auxin in any case; by the library where its own words can say the new widths, and else it refuses the file."""
    options, edits, said = WIDER[name]
    model = made(name, **options)
    model.fit(series(), verbose=False)
    net = model.model
    before, probe = given(net, lambda: forecast(model))
    grower = ax.Grower(
        net, torch.optim.Adam(net.parameters()), edits=lambda model: [], when=ax.when.every(10**9), probe=(probe[0],)
    )
    shapes = {p.shape for p in net.parameters()}
    for at, by in edits:
        grower.grow(ax.Widen(at, by=by))
    assert np.allclose(forecast(model), before, rtol=0, atol=1e-5)
    grown = [p for p in net.parameters() if p.requires_grad and p.shape not in shapes]
    start = [p.detach().clone() for p in grown]
    model.fit(series(), epochs=6, verbose=False)  # at least 20 steps
    assert model.model is net and grown
    assert not any(torch.equal(a, b) for a, b in zip(start, grown, strict=True))
    after = forecast(model)

    ax.save(grower, tmp_path / "run")
    again = made(name, **options)
    again.fit(series(), verbose=False)
    fresh = again.model
    other = ax.Grower(
        fresh,
        torch.optim.Adam(fresh.parameters()),
        edits=lambda model: [],
        when=ax.when.every(10**9),
        probe=(probe[0],),
    )
    ax.load(tmp_path / "run", other)
    assert np.array_equal(forecast(again), after)

    model.save(str(tmp_path / "as it is.pt"))
    with pytest.raises(RuntimeError, match="size mismatch"):
        type(model).load(str(tmp_path / "as it is.pt"))
    if said is not None:
        net.hparams.update(said)
        model.save(str(tmp_path / "said.pt"))
        assert np.array_equal(forecast(type(model).load(str(tmp_path / "said.pt"))), after)


def test_by_hand_a_block_in_the_module_list_alone_never_runs():
    import copy

    model = made("NBEATSModel", **BEATS)
    model.fit(series(), verbose=False)
    before = forecast(model)
    model.model.stacks[0].blocks.append(copy.deepcopy(model.model.stacks[0].blocks[0]))
    assert np.array_equal(forecast(model), before)
