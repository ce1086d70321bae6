"""Missing features to new samples: contrastive pairs (step 1), samples that cover (step 2), what counts as a sample."""
