"""Everything a run is made from: a file for each part of the pipeline, and the YAML that holds them all (file.py)."""
