"""Lifelong learning: what SGD, SAM and Lookbehind forget of tasks that are over, with and without a memory."""
