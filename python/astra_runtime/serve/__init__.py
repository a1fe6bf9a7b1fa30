"""A service of one's own, and `astra serve`: requests in, tokens out, one mesh behind it."""
