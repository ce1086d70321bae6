"""Who writes, explains and judges: one protocol, an OpenAI-compatible server, the backbone itself, and a double."""
