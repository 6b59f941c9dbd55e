"""What the notebooks share: where am I, weights, data, memory, device map, training, inference, pictures."""
