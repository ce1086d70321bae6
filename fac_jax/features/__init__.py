"""What SAE features mean: explanations, relevance to a task, and the tasks themselves (as data)."""
