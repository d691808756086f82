"""Pretrained encoders of images."""
