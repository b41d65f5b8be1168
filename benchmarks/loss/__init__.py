"""Losses: where an SAE's error costs the model loss, and other losses beside the squared error."""
