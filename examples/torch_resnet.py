"""Train a small ResNet twice, with PyTorch alone and with fastnorm inside: same losses, both times.

    python examples/torch_resnet.py                 # Fashion-MNIST (Debian: dataset-fashion-mnist) or the digits
    python examples/torch_resnet.py --steps 5       # a quick look

What changes is three lines: `accelerate`, `cross_entropy`, the optimizer. float64 shows that the computation is the
same; in float32 training amplifies roundings, as it does between two builds of PyTorch.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fastnorm._demo.data import Data, load_digits, load_idx
from fastnorm.integrations import torch as fast

FASHION_MNIST, DIGITS = Path("/usr/share/datasets/fashion-mnist"), "digits"
SEED, WARM_UP = 0, 2  # steps that no time is taken of


class Block(nn.Module):
    """Two convolutions beside a shortcut (He et al., "Deep residual learning for image recognition", figure 2)."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, out_channels, 3, stride, 1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False), nn.BatchNorm2d(out_channels))
        self.shortcut = nn.Identity() if stride == 1 else nn.Sequential(
            nn.Conv2d(channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add what the body changes to the shortcut."""
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet(classes: int, width: int) -> nn.Module:
    """Three stages of one block each, at full, half and quarter resolution."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes))


def train(data: Data, use_fastnorm: bool, steps: int, batch: int, width: int,
          dtype: torch.dtype) -> tuple[list[float], float]:
    """Train from the same seed; return the loss of each step and the milliseconds a step."""
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    model = resnet(data.classes, width).to(dtype, memory_format=torch.channels_last)
    if use_fastnorm:
        fast.accelerate(model)
    cross_entropy = fast.cross_entropy if use_fastnorm else nn.functional.cross_entropy
    optimizer = (fast.AdamW if use_fastnorm else torch.optim.AdamW)(model.parameters(), lr=2e-3)
    losses, times = [], []
    for _ in range(steps):
        rows = rng.choice(len(data.train), batch, replace=False)
        images = torch.from_numpy(data.train.images[rows]).to(dtype).reshape(batch, 1, *data.image_shape)
        labels = torch.from_numpy(data.train.labels[rows])
        began = time.perf_counter()
        optimizer.zero_grad()
        loss = cross_entropy(model(images.contiguous(memory_format=torch.channels_last)), labels)
        loss.backward()
        optimizer.step()
        times.append(time.perf_counter() - began)
        losses.append(loss.item())
    return losses, 1e3 * float(np.median(times[min(WARM_UP, steps - 1):]))


def main() -> None:
    """Train both ways and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(FASHION_MNIST) if FASHION_MNIST.is_dir() else DIGITS,
                        help=f"folder of IDX files, or {DIGITS!r} (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--width", type=int, default=16, help="channels of the first stage")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    options = parser.parse_args()
    data = load_digits() if options.data == DIGITS else load_idx(Path(options.data))
    print(f"{data.name}: {len(data.train)} images of {data.image_shape[0]} x {data.image_shape[1]}, "
          f"{options.steps} steps of {options.batch}, {options.dtype}")
    results = [train(data, use_fastnorm, options.steps, options.batch, options.width, getattr(torch, options.dtype))
               for use_fastnorm in (False, True)]
    for name, (losses, milliseconds) in zip(("PyTorch", "with fastnorm"), results, strict=True):
        print(f"{name:14s} loss {losses[0]:.6f} -> {losses[-1]:.6f}   {milliseconds:7.2f} ms a step")
    (before, slow), (after, quick) = results
    apart = max(abs(a - b) / abs(b) for a, b in zip(after, before, strict=True))
    print(f"losses differ by {apart:.1e} at most, relatively; {slow / quick:.2f} times as fast")


if __name__ == "__main__":
    main()
