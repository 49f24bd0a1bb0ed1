"""A byte-level language model: text, training, checkpoints, generation and resumable sessions."""
