"""The paper's translation experiment in small: an encoder-decoder over Adam, minibatches switched inside the step."""
