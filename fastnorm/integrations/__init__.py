"""fastnorm inside the libraries that people already train with.

Each module here needs its library, which fastnorm itself does not depend on: import the one you use.

- `fastnorm.integrations.torch`: optimizers, batch norm and cross-entropy for PyTorch on the CPU.
- `fastnorm.integrations.sklearn`: scikit-learn's MLPClassifier and MLPRegressor, trained on these kernels.
- `fastnorm.integrations.autograd`: functions that HIPS autograd differentiates.
- `fastnorm.integrations.thinc`: optimizers for thinc and spaCy, found by name in their configurations.
"""
