"""fastnorm under PyTorch on the CPU: the same classes and functions as PyTorch's own, over the tensors' own memory.

- `SGD`, `RMSprop`, `Adam`, `AdamW`, `Adagrad` replace those of ``torch.optim``; state dicts go both ways.
- `batch_norm` and `cross_entropy` replace those of ``torch.nn.functional``; autograd and ``torch.compile`` know them.
- `accelerate` makes the batch norms of an existing model use them, `restore` takes that back.

Tensors are dense, in CPU memory, of float32 or float64; anything else is refused before something has changed.
"""

from ..._runtime import expect_pytorch
from .functional import batch_norm, cross_entropy
from .modules import accelerate, restore
from .optim import SGD, Adagrad, Adam, AdamW, RMSprop

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "RMSprop", "accelerate", "batch_norm", "cross_entropy", "restore"]

expect_pytorch()
