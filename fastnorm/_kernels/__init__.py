"""Compiled kernels: one folder a level once built. Nothing outside the thin layer imports from here."""
