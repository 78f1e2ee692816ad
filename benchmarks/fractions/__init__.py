"""The gain at nearly SGD's cost: ascents by a part of the minibatch, beside other ways to save gradients."""
