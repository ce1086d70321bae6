"""The tied Top-K sparse autoencoder: its forward pass, exact top-k, training, validation figures and files."""
