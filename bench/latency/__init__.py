"""Time to first token of ASTRA and its baselines, by model, ranks, tokens and link."""
