"""The sparse autoencoder: its kinds, exact top-k, training, validation figures, files, and its effect on the model."""
