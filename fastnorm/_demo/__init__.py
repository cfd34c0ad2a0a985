"""The demonstration behind `python -m fastnorm train`, one subject a file: `command` runs it from start to finish."""
