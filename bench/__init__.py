"""Measurements beside their ideals and peers; results under `bench/results/<device>/`."""
