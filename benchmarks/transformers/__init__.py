"""The paper's experiments on transformers, in small: `translation` and `vit`, and what these two share."""
