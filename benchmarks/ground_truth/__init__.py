"""SAEs on synthetic activations whose features are known."""
