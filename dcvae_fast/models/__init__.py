"""The networks, and `DCVAE`, what users hold."""
