"""Ways to carry Flower messages."""
