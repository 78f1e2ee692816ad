"""Who takes part in an open step beside the buckets: each has something to put back (``open_step.Part``)."""
