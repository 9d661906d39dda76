"""Releases in other shapes: files for devices, graphs for other runtimes."""
