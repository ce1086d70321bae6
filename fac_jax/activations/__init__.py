"""Residuals of a backbone over a corpus: harvested (harvest), kept (store), and streamed to training (stream)."""
