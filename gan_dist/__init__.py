"""Distributed GAN training with TensorFlow; see README.md. Importing the package imports nothing else."""
