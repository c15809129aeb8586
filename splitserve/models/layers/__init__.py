"""What models are made of. A layer is built from its config and weights and is then called."""
