"""Find which features of a language model a data set does not exercise, and make the samples that do."""

__version__ = "0.1.0"
