"""A small GPT-2, trained here and adapted to its codes: accuracy against bits."""
