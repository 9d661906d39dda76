"""Where private histories live: pools and local training."""
