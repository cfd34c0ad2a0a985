"""The NumPy twin of fastnorm: same names, same signatures, same values, plain NumPy."""
