"""The measurements behind `python -m fastnorm bench` and `bench/`, one subject a file: `command` runs them."""
