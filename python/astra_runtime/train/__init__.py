"""What makes codebooks: calibration, k-means, training. Nothing of it runs in a call."""
