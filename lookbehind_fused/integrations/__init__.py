"""What trainers need so that a step takes all of its gradients: a module for each, which imports the trainer."""
