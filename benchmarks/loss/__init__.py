"""What the squared error hides: where an SAE's error costs loss, and training that weighs it so."""
