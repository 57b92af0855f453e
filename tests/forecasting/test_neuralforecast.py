"""Models of NeuralForecast as they are: grown while they train and between two fits, saved and loaded again.

Run by `make forecasting`, which installs the library into an environment of its own.
"""

import numpy as np
import pytest
import torch
from libraries import AHEAD, PAST, QUIET, given, grow_while_fitting, hush, values

import auxin as ax

pd = pytest.importorskip("pandas")
nf = pytest.importorskip("neuralforecast")
hush()
torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")
MLP = dict(mlp_units=3 * [[16, 16]])
SMALL = dict(hidden_size=8, n_head=2, encoder_layers=2, decoder_layers=1, conv_hidden_size=8)
SERIES = dict(n_series=1, hidden_size=8, e_layers=2, d_ff=8)
DENSE = dict(hidden_size=16, decoder_output_dim=4, temporal_decoder_dim=16, num_encoder_layers=2, num_decoder_layers=2)

ZERO, FADES = "last writers zero", "fade-in"
# model: options, list, how it grows, or why it does not
MODELS = {
    "NBEATS": (MLP, "blocks", ZERO),
    "NBEATSx": (MLP, "blocks", ZERO),
    "NHITS": (MLP, "blocks", ZERO),
    "TSMixer": (dict(n_series=1, n_block=2, ff_dim=8), "mixing_layers", FADES),
    "PatchTST": (
        dict(hidden_size=8, n_heads=2, encoder_layers=2, linear_hidden_size=16, patch_len=4, stride=2),
        "model.backbone.encoder.layers", FADES,
    ),
    "iTransformer": (dict(SERIES, n_heads=2), "encoder.attn_layers", FADES),
    "VanillaTransformer": (SMALL, "encoder.attn_layers", FADES),
    "Informer": (SMALL, "decoder.layers", FADES),
    "Autoformer": (SMALL, "encoder.attn_layers", FADES),
    "FEDformer": (dict(SMALL, n_head=8, modes=4), "encoder.attn_layers", FADES),
    "SOFTS": (dict(SERIES, d_core=8), "encoder.attn_layers", FADES),
    "TimeXer": (dict(SERIES, n_heads=2, patch_len=4), "encoder.layers", FADES),
    "TCN": (dict(encoder_hidden_size=8, decoder_hidden_size=8), "hist_encoder.tcn", FADES),
    "TFT": (
        dict(hidden_size=8, n_head=2), "temporal_encoder.history_vsn.var_grns",
        r"var_grns\.\d: the grown network does not run on the probe",
    ),
    "KAN": (dict(hidden_size=8, n_hidden_layers=2), "layers", "no tensors of a KANLinear can be zeroed"),
    "TimesNet": (
        dict(hidden_size=8, conv_hidden_size=8, encoder_layers=2, top_k=2), "model", "the outputs changed by",
    ),
    "StemGNN": (
        dict(n_series=1, n_stacks=2, multi_layer=1), "stock_block.0.GLUs", "GLUs.6: the network's forward never calls",
    ),
    "Informer, its first list": (
        SMALL, "encoder.attn_layers", r"attn_layers\.1: the network's forward called this layer before",
    ),
    "Autoformer, its second list": (SMALL, "decoder.layers", "the outputs changed by"),
    "TiDE": (DENSE | {"layernorm": False}, "dense_encoder", FADES),
    "MLP": (dict(hidden_size=8, num_layers=3), "mlp", FADES),
}  # fmt: skip
FEW = ("NBEATS", "NBEATSx", "NHITS")


def frame():
    y = values()
    return pd.DataFrame({"unique_id": "a", "ds": np.arange(len(y)), "y": y})


def fitted(name, steps, **options):
    cls = getattr(nf.models, name.split(",")[0])
    model = cls(h=AHEAD, input_size=PAST, max_steps=steps, **options, **QUIET)
    library = nf.NeuralForecast(models=[model], freq=1)
    library.fit(frame())
    return library


def forecast(library):
    return library.predict().iloc[:, -1].to_numpy()


@pytest.mark.parametrize("name", MODELS)
def test_grown_while_it_is_fitted_or_refused_by_name(name):
    options, at, outcome = MODELS[name]
    growing = grow_while_fitting(ax.Duplicate(at, by=1, fade=3))
    if outcome not in (ZERO, FADES):
        with pytest.raises(ax.GrowthError, match=outcome):
            fitted(name, 8, callbacks=[growing], **options)
        return
    library = fitted(name, 8, callbacks=[growing], **options)
    net = library.models[0]
    assert growing.change.how == outcome and growing.change.max_difference == 0
    assert not growing.unmoved, growing.unmoved
    assert not [n for n in net.state_dict() if "auxin" in n]
    assert np.isfinite(forecast(library)).all()


@pytest.mark.parametrize("name", FEW)
def test_grown_between_two_fits_and_loaded_again(name, tmp_path):
    library = fitted(name, 3, **MLP)
    net = library.models[0]
    before, probe = given(net, lambda: forecast(library))
    ax.grow(net, ax.Duplicate("blocks", order=[0, 0, 1, 2]), probe=probe)
    assert np.array_equal(forecast(library), before)
    start = [p.detach().clone() for p in net.blocks[1].parameters() if p.requires_grad]
    library.fit(frame())
    assert library.models[0] is net and len(net.blocks) == 4
    now = [p for p in net.blocks[1].parameters() if p.requires_grad]
    assert not any(torch.equal(a, b) for a, b in zip(start, now, strict=True))
    after = forecast(library)

    library.save(str(tmp_path / "as it is"), overwrite=True, save_dataset=True)
    with pytest.raises(RuntimeError, match="size mismatch|Unexpected key"):  # said, not silently another network
        nf.NeuralForecast.load(str(tmp_path / "as it is"))
    net.hparams["n_blocks"] = [2, 1, 1]  # what the library builds it from
    library.save(str(tmp_path / "said"), overwrite=True, save_dataset=True)
    loaded = nf.NeuralForecast.load(str(tmp_path / "said"))
    assert len(loaded.models[0].blocks) == 4 and np.array_equal(forecast(loaded), after)


# model: options, what gets wider and by how many, what the library builds it from then (None: nothing can say it)
WIDER = {
    "NHITS": (
        MLP, [(f"blocks.*.layers.{i}", 8) for i in (0, 1, 3, 5)], {"mlp_units": 3 * [[24, 24]]},
    ),
    "NBEATS": (MLP, [("blocks.1.layers.0", 8)], None),
    "MLP": (dict(hidden_size=8, num_layers=2), [("mlp.*", 8)], {"hidden_size": 16}),
    "PatchTST": (
        dict(hidden_size=8, n_heads=2, encoder_layers=2, linear_hidden_size=16, patch_len=4, stride=2),
        [("model.backbone.encoder.layers.*.ff.0", 8)], {"linear_hidden_size": 24},
    ),
    "TFT": (dict(hidden_size=8, n_head=2), [("temporal_fusion_decoder.positionwise_grn.lin_a", 4)], None),
}  # fmt: skip


@pytest.mark.parametrize("name", WIDER)
def test_widened_between_two_fits_and_loaded_again(name, tmp_path):
    """By auxin in any case; by the library where its own words can say the new widths, and else it refuses the file."""
    options, edits, said = WIDER[name]
    library = fitted(name, 3, **options)
    net = library.models[0]
    before, probe = given(net, lambda: forecast(library))
    grower = ax.Grower(
        net, torch.optim.Adam(net.parameters()), edits=lambda model: [], when=ax.when.every(10**9), probe=probe
    )
    shapes = {p.shape for p in net.parameters()}
    for at, by in edits:
        grower.grow(ax.Widen(at, by=by))
    assert np.allclose(forecast(library), before, rtol=0, atol=1e-6)
    net.max_steps = net.trainer_kwargs["max_steps"] = 20
    grown = [p for p in net.parameters() if p.requires_grad and p.shape not in shapes]
    start = [p.detach().clone() for p in grown]
    library.fit(frame())
    assert library.models[0] is net and grown
    assert not any(torch.equal(a, b) for a, b in zip(start, grown, strict=True))
    after = forecast(library)

    ax.save(grower, tmp_path / "run")
    again = fitted(name, 1, **options)
    fresh = again.models[0]
    other = ax.Grower(
        fresh, torch.optim.Adam(fresh.parameters()), edits=lambda model: [], when=ax.when.every(10**9), probe=probe
    )
    ax.load(tmp_path / "run", other)
    assert np.array_equal(forecast(again), after)

    library.save(str(tmp_path / "as it is"), overwrite=True, save_dataset=True)
    with pytest.raises(RuntimeError, match="size mismatch"):
        nf.NeuralForecast.load(str(tmp_path / "as it is"))
    if said is not None:
        net.hparams.update(said)
        library.save(str(tmp_path / "said"), overwrite=True, save_dataset=True)
        assert np.array_equal(forecast(nf.NeuralForecast.load(str(tmp_path / "said"))), after)


def test_widths_that_the_forward_takes_from_another_tensor_are_refused():
    """Without static inputs TFT makes zeros as long as another tensor is; the layer that reads them does not follow."""
    library = fitted("TFT", 3, hidden_size=8, n_head=2)
    net = library.models[0]
    _, probe = given(net, lambda: forecast(library))
    with pytest.raises(ax.GrowthError, match=r"would not run on the probe: .*tft.py:\d+"):
        ax.grow(net, ax.Widen("embedding", by=8), probe=probe)


def test_by_hand_a_copied_block_changes_the_forecast():
    import copy

    library = fitted("NBEATS", 3, **MLP)
    net, before = library.models[0], forecast(library)
    net.blocks.append(copy.deepcopy(net.blocks[2]))
    assert np.abs(forecast(library) - before).max() > 1e-3
