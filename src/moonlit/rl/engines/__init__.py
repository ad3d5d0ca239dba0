"""What turns token ids and media into sampled token ids and their log-probabilities."""
