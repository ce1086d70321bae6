"""Does coverage help? Ways to add samples to a seed set, by what a model trained on them does on held-out text."""
