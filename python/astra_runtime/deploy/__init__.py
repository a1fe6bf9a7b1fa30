"""A leader and its workers, and what to expect of devices before they are used."""
