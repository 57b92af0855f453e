"""Real models of timm, segmentation-models-pytorch and monai get wider where they were built, train, and load again."""

import copy
import importlib

import pytest
import torch
from models import has_timm, timm
from torch.nn import functional

import auxin as ax

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not has_timm(), reason="timm is not installed; `make zoo` brings it"),
]
NEVER = dict(edits=lambda model: [], when=ax.when.every(10**9))
IMAGE, SLICE = (2, 3, 64, 64), (2, 1, 32, 32)


def resnet():
    return timm().create_model("resnet18", num_classes=10), IMAGE


def convnext():
    return timm().create_model("convnext_atto", num_classes=10), IMAGE


def unet():
    smp = pytest.importorskip("segmentation_models_pytorch")
    return smp.Unet("resnet18", encoder_weights=None, classes=2), IMAGE


def monai_net(name, **options):
    pytest.importorskip("monai")
    return getattr(importlib.import_module("monai.networks.nets"), name)(
        spatial_dims=2, in_channels=1, out_channels=2, **options
    )


def monai_unet():
    return monai_net("UNet", channels=(8, 16, 32), strides=(2, 2), num_res_units=2, norm="batch"), SLICE


def segresnet():
    return monai_net("SegResNet", init_filters=8), SLICE


# model: the edits that make it wider, a shape that must have grown
CASES = {
    "resnet": (resnet, [("layer1.0.conv1", 16), ("conv1", 8)], ("layer1.0.conv1.weight", (80, 72, 3, 3))),
    "convnext": (convnext, [("stages.0.blocks.*.mlp.fc1", 32)], ("stages.0.blocks.1.mlp.fc2.weight", (40, 192, 1, 1))),
    "unet": (
        unet,
        [("encoder.layer1.0.conv1", 16), ("decoder.blocks.0.conv1.0", 32), ("encoder.conv1", 8)],
        ("decoder.blocks.0.conv2.0.weight", (256, 288, 3, 3)),
    ),
    "monai_unet": (
        monai_unet,
        [("model.0.conv.unit0.conv", 4), ("model.1.submodule.0.conv.unit1.conv", 8)],
        ("model.0.conv.unit1.conv.weight", (8, 12, 3, 3)),
    ),
    "segresnet": (
        segresnet, [("convInit.conv", 4), ("down_layers.1.0.conv", 2)], ("convInit.conv.weight", (12, 1, 3, 3)),
    ),
}  # fmt: skip


def built(name):
    torch.manual_seed(0)
    model, shape = CASES[name][0]()
    return model, torch.randn(shape, generator=torch.Generator().manual_seed(1))


def trained(model, optimizer, x, steps):
    losses = []
    model.train()
    for _ in range(steps):
        out = model(x)
        loss = functional.mse_loss(out, torch.ones_like(out))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def outputs(model, x):
    with torch.no_grad():
        return model.eval()(x)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("steps", [0, 3])
def test_widened_trained_saved_and_loaded(name, steps, tmp_path):
    model, x = built(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trained(model, optimizer, x, steps)
    grower = ax.Grower(model, optimizer, **NEVER, probe=x)
    edits, (tensor, shape) = CASES[name][1:]
    before = outputs(model, x)
    for at, by in edits:
        change = grower.grow(ax.Widen(at, by=by))
        assert change.preserves
    assert tuple(model.state_dict()[tensor].shape) == shape
    assert torch.allclose(outputs(model, x), before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))

    start = copy.deepcopy(model.state_dict())
    losses = trained(model, optimizer, x, 20)
    assert losses[-1] < losses[0] and all(loss == loss for loss in losses)
    now = model.state_dict()
    still = [n for n, p in model.named_parameters() if p.requires_grad and torch.equal(now[n], start[n])]
    assert still == []

    ax.save(grower, tmp_path / "run")
    again, _ = built(name)
    fresh = ax.Grower(again, torch.optim.AdamW(again.parameters(), lr=1e-3), **NEVER, probe=x)
    ax.load(tmp_path / "run", fresh)
    assert torch.equal(outputs(again, x), outputs(model, x))


def test_entries_behind_a_gain_of_zero_learn_once_it_has_moved():
    """The last norm of every block of a fresh ResNet has a gain of 0, as timm builds it."""
    model, x = built("resnet")
    assert not model.layer1[0].bn2.weight.any()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    change = ax.grow(model, ax.Widen("layer1.0.conv1", by=16), optimizer, probe=x)
    assert any("no gradient yet at the new entries" in note for note in change.notes)
    readers = []
    for _ in range(3):
        trained(model, optimizer, x, 1)
        readers.append(bool(model.layer1[0].conv2.weight[:, 64:].any()))
    assert readers == [False, True, True]


@pytest.mark.parametrize(
    ("name", "options", "by"),
    [
        ("vit_tiny_patch16_224", dict(init_values=0.1, img_size=32), 4),
        ("cait_xxs24_224", dict(img_size=32), 48),
        ("beit_base_patch16_224", dict(embed_dim=48, num_heads=4, img_size=32), 12),
        ("vit_small_patch14_dinov2", dict(embed_dim=48, num_heads=4, img_size=28), 4),
        ("eva02_tiny_patch14_224", dict(img_size=28), 64),
    ],
)
def test_streams_under_trained_gains(name, options, by):
    """LayerScale gains as far apart as training makes them; where heads are as wide as the stream, a head more."""
    torch.manual_seed(0)
    model = timm().create_model(name, num_classes=10, depth=2, **options).eval().double()
    with torch.no_grad():
        for path, p in model.named_parameters():
            p.copy_(torch.randn_like(p) if "gamma" in path else p + 0.02 * torch.randn_like(p))
    x = torch.randn(2, 3, options["img_size"], options["img_size"], dtype=torch.float64)
    before = outputs(model, x)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    assert ax.grow(model, ax.Widen("patch_embed.proj", by=by), optimizer, probe=x).preserves
    assert float((outputs(model, x) - before).norm() / before.norm()) < 1e-13


def test_a_stream_whose_new_channels_cannot_be_the_mean_of_the_others_is_refused():
    """A depthwise convolution gives no mean of what it gives for others, which the norm behind it would need."""
    model, x = built("convnext")
    with torch.no_grad():
        for block in model.stages[0].blocks:
            block.gamma.fill_(1.0)  # as large as training makes it: at 1e-6 nothing of this is seen
    with pytest.raises(ax.GrowthError, match=r"stages\.0\.blocks\.0\.conv_dw convolves each entry by itself"):
        ax.grow(model, ax.Widen("stem.0", by=8), probe=x)


def test_the_size_of_a_head_that_is_the_stream_s_is_refused_with_its_line():
    """Queries of a SegFormer have the width of the stream, by a reshape; in its first stage that is one head."""
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = smp.Unet("mit_b0", encoder_weights=None, classes=2)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ax.GrowthError, match=r"takes a norm over it \(\S+mix_transformer.py:\d+\)"):
        ax.grow(model, ax.Widen("encoder.block1.0.attn.q", by=8), probe=torch.randn(IMAGE))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
