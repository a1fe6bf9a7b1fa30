"""Launches the attention kernel: tiles, shares, strides."""
