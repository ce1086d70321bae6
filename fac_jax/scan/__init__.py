"""One pass of backbone and SAE over a corpus: per-feature statistics, top spans, per-sample peaks."""
