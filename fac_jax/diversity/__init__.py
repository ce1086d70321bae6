"""How diverse a data set is by the metrics that others report: of words, of syntax, of sentence embeddings."""
