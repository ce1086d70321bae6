"""What a run found, for people: one HTML page that opens from disk, and its twin for the terminal."""
