"""What codes cost in accuracy, on pretrained models: SmolLM2 and MiniLM."""
