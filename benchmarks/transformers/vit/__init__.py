"""The paper's vision transformer in small: pre-trained on some classes, fine-tuned on others with SGD."""
