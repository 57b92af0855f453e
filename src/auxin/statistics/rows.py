"""Inputs and outputs of linear layers and convolutions as rows of a matrix, one for each place that is computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Geometry:
    """How a layer walks over its input; a Linear is a convolution with a kernel of one place.

    Attributes:
        channels: that it reads.
        outputs: channels that it makes.
        bias: whether its rows end with a one.
        kernel, stride, dilation: one number for each spatial axis; none for a Linear.
        padding: (before, after) for each spatial axis.
        mode: how the border is filled, in torch's words.
    """

    channels: int
    outputs: int
    bias: bool
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    mode: str = "zeros"

    @classmethod
    def of(cls, layer: nn.Module) -> Geometry:
        """That of a Linear or a convolution."""
        bias = layer.bias is not None
        if isinstance(layer, nn.Linear):
            return cls(layer.in_features, layer.out_features, bias)
        assert isinstance(layer, CONVOLUTIONS)
        last_first = layer._reversed_padding_repeated_twice
        padding = tuple((last_first[i], last_first[i + 1]) for i in range(len(last_first) - 2, -1, -2))
        return cls(
            layer.in_channels,
            layer.out_channels,
            bias,
            layer.kernel_size,
            layer.stride,
            layer.dilation,
            padding,
            layer.padding_mode,
        )

    @property
    def places(self) -> int:
        """Places of the kernel; 1 for a Linear."""
        return int(torch.tensor(self.kernel).prod()) if self.kernel else 1

    @property
    def features(self) -> int:
        """Length of a row of what it reads, with the one for the bias."""
        return self.channels * self.places + self.bias

    @property
    def slides(self) -> bool:
        """Whether it is a convolution that goes on by one place at a time."""
        return bool(self.kernel) and {*self.stride, *self.dilation} == {1}

    def read(self, given: Tensor) -> Tensor:
        """What the layer multiplies its weights with: (samples, places of the output, features)."""
        patches = self._patches(given) if self.kernel else given.reshape(len(given), -1, self.channels)
        where = patches.shape[: len(self.kernel) + 1] if self.kernel else patches.shape[:-1]
        rows = given.new_empty(*where, self.features)
        rows[..., : self.channels * self.places].view(patches.shape).copy_(patches)
        if self.bias:
            rows[..., -1] = 1.0
        return rows.flatten(1, -2)

    def made(self, output: Tensor) -> Tensor:
        """What the layer makes, in the same order: (samples, places of the output, outputs)."""
        return (output if not self.kernel else output.movedim(1, -1)).reshape(len(output), -1, self.outputs)

    def brought_back(self, made: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """What belongs to each place of the input, for each place of the kernel that looks at it.

        Args:
            made: of shape (samples, spatial axes of the output, channels).
            sizes: of the spatial axes of the input.

        Returns:
            (samples, places of the input, places of the kernel, channels); zero where that place of the kernel never
            stands there.
        """
        found = made.new_zeros(len(made), *sizes, self.places, made.shape[-1])
        offsets = torch.cartesian_prod(*map(torch.arange, self.kernel)).reshape(self.places, -1).tolist()
        for number, offset in enumerate(offsets):
            here, there = found.select(-2, number), made
            for axis, (at, size, (before, _)) in enumerate(zip(offset, sizes, self.padding, strict=True), start=1):
                stride = self.stride[axis - 1]
                shift = at * self.dilation[axis - 1] - before  # output v stands at the input v stride + shift
                first = min(max(0, -(shift // stride)), made.shape[axis])
                last = min(made.shape[axis] - 1, (size - 1 - shift) // stride)
                there = there.narrow(axis, first, max(0, last - first + 1))
                whole = (slice(None),) * axis
                here = here[(*whole, slice(first * stride + shift, max(0, last * stride + shift + 1), stride))]
            here.copy_(there)
        return found.flatten(1, -3)

    def padded(self, given: Tensor) -> Tensor:
        """What it reads with its border filled."""
        if not any(pad for pair in self.padding for pad in pair):
            return given
        last_first = [pad for pair in reversed(self.padding) for pad in pair]
        return F.pad(given, last_first, mode="constant" if self.mode == "zeros" else self.mode)

    def _patches(self, given: Tensor) -> Tensor:
        """A view (samples, axes of the output, channels, axes of the kernel), as the weight is laid out."""
        given = self.padded(given)
        count = len(self.kernel)
        for axis in range(count):
            size, dilation = self.kernel[axis], self.dilation[axis]
            given = given.unfold(axis + 2, dilation * (size - 1) + 1, self.stride[axis])[..., ::dilation]
        spatial, kernel = list(range(2, 2 + count)), list(range(2 + count, 2 + 2 * count))
        return given.permute(0, *spatial, 1, *kernel)
