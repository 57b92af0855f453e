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

    def read(self, given: Tensor) -> Tensor:
        """What the layer multiplies its weights with: (samples, places of the output, features)."""
        if not self.kernel:
            rows = given.reshape(len(given), -1, self.channels)
        else:
            rows = self._patches(given)
        return F.pad(rows, (0, 1), value=1.0) if self.bias else rows

    def made(self, output: Tensor) -> Tensor:
        """What the layer makes, in the same order: (samples, places of the output, outputs)."""
        return (output if not self.kernel else output.movedim(1, -1)).reshape(len(output), -1, self.outputs)

    def brought_back(self, made: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """What belongs to each place of the input, for each place of the kernel that looks at it.

        Args:
            made: of shape (samples, channels, spatial axes of the output).
            sizes: of the spatial axes of the input.

        Returns:
            (samples, places of the input, places of the kernel, channels); zero where that place of the kernel never
            stands there.
        """
        spans = [size + sum(pad) for size, pad in zip(sizes, self.padding, strict=True)]
        found = []
        for offset in torch.cartesian_prod(*map(torch.arange, self.kernel)).reshape(self.places, -1).tolist():
            wide = made.new_zeros(*made.shape[:2], *spans)
            inside = wide
            for axis, (at, length) in enumerate(zip(offset, made.shape[2:], strict=True), start=2):
                stride, begin = self.stride[axis - 2], at * self.dilation[axis - 2]
                inside = inside.narrow(axis, begin, stride * (length - 1) + 1)
                inside = inside[(slice(None),) * axis + (slice(None, None, stride),)]
            inside.copy_(made)
            for axis, (size, (before, _)) in enumerate(zip(sizes, self.padding, strict=True), start=2):
                wide = wide.narrow(axis, before, size)
            found.append(wide.movedim(1, -1).reshape(len(made), -1, made.shape[1]))
        return torch.stack(found, dim=2)

    def _patches(self, given: Tensor) -> Tensor:
        """(samples, places of the output, channels x places of the kernel), as the weight is laid out."""
        if any(pad for pair in self.padding for pad in pair):
            last_first = [pad for pair in reversed(self.padding) for pad in pair]
            mode = "constant" if self.mode == "zeros" else self.mode
            given = F.pad(given, last_first, mode=mode)
        count = len(self.kernel)
        for axis in range(count):
            size, dilation = self.kernel[axis], self.dilation[axis]
            given = given.unfold(axis + 2, dilation * (size - 1) + 1, self.stride[axis])[..., ::dilation]
        spatial, kernel = list(range(2, 2 + count)), list(range(2 + count, 2 + 2 * count))
        return given.permute(0, *spatial, 1, *kernel).reshape(len(given), -1, self.channels * self.places)
