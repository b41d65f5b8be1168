"""What training through the language model does to delta loss."""
