"""The language model whose residual stream is read: its settings, forward pass, weights, decoding and export."""
