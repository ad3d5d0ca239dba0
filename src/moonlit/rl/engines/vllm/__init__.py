"""vLLM servers as an engine: they sample, and take their weights from the trainer."""
