"""What bits mean, on both sides: codebooks, and the codecs that turn tokens into codes and back."""
