"""Time to first token of ASTRA and its rivals, by model, ranks, tokens and link."""
