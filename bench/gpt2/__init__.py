"""A small GPT-2, trained here and adapted to its codes: accuracy against bits."""

KINDS = ("prose", "revised")  # of text, see `model`
