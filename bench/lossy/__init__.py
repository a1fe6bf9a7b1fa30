"""Links that lose packets, and frames that miss their deadline."""
