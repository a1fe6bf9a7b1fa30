"""Sessions: sequences that stay on all ranks, so that only their new tokens are computed."""
