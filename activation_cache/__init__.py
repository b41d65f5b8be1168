"""Text to activation store: tokens, the Gemma forward with taps, harvest, order and reader."""
