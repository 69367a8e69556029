"""The networks, and the public model `DCVAE`."""
