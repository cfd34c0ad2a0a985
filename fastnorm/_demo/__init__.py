"""The demonstration behind `python -m fastnorm train`: data, training loop, display."""
