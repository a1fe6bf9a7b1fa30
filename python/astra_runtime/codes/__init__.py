"""What bits mean, on both sides: codebooks, and the spaces that turn tokens into codes and back."""
