"""Parameter shapes of two networks that people train, written out, so that optimizers meet real lists."""

from __future__ import annotations

Shape = tuple[int, ...]


def _bottleneck(inputs: int, width: int, *, downsample: bool) -> list[Shape]:
    """One residual block: 1x1, 3x3, 1x1 convolutions, each with the scale and shift of its batch norm."""
    shapes: list[Shape] = []
    for kernel in ((width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)):
        shapes += [kernel, kernel[:1], kernel[:1]]
    if downsample:
        shapes += [(4 * width, inputs, 1, 1), (4 * width,), (4 * width,)]
    return shapes


def resnet50() -> list[Shape]:
    """ResNet-50 for 1,000 classes (He et al. 2016, table 1): 161 arrays, 25,557,032 parameters.

    Examples
    --------
    >>> import math
    >>> len(resnet50()), sum(map(math.prod, resnet50()))
    (161, 25557032)
    """
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += _bottleneck(inputs, width, downsample=block == 0)
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def gpt2_small() -> list[Shape]:
    """GPT-2 small, output tied to the token embedding (Radford et al. 2019): 148 arrays, 124,439,808 parameters.

    Examples
    --------
    >>> import math
    >>> len(gpt2_small()), sum(map(math.prod, gpt2_small()))
    (148, 124439808)
    """
    width = 768
    block: list[Shape] = [
        (width,), (width,),                          # layer norm
        (width, 3 * width), (3 * width,),            # queries, keys, values
        (width, width), (width,),                    # attention's projection
        (width,), (width,),                          # layer norm
        (width, 4 * width), (4 * width,),            # feed-forward, up
        (4 * width, width), (width,),                # feed-forward, down
    ]
    return [(50257, width), (1024, width), *(12 * block), (width,), (width,)]
