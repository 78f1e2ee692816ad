"""What only a GPU can show, in the ten minutes that somebody may have one: ``python -m tests.gpu``, `make gpu-check`.

Nothing is needed but the Python that runs it, with a PyTorch for the GPU.
"""
