"""What travels between server and nodes."""
