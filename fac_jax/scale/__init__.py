"""Throughput, measured side by side."""
