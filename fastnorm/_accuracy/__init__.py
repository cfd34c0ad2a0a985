"""What `python -m fastnorm accuracy` is made of: cases, exact references, PyTorch's calls, measurement, tables."""
